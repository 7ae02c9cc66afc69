"""FedAvg on a linear model, where everything has a closed form (arXiv 1602.05629)."""

from __future__ import annotations

import numpy as np
import pytest

from fedgrpc.aggregation.mean import mean_of
from fedgrpc.aggregation.server_optimizer import PlainStep

Share = tuple[np.ndarray, np.ndarray]


def _shares(counts: list[int], features: int, seed: int) -> list[Share]:
    """Least-squares data of each worker; every worker's own optimum is another one."""
    rng = np.random.default_rng(seed)
    return [
        (
            x := rng.standard_normal((count, features)),
            x @ rng.standard_normal(features) + rng.standard_normal(count),
        )
        for count in counts
    ]


def _gradient(w: np.ndarray, share: Share) -> np.ndarray:
    x, y = share
    return np.asarray(x.T @ (x @ w - y) / len(y))


def _train(w: np.ndarray, share: Share, steps: int, rate: float) -> np.ndarray:
    for _ in range(steps):
        w = w - rate * _gradient(w, share)
    return w


def _round(w: np.ndarray, shares: list[Share], steps: int, rate: float) -> np.ndarray:
    """One round of ours: float32 deltas, mean, server step."""
    updates = [((_train(w, share, steps, rate) - w).astype(np.float32), float(len(share[1]))) for share in shares]
    new, _ = PlainStep().step(w, mean_of(updates, w.shape), ())
    return new


def _closed_form(w: np.ndarray, shares: list[Share], steps: int, rate: float) -> np.ndarray:
    """`steps` of gradient descent shrink the distance to a worker's own optimum by (I - rate H)^steps."""
    total = sum(len(y) for _, y in shares)
    new = np.zeros_like(w)
    for x, y in shares:
        optimum = np.linalg.lstsq(x, y, rcond=None)[0]
        hessian = x.T @ x / len(y)
        shrink = np.linalg.matrix_power(np.eye(len(w)) - rate * hessian, steps)
        new += len(y) / total * (optimum + shrink @ (w - optimum))
    return new


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("counts", [[40, 40, 40], [10, 100, 30]], ids=["equal", "unequal"])
def test_a_round_equals_the_closed_form(steps: int, counts: list[int]) -> None:
    shares = _shares(counts, features=6, seed=steps)
    w = np.zeros(6)
    for _ in range(5):
        expected = _closed_form(w, shares, steps, rate=0.1)
        w = _round(w, shares, steps, rate=0.1)
        np.testing.assert_allclose(w, expected, atol=1e-6)


def test_one_local_step_equals_gradient_descent_on_all_the_data() -> None:
    shares = _shares([10, 100, 30], features=6, seed=1)
    pooled = np.concatenate([x for x, _ in shares]), np.concatenate([y for _, y in shares])
    w = np.zeros(6)
    for _ in range(400):
        w = _round(w, shares, steps=1, rate=0.3)
    np.testing.assert_allclose(w, _train(np.zeros(6), pooled, 400, 0.3), atol=1e-6)
    np.testing.assert_allclose(w, np.linalg.lstsq(*pooled, rcond=None)[0], atol=1e-6)
