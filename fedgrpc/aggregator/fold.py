"""Means of tensors over the updates of one commit.

    means_of    where updates differ in what they cover, are or may say: one update after the other
    Fold        what all updates cover whole: a piece of every update at a time, several times as fast

The rule: what is in hand fits the cache, whatever the number and size of updates. The same updates in slot order
give the same bits, however the work is cut. A fold gives those of `fedgrpc.aggregation.mean.TensorMean`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import TypeVar

import numpy as np

from fedgrpc.aggregation.mean import CoordinateMean
from fedgrpc.aggregation.partial_aggregate import add_partial_aggregate
from fedgrpc.aggregation.partial_update import coverage_of, unpack
from fedgrpc.aggregation.spread import Spread
from fedgrpc.codec.layout import TensorSpec
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import in_pieces, neighbours
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.values import Fill
from fedgrpc.errors import blaming
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.update_file import StoredUpdate, UpdateFile
from fedgrpc.submodels.coverage import Coverage

# 256 KiB of float64: the pieces of the sum and of an update fit the second-level cache.
PIECE = 1 << 15
# Each open file may hold a megabyte, inflated or read ahead; one whose tensors are read in place holds nothing.
_MOST_OPEN = 8
_MOST_OPEN_PLAIN = 64
# Every group of tensors asks for all manifests. Those of a thousand updates may take gigabytes.
_CACHED_MANIFESTS = 64

Load = Callable[[str], StoredUpdate]
T = TypeVar("T")


class Fold:
    """Context manager over the updates of one commit, (token, weight) in slot order. One thread uses it.

    A second thread inflates what comes next of each of a few updates. That is work in large pieces, during which
    the first has the interpreter to itself.
    """

    def __init__(self, updates: Sequence[tuple[str, float]], load: Load, scales: Mapping[str, float]) -> None:
        self._updates, self._load = updates, load
        self._factors = [weight * scales.get(token, 1.0) for token, weight in updates]
        # Scales shorten an update and leave its weight: the sum is divided by the weights alone.
        self._total = sum(weight for _, weight in updates)
        # Without any weight there is no mean, and nothing is covered.
        manifests = [load(token).manifest for token, _ in updates] if self._total > 0 else []
        self._names = _in_all(manifests, lambda one: {each.spec.name for each in one.entries if in_pieces(each)})
        self._neighbours = _in_all(manifests, neighbours)
        self._open: list[UpdateFile] = []
        self._filling: tuple[str, list[Fill]] = ("", [])
        # The same files are read for each tensor. A few stay open, and with many each is opened in turn.
        plain = all(map(_in_place, manifests))
        self._kept = len(updates) <= (_MOST_OPEN_PLAIN if plain else _MOST_OPEN)
        self._sum, self._scratch = np.empty(0), np.empty(PIECE)
        self._inflating = ThreadPoolExecutor(1, thread_name_prefix="inflate")

    def __enter__(self) -> Fold:
        return self

    def __exit__(self, *_: object) -> None:
        # Waits for what runs: the thread reads the files that are closed next.
        self._inflating.shutdown(cancel_futures=True)
        for file in self._open:
            file.close()

    def covers(self, spec: TensorSpec) -> bool:
        """Return whether the mean of this tensor can be had here."""
        return spec.is_trained and spec.name in self._names

    def goes_on(self, spec: TensorSpec, after: TensorSpec) -> bool:
        """Return whether `mean` of the one tensor can continue into the other, as if they were one."""
        return self.covers(spec) and self.covers(after) and (spec.name, after.name) in self._neighbours

    @property
    def step(self) -> int:
        """Number of elements to ask for at a time; files that do not stay open are opened for each `mean`."""
        return PIECE if self._kept else 1 << 62

    def mean(self, spec: TensorSpec, start: int, stop: int) -> np.ndarray:
        """Return these elements of the mean, flat and float64, valid until the next call. Raises as reading does.

        They may lie beyond the end of the tensor, in those behind it, as far as it `goes_on`.
        """
        if self._sum.size < stop - start:
            self._sum = np.empty(stop - start)
        total = self._sum[: stop - start]
        total[:] = 0
        # In slot order, whatever the order of arrival: sums of floats depend on it.
        values = np.empty(min(total.size, PIECE), spec.numpy_dtype)
        for (token, _), (fill, factor) in zip(self._updates, self._sources(spec.name), strict=True):
            with blaming(token):
                self._add(total, fill, factor, start, values)
        total /= self._total
        return total

    def _add(self, total: np.ndarray, fill: Fill, factor: float, start: int, values: np.ndarray) -> None:
        """Add an update's elements from `start` on to the sum; `values` is room for a piece of them."""
        for at in range(0, total.size, PIECE):
            piece = total[at : at + PIECE]
            elements, scratch = values[: piece.size], self._scratch[: piece.size]
            fill(elements, start + at)
            # float32 times a factor in float64, as `TensorMean` does it: the two have to agree bit for bit.
            piece += np.multiply(elements, factor, out=scratch, dtype=np.float64)

    def _sources(self, name: str) -> Iterable[tuple[Fill, float]]:
        """Return the reader of that tensor in each update, and its factor."""
        if not self._kept:
            return self._opened_in_turn(name)
        # A long tensor is asked for in many pieces, one after the other.
        if self._filling[0] != name:
            self._filling = (name, list(self._fills(name)))
        return zip(self._filling[1], self._factors, strict=True)

    def _fills(self, name: str) -> Iterator[Fill]:
        for (token, _), file in zip(self._updates, self._files(), strict=True):
            with blaming(token):
                fill = file.fill_from(name)
            yield fill

    def _files(self) -> list[UpdateFile]:
        if not self._open:
            for token, _ in self._updates:
                self._open.append(self._load(token).open(self._inflating.submit))
        return self._open

    def _opened_in_turn(self, name: str) -> Iterator[tuple[Fill, float]]:
        for (token, _), factor in zip(self._updates, self._factors, strict=True):
            file = self._load(token).open()
            try:
                with blaming(token):
                    fill = file.fill_from(name)
                yield fill, factor
            finally:
                file.close()


