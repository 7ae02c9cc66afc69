"""Start a server and its clients as NVFlare's proof of concept does, play the rounds, and stop them.

PYTHON job.py PROJECT_YML WIDTH CLIENTS ROUNDS MARKS
"""

import sys
import time

from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.recipe.poc_env import PocEnv
from server import MarkedFedAvg


def main(project: str, width: int, clients: int, rounds: int, marks: str) -> None:
    job = FedJob(name="noise", min_clients=clients)
    job.to_server(MarkedFedAvg(width, marks, clients, rounds))
    job.to_server("workload.py")
    job.to_clients(ScriptRunner("client.py", framework=FrameworkType.NUMPY))
    job.to_clients("workload.py")
    environment = PocEnv(num_clients=clients, project_conf_path=project)
    number = environment.deploy(job)
    while not str(environment.get_job_status(number)).startswith("FINISHED"):
        time.sleep(1)
    print(environment.get_job_status(number), flush=True)
    environment.stop(clean_up=False)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5])
