"""Committing a round: a pure function of the base model and the accepted update files.

The rule: a group of tensors at a time, updates in slot order. So memory is that of the groups in hand, whatever
the model and the number of updates; the same updates give the same bits in whatever order they arrived; and a
process that died half-way leaves nothing to repair, since the next one computes the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from fedgrpc.aggregation.channels import Selection
from fedgrpc.aggregation.compression_plan import CompressionPlan
from fedgrpc.aggregation.coverage import CoordinateMean
from fedgrpc.aggregation.merged import add_merged
from fedgrpc.aggregation.packed import coverage_of, unpack
from fedgrpc.aggregation.precision import rounding_noise, say
from fedgrpc.aggregation.server_optimizer import ServerOptimizer
from fedgrpc.aggregator.model_file import ModelFile, ModelWriter
from fedgrpc.aggregator.uploads import Fill, StoredUpdate, UpdateFile
from fedgrpc.codec.layout import Layout, TensorSpec
from fedgrpc.errors import UpdateRefused
from fedgrpc.spares import SpareFiles

_GROUP_ELEMENTS = 1 << 20
_PIECE = 1 << 15
_CACHED_MANIFESTS = 64
_MOST_OPEN = 64
# More would fight for the interpreter: a piece is too little work to share.
_THREADS = 1

T = TypeVar("T")
Group = range
Load = Callable[[str], StoredUpdate]
Stepped = list[tuple[np.ndarray, tuple[np.ndarray, ...]]]


@dataclass(frozen=True)
class Formats:
    """The number formats in which an update was trained, by its plan, and in how many steps."""

    plan: CompressionPlan
    steps: int

    def noise(self, spec: TensorSpec, values: np.ndarray) -> np.ndarray | None:
        """As `rounding_noise`, of the part of a tensor that the update covers."""
        return rounding_noise(self.plan, spec.name, values, self.steps, len(spec.shape))


@dataclass(frozen=True)
class Commit:
    """What a new version is made of. `updates` are (token, weight) in slot order; `load` finds a token's file.

    `parts` names the tokens whose updates are of a part of the model, and the slice (None: all channels) of each;
    `merged` those whose updates are means themselves, and what such an update says that it weighs. `scales` are
    factors on the differences of an update; without: 1. `formats` names those whose say falls with their noise.
    A coordinate that no update covers keeps its value, and the optimizer what it remembers of it.
    """

    base: ModelFile
    memory: ModelFile | None
    optimizer: ServerOptimizer
    updates: Sequence[tuple[str, float]]
    load: Load
    spares: SpareFiles | None = None
    parts: Mapping[str, Selection | None] = field(default_factory=dict)
    merged: Mapping[str, float] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    formats: Mapping[str, Formats] = field(default_factory=dict)

    @property
    def memory_layout(self) -> Layout:
        """What the optimizer keeps: `memory_count` float32 tensors for each float tensor of the model."""
        return tuple(
            TensorSpec(f"{part}/{spec.name}", "float32", spec.shape)
            for spec in self.base.layout
            if spec.is_float
            for part in range(self.optimizer.memory_count)
        )

    def write(self, model_path: Path, memory_path: Path) -> bytes:
        """Write the new version, and the optimizer's memory if it has any; returns the model's SHA-256.

        Raises `StorageError`, `CodecError` when a file is not what was accepted, and `UpdateRefused` when what the
        updates make of the model is not finite.
        """
        memory_layout = self.memory_layout
        with ModelWriter(model_path, self.base.layout, self.spares) as model:
            if not memory_layout:
                for values, _ in self._tensors():
                    model.add(values)
                return model.finish()
            with ModelWriter(memory_path, memory_layout) as memory:
                for values, parts in self._tensors():
                    model.add(values)
                    for part in parts:
                        memory.add(part)
                memory.finish()
            return model.finish()

    def _tensors(self) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
        load = cached(self.load)
        for stepped in by_groups(self.base.layout, lambda group: self._step(group, load)):
            yield from stepped

    def _step(self, group: Group, load: Load) -> Stepped:
        """New values and optimizer memory of each tensor of the group.

        Float tensors are differences to the base; all others are values, whose weighted mean is rounded.
        """
        with ExitStack() as stack:
            if (plain := self._plain(group, load, stack)) is not None:
                return plain
        specs = [self.base.layout[index] for index in group]
        base = {self.base.layout[index].name: self.base.tensor(index) for index in group if self.formats}
        means = means_of(specs, self.updates, load, self.parts, self.merged, self.scales, self.formats, base)
        stepped: Stepped = []
        for index, spec, mean in zip(group, specs, means, strict=True):
            if mean.covers_nothing:
                stepped.append((self.base.tensor(index), self._memory_of(spec)))
            elif spec.is_float:
                delta, where = mean.result().reshape(-1), mean.untouched
                untouched = None if where is None else where.reshape(-1)
                stepped.append(self._step_floats(index, delta.__getitem__, untouched))
            else:
                values = np.rint(mean.result())
                if (untouched := mean.untouched) is not None:
                    values[untouched] = self.base.tensor(index)[untouched]
                stepped.append((values, ()))
        return stepped

    def _plain(self, group: Group, load: Load, stack: ExitStack) -> Stepped | None:
        """The same where all of the group are floats that lie in the files as they are; None where not.

        A piece of every update at a time: what is in hand fits the cache, and no memory is taken for more.
        """
        specs = [self.base.layout[index] for index in group]
        if self.parts or self.merged or len(self.updates) > _MOST_OPEN or not all(s.is_float for s in specs):
            return None
        files = [UpdateFile(load(token)) for token, _ in self.updates]
        for file in files:
            stack.callback(file.close)
        weights = [weight for _, weight in self.updates]
        stepped: Stepped = []
        for index, spec in zip(group, specs, strict=True):
            fills = [fill for file in files if (fill := file.fill_from(spec.name)) is not None]
            if len(fills) < len(files) or not sum(weights) > 0:
                return None
            stepped.append(self._step_floats(index, RawMean(fills, weights, spec.numpy_dtype).piece))
        return stepped

    def _step_floats(
        self, index: int, mean_of: Callable[[slice], np.ndarray], untouched: np.ndarray | None = None
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """One optimizer step of float tensor `index`, in pieces that fit the cache: optimizers are elementwise.

        `mean_of` gives a piece of the mean update, flat and float64.
        """
        spec, base = self.base.layout[index], self.base.tensor(index)
        memory = self._memory_of(spec)
        values, kept = np.empty_like(base), tuple(np.empty_like(part) for part in memory)
        old, new = base.reshape(-1), values.reshape(-1)
        for start in range(0, spec.size, _PIECE):
            piece = slice(start, min(start + _PIECE, spec.size))
            wide = old[piece].astype(np.float64)
            before = tuple(part.reshape(-1)[piece].astype(np.float64) for part in memory)
            stepped, after = self.optimizer.step(wide, mean_of(piece), before)
            if untouched is not None:
                stepped[untouched[piece]] = wide[untouched[piece]]
                after = tuple(map(partial(_keep_where, untouched[piece]), before, after))
            new[piece] = _finite(spec, stepped, spec.numpy_dtype)
            for part, its in zip(kept, after, strict=True):
                part.reshape(-1)[piece] = _finite(spec, its, np.dtype(np.float32))
        return values, kept

    def _memory_of(self, spec: TensorSpec) -> tuple[np.ndarray, ...]:
        count = self.optimizer.memory_count if spec.is_float else 0
        if self.memory is None:
            return tuple(np.zeros(spec.shape, np.float32) for _ in range(count))
        return tuple(self.memory.named(f"{part}/{spec.name}") for part in range(count))


class RawMean:
    """The weighted mean of float tensors that lie in files, a piece at a time: `CoordinateMean` bit for bit."""

    def __init__(self, fills: Sequence[Fill], weights: Sequence[float], dtype: np.dtype) -> None:
        self._fills, self._weights = fills, weights
        self._values = np.empty(_PIECE, dtype)
        self._sum, self._scratch = np.empty(_PIECE), np.empty(_PIECE)

    def piece(self, piece: slice) -> np.ndarray:
        """Those elements of the mean, float64, until the next call. Raises `StorageError`."""
        count = piece.stop - piece.start
        values, total, scratch = self._values[:count], self._sum[:count], self._scratch[:count]
        total[:] = 0
        for fill, weight in zip(self._fills, self._weights, strict=True):
            fill(values, piece.start)
            total += np.multiply(values, weight, out=scratch, dtype=np.float64)
        total /= sum(self._weights)
        return total


def means_of(
    specs: Sequence[TensorSpec],
    updates: Sequence[tuple[str, float]],
    load: Load,
    parts: Mapping[str, Selection | None],
    merged: Mapping[str, float],
    scales: Mapping[str, float] = MappingProxyType({}),
    formats: Mapping[str, Formats] = MappingProxyType({}),
    base: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> list[CoordinateMean]:
    """The mean of each of these tensors over the updates, all of them as `Commit` has them."""
    means = [CoordinateMean(spec.shape) for spec in specs]
    for token, weight in updates:
        with load(token).open() as reader:
            for spec, mean in zip(specs, means, strict=True):
                # What is not a difference but a value stays what it is.
                scale = scales.get(token, 1.0) if spec.is_float else 1.0
                if token in merged:
                    add_merged(mean, spec, reader.names, reader.tensor, merged[token], weight, scale)
                elif token not in parts:
                    mean.add(reader.tensor(spec.name), weight, scale=scale)
                elif spec.name in reader.names:
                    whole = coverage_of(spec, parts[token])
                    values, coverage = unpack(spec.name, reader.names, reader.tensor, whole)
                    noise = None
                    if token in formats and spec.is_float:
                        noise = formats[token].noise(spec, coverage.take(base[spec.name]))
                    if noise is None:
                        mean.add(values, weight, coverage, scale=scale)
                    else:
                        mean.add_each(values, weight * say(noise, values), coverage, scale=scale)
    return means


def cached(load: Load) -> Load:
    """`load`, with the manifests of the last updates kept: every group of tensors asks for all of them."""
    return lru_cache(maxsize=_CACHED_MANIFESTS)(load)


def by_groups(layout: Layout, work: Callable[[Group], T]) -> Iterator[T]:
    """What `work` makes of each group of tensors, in order, one group ahead in a thread."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="commit") as pool:
        pending: deque[Future[T]] = deque()
        for group in groups(layout):
            pending.append(pool.submit(work, group))
            if len(pending) > _THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _keep_where(untouched: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    after[untouched] = before[untouched]
    return after


def _finite(spec: TensorSpec, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`values` as `dtype`. Raises `UpdateRefused` when it cannot hold them: no round could go on."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.isfinite(cast).all():
        raise UpdateRefused(f"the new values of tensor {spec.name!r} would not be finite in {dtype.name}")
    return cast


def groups(layout: Layout) -> Iterator[Group]:
    """Consecutive tensors, about a million elements together, or one larger tensor alone."""
    start = size = 0
    for index, spec in enumerate(layout):
        if size and size + spec.size > _GROUP_ELEMENTS:
            yield range(start, index)
            start, size = index, 0
        size += spec.size
    if start < len(layout):
        yield range(start, len(layout))
