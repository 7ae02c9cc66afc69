"""Accuracy of networks with BatchNorm on Fashion-MNIST, by encoding and server optimizer, against raw.

Each round every worker starts from the model that it holds, trains, and sends its update; all of it goes through
the package's own trainer, codec, update files and commit. Workers are simulated one after another in one process.
The learning rate falls to nothing along a cosine, and the score is the mean of the last rounds', so that figures
differ by the encoding more than by chance. Statistics that lose bits, or that an optimizer steps on, show at once.

    python -m tools.bench.batchnorm --model cnn --seeds 1 --rounds 12
    python -m tools.bench.batchnorm --model resnet18 --width 0.25 --examples 500 --rounds 12
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import statistics
import tempfile
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedgrpc.aggregation.server_optimizer import OPTIMIZERS, server_optimizer
from fedgrpc.aggregator.commit import ModelCommit
from fedgrpc.aggregator.delta_bases import DeltaBases, PayloadSource
from fedgrpc.codec.chunk import Chunk
from fedgrpc.codec.feedback import Residual, write_with_feedback
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.recipe import Recipe
from fedgrpc.datasets.dataset import Examples
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.protocol.tensors import manifest_to_proto
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.model_file import ModelFile, ModelTensors, write_model
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.submodels.channels import SubModel, sub_shapes
from fedgrpc.torch.local_model.slicing import resized, shapes_of
from fedgrpc.torch.local_model.tracing import trace_channels
from fedgrpc.torch.models import build_model
from fedgrpc.torch.task import TorchTask
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.trainer import TaskSetup, TrainJob
from fedgrpc.v1.aggregator_pb2 import UpdateHeader
from fedgrpc.worker.delta import Delta

# Upload and download recipe.
ENCODINGS = {
    "raw": ("raw", "raw"),
    "int8 both ways (default)": ("int8+zstd", "int8+zstd"),
    "entropy c=3 up, int8 down": ("entropy:c=3+zstd", "int8+zstd"),
}
# Of each server optimizer: one that learns at this number of rounds.
RATES = {"fedavg": 1.0, "fedavgm": 0.3, "fedadagrad": 0.03, "fedyogi": 0.02, "fedadam": 0.02}
LAST_SCORES = 3


class Images(TorchTask):
    """One worker's share of Fashion-MNIST."""

    batch_size = 32

    def __init__(self, network: nn.Module, train: Examples, held_out: Examples) -> None:
        self._network, self._train, self._held_out = network, train, held_out

    def model(self) -> nn.Module:
        return self._network

    def data(self, path: Path | None) -> tuple[TensorDataset, TensorDataset]:
        return _tensors(self._train), _tensors(self._held_out)

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        return inputs.float().div_(255)


def _tensors(examples: Examples) -> TensorDataset:
    inputs = torch.from_numpy(examples.inputs.reshape(-1, 1, 28, 28))
    return TensorDataset(inputs, torch.from_numpy(examples.labels.astype(np.int64)))


def network(name: str, width: float) -> nn.Module:
    """The network of that name with BatchNorm, narrowed to that share of its channels."""
    if name == "cnn":
        channels = max(1, round(64 * width))
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * 49, 10),
        )
    whole = build_model(f"{name}-batch", num_classes=10, in_channels=1, image_size=28)
    if width == 1:
        return whole
    selection = trace_channels(whole, torch.zeros(2, 1, 28, 28)).map.select(SubModel(width))
    narrow = resized(whole, sub_shapes(selection, shapes_of(whole)))
    for module in narrow.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return narrow


