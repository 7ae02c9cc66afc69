"""A model and the prefixes in it, trained in one step: their gradients meet in the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.submodels.channels import SubModel, sub_shapes
from fedgrpc.torch.local_model.nested import Nested
from fedgrpc.torch.local_model.slicing import resized, shapes_of
from fedgrpc.torch.local_model.tracing import trace_channels
from tests.torch.local_model.test_slicing import MODELS, sliced

LABELS = torch.tensor([1, 0])
loss_of = partial(functional.cross_entropy, target=LABELS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def built(name: str) -> tuple[nn.Module, Tensor]:
    """A model without chance, and two inputs of it."""
    build, shape = MODELS[name]
    module = build()
    for each in module.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    return module.train(), torch.randn(shape)


@pytest.mark.parametrize("name", MODELS)
def test_a_nested_model_computes_what_the_slice_alone_would(name: str) -> None:
    module, example = built(name)
    channels = trace_channels(module, example).map
    nested = Nested(module, channels, shapes_of(module), [0.25, 0.5])
    losses = [loss.item() for loss in nested.losses(loss_of, example)]
    alone = [loss_of(sliced(module, example, SubModel(width)).train()(example)).item() for width in (0.5, 0.25)]
    assert losses == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ["lenet", "resnet18", "shufflenetv2"])
def test_a_prefix_of_a_slice_is_the_same_prefix_of_the_whole(name: str) -> None:
    module, example = built(name)
    channels, shapes = trace_channels(module, example).map, shapes_of(module)
    half = sliced(module, example, SubModel(0.5)).train()
    nested = Nested(half, channels, shapes, [0.5, 0.25])
    assert len(nested) == 1
    (loss,) = nested.losses(loss_of, example)
    quarter = sliced(module, example, SubModel(0.25)).train()
    assert loss.item() == pytest.approx(loss_of(quarter(example)).item(), rel=1e-5)


def test_gradients_of_the_narrow_model_reach_its_channels_and_no_others() -> None:
    module, example = built("lenet")
    channels, shapes = trace_channels(module, example).map, shapes_of(module)
    (loss,) = Nested(module, channels, shapes, [0.25]).losses(loss_of, example)
    loss.backward()
    selection = channels.select(SubModel(0.25))
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        kept = torch.zeros_like(parameter)
        kept[selection.coverage(name, shapes[name]).index] = 1
        assert parameter.grad[kept.bool()].any(), name
        assert not parameter.grad[~kept.bool()].any(), name


def test_the_narrowest_device_has_nothing_nested() -> None:
    module, example = built("lenet")
    channels, shapes = trace_channels(module, example).map, shapes_of(module)
    narrow = resized(module, sub_shapes(channels.select(SubModel(0.25)), shapes))
    assert not Nested(narrow, channels, shapes, [0.5, 0.25])
