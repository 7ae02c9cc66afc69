"""Cost and accuracy of each technique of local-model plans: the tables of docs/measurements/heterogeneity.md.

`python -m tools.bench.techniques --out results.jsonl` measures each technique in a process of its own, which a
control group limits to the memory of a device class (root, cgroup v1); without the right to do that, nothing is
limited. `--show results.jsonl --plot techniques.png` prints the table and draws accuracy against memory.

Every process trains one task of one device from the same weights, which a device without limits has trained a
little, on Fashion-MNIST, with one thread. T_local is CPU time of a step, memory the peak of the process in
training; bytes are those of whole payloads in int8+zstd. Predictions are those of a planner that has measured the
whole model and nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from fedgrpc.aggregation.partial_update import pack
from fedgrpc.aggregator.negotiation import reduced_recipe
from fedgrpc.codec.layout import Layout, TensorRole, layout_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.plots import COLOURS, MARKERS, legend_below, new_figure, save
from fedgrpc.process import forget_peak_memory, peak_memory_bytes
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.submodels.cost import DeviceLimits, Observation, predict
from fedgrpc.submodels.layer_cost import StepShares
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_size import PlanElements, PlanSize, elements_of
from fedgrpc.submodels.reduction import ReducedTensors, Reduction
from fedgrpc.tasks.fashion_mnist import FashionMnist
from fedgrpc.torch.adapters import with_adapters
from fedgrpc.torch.trainer import TorchTrainer
from fedgrpc.torch.weights import load_weights
from fedgrpc.trainer import TaskSetup, TrainJob, TrainResult, Weights
from tools.bench.technique_cells import CELLS, MODELS, OWN_CELLS
from tools.containers.devices import JETSON_NANO_2GB, RASPBERRY_PI_4, DeviceClass

DEVICES = {kind.name: kind for kind in (RASPBERRY_PI_4, JETSON_NANO_2GB)}
TRAINING = 4000
RECIPE = "int8+zstd"
# Directions of the adapters of "cnn-adapters".
RANK = 16
# An emulated format takes its time, so its steps are few and its accuracy is not shown.
FEW = 2


class Sample(FashionMnist):
    """A share of Fashion-MNIST."""

    def __init__(self, model: str, batch_size: int, adapted: Mapping[str, np.ndarray] | None = None) -> None:
        self._adapted = adapted
        super().__init__(model.removesuffix("-adapters"))
        self.batch_size = batch_size
        self._held_out = MODELS[model][3]

    def model(self) -> nn.Module:
        """The model, or the trained one in `adapted` with adapters in its linear layers."""
        model = super().model()
        if self._adapted is None:
            return model
        load_weights(model, self._adapted)
        return with_adapters(model, RANK)

    def data(self, path: Path | None) -> tuple[Dataset[Any], Dataset[Any] | None]:
        train, held_out = super().data(path)
        assert isinstance(train, TensorDataset)
        assert isinstance(held_out, TensorDataset)
        return _first(train, TRAINING), _first(held_out, self._held_out) if self._held_out else None


def _first(examples: TensorDataset, count: int) -> TensorDataset:
    return TensorDataset(*(tensor[:count].clone() for tensor in examples.tensors))


def plan_of(model: str, text: str) -> LocalModelPlan:
    *_, part, last = MODELS[model]
    return LocalModelPlan.from_toml(text.replace("PART", part).replace("LAST", last))


def trainer_of(model: str, batch_size: int, adapted: Mapping[str, np.ndarray] | None = None) -> TorchTrainer:
    torch.set_num_threads(1)
    return TorchTrainer(Sample(model, batch_size, adapted), TaskSetup(device="cpu"))


def warm_up(model: str, path: Path) -> None:
    """Write the weights that every device is given."""
    batch_size, _, steps, *_ = MODELS[model]
    trainer = trainer_of(model, batch_size)
    result = trainer.train(trainer.initial_weights(), TrainJob(epochs=99, max_steps=steps, seed=7))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(result.weights), path)


def measure(model: str, text: str, path: Path, batch_size: int, steps: int) -> dict[str, Any]:
    """Train one task of a plan in this process."""
    plan = plan_of(model, text)
    start = load_file(path)
    adapted = start if model.endswith("-adapters") else None
    trainer = trainer_of(model, batch_size, adapted)
    start = start if adapted is None else dict(trainer.initial_weights())
    channels = trainer.channels()
    given = sub_model(start, channels, plan)
    stamps: list[float] = []
    local = None if plan.plain else plan
    trainer.train(_copied(given), TrainJob(max_steps=1, local_model=local))
    forget_peak_memory()
    job = TrainJob(epochs=99, max_steps=steps, seed=1, local_model=local)
    result = trainer.train(_copied(given), replace(job, report=lambda *_: stamps.append(time.process_time())))
    peak = peak_memory_bytes()
    accuracy = result.metrics.get("local_accuracy")
    if accuracy is None:
        scores = trainer.evaluate(result.weights)
        accuracy = None if scores is None else scores.metrics["accuracy"]
    layout = layout_of(start, trainer.layout())
    frozen = {spec.name for spec in layout if spec.role is TensorRole.CONSTANT}
    elements = elements_of(plan, {spec.name: spec.shape for spec in layout}, channels, frozen)
    assert elements.step is not None
    return {
        "step_s": statistics.median(np.diff(stamps)),
        "peak": peak,
        "tensors": result.tensor_bytes,
        "down": download_bytes(given, plan, layout),
        "up": payload_bytes(update(given, result, plan, frozen)),
        "accuracy": accuracy,
        "elements": [elements.own, elements.sent, elements.whole, elements.trained],
        "step": [elements.step.time, elements.step.kept],
    }


def _copied(weights: Weights) -> Weights:
    return {name: array.copy() for name, array in weights.items()}


def sub_model(weights: Weights, channels: ChannelMap, plan: LocalModelPlan) -> Weights:
    kept = channels.select(plan.sub_model(0), weights)
    return {
        name: kept.coverage(name, its.shape).take(its).copy() for name, its in weights.items() if kept.has(name)
    }


def update(given: Weights, result: TrainResult, plan: LocalModelPlan, frozen: Collection[str]) -> Weights:
    """What is sent of the trained weights, as it is packed."""
    start = given if result.start is None else result.start
    sent: dict[str, np.ndarray] = {}
    for name, array in result.weights.items():
        if name not in frozen and not plan.is_kept_back(name):
            sent |= pack(name, array - start[name], result.masks.get(name), name in result.clustered)
    return sent


def download_bytes(given: Weights, plan: LocalModelPlan, known: Layout) -> int:
    """Bytes of the first pull of the plan's model, without what the device would leave out of it."""
    own = layout_of(given, known)
    reduction = Reduction.of(plan)
    reduced = dict(ReducedTensors(given, reduction, given.keys()))
    return payload_bytes(reduced, reduced_recipe(Recipe.parse(RECIPE), own, reduction), own)


