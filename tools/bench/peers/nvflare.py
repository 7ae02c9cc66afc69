"""NVFlare's proof of concept: a server and clients, provisioned on this machine, and the job in `nvflare_job`.

Provisioned with gRPC and without TLS, which all other contestants go without.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tools.bench.peers.rounds import Result, measured, run_logged
from tools.bench.peers.watch import Group

_JOB = Path(__file__).parent / "nvflare_job"
_WORKLOAD = Path(__file__).parents[1] / "transport/workload.py"

_PROJECT = """\
api_version: 3
name: noise
description: plaintext gRPC
connection_security: clear
participants:
- {name: server, org: here, type: server, default_host: localhost, fed_learn_port: 8002}
- {name: admin@nvidia.com, org: here, type: admin, role: project_admin}
%s
builders:
- path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  args: {template_file: [master_template.yml, aws_template.yml, azure_template.yml]}
- path: nvflare.lighter.impl.static_file.StaticFileBuilder
  args: {config_folder: config, scheme: grpc}
- path: nvflare.lighter.impl.cert.CertBuilder
- path: nvflare.lighter.impl.signature.SignatureBuilder
"""
_CLIENT = "- {name: site-%d, org: here, type: client}"


def run(python: Path, width: int, clients: int, rounds: int, folder: Path) -> Result:
    """`rounds` rounds, the first of which does not count."""
    job, marks, project = folder / "job", folder / "marks.txt", folder / "project.yml"
    shutil.copytree(_JOB, job)
    shutil.copy(_WORKLOAD, job)
    project.write_text(_PROJECT % "\n".join(_CLIENT % (number + 1) for number in range(clients)))
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "NVFLARE_POC_WORKSPACE": str(folder / "poc"),
        "HOME": str(folder),
    }
    command = [str(python), "job.py", str(project), str(width), str(clients), str(rounds), str(marks)]

    def play() -> None:
        run_logged(command, job, environment)

    server = Group(lambda command: f"{folder}/poc/noise/prod_00/server" in command)
    sites = Group(lambda command: f"{folder}/poc/noise/prod_00/site-" in command)
    return measured(play, marks, server, sites, clients)
