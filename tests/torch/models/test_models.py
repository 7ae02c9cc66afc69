"""The ready-made models have the shapes and sizes their sources give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedgrpc.errors import UsageError
from fedgrpc.torch.models import MODEL_NAMES, build_model
from fedgrpc.torch.models.resnet import ResNet18


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize(("channels", "side", "classes"), [(1, 28, 10), (3, 32, 7)])
def test_every_model_gives_one_logit_per_class(name: str, channels: int, side: int, classes: int) -> None:
    model = build_model(name, num_classes=classes, in_channels=channels, image_size=side)
    assert model.eval()(torch.rand(2, channels, side, side)).shape == (2, classes)


def test_lenet_has_the_44426_parameters_of_niid_bench() -> None:
    """5x5x6+6, 6x5x5x16+16, 256x120+120, 120x84+84, 84x10+10."""
    assert parameter_count(build_model("lenet", num_classes=10, in_channels=1, image_size=28)) == 44426


def test_the_cnn_has_454922_parameters() -> None:
    """1x5x5x32+32, 32x5x5x64+64, 3136x128+128, 128x10+10."""
    assert parameter_count(build_model("cnn", num_classes=10, in_channels=1, image_size=28)) == 454922


def test_net_has_the_62006_parameters_of_the_pytorch_tutorial() -> None:
    assert parameter_count(build_model("net", num_classes=10, in_channels=3, image_size=32)) == 62006


def test_resnet18_has_torchvisions_11689512_parameters() -> None:
    """GroupNorm has as many parameters as BatchNorm."""
    assert parameter_count(ResNet18(1000, 3, cifar_stem=False)) == 11689512


def test_resnet18_keeps_no_running_statistics() -> None:
    assert not list(ResNet18().buffers())


def test_both_stems_of_resnet18_work() -> None:
    with torch.no_grad():
        assert ResNet18(10, 3, cifar_stem=False)(torch.rand(1, 3, 64, 64)).shape == (1, 10)
        assert ResNet18(10, 3, cifar_stem=True)(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_an_unknown_model_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(UsageError, match="choose mlp, lenet, cnn, cnn-exits, net, resnet18"):
        build_model("alexnet", num_classes=10, in_channels=3, image_size=32)


def test_images_too_small_for_lenet_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 16x16"):
        build_model("lenet", num_classes=10, in_channels=1, image_size=8)
