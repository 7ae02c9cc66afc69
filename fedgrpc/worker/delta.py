"""Differences between models, tensor by tensor: `Delta` takes what training changed, `Applied` adds it again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import BinaryIO, Final

import numpy as np

from fedgrpc.aggregation.partial_update import pack
from fedgrpc.codec.chunk import crc32
from fedgrpc.codec.digest import DIGEST_BYTES
from fedgrpc.codec.layout import Array, Layout, TensorRole, TensorSpec, spec_of, told_layout
from fedgrpc.codec.manifest import Manifest, TensorEntry
from fedgrpc.codec.payload import PayloadReader, naming
from fedgrpc.codec.raw import Raw
from fedgrpc.codec.values import (
    PIECE,
    InParts,
    Part,
    add,
    flat,
    left_out,
    part_filled,
    part_of,
    pieces,
    refuse_non_finite,
    subtract,
)
from fedgrpc.errors import LayoutError

NO_DIGEST: Final = bytes(DIGEST_BYTES)
_PIECE: Final = 2 * PIECE


class Delta(InParts):
    """Trained minus given, computed tensor by tensor on access, so that no third model is in memory.

    Leaves out constants, and unchanged tensors that are no parameters.
    """

    def __init__(
        self,
        trained: Mapping[str, Array],
        given: Mapping[str, Array],
        known: Layout = (),
        whole: Mapping[str, Array] | None = None,
    ) -> None:
        """`known` is as in `layout_of`. `whole` is the given model before a local model was made of it.

        Raises LayoutError unless both have the same tensors; floats may differ in width.
        """
        if missing := given.keys() - trained.keys():
            raise LayoutError(f"training returned no tensor {min(missing)!r}")
        if surplus := trained.keys() - given.keys():
            raise LayoutError(f"training returned the tensor {min(surplus)!r}, which the model does not have")
        self._given = given
        layout = told_layout(given, known)
        self._trained = {spec.name: _like(trained[spec.name], spec) for spec in layout}
        others = [spec for spec in layout if spec.role is not TensorRole.PARAMETER]
        unchanged = {spec.name for spec in others if left_out(spec, self._trained[spec.name], given[spec.name])}
        constants = {spec.name for spec in others if spec.role is TensorRole.CONSTANT}
        kept_back = unchanged | constants
        self.layout = tuple(spec for spec in layout if spec.name not in kept_back)
        self.changed_constants = sorted(constants - unchanged)
        self._specs = {spec.name: spec for spec in self.layout}
        self._whole = given if whole is None else whole

    def __getitem__(self, name: str) -> Array:
        spec = self._specs[name]
        if spec.role is not TensorRole.STATISTIC or not spec.is_float:
            return subtract(spec, self._trained[name], self._given[name])
        measured = _measured(self._trained[name], self._given[name], self._whole[name])
        with naming(spec):
            refuse_non_finite(measured)
        return measured

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        if self._specs[name].dtype != "float32" or not self._specs[name].is_trained:
            return None
        trained, given = flat(self._trained[name]), part_of(self._given, name)

        @np.errstate(over="ignore", invalid="ignore")
        def subtract_part(out: Array, start: int) -> None:
            np.subtract(trained[start : start + out.size], given(start, start + out.size), out=out)

        return part_filled(subtract_part, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class PartialDelta(InParts):
    """A delta as it travels: of pruned tensors the kept values, of clustered ones the codes.

    Tensors that are kept back are missing.
    """

    def __init__(
        self,
        delta: Mapping[str, Array],
        masks: Mapping[str, np.ndarray],
        clustered: Collection[str],
        is_kept_back: Callable[[str], bool],
    ) -> None:
        self._delta = delta
        self._names: list[str] = []
        self._packed: dict[str, Array] = {}
        for name in delta:
            if is_kept_back(name):
                continue
            packed = {}
            if name in masks or name in clustered:
                packed = pack(name, delta[name], masks.get(name), name in clustered)
            self._packed |= packed
            self._names += packed or [name]

    def __getitem__(self, name: str) -> Array:
        return self._packed[name] if name in self._packed else self._delta[name]

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        return None if name in self._packed else part_of(self._delta, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Scaled(InParts):
    """Differences times `factor`, computed on access; what is no difference stays as it is."""

    def __init__(self, delta: Mapping[str, Array], layout: Layout, factor: float) -> None:
        self.layout = layout
        self.factor = factor
        self._delta = delta
        self._trained = {spec.name for spec in layout if spec.is_trained}

    def __getitem__(self, name: str) -> Array:
        values = self._delta[name]
        return np.asarray(values * self.factor, values.dtype) if name in self._trained else values

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        part = part_of(self._delta, name)
        if name not in self._trained:
            return part
        return lambda start, stop: np.asarray(part(start, stop) * self.factor, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta)

    def __len__(self) -> int:
        return len(self._delta)


class Applied(InParts):
    """base + delta, computed tensor by tensor on access. Tensors without a delta are those of the base."""

    def __init__(self, base: PayloadReader, delta: PayloadReader) -> None:
        """Raises LayoutError unless the delta has the parameters of the base, and no others than its own."""
        self.layout = base.manifest.layout
        self._specs = {spec.name: spec for spec in self.layout}
        for spec in delta.manifest.layout:
            if self._specs.get(spec.name) != spec:
                raise LayoutError(f"the difference has a tensor {spec.name!r} that does not fit the held model")
        for spec in self.layout:
            if spec.role is TensorRole.PARAMETER and spec.name not in delta.names:
                raise LayoutError(f"the difference lacks the tensor {spec.name!r} of the held model")
        self._base = base
        self._delta = delta

    def __getitem__(self, name: str) -> Array:
        base = self._base.tensor(name)
        return add(self._specs[name], base, self._delta.tensor(name)) if name in self._delta.names else base

    def part_of(self, name: str) -> Part | None:
        """See `InParts.part_of`."""
        spec = self._specs[name]
        if not spec.is_trained:
            return None
        base, delta = self._base.part_of(name), self._delta.part_of(name)
        if base is None or delta is None:
            return None
        return lambda start, stop: add(spec, base(start, stop), delta(start, stop))

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self.layout)


def write_sum(base: PayloadReader, delta: PayloadReader, out: BinaryIO) -> tuple[Manifest, int]:
    """Write base + delta raw to `out`, a piece of a tensor at a time.

    Return its manifest, without a digest, and the CRC-32 of the payload. Raises LayoutError as `Applied`, and
    EncodeError for a sum that is not finite.
    """
    model, crc = Applied(base, delta), 0
    for spec in model.layout:
        part = part_of(model, spec.name)
        for piece in pieces(spec.size, _PIECE):
            values = part(piece.start, piece.stop)
            if spec.is_trained:
                with naming(spec):
                    refuse_non_finite(values)
            data = values.view(np.uint8).data
            crc = crc32(data, crc)
            out.write(data)
    entries = tuple(TensorEntry(spec, Raw(), spec.nbytes) for spec in model.layout)
    # A SHA-256 would cost more than the sum itself, and only a pull of the raw model needs it.
    return Manifest(entries, "none", (), sum(spec.nbytes for spec in model.layout), NO_DIGEST), crc


def _measured(trained: Array, start: Array, whole: Array) -> Array:
    """Return a statistic after training, without what a local model's number format took from it at the start.

    The clip keeps it between the given and the measured value, and so in the domain of both.
    """
    if start is whole or np.array_equal(start, whole):
        return trained
    with np.errstate(over="ignore", invalid="ignore"):
        values = whole + (trained - start)
    between = np.clip(values, np.minimum(whole, trained), np.maximum(whole, trained))
    return np.asarray(between, trained.dtype)


def _like(array: Array, spec: TensorSpec) -> Array:
    """Return `array` in the dtype of `spec`: NumPy code returns float64 easily. Anything else must fit."""
    array = np.asarray(array)
    if array.shape != spec.shape:
        raise LayoutError(f"training returned {spec.name!r} with shape {array.shape}, the model's is {spec.shape}")
    if array.dtype == spec.numpy_dtype:
        return array
    if not (spec_of(spec.name, array).is_float and spec.is_float):
        raise LayoutError(f"training returned {spec.name!r} as {array.dtype}, the model's is {spec.dtype}")
    with np.errstate(over="ignore"):
        return array.astype(spec.numpy_dtype)
