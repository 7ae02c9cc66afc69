"""Narrower sub-models of any module: what they keep, that they run, and what cannot be sliced and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedgrpc.errors import UsageError
from fedgrpc.submodels.channels import ChannelGroup, SubModel, kept_channels, sub_shapes
from fedgrpc.torch.local_model.slicing import check_runs, resized, shapes_of
from fedgrpc.torch.local_model.tracing import trace_channels
from fedgrpc.torch.models import build_model
from fedgrpc.torch.models.mobilenet import MobileNetV2
from fedgrpc.torch.models.pointnet import PointNet
from fedgrpc.torch.models.resnet import ResNet18
from fedgrpc.torch.models.shufflenet import ShuffleNetV2
from fedgrpc.torch.models.small import sigmoid_mlp

IMAGE = (2, 3, 32, 32)
MODELS: dict[str, Any] = {
    "sigmoid mlp": (sigmoid_mlp, (2, 5)),
    "lenet": (lambda: build_model("lenet", num_classes=10, in_channels=1, image_size=28), (2, 1, 28, 28)),
    "cnn": (lambda: build_model("cnn", num_classes=10, in_channels=1, image_size=28), (2, 1, 28, 28)),
    "net": (lambda: build_model("net", num_classes=10, in_channels=3, image_size=32), IMAGE),
    "resnet18": (ResNet18, IMAGE),
    "mobilenetv2": (MobileNetV2, IMAGE),
    "mobilenetv2 batch": (lambda: MobileNetV2(norm="batch"), IMAGE),
    "shufflenetv2": (ShuffleNetV2, IMAGE),
    "pointnet": (PointNet, (2, 3, 64)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def sliced(module: nn.Module, example: Tensor, sub_model: SubModel) -> nn.Module:
    """The sub-model with the values of the whole one."""
    channels, shapes = trace_channels(module, example), shapes_of(module)
    channels.map.validate(shapes)
    selection = channels.map.select(sub_model)
    narrow = resized(module, sub_shapes(selection, shapes))
    whole = module.state_dict()
    values = {name: selection.coverage(name, shape).take(whole[name].numpy()) for name, shape in shapes.items()}
    narrow.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return narrow


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rule", ["prefix", "rolling", "random"])
@pytest.mark.parametrize("width", [0.5, 0.25])
def test_every_model_has_sub_models_that_run_and_train(name: str, rule: str, width: float) -> None:
    build, shape = MODELS[name]
    module, example = build(), torch.randn(shape)
    narrow = sliced(module, example, SubModel(width, rule, round=5))
    check_runs(narrow, example, tuple(module.eval()(example).shape))
    share = parameter_count(narrow) / parameter_count(module)
    assert share < {0.5: 0.56, 0.25: 0.31}[width]
    narrow.train()(example).sum().backward()
    assert all(parameter.grad is not None for parameter in narrow.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_width_is_the_model_itself(name: str) -> None:
    build, shape = MODELS[name]
    module, example = build().eval(), torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(sliced(module, example, SubModel(1.0))(example), module(example))


@pytest.mark.parametrize("name", ["lenet", "resnet18", "mobilenetv2 batch", "pointnet"])
def test_leaving_out_channels_that_do_nothing_changes_nothing(name: str) -> None:
    """So the groups are right: zero a group's left-out channels everywhere, and the slice computes the same."""
    build, shape = MODELS[name]
    module, example = build().eval(), torch.randn(shape)
    if name == "resnet18":  # group statistics see zeroed channels, so normalization is taken out here
        for part in module.modules():
            for child, layer in list(part.named_children()):
                if isinstance(layer, nn.GroupNorm):
                    setattr(part, child, nn.BatchNorm2d(layer.num_channels).eval())
    if name == "pointnet":
        for part in module.modules():
            for child, layer in list(part.named_children()):
                if isinstance(layer, nn.GroupNorm):
                    setattr(part, child, nn.Identity())
    sub_model = SubModel(0.5, "random", round=1)
    channels = trace_channels(module, example)
    selection = channels.map.select(sub_model)
    with torch.no_grad():
        for tensor_name, tensor in module.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and "running" not in tensor_name:
                coverage = selection.coverage(tensor_name, tuple(tensor.shape))
                values = np.zeros(tensor.shape, np.float32)
                values[coverage.index] = tensor.detach().numpy()[coverage.index]
                tensor.copy_(torch.from_numpy(values))
        narrow = sliced(module, example, sub_model)
        torch.testing.assert_close(narrow(example), module(example), rtol=1e-4, atol=1e-5)


def test_layers_joined_by_an_addition_keep_the_same_channels() -> None:
    module = ResNet18()
    tensors = trace_channels(module, torch.randn(IMAGE)).map.tensors
    assert tensors["conv1.weight"][0] == tensors["layer1.0.conv2.weight"][0] == tensors["layer2.0.conv1.weight"][1]
    assert tensors["layer2.0.downsample.0.weight"][0] == tensors["layer2.1.conv2.weight"][0]
    assert tensors["layer1.0.conv1.weight"][0] != tensors["conv1.weight"][0]


