"""A small federation in one process, a fifth of which means harm: rules learn on, and the mean does not."""

from statistics import NormalDist

import numpy as np
import pytest

from fedgrpc.aggregation.robust.aggregation import aggregation_of

WORKERS, ATTACKERS, CLASSES, INPUTS = 10, 2, 4, 10
RULES = [
    *("median", "trimmed-mean:0.2", "geometric-median", "krum:f=2", "multi-krum:f=2", "centered-clip"),
    *("nnm:f=2+median", "nnm:f=2+trimmed-mean:0.2"),
]


def data(seed, count):
    """Clouds of points around a centre for each class."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(0, 2, (CLASSES, INPUTS))
    labels = rng.integers(0, CLASSES, count)
    return centres[labels] + rng.normal(0, 1, (count, INPUTS)), labels


def gradient(w, x, y):
    scores = np.exp(x @ w - (x @ w).max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    scores[np.arange(len(y)), y] -= 1
    return x.T @ scores / len(y)


def sent_by(attack, honest, own):
    if attack == "sign":
        return -own
    if attack == "scaled":
        return -20 * own
    if attack == "alie":
        # arXiv 1902.06156: mean - z * deviation, so small that it hides among the honest.
        z = NormalDist().inv_cdf((WORKERS - ATTACKERS - (WORKERS // 2 + 1 - ATTACKERS)) / (WORKERS - ATTACKERS))
        return np.tile(honest.mean(axis=0) - z * honest.std(axis=0), (ATTACKERS, 1))
    # arXiv 1903.03936: against the mean of the honest.
    return np.tile(-0.9 * honest.mean(axis=0), (ATTACKERS, 1))


def accuracy(text, attack):
    w, shares, test = np.zeros((INPUTS, CLASSES)), [data(k + 1, 60) for k in range(WORKERS)], data(99, 500)
    for _ in range(30):
        updates = np.stack([-0.5 * gradient(w, *share).ravel() for share in shares])
        updates[:ATTACKERS] = sent_by(attack, updates[ATTACKERS:], updates[:ATTACKERS])
        rule = aggregation_of(text)
        if rule is None:
            step = updates.mean(axis=0)
        else:
            verdict = rule.judge(updates @ updates.T)
            step = verdict.combine(updates) if verdict.combine else verdict.shares @ updates
        w = w + step.reshape(w.shape)
    return ((test[0] @ w).argmax(axis=1) == test[1]).mean()


@pytest.mark.parametrize("attack", ["sign", "scaled", "alie", "inner"])
@pytest.mark.parametrize("text", RULES)
def test_a_rule_learns_although_a_fifth_of_the_workers_attacks(text, attack):
    assert accuracy(text, attack) > 0.93


def test_the_mean_learns_nothing_from_a_fifth_that_scales_its_updates():
    assert accuracy("mean", "scaled") < 0.5
