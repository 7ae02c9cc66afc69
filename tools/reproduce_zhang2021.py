"""Reproduce figures 2, 3 and 4 of Zhang (2021, arXiv 2105.14675), and go on to the formats that it planned.

The experiment is that of the paper's section 6: two Gaussian classes of 5 features, means -1 and 1, sigma 1; five
hidden layers of ten sigmoid units; gradient descent on the full batch of 500 to 2,000 samples; a validation set of
1,000 samples of each class; 20 runs.

    python tools/reproduce_zhang2021.py --out docs/images/zhang2021

The rule: what is compared is interleaved. Each run trains all formats and sizes in turn, and a ratio of times is
the median over runs of the ratio within a run. Times are CPU time of the one thread that trains, which on an idle
machine is the time that passes. Each part is written to results.json when it is done; --part asks for some.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Before torch is imported: its profiler would tell of each epoch that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan
from fedgrpc.torch.local_model.formats import parse_format
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.models.small import sigmoid_mlp
from fedgrpc.torch.optimizer import MomentumSgd

SAMPLES = (500, 1000, 1500, 2000)
# The size at which the paper tells its milliseconds and megabytes.
COMPARED = 1000
# Emulated arithmetic makes scoring slow, and no curve of it is drawn.
_SCORE_EVERY = 5
VALIDATION = 2000
# The paper does not give these three here: the rate, the momentum, and Xavier's weights with sigmoid's own gain.
LEARNING_RATE, MOMENTUM, GAIN = 0.5, 0.9, 4.0
REACHED = 0.95

Plans = Mapping[str, LocalModelPlan]
Report = Callable[[str], None]


def _format(name: str, rounding: str = "nearest", **more: Any) -> LocalModelPlan:
    return LocalModelPlan(arithmetic=Arithmetic(name, rounding, **more))


PAPER_FORMATS: Plans = {"float64": _format("float64"), "float32": LocalModelPlan()}
PLANNED_FORMATS: Plans = {
    "float32": LocalModelPlan(),
    "float24": _format("float24"),
    "float16": _format("float16", emulated=True),
    "bfloat16": _format("bfloat16", emulated=True),
    "float16, native": _format("float16"),
    "bfloat16, native": _format("bfloat16"),
    "fixed16.10, stochastic": _format("fixed16.10", "stochastic"),
    "fixed12.8, stochastic": _format("fixed12.8", "stochastic"),
    "fixed8.5, stochastic": _format("fixed8.5", "stochastic"),
    "float8_e4m3fn, stochastic": _format("float8_e4m3fn", "stochastic"),
    "float8_e5m2, stochastic": _format("float8_e5m2", "stochastic"),
}


@dataclass(frozen=True)
class Run:
    """One training: CPU milliseconds of each epoch, and the validation accuracy after it."""

    epoch_ms: tuple[float, ...]
    accuracy: tuple[float, ...]

    @property
    def usual_ms(self) -> float:
        """The median epoch, which the first one's preparations do not move."""
        return statistics.median(self.epoch_ms)

    @property
    def epochs_to_reach(self) -> int | None:
        """The first epoch with an accuracy of `REACHED`."""
        return next((epoch for epoch, value in enumerate(self.accuracy, 1) if value >= REACHED), None)


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `count` samples, half of each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    return torch.randn(count, 5, generator=generator) + (2 * labels - 1)[:, None], labels


