"""Server optimizers against a plain transcription of their papers, one scalar at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from fedgrpc.aggregation.server_optimizer import (
    OPTIMIZERS,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedYogi,
    PlainStep,
    ServerOptimizer,
    server_optimizer,
)
from fedgrpc.errors import UsageError

STEPS = 12


def _fedopt(deltas: list[float], second: Callable[[float, float], float], beta1: float) -> list[float]:
    """arXiv 2003.00295, algorithm 2: m_t, v_t, then x_{t+1} = x_t + eta * m_t / (sqrt(v_t) + tau)."""
    eta, tau = 0.01, 1e-3
    x, m, v = 1.0, 0.0, 0.0
    path = []
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        v = second(v, delta * delta)
        x = x + eta * m / (math.sqrt(v) + tau)
        path.append(x)
    return path


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _fedavg(deltas: list[float]) -> list[float]:
    return [1.0 + sum(deltas[: t + 1]) for t in range(len(deltas))]


def _fedavgm(deltas: list[float]) -> list[float]:
    """arXiv 1909.06335: v <- beta v + delta, w <- w + v."""
    return [
        1.0 + sum(sum(0.9 ** (s - i) * deltas[i] for i in range(s + 1)) for s in range(t + 1))
        for t in range(len(deltas))
    ]


PAPERS: list[tuple[ServerOptimizer, Callable[[list[float]], list[float]]]] = [
    (PlainStep(), _fedavg),
    (FedAvgM(), _fedavgm),
    (FedAdagrad(), lambda d: _fedopt(d, lambda v, sq: v + sq, beta1=0.0)),
    (FedYogi(), lambda d: _fedopt(d, lambda v, sq: v - 0.01 * sq * _sign(v - sq), beta1=0.9)),
    (FedAdam(), lambda d: _fedopt(d, lambda v, sq: 0.99 * v + 0.01 * sq, beta1=0.9)),
]


@pytest.mark.parametrize(("optimizer", "paper"), PAPERS, ids=lambda value: type(value).__name__)
def test_an_optimizer_does_what_its_paper_says(
    optimizer: ServerOptimizer, paper: Callable[[list[float]], list[float]]
) -> None:
    deltas = np.random.default_rng(3).standard_normal((STEPS, 2, 3)) * 10.0 ** np.arange(-3, 0)
    weights = np.ones((2, 3))
    state = tuple(np.zeros((2, 3)) for _ in range(optimizer.state_count))
    path = []
    for delta in deltas:
        weights, state = optimizer.step(weights, delta, state)
        assert len(state) == optimizer.state_count
        path.append(weights)
    for index in np.ndindex(2, 3):
        expected = paper([float(delta[index]) for delta in deltas])
        np.testing.assert_allclose([w[index] for w in path], expected, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_leaves_its_inputs_as_they_are(name: str) -> None:
    optimizer = server_optimizer(name)
    weights, delta = np.ones(3), np.array([0.1, -0.2, 0.0])
    state = tuple(np.full(3, 0.5) for _ in range(optimizer.state_count))
    optimizer.step(weights, delta, state)
    np.testing.assert_array_equal(weights, np.ones(3))
    np.testing.assert_array_equal(delta, [0.1, -0.2, 0.0])
    assert all(np.array_equal(part, np.full(3, 0.5)) for part in state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_nothing_from_fresh_memory_moves_nothing(name: str) -> None:
    optimizer = server_optimizer(name)
    state = tuple(np.zeros(3) for _ in range(optimizer.state_count))
    weights, _ = optimizer.step(np.ones(3), np.zeros(3), state)
    np.testing.assert_array_equal(weights, np.ones(3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_learning_rate_scales_the_first_step(name: str) -> None:
    small, large = server_optimizer(name, 0.001), server_optimizer(name, 0.01)
    delta = np.array([0.1, -0.2])
    moves = [
        optimizer.step(np.zeros(2), delta, tuple(np.zeros(2) for _ in range(optimizer.state_count)))[0]
        for optimizer in (small, large)
    ]
    np.testing.assert_allclose(moves[0] * 10, moves[1])


def test_an_unknown_optimizer_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"no server optimizer 'adam'.*fedavg, fedavgm"):
        server_optimizer("adam")


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_learning_rate_that_is_not_a_positive_number_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="learning rate"):
        server_optimizer("fedavg", rate)
