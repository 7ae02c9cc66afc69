"""Bytes and accuracy of federated algorithms on digits: a real aggregator and five real workers in one process.

    python -m tools.bench.algorithms              every algorithm, in three encodings
    python -m tools.bench.algorithms --rounds 3   a short look

What SCAFFOLD's control variates cost, in each encoding, beside FedAvg. Dirichlet 0.3, two local epochs, plain SGD.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import structlog

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.calls import connect
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2, round_pb2
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.task_loader import load_trainer

WORKERS = 5
ENCODINGS = ("raw", "int8+zstd", "entropy")
ALGORITHMS = ("fedavg", "fedprox:mu=0.1", "fednova", "feddyn:alpha=0.1", "scaffold", "ditto", "ifca")


async def played(folder: Path, algorithm: str, encoding: str, rounds: int) -> list[round_pb2.Round]:
    """Records of the rounds of one run."""
    settings = AggregatorSettings(
        folder / "aggregator",
        "127.0.0.1:0",
        rounds=rounds,
        policy=RoundPolicy(min_workers=WORKERS, min_sample_size=WORKERS, quorum=WORKERS, deadline_s=3600.0),
        plan=TrainingPlan(epochs=2.0, learning_rate=0.1, momentum=0.0, batch_size=32, algorithm=algorithm),
        # Models and updates the same way; a difference to what the device holds where it has a version.
        download_recipe="int8+zstd" if encoding == "entropy" else encoding,
        difference_recipe="entropy:c=1+zstd" if encoding == "entropy" else encoding,
        upload_recipe=encoding,
        stay=True,
        drain_s=1.0,
        durable=False,
    )
    aggregator, ready = Aggregator(settings), asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(aggregator.run(ready.set_result))
    address = f"127.0.0.1:{await ready}"
    workers = []
    for number in range(1, WORKERS + 1):
        trainer = load_trainer(
            "fedgrpc.tasks.digits", device="cpu", partition="dirichlet:0.3", part=f"{number}/{WORKERS}", threads=1
        )
        own = WorkerSettings(
            name=f"w{number}", aggregator=address, state_dir=folder / f"w{number}", serve_address=None
        )
        workers.append(asyncio.create_task(run_worker(own, trainer)))
    async with connect(address) as client:
        async for message in client.watch():
            if message.run.phase == aggregator_pb2.RUN_PHASE_FINISHED:
                break
        records = [await client.round(number) for number in range(1, rounds + 2)]
    await asyncio.gather(*workers)
    aggregator.stop()
    await serving
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    parser.add_argument("--encodings", nargs="+", default=ENCODINGS)
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    print("| algorithm | encoding | kB down a task | kB up a task | accuracy |\n| --- | --- | --- | --- | --- |")
    for algorithm in asked.algorithms:
        for encoding in asked.encodings:
            with tempfile.TemporaryDirectory(prefix="algorithms-") as folder:
                records = asyncio.run(played(Path(folder), algorithm, encoding, asked.rounds))
            # The first round downloads a whole model; what follows are differences.
            tasks = [task for record in records[1:] for task in record.tasks if task.upload_bytes]
            down = sum(task.download_bytes for task in tasks) / len(tasks) / 1000
            up = sum(task.upload_bytes for task in tasks) / len(tasks) / 1000
            accuracy = max((record.metrics.get("accuracy", 0.0) for record in records), default=0.0)
            print(f"| {algorithm} | {encoding} | {down:.2f} | {up:.2f} | {100 * accuracy:.1f} |", flush=True)


if __name__ == "__main__":
    main()
