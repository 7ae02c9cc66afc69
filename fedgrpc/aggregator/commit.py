"""Commit of a round: a pure function of the base model and the accepted update files.

The rule: a group of tensors at a time, updates in slot order. Memory is that of two groups, whatever the model and
the number of updates. The same updates give the same bits, in whatever order they arrived. A process that died
half-way leaves nothing to repair: the next one computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np

from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.aggregation.server_optimizer import ServerOptimizer
from fedgrpc.aggregator.fold import PIECE, Fold, Load, cached, means_of
from fedgrpc.aggregator.robust_merge import Combined, combined
from fedgrpc.aio import BackgroundThread
from fedgrpc.algorithms.companions import suffix_of
from fedgrpc.codec.layout import Layout, TensorRole, TensorSpec
from fedgrpc.errors import NotFinite
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.files import RecycledFiles
from fedgrpc.storage.model_file import ModelFile, ModelWriter

# Larger groups take more memory. Smaller ones cost more: each is a hop to the thread, and opens every update once
# where tensors are not folded.
_GROUP_ELEMENTS = 1 << 20
# A single tensor may be far larger than a group. It is stepped and written in spans.
_SPAN_ELEMENTS = 1 << 20

S = TypeVar("S")
T = TypeVar("T")
Group = range
# New values, flat or not, and optimizer state.
Stepped = tuple[np.ndarray, tuple[np.ndarray, ...]]
# noise(name, start, count): added to these elements of a mean, float64; the same however they are cut.
Noise = Callable[[str, int, int], np.ndarray]
# mean(start, stop)
Mean = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class Span:
    """Elements `start` to `stop` of tensor number `index`, perhaps on into those behind it (`Fold.goes_on`)."""

    index: int
    start: int
    stop: int

    def cut(self) -> Iterator[Span]:
        """Yield the same in pieces of `_SPAN_ELEMENTS`."""
        # A tensor without elements is still a tensor of the file, and so one span.
        for start in range(self.start, max(self.stop, self.start + 1), _SPAN_ELEMENTS):
            yield Span(self.index, start, min(start + _SPAN_ELEMENTS, self.stop))


@dataclass(frozen=True)
class ModelCommit:
    """Sources of a new version: a base, and the updates of `merge`, whose files `load` finds by token.

    `about` is for the metadata of the model's file. A coordinate that no update covers keeps its value, and the
    optimizer what it remembers of it. `by_suffix`: optimizers of companion tensors, and by "" the one that an
    algorithm has in place of `optimizer`. `noise` is added to the mean of every trained tensor, covered or not.
    `starts`: models of workers are mixed in, and these are the versions that they started from, with the share of
    each model in the new version (`fedgrpc.algorithms.fedasync`).
    """

    base: ModelFile
    optimizer_state: ModelFile | None
    optimizer: ServerOptimizer
    merge: Merge
    load: Load
    recycled: RecycledFiles | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    by_suffix: Mapping[str, ServerOptimizer] = field(default_factory=dict)
    noise: Noise | None = None
    starts: Sequence[tuple[float, ModelFile]] = ()

    @property
    def state_layout(self) -> Layout:
        """Layout of the optimizer's state: `state_count` float32 tensors for each trained tensor of the model."""
        return tuple(
            TensorSpec(f"{part}/{spec.name}", "float32", spec.shape)
            for spec in self.base.layout
            if spec.is_trained
            for part in range(self._optimizer_of(spec).state_count)
        )

    def _optimizer_of(self, spec: TensorSpec) -> ServerOptimizer:
        return self.by_suffix.get(suffix_of(spec.name, self.by_suffix), self.optimizer)

    def write(self, model_path: Path, state_path: Path) -> bytes:
        """Write the new version, and the optimizer's state if it has any; returns the model's SHA-256.

        Raises `StorageError`, `UnusableUpdate` when an update is not what was accepted, and `NotFinite` when what
        the updates make of the model is not finite.
        """
        state_layout = self.state_layout
        # A writer that an error leaves without `finish` removes its file.
        with ModelWriter(model_path, self.base.layout, self.recycled, about=self.about) as model:
            if not state_layout:
                for values, _ in self._stepped():
                    model.add(values)
                return model.finish()
            with ModelWriter(state_path, state_layout) as state:
                for values, parts in self._stepped():
                    model.add(values)
                    for part in parts:
                        state.add(part)
                # The state first. A version whose optimizer state is missing would start the optimizer over.
                state.finish()
            return model.finish()

    def _stepped(self) -> Iterator[Stepped]:
        load = cached(self.load)
        # A fold adds whole tensors, element by element. Partial updates and means need a weight for each element.
        updates = tuple(self.merge.weights.items()) if self.merge.alike else ()
        with Fold(updates, load, self.merge.scales) as fold:
            for stepped in ahead(self._spans(fold), lambda spans: self._step(spans, load, fold)):
                yield from stepped

    def _spans(self, fold: Fold) -> Iterator[list[Span]]:
        """Yield the model in pieces of work. Tensors are joined and cut where nothing needs each of them whole."""
        # State is stored by tensor, so its tensors are read and written whole.
        whole = bool(self.state_layout)
        for group in groups(self.base.layout):
            spans = [Span(index, 0, self.base.layout[index].size) for index in group]
            if whole:
                yield spans
                continue
            # Noise is drawn by tensor.
            spans = spans if self.noise is not None else self._joined(spans, fold)
            # Only a single span of a fold may be cut: a mean by coordinates is computed of whole tensors.
            if len(spans) > 1 or not fold.covers(self.base.layout[group[0]]):
                yield spans
            else:
                yield from ([span] for span in spans[0].cut())

    def _joined(self, spans: Sequence[Span], fold: Fold) -> list[Span]:
        """Join the spans of tensors that a fold takes in one call: most tensors are small."""
        joined: list[Span] = []
        first, stop = spans[0].index, 0
        for before, after in pairwise(spans):
            stop += before.stop
            specs = self.base.layout[before.index], self.base.layout[after.index]
            if not fold.goes_on(*specs) or self._optimizer_of(specs[0]) is not self._optimizer_of(specs[1]):
                joined.append(Span(first, 0, stop))
                first, stop = after.index, 0
        return [*joined, Span(first, 0, stop + spans[-1].stop)]

    def _step(self, spans: Sequence[Span], load: Load, fold: Fold) -> list[Stepped]:
        """Return new values and optimizer state of each span.

        Trained tensors are differences to the base. All others are values, which no optimizer steps on.
        """
        # All at once, since each update is opened once for all of them.
        means = self._means([s.index for s in spans if not fold.covers(self.base.layout[s.index])], load)
        stepped: list[Stepped] = []
        for span in spans:
            spec = self.base.layout[span.index]
            if span.index not in means:
                stepped.append(self._step_floats(span, partial(fold.mean, spec), fold.step))
            elif means[span.index].covers_nothing and spec.is_trained and self.noise is not None:
                stepped.append(self._step_floats(span, lambda start, stop: np.zeros(stop - start), PIECE))
            # Nobody has trained it, or may: base and state stay as they are, bit for bit.
            elif means[span.index].covers_nothing or spec.role is TensorRole.CONSTANT:
                stepped.append((self.base.tensor(span.index), self._state_of(spec)))
            elif spec.is_trained:
                delta, where = means[span.index].result().reshape(-1), means[span.index].untouched
                untouched = None if where is None else where.reshape(-1)
                stepped.append(
                    self._step_floats(span, lambda start, stop: delta[start:stop], PIECE, untouched)  # noqa: B023
                )
            else:
                stepped.append((self._replaced(span.index, means[span.index]), ()))
        return stepped

    def _means(self, indices: Sequence[int], load: Load) -> dict[int, CoordinateMean | Combined]:
        """Return the means of the tensors with these numbers, or what a rule makes of those that are trained."""
        if self.merge.means is not None:
            # Of what is not trained, constants alone, a secure sum says nothing.
            known = self.merge.means
            summed = {index: self.base.layout[index] for index in indices}
            return {
                index: Combined(known[spec.name] if spec.name in known else np.full(spec.shape, np.nan))
                for index, spec in summed.items()
            }
        ruled = [index for index in indices if self.merge.combine and self.base.layout[index].is_trained]
        found: dict[int, CoordinateMean | Combined] = {
            index: combined(self.base.layout[index], self.merge, load) for index in ruled
        }
        if averaged := [index for index in indices if index not in found]:
            specs = [self.base.layout[index] for index in averaged]
            found.update(zip(averaged, means_of(specs, self.merge, load, self.base.named), strict=True))
        return found

    def _replaced(self, index: int, mean: CoordinateMean | Combined) -> np.ndarray:
        """Return the mean as the new value: it is within the values of the updates, and so in their domain."""
        spec, result = self.base.layout[index], mean.result()
        # Counters, indices and masks know whole numbers only.
        if spec.role is not TensorRole.STATISTIC or not spec.is_float:
            result = np.rint(result)
        elif self.starts:
            before, share = self.base.tensor(index), sum(share for share, _ in self.starts)
            result = before + share * (result - before)
        values = _cast(result, spec.numpy_dtype)
        if (untouched := mean.untouched) is not None:
            values[untouched] = self.base.tensor(index)[untouched]
        return values

    def _step_floats(self, span: Span, mean_of: Mean, step: int, untouched: np.ndarray | None = None) -> Stepped:
        """Take one optimizer step of a span, in pieces that fit the cache: optimizers are elementwise.

        `mean_of` gives a piece of the mean update, flat and float64, best `step` elements at a time.
        """
        spec, old = self.base.layout[span.index], self.base.part(span.index, span.start, span.stop)
        state, optimizer = self._state_of(spec), self._optimizer_of(spec)
        new, kept = np.empty_like(old), tuple(np.empty_like(part) for part in state)
        # The part of the mean update that is known now, and the element of the span at which it begins.
        delta, delta_at = np.empty(0), 0
        for at in range(0, old.size, PIECE):
            piece = slice(at, min(at + PIECE, old.size))
            # `mean_of` may give more than a piece at a time: files that are opened for each call are opened less.
            if piece.stop > delta_at + delta.size:
                delta, delta_at = mean_of(span.start + at, min(span.start + at + step, span.stop)), at
            # The step is in float64, and so a piece at a time: a wide copy of all would double the memory.
            wide = old[piece].astype(np.float64)
            before = tuple(part.reshape(-1)[piece].astype(np.float64) for part in state)
            mean = delta[at - delta_at : piece.stop - delta_at]
            if self.noise is not None:
                mean = mean + self.noise(spec.name, span.start + at, mean.size)
            for share, start in self.starts:
                # x + a (x_tau + difference - x): what the difference is to is not where the step begins.
                began = start.part(span.index, span.start + piece.start, span.start + piece.stop)
                mean = mean + share * (began - wide)
            stepped, after = optimizer.step(wide, mean, before)
            # An optimizer with momentum would also move what no update covers.
            if untouched is not None:
                stepped[untouched[piece]] = wide[untouched[piece]]
                after = tuple(map(partial(_keep_where, untouched[piece]), before, after))
            new[piece] = self._finite(span, at, stepped, spec.numpy_dtype)
            for part, new_state in zip(kept, after, strict=True):
                part.reshape(-1)[piece] = self._finite(span, at, new_state, np.dtype(np.float32))
        return new, kept

    def _finite(self, span: Span, at: int, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Return `values`, which begin at element `at` of a span, as `dtype`.

        Raises `NotFinite` when it cannot hold them: no round could continue.
        """
        # Checked after the cast, in which a finite float64 may overflow.
        with np.errstate(over="ignore"):
            cast = values.astype(dtype)
        finite = np.isfinite(cast)
        if not finite.all():
            # A joined span runs over several tensors, and the one to blame is named.
            name = self._name_at(span.index, span.start + at + int(finite.argmin()))
            raise NotFinite(f"the new values of tensor {name!r} would not be finite in {dtype.name}", tensor=name)
        return cast

    def _name_at(self, index: int, element: int) -> str:
        """Return the name of the tensor with this element, counted from the start of tensor number `index`."""
        while element >= self.base.layout[index].size:
            element -= self.base.layout[index].size
            index += 1
        return self.base.layout[index].name

    def _state_of(self, spec: TensorSpec) -> tuple[np.ndarray, ...]:
        count = self._optimizer_of(spec).state_count if spec.is_trained else 0
        if self.optimizer_state is None:
            # The first commit, or the first after another optimizer was chosen.
            return tuple(np.zeros(spec.shape, np.float32) for _ in range(count))
        return tuple(self.optimizer_state.named(f"{part}/{spec.name}") for part in range(count))


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return means of values of that dtype as that dtype."""
    # float64 has no 2**63 - 1 and rounds it up to 2**63, which would wrap to the lowest int64.
    if dtype == np.int64:
        values = np.minimum(values, np.nextafter(2.0**63, 0))
    return values.astype(dtype)


def by_groups(layout: Layout, work: Callable[[Group], T]) -> Iterator[T]:
    """Yield what `work` makes of each group of tensors, in order, one group ahead in a thread."""
    return ahead(groups(layout), work)


def ahead(items: Iterable[S], work: Callable[[S], T]) -> Iterator[T]:
    """Yield the results of `work` on each item, in order, one item ahead in a thread if there is more than one.

    More threads would only compete for the interpreter: the work on an item is too small to share.
    """
    rest = iter(items)
    # A small model is one item, and not worth starting a thread.
    first = list(islice(rest, 2))
    if len(first) < 2:
        yield from map(work, first)
        return
    with BackgroundThread[T]("commit") as thread:
        for item in chain(first, rest):
            yield from thread.make_room()
            thread.submit(work, item)
        yield from thread.results()


def _keep_where(untouched: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    after[untouched] = before[untouched]
    return after


def groups(layout: Layout) -> Iterator[Group]:
    """Yield consecutive tensors, about a million elements together, or one larger tensor alone."""
    start = size = 0
    for index, spec in enumerate(layout):
        if size and size + spec.size > _GROUP_ELEMENTS:
            yield range(start, index)
            start, size = index, 0
        size += spec.size
    if start < len(layout):
        yield range(start, len(layout))
