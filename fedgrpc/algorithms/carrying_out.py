"""Carrying out a device's half of an algorithm with whatever trains and scores: a worker, a simulation, a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedgrpc.algorithms.algorithm import Algorithm, Pass, Received, Sent, Trained, Weights
from fedgrpc.training_plan import TrainingPlan


def carry_out(
    algorithm: Algorithm,
    received: Received,
    plan: TrainingPlan,
    train: Callable[[Pass], Trained],
    score: Callable[[Weights], Mapping[str, float]],
) -> Sent:
    """Return what the device's half comes to. Raises as `train` and `score` do."""
    local, answer = algorithm.local(received, plan), None
    try:
        while True:
            wanted = local.send(answer)
            answer = train(wanted) if isinstance(wanted, Pass) else score(wanted.weights)
    except StopIteration as done:
        sent: Sent = done.value
        return sent
    finally:
        local.close()
