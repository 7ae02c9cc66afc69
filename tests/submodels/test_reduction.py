"""What the aggregator leaves out of a model is what the device would leave out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedgrpc.submodels.plan import Clustering, LocalModelPlan, Pruning
from fedgrpc.submodels.reduction import ReducedTensors, Reduction
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.weights import weights_of

PLANS = [
    LocalModelPlan(pruning=Pruning(0.3)),
    LocalModelPlan(pruning=Pruning(0.9, scope="global")),
    LocalModelPlan(pruning=Pruning(0.5, layers=("2.*",))),
    LocalModelPlan(clustering=Clustering(16)),
    LocalModelPlan(clustering=Clustering(4), pruning=Pruning(0.5)),
]


def net(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.LayerNorm(20), torch.nn.Linear(20, 5))


def reduced(plan: LocalModelPlan, seed: int) -> dict[str, np.ndarray]:
    weights = weights_of(net(seed))
    return dict(ReducedTensors(weights, Reduction.of(plan), weights.keys()))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.to_line())
def test_a_reduced_model_is_the_local_model_that_the_device_would_make(plan: LocalModelPlan, seed: int) -> None:
    local = weights_of(LocalModel(net(seed), plan).module)
    for name, values in reduced(plan, seed).items():
        np.testing.assert_allclose(values, local[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.to_line())
def test_the_device_finds_nothing_more_to_do_in_a_reduced_model(plan: LocalModelPlan) -> None:
    given = net(0)
    sent = {name: torch.from_numpy(values) for name, values in reduced(plan, 0).items()}
    given.load_state_dict(sent)
    local = LocalModel(given, plan)
    for name, values in weights_of(local.module).items():
        assert np.array_equal(values, sent[name].numpy())
    for name, mask in local.masks.items():
        assert torch.equal(mask, sent[name] != 0)
    for name, clusters in local.clusters.items():
        assert len(clusters.centroids) == len(set(sent[name][sent[name] != 0].tolist()))


def test_a_plan_without_either_reduces_nothing() -> None:
    assert Reduction.of(LocalModelPlan(0.5)).nothing
    assert not Reduction.of(PLANS[0]).nothing
