"""A task's outcome as an update: its payload, its header, and the layers that stay on the device.

TRAIN         payload: what training changed (fedgrpc.worker.delta), plus the residual where it is lossy
INITIALIZE    payload: the initial weights themselves
EVALUATE      no payload: scores of the given weights

Personal layers are trained here and never sent (FedPer, arXiv 1912.00818). They are stored with the update that
they were trained with, or not at all.

An encoding may have a budget of bytes:

    entropy:budget=150000    that many
    entropy:budget=link      what this worker's link carries in the time left: rate * seconds * 0.8

A budget makes an update coarser and never stops it. An update that cannot keep to it is sent at the coarsest step,
with a line in the log.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import structlog

from fedgrpc.aggregation.admission import sum_of_squares
from fedgrpc.aggregation.scaling import clip_scale
from fedgrpc.codec.budget import fit
from fedgrpc.codec.entropy import LINK, Entropy
from fedgrpc.codec.feedback import Corrected, Keep, Residual, write_with_feedback
from fedgrpc.codec.layout import Array, Layout, TensorRole, layout_of, spec_of, told_layout
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.values import InParts, part_of, pieces
from fedgrpc.process import peak_memory_bytes
from fedgrpc.protocol.secure import MASKED
from fedgrpc.protocol.tasks import Task
from fedgrpc.protocol.updates import report_to_proto
from fedgrpc.rounds.history import Timings
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.task_context import Report
from fedgrpc.storage.residual_file import read_residual, write_residual
from fedgrpc.submodels.channels import ChannelMap
from fedgrpc.trainer import EvalResult, Weights
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.delta import Delta, PartialDelta, Scaled
from fedgrpc.worker.spool import Fill

# The rest of what the link carries is for encoding, syncing and a link that is slower this time.
_SHARE: Final = 0.8

# Returns the masked vector, uint8, of the differences of an update with so many examples.
Masked = Callable[[Mapping[str, Array], int, np.random.Generator], Array]

log = structlog.get_logger()


@dataclass(frozen=True)
class Outcome:
    """The result of the local work. `weights` are trained, initial, or None for scores alone.

    `start`, `masks`, `clustered`, `tensor_bytes` and `noise_ratio` are those of `TrainResult`; `layout` is that of
    initial weights. `kept` replaces what the run's algorithm keeps on this device; None: it stays.
    """

    weights: Weights | None
    example_count: int
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: EvalResult | None = None
    start: Weights | None = None
    masks: Weights = field(default_factory=dict)
    clustered: Collection[str] = ()
    channels: ChannelMap | None = None
    tensor_bytes: int = 0
    layout: Layout = ()
    noise_ratio: float = 0.0
    kept: Weights | None = None


def update_of(
    task: Task,
    worker: str,
    given: Weights,
    outcome: Outcome,
    residual: Residual,
    began: Began,
    layout: Layout = (),
    masked: Masked | None = None,
    peak_bytes: Callable[[], int] = peak_memory_bytes,
) -> Fill:
    """Return the function with which the spool writes the update and the residual it leaves behind.

    `masked` makes the vector of a secure sum of it; None: it travels as it is. `peak_bytes` returns the most
    memory that the task has taken.
    `given` are the weights as they were pulled, `layout` is the run's layout of them. The trainer may have changed
    the arrays that it was handed, so do not pass those.
    """

    def fill(payload: BinaryIO, keep: Keep) -> tuple[aggregator_pb2.UpdateHeader, Layout | None]:
        delta = _delta_of(task, given, layout, outcome)
        manifest, left = _write(task, worker, given, layout, outcome, delta, residual, payload, keep, masked)
        unchanged = task.kind is TaskKind.TRAIN and _left_as_it_was(outcome, given, layout)
        if unchanged:
            log.warning("training changed nothing", round=task.round, steps=outcome.steps)
        metrics = task.metrics or task.kind is not TaskKind.TRAIN
        report = _report(outcome, began.timings(), peak_bytes(), unchanged, metrics)
        if masked is not None:
            # The weight is in the sum, and what would tell of it stays here.
            report = replace(report, example_count=1, steps=1, noise_ratio=0.0, unchanged=False)
        elif isinstance(delta, Scaled):
            report = replace(report, clipped=delta.factor < 1)
        return report_to_proto(report, task.token, worker, manifest, outcome.channels), left

    return fill


def _left_as_it_was(outcome: Outcome, given: Weights, layout: Layout) -> bool:
    """Return whether training changed no parameter."""
    start = given if outcome.start is None else outcome.start
    others = {spec.name for spec in layout if spec.role is not TensorRole.PARAMETER}
    trained = (outcome.weights or {}).items()
    return all(np.array_equal(array, start[name]) for name, array in trained if name not in others)


@dataclass(frozen=True)
class Began:
    """Start of the local work on the monotonic clock, after a download of `download_s` seconds."""

    download_s: float
    local_at_s: float

    def timings(self) -> Timings:
        """Return the times until now. The aggregator measures the upload."""
        return Timings(download_s=self.download_s, local_s=time.monotonic() - self.local_at_s)


def _write(
    task: Task,
    worker: str,
    given: Weights,
    known: Layout,
    outcome: Outcome,
    delta: Delta | Scaled | None,
    residual: Residual,
    payload: BinaryIO,
    keep: Keep,
    masked: Masked | None = None,
) -> tuple[Manifest, Layout | None]:
    recipe = Recipe.parse(task.upload_recipe or "raw")
    draw = partial(np.random.default_rng, (task.seed, task.round, zlib.crc32(worker.encode())))
    if outcome.weights is None:
        return write_payload({}, recipe, payload, draw()), None
    if delta is None:
        return write_payload(outcome.weights, recipe, payload, draw(), outcome.layout), None
    start = given if outcome.start is None else outcome.start
    recipe = recipe.for_layout(told_layout(start, known))
    if masked is not None:
        # No error feedback: rounding is right in the mean, and the residual would tell of the update.
        vector = masked(delta, outcome.example_count, draw())
        return write_payload({MASKED: vector}, Recipe.parse("raw"), payload, draw()), None
    sent = PartialDelta(delta, outcome.masks, outcome.clustered, task.is_kept_back)
    if outcome.masks or task.sub_model.moves:
        # No error feedback: the next update covers other coordinates, which this one's loss does not concern.
        return write_payload(sent, fitted(recipe, sent, known, task, draw), payload, draw(), known), None
    names = set(sent)
    kept = tuple(spec for spec in delta.layout if spec.name in names)
    layout = layout_of(sent, known) if outcome.clustered else kept
    recipe = fitted(recipe, Corrected(sent, residual, layout), known, task, draw)
    return write_with_feedback(sent, residual, recipe, payload, draw(), layout, keep)[0], layout


def _delta_of(task: Task, given: Weights, known: Layout, outcome: Outcome) -> Delta | Scaled | None:
    """Return what training has changed, clipped where the task asks for it; None for any other work."""
    if outcome.weights is None or task.kind is TaskKind.INITIALIZE:
        return None
    delta = Delta(outcome.weights, given if outcome.start is None else outcome.start, known, given)
    if delta.changed_constants:
        log.warning("constants changed by training stay as they are", tensors=delta.changed_constants)
    return delta if task.clip_norm is None else clipped(delta, delta.layout, task.clip_norm)


def clipped(delta: Mapping[str, Array], layout: Layout, bound: float) -> Scaled:
    """Return the differences, scaled down to an L2 norm of `bound` over all trained tensors (arXiv 1710.06963)."""
    square = 0.0
    for spec in layout:
        part = part_of(delta, spec.name)
        square += sum(sum_of_squares(part(each.start, each.stop)) for each in pieces(spec.size) if spec.is_trained)
    return Scaled(delta, layout, clip_scale(math.sqrt(square), bound))


def _report(outcome: Outcome, timings: Timings, peak_bytes: int, unchanged: bool, metrics: bool = True) -> Report:
    if not metrics:
        # An update counts as one device, whatever it has: the rest would tell of its data.
        return Report(1, 1, {}, {}, 0, timings, peak_memory_bytes=peak_bytes)
    scores = outcome.scores or EvalResult(0, {})
    return Report(
        example_count=outcome.example_count,
        steps=outcome.steps,
        metrics=outcome.metrics,
        evaluation_metrics=scores.metrics,
        evaluation_example_count=scores.example_count,
        timings=timings,
        peak_memory_bytes=peak_bytes,
        tensor_bytes=outcome.tensor_bytes,
        unchanged=unchanged,
        scores_not_finite=frozenset(scores.not_finite),
        noise_ratio=outcome.noise_ratio,
    )


def load_personal_layers(given: Weights, path: Path, run: str, is_personal: Callable[[str], bool]) -> Weights:
    """Return `given` with the personal layers that the file `path` keeps in place of its own, where they fit.

    The first round starts personal layers from the model's own values.
    """
    if not any(map(is_personal, given)):
        return given
    kept = read_residual(path, run).tensors
    fits = {
        name: array
        for name, array in kept.items()
        if name in given and is_personal(name) and spec_of(name, array) == spec_of(name, given[name])
    }
    return Replaced(given, fits) if isinstance(given, InParts) else {**given, **fits}


class Replaced(Mapping[str, Array]):
    """Tensors of `base`, of which some are read elsewhere. Others stay unread until they are asked for."""

    def __init__(self, base: Weights, others: Weights) -> None:
        self._base = base
        self._others = others
        self.layout = told_layout(base)

    def __getitem__(self, name: str) -> Array:
        return self._others[name] if name in self._others else self._base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def personal_layers_writer(
    trained: Weights, run: str, is_personal: Callable[[str], bool]
) -> Callable[[Path], None] | None:
    """Return a function that writes the personal layers of `trained` to a file; None where there are none."""
    own = {name: array for name, array in trained.items() if is_personal(name)}
    return partial(write_residual, residual=Residual(layout_of(own), own), run=run) if own else None


def kept_writer(kept: Weights | None, run: str) -> Callable[[Path], None] | None:
    """Return a function that writes what an algorithm keeps to a file; None where that does not change."""
    if kept is None:
        return None
    return partial(write_residual, residual=Residual(layout_of(kept), kept), run=run)


def budget_bytes(budget: str, task: Task, now_s: float) -> float | None:
    """Return the most bytes a payload may take; None: no bound is known. `now_s` is of the monotonic clock."""
    if budget != LINK:
        return float(budget)
    if task.deadline_s is None or not task.uplink_bytes_per_second:
        return None
    return _SHARE * task.uplink_bytes_per_second * max(0.0, task.deadline_s - now_s)


def fitted(
    recipe: Recipe,
    tensors: Mapping[str, Array],
    known: Layout,
    task: Task,
    draw: Callable[[], np.random.Generator],
) -> Recipe:
    """Return `recipe` with the finest step that fits its budget; unchanged without a budget.

    `tensors` will be encoded with the random numbers that `draw` gives; `known` is as in `layout_of`.
    """
    if not recipe.budget:
        return recipe
    most_bytes = budget_bytes(recipe.budget, task, time.monotonic())
    if most_bytes is None:
        reason = "a deadline or the rate of this link is not known"
        log.info("update without a budget", round=task.round, reason=reason)
        return recipe.without_budget()
    found = fit(tensors, recipe, most_bytes, draw, known)
    assert isinstance(found.recipe.default, Entropy)
    about = {"round": task.round, "c": found.recipe.default.c, "bytes": found.size_bytes}
    if found.size_bytes > most_bytes:
        log.warning("update over its budget", **about, budget_bytes=int(most_bytes))
    else:
        log.info("update fitted to its budget", **about, budget_bytes=int(most_bytes))
    return found.recipe
