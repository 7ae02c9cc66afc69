"""The demo's yardstick: the same model trained in one place on all the data, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Final

from fedgrpc.cli.demo.processes import Processes

_NAME: Final = "pooled"

Scores = dict[str, float]


async def train_pooled(
    processes: Processes,
    task_arguments: Sequence[str],
    rounds: int,
    epochs: float,
    step: Callable[[int, Scores], None],
) -> list[Scores]:
    """Scores on the held-out data after each round's worth of epochs; `step` hears of each.

    Raises:
        FedgrpcError: the training failed.
    """
    arguments = ["-m", "fedgrpc.tasks.pooled", *task_arguments, "--rounds", str(rounds), "--epochs", f"{epochs:g}"]
    process = await processes.start(_NAME, arguments, piped=True)
    assert process.stdout is not None
    scores: list[Scores] = []
    async for line in process.stdout:
        scores.append(json.loads(line)["metrics"])
        step(len(scores), scores[-1])
    if (code := await process.wait()) != 0:
        raise processes.failure(_NAME, code)
    return scores