def payload_bytes(weights: Weights, recipe: Recipe | None = None, layout: Layout = ()) -> int:
    recipe = recipe or Recipe.parse(RECIPE)
    return write_payload(weights, recipe, io.BytesIO(), np.random.default_rng(0), layout).size_bytes


@contextmanager
def limited(device: DeviceClass | None) -> Iterator[Path | None]:
    """A control group with the memory of the device; None where there may be none."""
    group = Path(f"/sys/fs/cgroup/memory/fedgrpc-techniques-{os.getpid()}")
    if device is None:
        yield None
        return
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(device.memory_bytes))
        with suppress(OSError):  # without accounting of swap there is no such file
            (group / "memory.memsw.limit_in_bytes").write_text(str(device.memory_bytes))
        yield group
    finally:
        group.rmdir()


def run_cell(model: str, text: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own. A killed one has no figures but `killed`."""
    command = [sys.executable, "-m", "tools.bench.techniques", "--cell", model, text, str(asked.start)]
    if asked.batch:
        command += ["--batch", str(asked.batch)]
    if asked.steps:
        command += ["--steps", str(asked.steps)]
    with limited(DEVICES.get(asked.device)) as group:

        def enter() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=enter, check=False)
    if ended.returncode == -9:
        return {"killed": True}
    if ended.returncode < 0:
        raise RuntimeError(f"the process of {model}, {text!r} ended by signal {-ended.returncode}")
    if ended.returncode:
        return {"refused": ended.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def measure_all(asked: argparse.Namespace) -> None:
    """Append a line of JSON to the file for each cell that it has not yet."""
    done = {(line["model"], line["plan"], line["device"]) for line in read(asked.out)}
    for model in asked.model or MODELS:
        path = asked.start / f"{model}.safetensors"
        if not path.exists():
            warm_up(model, path)
        for group, degree, text in OWN_CELLS.get(model, CELLS):
            if (model, text, asked.device) in done or (asked.only and asked.only not in group):
                continue
            found = run_cell(model, text, asked)
            line = {"model": model, "group": group, "degree": degree, "plan": text, "device": asked.device}
            with asked.out.open("a") as file:
                file.write(json.dumps({**line, **found}) + "\n")
            print(model, group, degree, found, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def observation(line: Mapping[str, Any]) -> tuple[Observation, PlanSize]:
    """The cell as a planner sees it, and the size of its plan."""
    own, sent, whole, trained = line["elements"]
    plan = plan_of(line["model"], line["plan"])
    size = PlanElements(plan, own, sent, whole, trained, StepShares(*line["step"])).size(8.0, 8.0)
    seen = Observation(
        size.share, size.weights_bytes, 0, line["step_s"], 0, 0, 0, line["peak"], line["tensors"], 0.0, plan
    )
    return replace(seen, technique=size.technique, step=size.step), size


def show(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of each model."""
    for model in dict.fromkeys(line["model"] for line in lines):
        mine = [line for line in lines if line["model"] == model]
        # A whole model that was killed predicts nothing.
        history = [observation(mine[0])[0]] if "step_s" in mine[0] else []
        heads = ("ms a step", "predicted", "peak MB", "predicted", "tensors MB", "down kB", "up kB", "accuracy")
        print(f"\n| {model} | | {' | '.join(heads)} |")
        print("| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |")
        for line in mine:
            name = f"| {line['group']} | {line['degree']} |"
            if "step_s" not in line:
                print(name, "killed" if line.get("killed") else "refused: no blocks", "| | | | | | | |")
                continue
            seen, size = observation(line)
            wanted = predict(DeviceLimits(), history, size)
            accuracy = f"{100 * line['accuracy']:.1f}" if scored(line) else ""
            cells = [
                f"{1000 * seen.local_s:.1f}",
                "" if wanted.local_s is None else f"{1000 * wanted.local_s:.1f}",
                f"{seen.peak_memory_bytes / 1e6:.0f}",
                f"{wanted.peak_memory_bytes / 1e6:.0f}",
                f"{seen.tensor_bytes / 1e6:.1f}",
                f"{line['down'] / 1e3:.1f}",
                f"{line['up'] / 1e3:.1f}",
                accuracy,
            ]
            print(name, " | ".join(cells), "|")


def scored(line: Mapping[str, Any]) -> bool:
    """Whether a cell has trained long enough for its accuracy to say something."""
    return line.get("accuracy") is not None and line["group"] != "emulated" and MODELS[line["model"]][3] > 0


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy against the tensors' bytes, a panel for each model."""
    from matplotlib import ticker  # the cells are to be without its memory

    lines = [line for line in lines if scored(line)]
    models = list(dict.fromkeys(line["model"] for line in lines))
    groups = list(dict.fromkeys(line["group"] for line in lines))
    figure, panels = new_figure(len(models), 5.5 * len(models), 5.4)
    for model, panel in zip(models, panels, strict=True):
        for place, group in enumerate(groups):
            mine = [line for line in lines if (line["model"], line["group"]) == (model, group)]
            panel.plot(
                [line["tensors"] / 1e6 for line in mine],
                [100 * line["accuracy"] for line in mine],
                linestyle="none",
                marker=MARKERS[place % len(MARKERS)],
                markersize=8,
                color=COLOURS[place % len(COLOURS)],
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.set_title(f"{model}: each point is a technique and a degree")
        panel.set_xlabel("tensors of a training step, MB")
    panels[0].set_ylabel("accuracy of the local model, %")
    # The first panel has but some of the groups: the legend has all.
    for place, group in enumerate(groups):
        look = {"marker": MARKERS[place % len(MARKERS)], "color": COLOURS[place % len(COLOURS)]}
        panels[0].plot([], [], linestyle="none", label=group, **look)
    legend_below(figure, panels[0], 7)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help="lines of JSON, one for each technique; kept ones are not repeated"
    )
    parser.add_argument("--start", type=Path, default=Path("/tmp/techniques"), help="folder of the given weights")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--only", help="techniques with this in their name")
    parser.add_argument("--device", choices=["", *DEVICES], default="", help="whose memory is the limit")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--show", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.cell:
        model, text, start = asked.cell
        steps = FEW if plan_of(model, text).emulated else asked.steps or MODELS[model][1]
        path = Path(start) / f"{model}.safetensors"
        print(json.dumps(measure(model, text, path, asked.batch or MODELS[model][0], steps)))
    elif asked.show:
        show(read(asked.show))
        if asked.plot:
            plot(read(asked.show), asked.plot)
    else:
        measure_all(asked)


if __name__ == "__main__":
    main()
