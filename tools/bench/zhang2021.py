"""Figures 2, 3 and 4 of Zhang (2021), and on from where they stop: small formats, pruning, bits, clusters.

The paper: two Gaussian classes of 5 features, means -1 and 1, sigma 1; five layers of ten sigmoid units; gradient
descent on the full batch; 500 to 2000 samples; 20 runs. Time and memory of an epoch, accuracy after training, and
the epochs it takes to get there, by number format.

`python -m tools.bench.zhang2021 --out docs/images/zhang2021 --runs 20` writes results.json and three plots;
with `--models`, rows of MobileNetV2 and ShuffleNetV2 on Fashion-MNIST and PointNet on solids instead, into
models.json, where rows of as many steps stay as they are: it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.submodels.plan import (
    Arithmetic,
    Clustering,
    LocalModelPlan,
    Pruning,
    Quantization,
)
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.models.small import sigmoid_mlp
from fedgrpc.torch.optimizer import MomentumSgd
from fedgrpc.trainer import SliceableTrainer, Trainer, TrainJob
from fedgrpc.worker.task_loader import load_trainer

SAMPLES = (500, 1000, 1500, 2000)
LEARNING_RATE = 0.5
MOMENTUM = 0.9
REACHED = 0.95

FORMATS = {
    "float64": LocalModelPlan(arithmetic=Arithmetic("float64")),
    "float32": LocalModelPlan(),
}
# Of an epoch: section 4 of the paper.
PAPER = {
    "epoch_ms": {"float64": "31.2 ms", "float32": "25.3 ms"},
    "tensor_bytes": {"float64": "1.7 MB", "float32": "1.2 MB"},
    "accuracy": {"float64": "as float32", "float32": "as float64"},
}
_FIGURES = {"epoch_ms": ("ms per epoch", 1), "tensor_bytes": ("tensors, MB", 1e6), "accuracy": ("accuracy", 1)}
SMALL_FORMATS = {
    "float24": LocalModelPlan(arithmetic=Arithmetic("float24")),
    "float16, native": LocalModelPlan(arithmetic=Arithmetic("float16")),
    "bfloat16, native": LocalModelPlan(arithmetic=Arithmetic("bfloat16")),
    "float16": LocalModelPlan(arithmetic=Arithmetic("float16", emulated=True)),
    "bfloat16": LocalModelPlan(arithmetic=Arithmetic("bfloat16", emulated=True)),
    "bfloat16, stochastic": LocalModelPlan(arithmetic=Arithmetic("bfloat16", "stochastic")),
    "float8_e4m3fn": LocalModelPlan(arithmetic=Arithmetic("float8_e4m3fn")),
    "float8_e4m3fn, stochastic": LocalModelPlan(arithmetic=Arithmetic("float8_e4m3fn", "stochastic")),
    "float8_e5m2, stochastic": LocalModelPlan(arithmetic=Arithmetic("float8_e5m2", "stochastic")),
    "fixed16.10, stochastic": LocalModelPlan(arithmetic=Arithmetic("fixed16.10", "stochastic")),
}
TECHNIQUES = {
    **{f"pruned {ratio:.0%}": LocalModelPlan(pruning=Pruning(ratio)) for ratio in (0.25, 0.5, 0.75, 0.9)},
    **{f"{bits}-bit weights": LocalModelPlan(quantization=Quantization(bits)) for bits in (8, 4, 3, 2)},
    "8-bit weights and activations": LocalModelPlan(quantization=Quantization(8, 8)),
    **{f"{count} clusters": LocalModelPlan(clustering=Clustering(count)) for count in (32, 16, 8, 4)},
}


@dataclass(frozen=True)
class Run:
    """One training: an epoch's median time, bytes of tensors held, accuracy, epochs until `REACHED` (or None)."""

    epoch_ms: float
    tensor_bytes: int
    accuracy: float
    epochs_to_reach: int | None


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Both classes, half each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    return torch.randn(count, 5, generator=generator) + (2 * labels - 1)[:, None], labels


