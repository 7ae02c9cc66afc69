"""Copies of modules: by pickle they are what `copy.deepcopy` makes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from fedgrpc.torch.models.registry import MODEL_NAMES, build_model
from fedgrpc.torch.module_copies import ModuleCopies, with_tensors


class Tied(nn.Module):
    """Two names of one weight, a function that has no name of its own, and state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.activation = lambda x: x * 2
        self.seen: list[int] = []
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.also_scale = self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(1)
        return self.second(self.activation(self.first(x)))  # type: ignore[no-any-return]


class SaysHow(nn.Module):
    """A module with a copy of its own making."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SaysHow:
        made = SaysHow()
        made.copied = True
        return made


def _filled(module: nn.Module) -> dict[int, torch.Tensor]:
    """New tensors for all parameters, in the order of their names."""
    return {
        id(each): nn.Parameter(torch.full_like(each, number)) for number, each in enumerate(module.parameters())
    }


@pytest.mark.parametrize("name", ["lenet", "mlp", "cnn-exits", "resnet18-batch", "mobilenetv2"])
def test_copies_by_pickle_compute_what_deep_copies_do(name: str) -> None:
    assert name in MODEL_NAMES
    module = build_model(name, num_classes=4, in_channels=1, image_size=32)
    made = {id(each): nn.Parameter(torch.randn_like(each)) for each in module.parameters()}
    copies = ModuleCopies(module)
    assert copies.pickled
    fast, slow = copies.copy(made).eval(), with_tensors(module, made).eval()
    assert [(key, type(each)) for key, each in fast.named_modules()] == [
        (key, type(each)) for key, each in slow.named_modules()
    ]
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(fast(x), slow(x))


def test_a_copy_shares_nothing_that_changes_and_keeps_tied_tensors_tied() -> None:
    module = Tied()
    copies = ModuleCopies(module)
    assert copies.pickled
    one, other = copies.copy(_filled(module)), copies.copy(_filled(module))
    assert isinstance(one, Tied)
    assert isinstance(other, Tied)
    assert one.second.weight is one.first.weight
    assert one.first.weight is not other.first.weight
    assert one.also_scale is one.scale
    assert one.scale is not other.scale
    assert one.activation is module.activation
    one(torch.ones(1, 3))
    assert (one.seen, other.seen, module.seen) == ([1], [], [])
    one.first.register_forward_hook(lambda *arguments: None)
    assert not other.first._forward_hooks
    assert not module.first._forward_hooks


def test_what_cannot_be_pickled_or_says_how_it_is_copied_is_copied_deeply() -> None:
    special = nn.Sequential(SaysHow(), nn.Linear(2, 2))
    copies = ModuleCopies(special)
    assert not copies.pickled
    assert copies.copy(_filled(special))[0].copied  # type: ignore[index]
    locked = nn.Linear(2, 2)
    locked.lock = threading.Lock()  # type: ignore[assignment]
    assert not ModuleCopies(locked).pickled