def sharpened(module: nn.Module) -> nn.Module:
    """Set Xavier's weights times `GAIN`: through five layers of sigmoids, torch's own barely learn."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter, gain=GAIN)
        else:
            nn.init.zeros_(parameter)
    return module


class Training:
    """Full-batch gradient descent of one local model, from the seed's weights and samples."""

    def __init__(self, plan: LocalModelPlan, count: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.local = LocalModel(sharpened(sigmoid_mlp()), plan, seed)
        inputs, self._labels = samples(count, seed)
        self._inputs = inputs.to(self.local.dtype)
        self._parameters = list(self.local.module.parameters())
        self._optimizer = MomentumSgd(self._parameters, LEARNING_RATE, MOMENTUM, 0.0)

    def epoch(self) -> None:
        """Take the step of one pass over all samples."""
        for parameter in self._parameters:
            parameter.grad = None
        loss = functional.cross_entropy(self.local(self._inputs), self._labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    @property
    def held_bytes(self) -> int:
        """Bytes of samples and weights, which an epoch finds there."""
        held = (self._inputs, self._labels, *self._parameters)
        return sum(tensor.untyped_storage().nbytes() for tensor in held)


def train(plan: LocalModelPlan, count: int, seed: int, epochs: int, score_every: int = 1) -> Run:
    """Train, and score after every so many epochs, outside of their time. In between, the last score stands."""
    training = Training(plan, count, seed)
    validation = samples(VALIDATION, seed + 10_000)
    times, accuracies = [], []
    with training.local.arithmetic():
        for epoch in range(1, epochs + 1):
            begun_s = time.thread_time()
            training.epoch()
            times.append(1000 * (time.thread_time() - begun_s))
            due = epoch == 1 or epoch % score_every == 0
            accuracies.append(score(training.local, *validation) if due else accuracies[-1])
    return Run(tuple(times), tuple(accuracies))


@torch.no_grad()
def score(local: LocalModel, inputs: Tensor, labels: Tensor) -> float:
    """Return the share of samples told right, counted in integers, which no format rounds."""
    return int((local(inputs).argmax(1) == labels).sum()) / len(labels)


def peak_bytes(plan: LocalModelPlan, count: int, epochs: int) -> list[int]:
    """Return, for each epoch, the most bytes of tensors alive at once, by torch's own allocator.

    Sizes do not depend on values: one seed stands for all.
    """
    training = Training(plan, count, 0)
    live, peaks = training.held_bytes, []
    with training.local.arithmetic():
        for _ in range(epochs):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
                training.epoch()
            peak = live
            for event in sorted(_memory_events(profiled), key=lambda event: event.start_ns()):
                live += event.nbytes()
                peak = max(peak, live)
            peaks.append(peak)
    return peaks


def _memory_events(profiled: Any) -> list[Any]:
    events = profiled.profiler.kineto_results.events()
    return [event for event in events if event.name() == "[memory]"]


def accuracy_curve(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Return the mean of the runs' accuracies, by epoch."""
    return {
        "middle": [
            round(statistics.fmean(values), 4) for values in zip(*(run.accuracy for run in runs), strict=True)
        ]
    }


def time_curve(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Return the median and the quartiles of the runs' milliseconds, by epoch."""
    # Twice the values: a single run has quartiles, too.
    by_epoch = [
        statistics.quantiles(values * 2, n=4, method="inclusive")
        for values in zip(*(run.epoch_ms for run in runs), strict=True)
    ]
    columns = dict(zip(("low", "middle", "high"), zip(*by_epoch, strict=True), strict=True))
    return {name: [round(value, 3) for value in values] for name, values in columns.items()}


def summary(runs: Sequence[Run], base: Sequence[Run], memory: Sequence[int]) -> dict[str, Any]:
    """Return the figures of one plan; `base` are the runs of the same seeds that times are compared with."""
    reached = [run.epochs_to_reach for run in runs if run.epochs_to_reach is not None]
    ratios = [run.usual_ms / other.usual_ms for run, other in zip(runs, base, strict=True)]
    return {
        "epoch_ms": round(statistics.median(run.usual_ms for run in runs), 3),
        "time_ratio": round(statistics.median(ratios), 2),
        "peak_bytes": max(memory),
        "accuracy": round(statistics.fmean(run.accuracy[-1] for run in runs), 4),
        "epochs_to_reach": round(statistics.fmean(reached), 1) if reached else None,
        "runs_that_reached": len(reached),
    }


def by_samples(asked: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Figures 2 and 3: both formats of the paper at each number of samples."""
    runs: dict[tuple[str, int], list[Run]] = {}
    for seed in range(asked.runs):
        for count in SAMPLES:
            for name, plan in PAPER_FORMATS.items():
                runs.setdefault((name, count), []).append(train(plan, count, seed, asked.epochs))
        report(f"by samples: run {seed + 1} of {asked.runs}")
    rows = {}
    for (name, count), trained in runs.items():
        memory = peak_bytes(PAPER_FORMATS[name], count, 3)
        rows[f"{name}/{count}"] = summary(trained, runs["float32", count], memory)
        if name == "float32":
            rows[f"{name}/{count}"]["accuracy_by_epoch"] = accuracy_curve(trained)
    return rows


def by_epoch(asked: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Figure 4: both formats, each training in a process of its own, whose first epoch is a first one indeed."""
    runs: dict[str, list[Run]] = {name: [] for name in PAPER_FORMATS}
    with ProcessPoolExecutor(1, get_context("spawn"), _one_thread, max_tasks_per_child=1) as processes:
        for seed in range(asked.runs):
            for name, plan in PAPER_FORMATS.items():
                runs[name].append(processes.submit(train, plan, COMPARED, seed, asked.epochs).result())
            report(f"by epoch: run {seed + 1} of {asked.runs}")
    rows = {}
    for name, plan in PAPER_FORMATS.items():
        memory = peak_bytes(plan, COMPARED, asked.epochs)
        rows[name] = {
            **summary(runs[name], runs["float32"], memory),
            "accuracy_by_epoch": accuracy_curve(runs[name]),
            "ms_by_epoch": time_curve(runs[name]),
            "peak_bytes_by_epoch": memory,
        }
    return rows


def by_format(asked: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Measure the formats that the paper planned at 1,000 samples, each beside float32."""
    runs: dict[str, list[Run]] = {name: [] for name in PLANNED_FORMATS}
    for seed in range(asked.runs):
        for name, plan in PLANNED_FORMATS.items():
            runs[name].append(train(plan, COMPARED, seed, asked.epochs, _SCORE_EVERY))
        report(f"by format: run {seed + 1} of {asked.runs}")
    rows = {}
    for name, plan in PLANNED_FORMATS.items():
        rows[name] = summary(runs[name], runs["float32"], peak_bytes(plan, COMPARED, 3))
        if plan.arithmetic is not None:
            rows[name]["bits"] = parse_format(plan.arithmetic.format).bits
    return rows


PARTS: Mapping[str, Callable[[argparse.Namespace, Report], dict[str, Any]]] = {
    "samples": by_samples,
    "epochs": by_epoch,
    "formats": by_format,
}


def table(rows: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Write the rows of one part as a Markdown table."""
    yield "| | ms | against float32 | peak MB | accuracy | epochs to 95 % | runs that got there |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, row in rows.items():
        yield (
            f"| {name} | {row['epoch_ms']:.2f} | {row['time_ratio']:.2f} | {row['peak_bytes'] / 1e6:.2f} "
            f"| {row['accuracy']:.3f} | {row['epochs_to_reach'] or 'never'} | {row['runs_that_reached']} |"
        )


# Okabe and Ito's colours, which colour-blind eyes tell apart; lines differ in style, too.
_STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"))
_PAPER_MS = {"float64": 31.2, "float32": 25.3}
_PAPER_MB = {"float64": 1.7, "float32": 1.2}


def plot(results: Mapping[str, Any], folder: Path) -> None:
    """Draw the figures whose parts are measured, numbered as in the paper."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    )
    drawings = (("samples", 2, 1, _figure2), ("samples", 3, 2, _figure3), ("epochs", 4, 3, _figure4))
    for part, number, columns, draw in (*drawings, ("formats", "formats", 3, _formats)):
        if part in results:
            figure, axes = pyplot.subplots(1, columns, figsize=(4.2 * columns + 1, 3.8), layout="constrained")
            draw(figure, axes, results[part]["rows"], results[part]["runs"])
            name = f"figure{number}" if isinstance(number, int) else number
            figure.savefig(folder / f"{name}.png", dpi=110)
            pyplot.close(figure)


def _figure2(figure: Any, axes: Any, rows: Any, runs: int) -> None:
    for count, style in zip(SAMPLES, _STYLES, strict=False):
        _draw_curve(axes, rows[f"float32/{count}"]["accuracy_by_epoch"], style, f"{count:,} samples", band=False)
    axes.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0.45, 1.0))
    axes.legend(loc="lower right")
    figure.suptitle(f"Figure 2. Validation accuracy by epoch (mean of {runs} runs)", fontsize=10)


def _figure3(figure: Any, axes: Any, rows: Any, runs: int) -> None:
    for (name, paper_ms), (colour, line) in zip(_PAPER_MS.items(), _STYLES, strict=False):
        own = [rows[f"{name}/{count}"] for count in SAMPLES]
        axes[0].plot(
            SAMPLES, [row["epoch_ms"] for row in own], line, color=colour, marker="o", label=f"{name}, ours"
        )
        axes[1].plot(SAMPLES, [row["peak_bytes"] / 1e6 for row in own], line, color=colour, marker="o")
        axes[1].plot(COMPARED, _PAPER_MB[name], "D", mfc="none", color=colour, label=f"{name}, paper")
        axes[0].plot([], [], "D", mfc="none", color=colour, label=f"{name}, paper: {paper_ms} ms at {COMPARED:,}")
    axes[0].set(xlabel="samples", ylabel="ms per epoch", ylim=(0, None), title="(a) time")
    axes[1].set(xlabel="samples", ylabel="peak memory of tensors, MB", ylim=(0, 2), title="(b) memory")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    figure.suptitle(f"Figure 3. Time and memory of an epoch by samples (medians of {runs} runs)", fontsize=10)


def _figure4(figure: Any, axes: Any, rows: Any, runs: int) -> None:
    accuracy, duration, memory = axes
    for (name, row), style in zip(rows.items(), _STYLES, strict=False):
        colour, line = style
        _draw_curve(accuracy, row["accuracy_by_epoch"], style, name, band=False)
        _draw_curve(duration, row["ms_by_epoch"], style, f"{name}, ours")
        duration.axhline(_PAPER_MS[name], color=colour, linestyle=line, alpha=0.5)
        peaks = [peak / 1e6 for peak in row["peak_bytes_by_epoch"]]
        memory.plot(range(1, len(peaks) + 1), peaks, line, color=colour, label=f"{name}, ours")
        memory.axhline(_PAPER_MB[name], color=colour, linestyle=line, alpha=0.5)
    texts = {"ha": "right", "fontsize": 8, "color": "#333333"}
    end = len(peaks)
    duration.text(end, 34, "paper: 31.2 (float64) and 25.3 ms", va="bottom", **texts)
    for name, megabytes in _PAPER_MB.items():
        memory.text(end, megabytes + 0.02, f"paper: {megabytes} MB ({name})", va="bottom", **texts)
    accuracy.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0.45, 1.0), title="(a) accuracy")
    duration.set(xlabel="epoch", ylabel="ms per epoch", yscale="log", ylim=(None, 100), title="(b) time")
    memory.set(xlabel="epoch", ylabel="peak memory of tensors, MB", ylim=(0, 2), title="(c) memory")
    accuracy.legend(loc="lower right", fontsize=8)
    duration.legend(loc="center right", fontsize=8)
    memory.legend(loc="center right", fontsize=8, bbox_to_anchor=(1, 0.45))
    figure.suptitle(f"Figure 4. float64 against float32 by epoch, {COMPARED:,} samples ({runs} runs)", fontsize=10)


def _formats(figure: Any, axes: Any, rows: Any, runs: int) -> None:
    names = list(rows)[::-1]
    bars = (
        ("accuracy", "accuracy after the last epoch", lambda row: row["accuracy"], "{:.3f}"),
        ("time", "time of an epoch, float32 = 1", lambda row: row["time_ratio"], "{:.1f}"),
        ("memory", "peak memory of tensors, MB", lambda row: row["peak_bytes"] / 1e6, "{:.2f}"),
    )
    for column, (title, label, value_of, text) in enumerate(bars):
        values = [value_of(rows[name]) for name in names]
        drawn = axes[column].barh(names, values, color=_STYLES[column][0], height=0.7)
        axes[column].bar_label(drawn, [text.format(value) for value in values], padding=2, fontsize=8)
        axes[column].set(title=f"({'abc'[column]}) {title}", xlabel=label)
        axes[column].margins(x=0.2)
        axes[column].grid(axis="y", visible=False)
        axes[column].tick_params(labelsize=8, labelleft=column == 0)
    axes[0].set_xlim(0.4, 1.1)
    axes[1].set(xscale="log", xlim=(0.5, 4 * max(row["time_ratio"] for row in rows.values())))
    figure.suptitle(f"Formats that the paper planned, {COMPARED:,} samples ({runs} runs)", fontsize=10)


def _draw_curve(axes: Any, curve: Any, style: tuple[str, str], label: str, band: bool = True) -> None:
    colour, line = style
    epochs = range(1, len(curve["middle"]) + 1)
    axes.plot(epochs, curve["middle"], line, color=colour, label=label)
    if band:
        axes.fill_between(epochs, curve["low"], curve["high"], color=colour, alpha=0.12, linewidth=0)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json and the plots")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this part; repeat. Without: all")
    parser.add_argument("--draw", action="store_true", help="measure nothing: draw results.json again")
    asked = parser.parse_args()
    if asked.runs < 1 or asked.epochs < 1:
        parser.error("--runs and --epochs are 1 or more")
    _one_thread()
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in () if asked.draw else asked.part or PARTS:
        rows = PARTS[part](asked, lambda line: print(line, flush=True))
        results[part] = {"runs": asked.runs, "epochs": asked.epochs, "rows": rows}
        path.write_text(json.dumps(results) + "\n")
    for part, result in results.items():
        print(f"\n{part}: {result['runs']} runs of {result['epochs']} epochs\n", *table(result["rows"]), sep="\n")
    plot(results, asked.out)


if __name__ == "__main__":
    _main()