def test_each_group_of_a_group_norm_keeps_as_many_channels() -> None:
    module = ResNet18()
    channel_map = trace_channels(module, torch.randn(IMAGE)).map
    for kept, group in zip(channel_map.select(SubModel(0.3, "random", 2)).kept, channel_map.groups, strict=True):
        first_half = int((kept < group.channels // 2).sum())
        assert first_half * 2 == len(kept)


def test_flattened_channels_keep_all_their_pixels() -> None:
    module = build_model("lenet", num_classes=10, in_channels=1, image_size=28)
    selection = trace_channels(module, torch.randn(2, 1, 28, 28)).map.select(SubModel(0.25))
    positions = selection.coverage("fc1.weight", (120, 256)).positions
    assert positions[1] is not None
    assert positions[1].tolist() == list(range(4 * 16))


class FixedView(nn.Module):
    """As many tutorials write it: the flattened size is spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.fc1 = nn.Linear(8 * 26 * 26, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).view(-1, 8 * 26 * 26)
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


def test_what_cannot_be_sliced_is_kept_whole_and_says_why() -> None:
    module, example = FixedView(), torch.randn(2, 1, 28, 28)
    channels = trace_channels(module, example)
    assert "view()" in channels.full_width["conv.weight"]
    assert "output" in channels.full_width["fc2.weight"]
    assert "fc1.bias" not in channels.full_width
    narrow = sliced(module, example, SubModel(0.5))
    check_runs(narrow, example, (2, 10))
    shapes = shapes_of(narrow)
    assert shapes["conv.weight"] == (8, 1, 3, 3)
    assert shapes["fc1.weight"] == (16, 8 * 26 * 26)


class Recurrent(nn.Module):
    """Nothing of it is understood."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def test_layers_that_nobody_understands_are_named_with_the_operation() -> None:
    channels = trace_channels(Recurrent(), torch.randn(2, 5, 4))
    assert not channels.map.groups
    names = [f"lstm.{kind}_{where}_l0" for kind in ("weight", "bias") for where in ("ih", "hh")]
    assert channels.by_reason == [(names, "lstm() is not understood, or not with these sizes")]


class Odd(nn.Module):
    """Concatenation, a learned scale, a shared layer, an operation nobody knows, and a parameter in it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 6, 3, padding=1)
        self.right = nn.Conv2d(1, 4, 3, padding=1)
        self.both = nn.Conv2d(10, 8, 1)
        self.again = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.slope = nn.Parameter(torch.full((8,), 0.1))
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(torch.cat([self.left(x), self.right(x)], 1)) * self.scale
        x = self.again(self.again(x))
        x = x + torch.nn.functional.prelu(x, self.slope)
        return self.last(x.mean((2, 3)))  # type: ignore[no-any-return]


def test_concatenations_shared_layers_and_learned_scales_are_followed() -> None:
    module, example = Odd(), torch.randn(2, 1, 8, 8)
    channels = trace_channels(module, example)
    assert "prelu()" in channels.full_width["again.weight"]
    assert "prelu()" in channels.full_width["scale"]
    narrow = sliced(module, example, SubModel(0.5))
    check_runs(narrow, example, (2, 3))
    shapes = shapes_of(narrow)
    assert shapes["left.weight"][0] == 3
    assert shapes["right.weight"][0] == 2
    assert shapes["both.weight"] == (8, 5, 1, 1)


def test_tracing_leaves_the_module_as_it_was() -> None:
    module = MobileNetV2(norm="batch")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.features.eval()
    training = [part.training for part in module.modules()]
    trace_channels(module, torch.randn(IMAGE))
    assert [part.training for part in module.modules()] == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_module_that_cannot_take_the_example_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be traced"):
        trace_channels(sigmoid_mlp(), torch.randn(2, 7))


def test_a_narrower_module_that_would_not_run_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).reshape(-1, 8))  # type: ignore[no-any-return]

    module = Stubborn()
    shapes = {"a.weight": (4, 4), "a.bias": (4,), "b.weight": (2, 4)}
    with pytest.raises(UsageError, match="narrower Stubborn"):
        check_runs(resized(module, shapes), torch.randn(3, 4), (3, 2))


def test_rolling_windows_visit_every_channel_equally_often() -> None:
    group = ChannelGroup(10)
    counts = np.zeros(10, int)
    for number in range(10):
        counts[kept_channels(group, SubModel(0.3, "rolling", number), 0)] += 1
    assert counts.tolist() == [3] * 10


def test_random_channels_differ_by_round_and_group_and_never_change_between_releases() -> None:
    group = ChannelGroup(12)
    first = kept_channels(group, SubModel(0.5, "random", 1), 0).tolist()
    assert first == [1, 5, 7, 8, 9, 10]
    others = [
        kept_channels(group, SubModel(0.5, "random", number), which).tolist() for number, which in [(2, 0), (1, 1)]
    ]
    assert all(other != first for other in others)
