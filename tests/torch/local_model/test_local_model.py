"""A local model is what its plan says, stays that while it is trained, and leaves the module's code alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.submodels.plan import (
    FORMATS,
    Arithmetic,
    Clustering,
    LocalModelPlan,
    Pruning,
    Quantization,
)
from fedgrpc.torch.local_model.clustering import cluster
from fedgrpc.torch.local_model.formats import FLOAT8_E4M3, NAMED
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.local_model.pruning import keep_masks
from fedgrpc.torch.local_model.quantization import quantized_activations, quantized_weights, straight_through
from fedgrpc.torch.models import build_model
from fedgrpc.torch.optimizer import MomentumSgd


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def lenet() -> nn.Module:
    return build_model("lenet", num_classes=10, in_channels=1, image_size=28)


def mlp() -> nn.Module:
    return build_model("mlp", num_classes=10, in_channels=1, image_size=28)


def train(local: LocalModel, steps: int = 5, optimizer: Any = None, learning_rate: float = 0.05) -> list[float]:
    parameters = list(local.module.parameters())
    optimizer = optimizer or MomentumSgd(parameters, learning_rate, 0.9, 1e-3)
    targets = torch.arange(32) % 10
    inputs = torch.randn(10, 1, 28, 28)[targets] + 0.1 * torch.randn(32, 1, 28, 28)
    losses = []
    with local.arithmetic():
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = None
            loss = functional.cross_entropy(local(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    local.settle()
    return losses


def distinct(tensor: Tensor) -> int:
    return len(set(tensor.detach().reshape(-1).tolist()))


def weights(local: LocalModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in local.module.named_parameters()}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_the_smallest_weights_are_pruned_exactly_as_many_as_asked(scope: str, ratio: float) -> None:
    tensors: dict[str, Tensor] = dict(lenet().named_parameters())
    masks = keep_masks(tensors, Pruning(ratio, scope))
    assert set(masks) == {name for name in tensors if name.endswith("weight")}
    counted = masks.values() if scope == "layer" else [torch.cat([mask.reshape(-1) for mask in masks.values()])]
    for mask in counted:
        assert int(mask.sum()) == round((1 - ratio) * mask.numel())
    groups = [[name] for name in masks] if scope == "layer" else [list(masks)]
    for names in groups:
        kept = torch.cat([tensors[name].detach()[masks[name]].abs() for name in names])
        gone = torch.cat([tensors[name].detach()[~masks[name]].abs() for name in names])
        assert kept.min() >= gone.max()


def test_equal_weights_are_pruned_by_position_and_no_layer_vanishes() -> None:
    masks = keep_masks({"a": torch.ones(4, 4), "b": torch.full((2, 2), 1e-9)}, Pruning(0.5, "global"))
    assert int(masks["a"].sum()) == 10
    assert int(masks["b"].sum()) == 1


@pytest.mark.parametrize("kind", [None, torch.optim.Adam])
def test_pruned_weights_are_zero_and_stay_zero(kind: Any) -> None:
    local = LocalModel(lenet(), LocalModelPlan(pruning=Pruning(0.7)))
    before = weights(local)
    train(local, optimizer=kind and kind(local.module.parameters(), lr=0.01))
    for name, mask in local.masks.items():
        after = weights(local)[name]
        assert not before[name][~mask].any()
        assert not after[~mask].any()
        assert (after[mask] != before[name][mask]).float().mean() > 0.5


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60), st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_each_weight_has_its_nearest_centroid_and_each_centroid_is_the_mean_of_its_weights(
    values: list[float], count: int
) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    clusters = cluster(tensor, count)
    distances = (tensor[:, None] - clusters.centroids).abs()
    assert len(clusters.centroids) <= count
    torch.testing.assert_close((tensor - clusters.values).abs(), distances.min(dim=1).values)
    for number in range(len(clusters.centroids)):
        mean = tensor[clusters.members == number].mean()
        torch.testing.assert_close(clusters.centroids[number], mean, rtol=1e-6, atol=1e-6)


def test_projecting_a_gradient_is_the_gradient_of_the_centroids() -> None:
    tensor = torch.randn(40)
    clusters = cluster(tensor, 5)
    centroids = clusters.centroids.clone().requires_grad_()
    target = torch.randn(40)
    ((centroids[clusters.members] - target) ** 2).sum().backward()  # type: ignore[no-untyped-call]
    assert centroids.grad is not None
    sizes = clusters.members.bincount(minlength=len(centroids))
    gradient = 2 * (clusters.values - target)
    wanted = (centroids.grad / sizes)[clusters.members]
    torch.testing.assert_close(clusters.projected(gradient), wanted)


@pytest.mark.parametrize("kind", [None, torch.optim.Adam])
def test_a_clustered_layer_is_trained_through_its_centroids(kind: Any) -> None:
    plan = LocalModelPlan(clustering=Clustering(16, ("fc*",)))
    local = LocalModel(lenet(), plan)
    before = weights(local)
    train(local, optimizer=kind and kind(local.module.parameters(), lr=0.01))
    assert set(local.clusters) == {"fc1.weight", "fc2.weight", "fc3.weight"}
    for name, clusters in local.clusters.items():
        after = weights(local)[name]
        assert distinct(before[name]) == len(clusters.centroids) <= 16
        assert distinct(after) <= 16
        for number in range(len(clusters.centroids)):
            assert distinct(after[clusters.members == number]) == 1
        assert not torch.equal(after, before[name])
    assert distinct(weights(local)["conv2.weight"]) > 1000


def test_one_step_moves_each_cluster_by_the_mean_gradient_of_its_members() -> None:
    """A dumb loop over the clusters, from the gradients of a plain module with the same weights."""
    local = LocalModel(mlp(), LocalModelPlan(clustering=Clustering(8)))
    plain = mlp()
    plain.load_state_dict(local.module.state_dict())
    inputs, targets = torch.randn(16, 1, 28, 28), torch.arange(16) % 10
    functional.cross_entropy(plain(inputs), targets).backward()  # type: ignore[no-untyped-call]
    before = weights(local)
    with local.arithmetic():
        functional.cross_entropy(local(inputs), targets).backward()  # type: ignore[no-untyped-call]
        MomentumSgd(local.module.parameters(), 0.5, 0.0, 0.0).step()
    local.settle()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, after in weights(local).items():
        gradient = gradients[name]
        assert gradient is not None
        wanted = gradient.clone()
        for number in range(len(local.clusters[name].centroids) if name in local.clusters else 0):
            members = local.clusters[name].members == number
            wanted[members] = gradient[members].mean()
        torch.testing.assert_close(after, before[name] - 0.5 * wanted, rtol=1e-4, atol=1e-6)


def test_pruned_weights_belong_to_no_cluster() -> None:
    plan = LocalModelPlan(pruning=Pruning(0.5), clustering=Clustering(4))
    local = LocalModel(lenet(), plan)
    train(local)
    for name, mask in local.masks.items():
        after = weights(local)[name]
        assert not after[~mask].any()
        assert distinct(after[mask]) <= 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_k_bits_have_at_most_that_many_values_in_each_channel(bits: int) -> None:
    tensor = torch.randn(6, 500)
    quantized = quantized_weights(tensor, bits)
    step = tensor.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert all(distinct(row) <= 2**bits - 1 for row in quantized)
    assert bool(((quantized - tensor).abs() <= step * 0.5001).all())
    torch.testing.assert_close(quantized_weights(quantized, bits), quantized)
    assert not quantized_weights(torch.zeros(3, 3), bits).any()


@pytest.mark.parametrize("values", [torch.randn(1000), torch.rand(1000) + 3, -torch.rand(1000), torch.zeros(5)])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_of_k_bits_keep_zero_and_their_range(values: Tensor, bits: int) -> None:
    quantized = quantized_activations(values, bits)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    assert distinct(quantized) <= 2**bits
    assert not quantized_activations(torch.cat([values, torch.zeros(1)]), bits)[-1]
    assert float((quantized - values).abs().max()) <= 1.01 * (high - low) / (2**bits - 1)


def test_gradients_pass_straight_through() -> None:
    tensor = torch.randn(10, requires_grad=True)
    straight_through(tensor, quantized_weights(tensor, 4)).pow(2).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(tensor.grad, 2 * quantized_weights(tensor.detach(), 4))


def test_the_forward_pass_of_a_quantized_model_is_that_of_its_quantized_weights() -> None:
    local = LocalModel(lenet(), LocalModelPlan(quantization=Quantization(4)))
    train(local)
    plain = lenet()
    plain.load_state_dict(
        {n: quantized_weights(t, 4) if t.dim() > 1 else t for n, t in local.module.state_dict().items()}
    )
    inputs = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(local(inputs), plain(inputs))
    assert distinct(local.module.state_dict()["fc1.weight"][0]) > 15  # what is trained is not quantized


def test_activations_are_quantized_while_training_and_hooks_are_gone_after_it() -> None:
    plan = LocalModelPlan(quantization=Quantization(0, 4, ("fc*",)), pruning=Pruning(0.5))
    local = LocalModel(lenet(), plan)
    seen: list[Tensor] = []
    layers = dict(local.module.named_modules())
    with local.arithmetic():
        handle = layers["fc2"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        local(torch.randn(8, 1, 28, 28))
        handle.remove()
    assert distinct(seen[0]) <= 16
    for layer in layers.values():
        assert not layer._forward_pre_hooks
    assert not any(parameter._post_accumulate_grad_hooks for parameter in local.module.parameters())


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
def test_native_formats_run_natively(name: str) -> None:
    local = LocalModel(mlp(), LocalModelPlan(arithmetic=Arithmetic(name)))
    losses = train(local, steps=30)
    assert {parameter.dtype for parameter in local.module.parameters()} == {getattr(torch, name)}
    assert losses[-1] < losses[0]


def test_emulated_formats_are_rounded_and_compressed_too() -> None:
    plan = LocalModelPlan(
        pruning=Pruning(0.5),
        clustering=Clustering(8, ("fc*",)),
        arithmetic=Arithmetic("float8_e4m3", "stochastic"),
    )
    local = LocalModel(lenet(), plan)
    train(local)
    for name, tensor in weights(local).items():
        assert torch.equal(FLOAT8_E4M3.round(tensor), tensor)
        if name in local.masks:
            assert not tensor[~local.masks[name]].any()
        if name in local.clusters:
            assert distinct(tensor[local.masks[name]]) <= 8


def test_the_names_of_formats_that_a_plan_takes_are_those_that_there_are() -> None:
    assert set(FORMATS) == set(NAMED)


def test_a_plain_plan_changes_nothing() -> None:
    whole, local = lenet(), lenet()
    local.load_state_dict(whole.state_dict())
    trained = LocalModel(local, LocalModelPlan())
    train(trained, steps=3)
    torch.manual_seed(0)
    assert not trained.masks
    assert not trained.clusters
    assert trained.dtype is torch.float32


COMBINATIONS = [
    LocalModelPlan(pruning=Pruning(0.5), quantization=Quantization(8), clustering=Clustering(16, ("fc3*",))),
    LocalModelPlan(quantization=Quantization(4, 8), arithmetic=Arithmetic("bfloat16")),
    LocalModelPlan(clustering=Clustering(32), quantization=Quantization(8, 8)),
    LocalModelPlan(pruning=Pruning(0.3, "global"), arithmetic=Arithmetic("float24")),
]


@pytest.mark.parametrize("plan", COMBINATIONS, ids=str)
def test_any_combination_learns(plan: LocalModelPlan) -> None:
    losses = train(LocalModel(mlp(), plan), steps=30)
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sgd_moves_16_bit_weights_from_the_first_step_on(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = MomentumSgd([weight], 0.25, 0.9, 0.0)
    for wanted in (0.5, 0.5 - 0.95):
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
        torch.testing.assert_close(weight.detach().float(), torch.full((64,), wanted), atol=0.01, rtol=0)