def _in_all(manifests: Iterable[Manifest], find: Callable[[Manifest], set[T]]) -> set[T]:
    """Return what all of them have. Most updates of a run list the very same tensors, which are read once."""
    alike = {(id(manifest.entries), manifest.compression): manifest for manifest in manifests}
    found = [find(manifest) for manifest in alike.values()]
    return set.intersection(*found) if found else set()


def _in_place(manifest: Manifest) -> bool:
    return manifest.compression == "none" and all(entry.encoding == Raw() for entry in manifest.entries)


def means_of(
    specs: Sequence[TensorSpec],
    merge: Merge,
    load: Load,
    base: Callable[[str], np.ndarray],
) -> list[CoordinateMean]:
    """Return the mean of each of these tensors over the updates of `merge`.

    `base` gives a tensor of the base model by its name. A buffer that only some updates have is as it was to the
    others: who sends one that nobody else has changed does not decide alone what it becomes.
    """
    means = [CoordinateMean(spec.shape) for spec in specs]
    # Several updates may ask for the same tensor of the base, most ask for none.
    base = cache(base)
    sub_models, merged, scales = merge.sub_models, merge.merged, merge.scales
    sent = {spec.name for token in merge.weights for spec in load(token).manifest.layout}
    clipped = [spec for spec in specs if not spec.is_trained and spec.name in sent] if merge.clips_buffers else []
    # The spread of all comes first: no update is added before it is known what the others say.
    spreads = _spreads(clipped, merge, load, base) if clipped else {}
    for token, weight in merge.weights.items():
        with blaming(token), load(token).open() as reader:
            for spec, mean in zip(specs, means, strict=True):
                # What is not a difference but a value stays what it is.
                scale = scales.get(token, 1.0) if spec.is_trained else 1.0
                spread = spreads.get(spec.name)
                # A trained tensor that an update leaves out counts for nothing. A buffer counts as it was, unless
                # the worker has no such tensor, or keeps it to itself.
                if spec.name not in reader.names:
                    if spec.name in sent and not spec.is_trained and not merge.lacks(token, spec.name):
                        _add_unchanged(mean, base(spec.name), weight, coverage_of(spec, sub_models.get(token)))
                elif token in merged:
                    read = reader.tensor if spread is None else _clipping(spec.name, spread, reader.tensor)
                    add_partial_aggregate(mean, spec, reader.names, read, merged[token], weight, scale)
                elif token not in sub_models:
                    values = reader.tensor(spec.name)
                    mean.add(values if spread is None else spread.clipped(values), weight, scale=scale)
                else:
                    # A partial update: its worker had some channels, and may have sent some elements of these.
                    whole = coverage_of(spec, sub_models[token])
                    values, coverage = unpack(spec.name, reader.names, reader.tensor, whole)
                    values = values if spread is None else spread.clipped(values, coverage)
                    mean.add(values, weight, coverage, scale=scale)
    return means


def _spreads(
    buffers: Sequence[TensorSpec], merge: Merge, load: Load, base: Callable[[str], np.ndarray]
) -> dict[str, Spread]:
    """Return the values of each of these buffers in the base and in the updates."""
    spreads = {spec.name: Spread(base(spec.name)) for spec in buffers}
    for token in merge.weights:
        with blaming(token), load(token).open() as reader:
            for spec in buffers:
                whole = coverage_of(spec, merge.sub_models.get(token))
                if spec.name in reader.names:
                    spreads[spec.name].add(*unpack(spec.name, reader.names, reader.tensor, whole))
                elif not merge.lacks(token, spec.name):
                    spreads[spec.name].add(whole.take(base(spec.name)), whole)
    return spreads


def _clipping(name: str, spread: Spread, read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Return `read`, with the tensor of that name within its spread."""
    return lambda each: spread.clipped(read(each)) if each == name else read(each)


def _add_unchanged(mean: CoordinateMean, base: np.ndarray, weight: float, coverage: Coverage) -> None:
    """Add what `coverage` has of a buffer as it was."""
    # NaN is a value without any measurement yet, and would make the mean NaN.
    values = coverage.take(base)
    if (unknown := np.isnan(values)).any():
        coverage = coverage.masked(~unknown)
        values = coverage.take(base)
    mean.add(values, weight, coverage)


def cached(load: Load) -> Load:
    """Return `load` with the manifests of the last updates kept: every group of tensors asks for all of them."""
    return lru_cache(maxsize=_CACHED_MANIFESTS)(load)