@dataclass
class Federation:
    """One run in a folder: versions and updates are files, as the aggregator keeps them."""

    folder: Path
    trainers: list[TorchTrainer]
    up: Recipe
    down: Recipe
    optimizer: str
    bytes_up: int = 0
    held: tuple[int, bytes, str] | None = None
    residuals: dict[int, Residual] = field(default_factory=dict)

    def start(self) -> None:
        """Write version 1."""
        weights = self.trainers[0].initial_weights()
        layout = layout_of(weights)
        self.delta_bases, self.journal = (
            DeltaBases(self.folder / "delta-bases"),
            UploadJournal(self.folder / "uploads"),
        )
        write_model(self._path(1), layout, weights.values())

    def _path(self, version: int) -> Path:
        return self.folder / f"{version}.safetensors"

    def given(self, version: int) -> Mapping[str, np.ndarray]:
        """What every worker holds of a version: it took the differences to what it held before."""
        model = ModelFile.open(self._path(version))
        if self.down.lossless:
            return dict(ModelTensors(model))
        base = None if self.held is None else self.delta_bases.open(self.held)
        source = PayloadSource(
            version, model.layout, ModelTensors(model), None if base is None else ModelTensors(base)
        )
        manifest = self.delta_bases.write(source, self.down, io.BytesIO(), np.random.default_rng(version))
        self.held = (version, manifest.digest, "")
        base = self.delta_bases.open(self.held)
        assert base is not None
        return dict(ModelTensors(base))

    def round(self, number: int, learning_rate: float, seed: int) -> None:
        """Train version `number` to the next."""
        given = self.given(number)
        layout = ModelFile.open(self._path(number)).layout
        weights = []
        for worker, trainer in enumerate(self.trainers):
            job = TrainJob(learning_rate=learning_rate, seed=seed * len(self.trainers) + worker, round=number)
            result = trainer.train({name: array.copy() for name, array in given.items()}, job)
            token = f"{number}-{worker}"
            self._send(worker, token, Delta(result.weights, given, layout), seed)
            weights.append((token, float(result.example_count)))
        base = ModelFile.open(self._path(number))
        memory = ModelFile.open(path) if (path := self.folder / f"memory-{number}").exists() else None
        optimizer = server_optimizer(self.optimizer, RATES[self.optimizer])
        commit = ModelCommit(base, memory, optimizer, Merge(dict(weights)), self.journal.load)
        commit.write(self._path(number + 1), self.folder / f"memory-{number + 1}")
        self.journal.discard([token for token, _ in weights])

    def _send(self, worker: int, token: str, delta: Delta, seed: int) -> None:
        payload = io.BytesIO()
        rng = np.random.default_rng([seed, zlib.crc32(token.encode())])
        residual = self.residuals.get(worker, Residual())
        manifest, self.residuals[worker] = write_with_feedback(
            delta, residual, self.up, payload, rng, delta.layout
        )
        data = payload.getvalue()
        self.bytes_up += len(data)
        header = UpdateHeader(token=token, manifest=manifest_to_proto(manifest))
        upload = self.journal.begin(header, manifest)
        upload.append([Chunk(0, data, zlib.crc32(data))])
        upload.finish()
        upload.seal()
        upload.close()

    def accuracy(self, version: int) -> float:
        """Accuracy of a committed version on the held-out images."""
        scored = self.trainers[0].evaluate(dict(ModelTensors(ModelFile.open(self._path(version)))))
        assert scored is not None
        return scored.metrics["accuracy"]

    def least_variance(self, version: int) -> float:
        """The smallest running variance of a committed version."""
        tensors = ModelTensors(ModelFile.open(self._path(version)))
        return min(float(tensors[name].min()) for name in tensors if name.endswith("running_var"))


def scores_of(args: argparse.Namespace, optimizer: str, encoding: str, seed: int) -> dict[str, float]:
    """Accuracy, least variance and bytes of one run."""
    torch.manual_seed(seed)
    whole = network(args.model, args.width)
    data = load_fashion_mnist()
    order = np.random.default_rng(seed).permutation(len(data.train))
    shares = [data.train.take(order[n * args.examples : (n + 1) * args.examples]) for n in range(args.workers)]
    held_out = data.held_out.take(np.arange(args.held_out))
    tasks = [Images(copy.deepcopy(whole), share, held_out) for share in shares]
    trainers = [TorchTrainer(task, TaskSetup(device="cpu")) for task in tasks]
    up, down = map(Recipe.parse, ENCODINGS[encoding])
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder), trainers, up, down, optimizer)
        federation.start()
        scores, least = [], []
        for number in range(1, args.rounds + 1):
            rate = 0.5 * args.learning_rate * (1 + math.cos(math.pi * (number - 1) / args.rounds))
            federation.round(number, rate, seed)
            least.append(federation.least_variance(number + 1))
            if number > args.rounds - LAST_SCORES:
                scores.append(federation.accuracy(number + 1))
    return {
        "accuracy": statistics.mean(scores),
        "least_variance": min(least),
        "bytes_up": federation.bytes_up,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["cnn", "resnet18"], default="cnn")
    parser.add_argument("--width", type=float, default=1.0, help="share of the network's channels")
    parser.add_argument("--optimizers", nargs="*", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--examples", type=int, default=1000, help="of each of the workers")
    parser.add_argument("--held-out", type=int, default=10_000, help="images that score")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of the first round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append one line for each run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| server optimizer | encoding | accuracy | against raw | least variance | MB up |", flush=True)
    print("| --- | --- | --: | --: | --: | --: |", flush=True)
    for optimizer in args.optimizers:
        plain = 0.0
        for encoding in ENCODINGS:
            runs = []
            for seed in range(args.seeds):
                began_s = time.monotonic()
                run = scores_of(args, optimizer, encoding, seed)
                runs.append(run)
                if args.json:
                    about = {"model": args.model, "optimizer": optimizer, "encoding": encoding, "seed": seed}
                    took = {"seconds": time.monotonic() - began_s}
                    with args.json.open("a") as file:
                        file.write(json.dumps({**about, **run, **took}) + "\n")
            accuracy = 100 * statistics.mean(run["accuracy"] for run in runs)
            plain = accuracy if encoding == "raw" else plain
            least = min(run["least_variance"] for run in runs)
            size = statistics.mean(run["bytes_up"] for run in runs) / 1e6
            cells = [optimizer, encoding, f"{accuracy:.2f} %", f"{accuracy - plain:+.2f}", f"{least:.2g}"]
            print("|", " | ".join([*cells, f"{size:.2f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
