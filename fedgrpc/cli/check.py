"""`fedgrpc check`: try a learning task on this machine: two steps, one evaluation, and the way to the aggregator.

exit code 0     the task can take part in a run; remarks say what looks like a mistake
          1     its code raised: the traceback is on standard error
          2     the task, its data or its model cannot be used
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import structlog

from fedgrpc.aggregator.first_model import complaint
from fedgrpc.claims import printable
from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.learning_task import MODEL_SETTINGS, trainer_of
from fedgrpc.cli.options import AS_JSON, Declare, SettingsCommand
from fedgrpc.cli.small_devices import remarks_on, threads_in_use
from fedgrpc.codec.layout import Layout
from fedgrpc.codec.payload import PayloadReader, buffer_reader, write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import TaskError, UsageError
from fedgrpc.process import forget_peak_memory, peak_memory_bytes, use_threads
from fedgrpc.trainer import Trainer, TrainJob, TrainResult, Weights, local_examples
from fedgrpc.words import scores, seconds, size
from fedgrpc.worker.guarded_trainer import first_weights, users_traceback

_what = Declare("What to try")


@dataclass
class Findings:
    """Results of the checks, as lines for people and values for programs; `remarks` look like mistakes."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    small_devices: list[str] = field(default_factory=list)

    def note(self, what: str, text: str, **values: Any) -> None:
        """Note one thing that was tried."""
        self.lines.append((what, text))
        self.values[what.replace(" ", "_")] = values


def _run(**values: Any) -> None:
    # What a worker would log is said here in lines of its own.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    if values["threads"] is not None:
        use_threads(values["threads"])
    findings = Findings()
    try:
        _check(values, findings)
    except TaskError as error:
        if error.__cause__ is not None:
            click.echo(users_traceback(error.__cause__), err=True, nl=False)
        raise
    finally:
        _show(findings, values["as_json"])


def _show(findings: Findings, as_json: bool) -> None:
    if as_json:
        remarks = {"remarks": findings.remarks, "small_devices": findings.small_devices}
        click.echo(json_text({**findings.values, **remarks}))
        return
    width = max((len(what) for what, _ in findings.lines), default=0)
    for what, text in findings.lines:
        click.echo(printable(f"{what:<{width}}  {text}"))
    for remark in findings.remarks:
        click.echo(printable(f"remark: {remark}"))
    for remark in findings.small_devices:
        click.echo(printable(f"on a small device: {remark}"))


def _check(values: Mapping[str, Any], findings: Findings) -> None:
    with _timed() as loading:
        trainer = trainer_of(values)
        weights, layout = first_weights(trainer)
    if wrong := complaint(layout):
        raise UsageError(f"the model of {values['task']} cannot be used: {wrong}")
    size_bytes = sum(spec.nbytes for spec in layout)
    findings.note(
        "model",
        f"{len(layout)} tensors, {size(size_bytes)}, built in {seconds(loading.s)}",
        tensors=len(layout),
        size_bytes=size_bytes,
        seconds=loading.s,
    )
    if (examples := local_examples(trainer)) is not None:
        findings.note("data", f"{examples.count} examples to train on", examples=examples.count)
    result = _try_training(trainer, weights, findings)
    _try_scoring(trainer, weights, findings)
    findings.small_devices = list(remarks_on(trainer, layout, findings.values["one_step"]["peak_memory_bytes"]))
    recipes = (
        ("model sent", values["download"], weights),
        ("update sent", values["upload"], _update(weights, result)),
    )
    for what, recipe, tensors in recipes:
        _try_travel(what, Recipe.parse(recipe), tensors, layout, findings)


