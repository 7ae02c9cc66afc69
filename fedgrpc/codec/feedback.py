"""Error feedback: what an encoding lost is added to the next update (Karimireddy et al., arXiv 1901.09847).

    p_t = delta_t + e_t,   sent = C(p_t),   e_{t+1} = p_t - decode(sent)

The caller keeps the old residual until the update is safe, and decides which of the two survives. An encoding that
is not contractive (coarse unbiased rounding) would make the residual grow without bound, so none is kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from fedgrpc.codec.layout import Array, Layout, TensorSpec, layout_of
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadWriter, encode_tensor, naming
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.uniform import Uniform
from fedgrpc.codec.values import Part, part_filled, part_of

Keep = Callable[[str, Array], None]


@dataclass(frozen=True)
class Residual:
    """The error still owed, for the tensors that have any. Valid for one layout only."""

    layout: Layout = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)

    def for_layout(self, layout: Layout) -> Residual:
        """Return this residual, or an empty one if the model's layout has changed."""
        return self if trained(self.layout) == trained(layout) else Residual(layout)


def trained(layout: Layout) -> Layout:
    """Return the tensors that may owe an error. The others arrive unchanged, or are left out."""
    return tuple(spec for spec in layout if spec.is_trained)


def write_with_feedback(
    delta: Mapping[str, Array],
    residual: Residual,
    recipe: Recipe,
    out: BinaryIO,
    rng: np.random.Generator,
    layout: Layout | None = None,
    keep: Keep | None = None,
) -> tuple[Manifest, Residual]:
    """Write delta + residual to `out`. Return the manifest and the residual of the next update.

    `layout` is that of `delta`, in its order: give it where `delta` computes its tensors on access. `keep`
    receives the new residual as it arises, each tensor whole or in flat parts that are valid until `keep` returns.
    The returned residual then has no tensors. Neither input is changed. Raises EncodeError as `write_payload`
    does, and the old residual stays valid.
    """
    layout = layout_of(delta) if layout is None else layout
    # Of another layout nothing is owed: a name may mean another tensor there.
    owed = residual.for_layout(layout).tensors
    writer = PayloadWriter(out, recipe.compression)
    left = _Left()
    keep = keep or left.add
    for spec in layout:
        encoding = recipe.for_tensor(spec)
        # The common case works in pieces: no array of the size of the tensor is made beside the encoded one.
        if isinstance(encoding, Uniform) and spec.dtype == "float32":
            with naming(spec):
                data = quantize_with_feedback(delta, owed, spec, encoding, rng, keep)
            writer.add(spec, encoding, data)
            continue
        corrected = correct(delta[spec.name], owed.get(spec.name))
        encoding, encoded = encode_tensor(spec, corrected, encoding, rng)
        writer.add(spec, encoding, encoded)
        if not encoding.lossless and encoding.contractive:
            # Decoded as the receiver does: what is owed is what it does not see.
            keep(spec.name, left_over(corrected, encoding.decode(memoryview(encoded).toreadonly(), spec)))
    return writer.finish(), Residual(layout, left.tensors(layout))


def quantize_with_feedback(
    delta: Mapping[str, Array],
    owed: Mapping[str, Array],
    spec: TensorSpec,
    encoding: Uniform,
    rng: np.random.Generator,
    keep: Keep,
) -> memoryview:
    """Encode one float32 tensor, taking each piece from delta to residual while it is in the cache."""
    part = part_of(delta, spec.name)
    if spec.name in owed:
        part = _sum_of(part, part_of(owed, spec.name))

    def keep_part(start: int, values: Array, decoded: Array) -> None:
        # The decoded piece is scratch memory: the difference takes its place.
        keep(spec.name, np.subtract(values, decoded, out=decoded))

    return encoding.encode_parts(part, spec.size, rng, keep_part if encoding.contractive else None)


def _sum_of(one: Part, other: Part) -> Part:
    def add(out: Array, start: int) -> None:
        np.add(one(start, start + out.size), other(start, start + out.size), out=out)

    return part_filled(add, np.float32)


class _Left:
    """Collector of a residual that stays in memory."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {}

    def add(self, name: str, part: Array) -> None:
        # The part is a view of memory that the encoder uses for the next one.
        self._parts.setdefault(name, []).append(part.reshape(-1).copy())

    def tensors(self, layout: Layout) -> dict[str, Array]:
        shapes = {spec.name: spec.shape for spec in layout}
        return {name: np.concatenate(parts).reshape(shapes[name]) for name, parts in self._parts.items()}


class Corrected(Mapping[str, Array]):
    """delta + residual, each tensor computed on access: what `write_with_feedback` encodes."""

    def __init__(self, delta: Mapping[str, Array], residual: Residual, layout: Layout) -> None:
        self._delta = delta
        self._owed = residual.for_layout(layout).tensors

    def __getitem__(self, name: str) -> Array:
        return correct(self._delta[name], self._owed.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta)

    def __len__(self) -> int:
        return len(self._delta)


def correct(delta: Array, owed: Array | None) -> Array:
    """Return delta + owed in delta's dtype, or delta itself when nothing is owed."""
    return delta if owed is None else np.add(delta, owed, dtype=delta.dtype)


def left_over(corrected: Array, decoded: Array) -> Array:
    """Return corrected - decoded, written into the decoded array where that is writable."""
    if not decoded.flags.writeable:
        return np.subtract(corrected, decoded)
    return np.subtract(corrected, decoded, out=decoded)
