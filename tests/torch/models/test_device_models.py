"""MobileNetV2, ShuffleNetV2, PointNet and the MLP of Zhang (2021) are those of their papers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fedgrpc.torch.models.mobilenet import MobileNetV2
from fedgrpc.torch.models.norm import norm_layer
from fedgrpc.torch.models.pointnet import PointNet
from fedgrpc.torch.models.shufflenet import ShuffleNetV2
from fedgrpc.torch.models.small import sigmoid_mlp


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_mobilenetv2_has_torchvisions_3504872_parameters_and_names() -> None:
    model = MobileNetV2(1000, cifar_stem=False, norm="batch")
    assert parameter_count(model) == 3504872
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["features.0.0.weight"] == (32, 3, 3, 3)
    assert shapes["features.0.1.running_var"] == (32,)
    assert shapes["features.1.conv.0.0.weight"] == (32, 1, 3, 3)
    assert shapes["features.1.conv.1.weight"] == (16, 32, 1, 1)
    assert shapes["features.2.conv.0.0.weight"] == (96, 16, 1, 1)
    assert shapes["features.2.conv.1.0.weight"] == (96, 1, 3, 3)
    assert shapes["features.2.conv.2.weight"] == (24, 96, 1, 1)
    assert shapes["features.2.conv.3.bias"] == (24,)
    assert shapes["features.18.0.weight"] == (1280, 320, 1, 1)
    assert shapes["classifier.1.weight"] == (1000, 1280)


def test_shufflenetv2_has_torchvisions_2278604_parameters_and_names() -> None:
    model = ShuffleNetV2(1000, cifar_stem=False, norm="batch")
    assert parameter_count(model) == 2278604
    assert parameter_count(ShuffleNetV2(1000, cifar_stem=False, norm="batch", width=0.5)) == 1366792
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["conv1.0.weight"] == (24, 3, 3, 3)
    assert shapes["stage2.0.branch1.0.weight"] == (24, 1, 3, 3)
    assert shapes["stage2.0.branch1.2.weight"] == (58, 24, 1, 1)
    assert shapes["stage2.0.branch2.0.weight"] == (58, 24, 1, 1)
    assert shapes["stage3.1.branch2.3.weight"] == (116, 1, 3, 3)
    assert shapes["stage4.3.branch2.5.weight"] == (232, 232, 1, 1)
    assert shapes["conv5.1.running_mean"] == (1024,)
    assert shapes["fc.weight"] == (1000, 1024)


@pytest.mark.parametrize(
    ("model", "entries", "sha256"),
    [
        (lambda stem: MobileNetV2(1000, cifar_stem=stem, norm="batch"), 314, "a18c560d82f6d01d"),
        (lambda stem: ShuffleNetV2(1000, cifar_stem=stem, norm="batch"), 338, "cb82a4e6fc1db15e"),
        (lambda stem: ShuffleNetV2(1000, cifar_stem=stem, norm="batch", width=0.5), 338, "54a515f5b9e5104f"),
    ],
    ids=["mobilenet_v2", "shufflenet_v2_x1_0", "shufflenet_v2_x0_5"],
)
@pytest.mark.parametrize("cifar_stem", [False, True])
def test_names_shapes_and_their_order_are_those_of_torchvision_0_29(
    model: Callable[[bool], nn.Module], entries: int, sha256: str, cifar_stem: bool
) -> None:
    """The digests are of torchvision's own; with its weights, the outputs were the same bit for bit."""
    state = model(cifar_stem).state_dict()
    text = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    assert len(state) == entries
    assert hashlib.sha256(text.encode()).hexdigest().startswith(sha256)


@pytest.mark.parametrize("build", [MobileNetV2, ShuffleNetV2])
def test_stems_for_small_and_large_images_both_work(build: type[MobileNetV2] | type[ShuffleNetV2]) -> None:
    with torch.no_grad():
        assert build(10, 3, cifar_stem=True)(torch.rand(1, 3, 32, 32)).shape == (1, 10)
        assert build(10, 3, cifar_stem=False)(torch.rand(1, 3, 64, 64)).shape == (1, 10)


@pytest.mark.parametrize("build", [MobileNetV2, ShuffleNetV2])
@pytest.mark.parametrize("norm", ["group", "static"])
def test_without_running_statistics_there_is_nothing_but_parameters(
    build: type[MobileNetV2] | type[ShuffleNetV2], norm: str
) -> None:
    assert not list(build(norm=norm).buffers())


def test_a_normalization_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="group, batch, static"):
        norm_layer("layer", 8)


def test_pointnet_does_not_mind_the_order_of_the_points() -> None:
    model = PointNet(num_classes=4).eval()
    cloud = torch.randn(2, 3, 50)
    shuffled = cloud[:, :, torch.randperm(50)]
    with torch.no_grad():
        torch.testing.assert_close(model(cloud), model(shuffled))
        assert model(cloud).shape == (2, 4)


def test_the_mlp_of_zhang_2021_has_five_layers_of_ten_sigmoid_units() -> None:
    model = sigmoid_mlp()
    assert parameter_count(model) == 5 * 10 + 10 + 4 * (10 * 10 + 10) + 10 * 2 + 2
    hidden = [layer for layer in model.layers if isinstance(layer, nn.Linear)][:-1]
    x = torch.randn(3, 5)
    with torch.no_grad():
        wanted = x
        for layer in hidden:
            wanted = torch.sigmoid(layer(wanted))
        torch.testing.assert_close(model(x), model.layers[-1](wanted))