class Held:
    """Bytes of all that autograd keeps for the backward pass, each tensor once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def train(plan: LocalModelPlan, count: int, seed: int, epochs: int) -> Run:
    """Full-batch gradient descent from the seed's weights; scored on as many fresh samples."""
    torch.manual_seed(seed)
    local = LocalModel(sharpened(sigmoid_mlp()), plan, seed)
    inputs, labels = samples(count, seed)
    test_inputs, test_labels = samples(count, seed + 10_000)
    inputs = inputs.to(local.dtype)
    parameters = list(local.module.parameters())
    optimizer = MomentumSgd(parameters, LEARNING_RATE, MOMENTUM, 0.0)
    times, reached, held = [], None, Held()
    with local.arithmetic():
        for epoch in range(1, epochs + 1):
            begun = time.perf_counter()
            for parameter in parameters:
                parameter.grad = None
            if epoch == 2:
                with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda tensor: tensor):
                    loss = functional.cross_entropy(local(inputs), labels)
            else:
                loss = functional.cross_entropy(local(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            times.append(time.perf_counter() - begun)
            if reached is None and epoch % 5 == 0 and score(local, test_inputs, test_labels) >= REACHED:
                reached = epoch
        accuracy = score(local, test_inputs, test_labels)
    # Weights, their gradients and velocities live beside what the backward pass needs.
    kept = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    state = 3 * sum(tensor.numel() * tensor.element_size() for tensor in parameters)
    activations = sum(size for place, size in held.sizes.items() if place not in kept)
    return Run(1000 * statistics.median(times), state + activations, accuracy, reached)


def sharpened(module: nn.Module) -> nn.Module:
    """Xavier's weights times 4, sigmoid's own gain: through five layers of sigmoids torch's own barely learn."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter, gain=4.0)
        else:
            nn.init.zeros_(parameter)
    return module


@torch.no_grad()
def score(local: LocalModel, inputs: Tensor, labels: Tensor) -> float:
    """Share of the samples told right; counted in integers, which no format rounds."""
    return int((local(inputs).argmax(1) == labels).sum()) / len(labels)


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Means over the runs; epochs of those that got there."""
    reached = [run.epochs_to_reach for run in runs if run.epochs_to_reach is not None]
    return {
        "epoch_ms": statistics.median(run.epoch_ms for run in runs),
        "tensor_bytes": runs[0].tensor_bytes,
        "accuracy": statistics.fmean(run.accuracy for run in runs),
        "accuracy_sd": statistics.pstdev(run.accuracy for run in runs),
        "epochs_to_reach": statistics.fmean(reached) if reached else None,
        "runs_that_reached": len(reached),
    }


def measure(asked: argparse.Namespace, report: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    results: dict[str, Any] = {"runs": asked.runs, "epochs": asked.epochs, "threshold": REACHED, "sizes": {}}
    for name, plan in FORMATS.items():
        for count in SAMPLES:
            runs = [train(plan, count, seed, asked.epochs) for seed in range(asked.runs)]
            results["sizes"][f"{name}/{count}"] = summary(runs)
            report(f"{name} {count}: {results['sizes'][f'{name}/{count}']}")
    for kind, plans in (("formats", SMALL_FORMATS), ("techniques", TECHNIQUES)):
        results[kind] = {}
        for name, plan in plans.items():
            runs = [train(plan, 1000, seed, asked.epochs) for seed in range(min(asked.runs, asked.more_runs))]
            results[kind][name] = summary(runs)
            report(f"{name}: {results[kind][name]}")
    return results


DEVICE_MODELS = ("mobilenetv2", "shufflenetv2", "pointnet")
MODEL_PLANS = {
    "whole": LocalModelPlan(),
    "width 0.5": LocalModelPlan(0.5),
    "width 0.25": LocalModelPlan(0.25),
    "pruned 50%": LocalModelPlan(pruning=Pruning(0.5)),
    "8-bit weights and activations": LocalModelPlan(quantization=Quantization(8, 8)),
    "16 clusters": LocalModelPlan(clustering=Clustering(16)),
    "bfloat16, native": LocalModelPlan(arithmetic=Arithmetic("bfloat16")),
}


def device_model(name: str) -> Trainer:
    """A trainer of the model; of Fashion-MNIST a twentieth: 3000 images to train on, 500 to score."""
    if name == "pointnet":
        return load_trainer("fedgrpc.tasks.shapes")
    return load_trainer("fedgrpc.tasks.fashion_mnist", model=name, partition="iid", part="1/20")


def measure_model(name: str, trainer: Trainer, plan: LocalModelPlan, steps: int) -> dict[str, Any]:
    """The model by that plan, trained once for so many steps: CPU ms of a step, bytes of tensors, accuracy."""
    assert isinstance(trainer, SliceableTrainer)
    whole = trainer.initial_weights()
    selection = trainer.channels().select(plan.sub_model(0), whole)
    given = {key: selection.coverage(key, its.shape).take(its).copy() for key, its in whole.items()}
    local_model = None if plan.plain else plan
    job = TrainJob(epochs=100, max_steps=steps, batch_size=16, local_model=local_model)
    job = job if name == "pointnet" else replace(job, learning_rate=0.005)
    begun = time.process_time()
    result = trainer.train(given, job)
    step_ms = 1000 * (time.process_time() - begun) / steps
    score = trainer.evaluate(result.weights)
    assert score is not None
    return {
        "steps": steps,
        "step_ms": round(step_ms, 1),
        "tensor_bytes": result.tensor_bytes,
        "parameters": sum(its.size for its in given.values()),
        "accuracy": score.metrics["accuracy"],
    }


def measure_models(names: Sequence[str], steps: int, path: Path, report: Callable[[str], None]) -> None:
    """The rows of these models, each written to `path` as soon as it is there."""
    rows = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        trainer = device_model(name)
        for plan_name, plan in MODEL_PLANS.items():
            key = f"{name}/{plan_name}"
            if rows.get(key, {}).get("steps") == steps:
                continue
            rows[key] = measure_model(name, trainer, plan, steps)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            report(f"{key}: {rows[key]}")


def plot(results: dict[str, Any], folder: Path) -> None:
    """Time, memory and accuracy by samples (the paper's figures 2, 3 and 4), one file each.

    The paper's own numbers are told beside ours: on an axis with them ours would be a flat line.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    for number, (key, (label, unit)) in enumerate(_FIGURES.items(), start=2):
        figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
        for name, style in zip(FORMATS, ("o-", "x--"), strict=True):
            values = [results["sizes"][f"{name}/{count}"][key] / unit for count in SAMPLES]
            axes.plot(SAMPLES, values, style, markersize=8, label=f"{name} (paper: {PAPER[key][name]})")
        axes.set(xlabel="samples", ylabel=label, ylim=(0.5, 1.0) if key == "accuracy" else (0, None))
        axes.legend()
        figure.savefig(folder / f"figure{number}.png", dpi=120)
        pyplot.close(figure)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and the plots")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--more-runs", type=int, default=5, help="runs of each further format and technique")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--models", action="store_true", help="rows of the device models instead")
    parser.add_argument("--model", action="append", choices=DEVICE_MODELS, help="with --models: not all of them")
    parser.add_argument("--draw", action="store_true", help="draw the plots of results.json again, no more")
    parser.add_argument("--steps", type=int, default=100, help="of each row of the device models")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.models:
        names, path = asked.model or DEVICE_MODELS, asked.out / "models.json"
        measure_models(names, asked.steps, path, lambda line: print(line, flush=True))
        return
    path = asked.out / "results.json"
    if asked.draw:
        plot(json.loads(path.read_text()), asked.out)
        return
    results = measure(asked, lambda line: print(line, flush=True))
    path.write_text(json.dumps(results, indent=1))
    plot(results, asked.out)


if __name__ == "__main__":
    _main()
