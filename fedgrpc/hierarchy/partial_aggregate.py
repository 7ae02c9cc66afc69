"""The partial aggregate of a leaf's round: the mean of its updates, on the disk until it has been sent.

    mean.payload    the tensors (fedgrpc.aggregation.partial_aggregate), raw
    mean.header     the `UpdateHeader`, written last: its presence says that the mean is whole

The rule: the mean is a pure function of the base and the accepted updates, so that a process that died half-way
leaves nothing to repair. It is computed one group of tensors at a time. Its encoding is chosen when it is sent.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
from google.protobuf.message import DecodeError

from fedgrpc.aggregation.partial_aggregate import EXACT, check_finite, pack_mean, pack_summed
from fedgrpc.aggregator.commit import Group, by_groups
from fedgrpc.aggregator.fold import Fold, Load, cached, means_of
from fedgrpc.codec.feedback import Corrected, Keep, Residual, write_with_feedback
from fedgrpc.codec.layout import Array, Layout, TensorRole, TensorSpec, spec_of
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import (
    LazyTensors,
    PayloadReader,
    PayloadWriter,
    encode_tensor,
    file_reader,
    write_payload,
)
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.recipe import Compression, Recipe
from fedgrpc.errors import StorageError, blaming
from fedgrpc.process import peak_memory_bytes
from fedgrpc.protocol.tasks import Task
from fedgrpc.protocol.tensors import manifest_from_proto, manifest_to_proto
from fedgrpc.protocol.updates import sent_header
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.files import make_private, storage_errors, sync, write_file
from fedgrpc.storage.model_file import ModelFile
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.v1 import aggregator_pb2
from fedgrpc.worker.spool import Fill
from fedgrpc.worker.update import Began, fitted

Tensors = Iterator[tuple[TensorSpec, Array]]
# Elements whose mean is in memory at a time, float64.
_MOST_AT_ONCE: Final = 1 << 20
_AS_IT_IS: Final = Raw()


@dataclass(frozen=True)
class StoredAggregate:
    """A complete mean on disk. The header's token is that of the task it answers."""

    path: Path
    header: aggregator_pb2.UpdateHeader

    @contextmanager
    def open(self) -> Iterator[PayloadReader]:
        """Open the tensors for reading. Raises `StorageError`."""
        with storage_errors(self.path), self.path.open("rb") as file:
            yield PayloadReader(manifest_from_proto(self.header.manifest), file_reader(file.fileno()))


class AggregateFile:
    """The one mean of a folder. All methods block, and may raise `StorageError`."""

    def __init__(self, folder: Path) -> None:
        with storage_errors(folder):
            make_private(folder)
        self._payload = folder / "mean.payload"
        self._header = folder / "mean.header"

    def load(self, token: str) -> StoredAggregate | None:
        """Return the mean if it is the one that answers the task of that token."""
        with storage_errors(self._header):
            if not self._header.exists():
                return None
            try:
                header = aggregator_pb2.UpdateHeader.FromString(self._header.read_bytes())
            except DecodeError as error:
                raise StorageError(f"cannot read {self._header}: {error}") from error
        return StoredAggregate(self._payload, header) if header.token == token else None

    def write(self, header: aggregator_pb2.UpdateHeader, tensors: Tensors) -> None:
        """Replace the stored mean, durably. Also raises what `tensors` raises."""
        with storage_errors(self._payload):
            self._header.unlink(missing_ok=True)
            with self._payload.open("wb") as file:
                writer, rng = PayloadWriter(file, Compression()), np.random.default_rng(0)
                for spec, array in tensors:
                    writer.add(spec, *encode_tensor(spec, array, _AS_IT_IS, rng))
                manifest = writer.finish()
            sync(self._payload)
            header.manifest.CopyFrom(manifest_to_proto(manifest))
            write_file(self._header, header.SerializeToString())


def mean_tensors(
    base: ModelFile,
    merge: Merge,
    load: Load,
) -> Tensors:
    """Yield the tensors of the mean of the updates of `merge`, which are to `base`.

    Raises `NotFinite`, `StorageError`, and `UnusableUpdate` when an update is not what was accepted.
    """
    if merge.means is not None:
        yield from _summed(base.layout, merge.means, merge.weight)
        return
    total, layout, load = merge.weight, base.layout, cached(load)
    with Fold(tuple(merge.weights.items()) if merge.alike else (), load, merge.scales) as fold:

        def pack(group: Group) -> dict[str, Array]:
            specs = [layout[index] for index in group if layout[index].role is not TensorRole.CONSTANT]
            rest = [spec for spec in specs if not fold.covers(spec)]
            means = iter(means_of(rest, merge, load, base.named) if rest else ())
            packed: dict[str, Array] = {}
            for spec in specs:
                if fold.covers(spec):
                    packed[spec.name] = _folded(spec, fold)
                else:
                    packed |= pack_mean(spec, next(means), total, spec.numpy_dtype)
            return packed

        known = {spec.name: spec for spec in layout}
        for packed in by_groups(layout, pack):
            for name, array in packed.items():
                yield spec_of(name, array, known.get(name)), array


def _summed(layout: Layout, means: Mapping[str, Array], weight: float) -> Tensors:
    """Yield the means that a secure sum gave."""
    for spec in layout:
        if spec.name in means:
            packed = pack_summed(spec, means[spec.name], weight, spec.numpy_dtype)
            for name, array in packed.items():
                yield spec_of(name, array, spec if name == spec.name else None), array


def _folded(spec: TensorSpec, fold: Fold) -> Array:
    """Do what `pack_mean` does for floats that all updates cover, without a float64 copy of the whole tensor."""
    packed, step = np.empty(spec.size, spec.numpy_dtype), min(fold.step, _MOST_AT_ONCE)
    with np.errstate(over="ignore"):
        for start in range(0, spec.size, step):
            stop = min(start + step, spec.size)
            packed[start:stop] = fold.mean(spec, start, stop)
    check_finite(spec, packed)
    return packed.reshape(spec.shape)


def own_tensors(token: str, update: StoredUpdate) -> Tensors:
    """Yield the tensors of one update unchanged."""
    with blaming(token), update.open() as reader:
        yield from reader


def sending(task: Task, worker: str, mean: StoredAggregate, residual: Residual, began: Began) -> Fill:
    """Return the function with which the spool writes the update for the parent, as the task says."""

    def fill(payload: BinaryIO, keep: Keep) -> tuple[aggregator_pb2.UpdateHeader, Layout | None]:
        with mean.open() as reader:
            manifest, left = _encode(task, worker, reader, residual, payload, keep)
        return sent_header(mean.header, worker, manifest, began.timings(), peak_memory_bytes()), left

    return fill


def _encode(
    task: Task, worker: str, reader: PayloadReader, residual: Residual, payload: BinaryIO, keep: Keep
) -> tuple[Manifest, Layout | None]:
    recipe = Recipe.parse(task.upload_recipe or "raw")
    recipe = replace(recipe, overrides=(*((pattern, Raw()) for pattern in EXACT), *recipe.overrides))
    recipe = recipe.for_layout(reader.manifest.layout)
    draw = partial(np.random.default_rng, (task.seed, task.round, zlib.crc32(worker.encode())))
    tensors = LazyTensors(reader)
    if task.kind is not TaskKind.TRAIN:
        return write_payload(tensors, recipe, payload, draw(), reader.manifest.layout), None
    layout = reader.manifest.layout
    recipe = fitted(recipe, Corrected(tensors, residual, layout), layout, task, draw)
    return write_with_feedback(tensors, residual, recipe, payload, draw(), layout, keep)[0], layout
