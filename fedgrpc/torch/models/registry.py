"""Models by name, so that `--model lenet` works in every task.

`resnet18`, `mobilenetv2` and `shufflenetv2` have GroupNorm; `resnet18-static`, `resnet18-batch` and so on have the
other normalizations of `fedgrpc.torch.models.norm`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from fedgrpc.errors import UsageError
from fedgrpc.torch.models.exits import cnn_with_exits, resnet18_with_exits
from fedgrpc.torch.models.mobilenet import MobileNetV2
from fedgrpc.torch.models.resnet import ResNet18
from fedgrpc.torch.models.shufflenet import ShuffleNetV2
from fedgrpc.torch.models.small import CNN, MLP, LeNet, Net, sigmoid_mlp

# Each takes the number of classes, the channels and the side of its square images.
_BUILDERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mlp": lambda classes, channels, side: MLP(channels * side * side, classes),
    "lenet": LeNet,
    "cnn": CNN,
    "cnn-exits": cnn_with_exits,
    "net": Net,
    "resnet18": lambda classes, channels, side: ResNet18(classes, channels),
    "resnet18-exits": lambda classes, channels, side: resnet18_with_exits(classes, channels),
    "resnet18-static": lambda classes, channels, side: ResNet18(classes, channels, norm="static"),
    "resnet18-batch": lambda classes, channels, side: ResNet18(classes, channels, norm="batch"),
    "mobilenetv2": lambda classes, channels, side: MobileNetV2(classes, channels),
    "mobilenetv2-static": lambda classes, channels, side: MobileNetV2(classes, channels, norm="static"),
    "mobilenetv2-batch": lambda classes, channels, side: MobileNetV2(classes, channels, norm="batch"),
    "shufflenetv2": lambda classes, channels, side: ShuffleNetV2(classes, channels),
    "shufflenetv2-static": lambda classes, channels, side: ShuffleNetV2(classes, channels, norm="static"),
    "shufflenetv2-batch": lambda classes, channels, side: ShuffleNetV2(classes, channels, norm="batch"),
    "sigmoid-mlp": lambda classes, channels, side: sigmoid_mlp(channels * side * side, classes),
}

MODEL_NAMES = tuple(_BUILDERS)


def build_model(name: str, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build a model for images [B, in_channels, image_size, image_size].

    Raises:
        UsageError: there is no such model, or it does not take such images.
    """
    builder = _BUILDERS.get(name.lower())
    if builder is None:
        raise UsageError(f"there is no model {name!r}: choose {', '.join(MODEL_NAMES)}")
    try:
        return builder(num_classes, in_channels, image_size)
    except ValueError as error:
        raise UsageError(f"model {name}: {error}") from error