def _try_training(trainer: Trainer, weights: Weights, findings: Findings) -> TrainResult:
    # The first step loads libraries and allocates buffers for all later ones.
    trainer.train(_copy(weights), TrainJob(max_steps=1))
    forget_peak_memory()
    with _timed() as step:
        result = trainer.train(_copy(weights), TrainJob(max_steps=1))
    peak = peak_memory_bytes()
    told, threads = scores(result.metrics), threads_in_use()
    threads_text = f" with {threads} thread{'s' * (threads != 1)}" if threads else ""
    findings.note(
        "one step",
        f"{seconds(step.s)}{threads_text}, {size(peak)} of memory at most" + (f", {told}" if told else ""),
        seconds=step.s,
        peak_memory_bytes=peak,
        threads=threads,
        metrics=dict(result.metrics),
    )
    if result.steps != 1:
        findings.remarks.append(
            f"one step was asked for and {result.steps} were done: does train use job.batches, or heed max_steps?"
        )
    if all(np.array_equal(result.weights[name], weights[name]) for name in weights):
        findings.remarks.append("training left every tensor as it was: is the optimizer's step called?")
    if bad := [name for name, array in result.weights.items() if not _finite(array)]:
        findings.remarks.append(f"after one step {bad[0]!r} is not finite: try a smaller learning rate")
    again = trainer.train(_copy(weights), TrainJob(max_steps=1))
    if any(not np.array_equal(result.weights[name], again.weights[name]) for name in result.weights):
        findings.remarks.append("the same step gives another result: use job.seed, so that a run can be repeated")
    return result


def _try_scoring(trainer: Trainer, weights: Weights, findings: Findings) -> None:
    given = _copy(weights)
    with _timed() as scoring:
        found = trainer.evaluate(given)
    if found is None:
        findings.note("evaluation", "no held-out data on this device: its versions get no score from here")
        return
    findings.note(
        "evaluation",
        f"{seconds(scoring.s)}, {scores(found.metrics)} on {found.example_count} examples",
        seconds=scoring.s,
        metrics=dict(found.metrics),
        examples=found.example_count,
    )
    if any(not np.array_equal(given[name], weights[name]) for name in weights):
        findings.remarks.append("evaluate changes the weights that it is given: score a copy")
    if found.not_finite:
        findings.remarks.append(f"the score {found.not_finite[0]!r} is not finite")


def _try_travel(what: str, recipe: Recipe, tensors: Weights, layout: Layout, findings: Findings) -> None:
    """Encode and decode tensors as they travel."""
    raw_bytes, file = sum(spec.nbytes for spec in layout), io.BytesIO()
    with _timed() as encoding:
        manifest = write_payload(tensors, recipe.for_layout(layout), file, np.random.default_rng(0), layout)
    with _timed() as decoding:
        decoded = {spec.name: array for spec, array in PayloadReader(manifest, buffer_reader(file.getbuffer()))}
    error = max((_error(tensors[name], decoded[name]) for name in decoded), default=0.0)
    findings.note(
        what,
        f"{size(manifest.size_bytes)} as {recipe}, {manifest.size_bytes / max(1, raw_bytes):.0%} of raw; error at "
        f"most {error:.2g}; written in {seconds(encoding.s)}, read in {seconds(decoding.s)}",
        recipe=str(recipe),
        size_bytes=manifest.size_bytes,
        largest_error=error,
        encode_seconds=encoding.s,
        decode_seconds=decoding.s,
    )


def _update(weights: Weights, result: TrainResult) -> Weights:
    """Return what travels of a training: differences of floats, and all else as it is."""
    return {
        name: (after - weights[name]).astype(after.dtype) if _is_float(after) else after
        for name, after in result.weights.items()
    }


def _error(before: np.ndarray, after: np.ndarray) -> float:
    if not _is_float(before) or not before.size:
        return 0.0
    return float(np.abs(before.astype(np.float64) - after.astype(np.float64)).max())


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _finite(array: np.ndarray) -> bool:
    return not _is_float(array) or bool(np.isfinite(array.astype(np.float64)).all())


def _copy(weights: Weights) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in weights.items()}


@dataclass
class _Timing:
    s: float = 0.0


@contextmanager
def _timed() -> Iterator[_Timing]:
    timing, begun = _Timing(), time.perf_counter()
    yield timing
    timing.s = time.perf_counter() - begun


CHECK = SettingsCommand(
    "check",
    _run,
    [
        *MODEL_SETTINGS,
        _what("--download", "Recipe of models.", type=str, default="int8+zstd", metavar="RECIPE"),
        _what("--upload", "Recipe of updates.", type=str, default="int8+zstd", metavar="RECIPE"),
        _what("--threads", "CPU threads to train with; without: as a worker.", type=click.IntRange(1)),
        AS_JSON,
    ],
    "Try a learning task on this machine: steps, scores, memory, time, and what travels.",
)
