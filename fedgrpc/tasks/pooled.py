"""Pooled training: the same model trained in one place on all the data, as a baseline for a federation.

`python -m fedgrpc.tasks.pooled --task fedgrpc.tasks.digits --rounds 12 --epochs 3` prints one JSON line after
each round's worth of epochs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fedgrpc.errors import FedgrpcError
from fedgrpc.trainer import EvalResult, Trainer, TrainJob
from fedgrpc.worker.task_loader import load_trainer


def train_pooled(trainer: Trainer, job: TrainJob, rounds: int) -> Iterator[EvalResult | None]:
    """Train from the initial weights for `rounds` times `job.epochs` epochs, scoring after each."""
    weights = trainer.initial_weights()
    for number in range(rounds):
        weights = trainer.train(weights, replace(job, round=number)).weights
        yield trainer.evaluate(weights)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fedgrpc.tasks.pooled", description=__doc__)
    parser.add_argument("--task", default="fedgrpc.tasks.digits")
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--momentum", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    job = TrainJob(
        epochs=asked.epochs,
        batch_size=asked.batch_size,
        learning_rate=asked.learning_rate,
        momentum=asked.momentum,
        seed=asked.seed,
    )
    try:
        trainer = load_trainer(
            asked.task,
            model=asked.model,
            data=asked.data,
            device=asked.device,
            seed=asked.seed,
            threads=asked.threads,
        )
        for number, result in enumerate(train_pooled(trainer, job, asked.rounds), start=1):
            metrics = {} if result is None else dict(result.metrics)
            print(json.dumps({"round": number, "metrics": metrics}, allow_nan=False), flush=True)
    except FedgrpcError as error:
        parser.error(str(error))


if __name__ == "__main__":
    _main()
