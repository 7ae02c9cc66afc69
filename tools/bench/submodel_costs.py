"""What a step of training and a payload cost, by the width of the slice: the first table of docs/heterogeneity.md.

`python -m tools.bench.submodel_costs`: random weights and images, one thread, SGD with momentum. CPU time of a
step is the median of five rounds of `--steps` each; bytes are those of tensors (weights, gradients, velocities,
and what the backward pass keeps) and of whole payloads.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.torch.models.registry import build_model
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob, Weights

# Name, as in the table; channels and side of its images; batch.
MODELS = {
    "lenet": ("LeNet", 1, 28, 64),
    "cnn": ("CNN", 1, 28, 64),
    "resnet18": ("ResNet-18", 3, 32, 8),
    "mobilenetv2": ("MobileNetV2", 3, 32, 8),
}
WIDTHS = (1.0, 0.5, 0.25)
CLASSES = 10
ROUNDS = 5


class RandomImages(TorchTask):
    """Nothing to be learnt: images of noise, one batch of them."""

    momentum = 0.9

    def __init__(self, model: str, channels: int, side: int, batch_size: int) -> None:
        self._model, self._shape, self.batch_size = model, (channels, side), batch_size

    def model(self) -> nn.Module:
        channels, side = self._shape
        return build_model(self._model, num_classes=CLASSES, in_channels=channels, image_size=side)

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        channels, side = self._shape
        images = torch.randn(self.batch_size, channels, side, side)
        return TensorDataset(images, torch.arange(self.batch_size) % CLASSES), None


def step_ms(trainer: TorchTrainer, given: Weights, steps: int) -> tuple[float, int]:
    """CPU milliseconds of a step, and bytes of its tensors."""
    trainer.train(given, TrainJob(max_steps=1))  # loads and allocates what all later steps find
    times, tensor_bytes = [], 0
    for _ in range(ROUNDS):
        begun = time.process_time()
        tensor_bytes = trainer.train(
            given, TrainJob(epochs=steps, max_steps=steps, learning_rate=1e-4)
        ).tensor_bytes
        times.append(1000 * (time.process_time() - begun) / steps)
    return statistics.median(times), tensor_bytes


def payload_bytes(weights: Weights, recipe: str) -> int:
    return write_payload(weights, Recipe.parse(recipe), io.BytesIO(), np.random.default_rng(0)).size_bytes


def rows(model: str, steps: int) -> Iterator[str]:
    """Lines of the table, widest first."""
    name, channels, side, batch_size = MODELS[model]
    trainer = TorchTrainer(RandomImages(model, channels, side, batch_size), TaskSetup(device="cpu"))
    whole = trainer.initial_weights()
    for width in WIDTHS:
        selection = trainer.channels().select(LocalModelPlan(width).sub_model(0), whole)
        given = {key: selection.coverage(key, its.shape).take(its).copy() for key, its in whole.items()}
        ms, tensor_bytes = step_ms(trainer, given, steps)
        bytes_ = [tensor_bytes, payload_bytes(given, "raw"), payload_bytes(given, "int8+zstd")]
        counts = [f"{count:,}".replace(",", " ") for count in (sum(its.size for its in given.values()), *bytes_)]
        yield f"| {name} | {width:g} | {counts[0]} | {ms:.1f} | {' | '.join(counts[1:])} |"
        name = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="not all of them")
    parser.add_argument("--steps", type=int, default=20, help="of each of five rounds")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | width | parameters | ms per step | tensor bytes | raw | int8+zstd |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in asked.model or MODELS:
        for row in rows(model, asked.steps):
            print(row, flush=True)


if __name__ == "__main__":
    main()
