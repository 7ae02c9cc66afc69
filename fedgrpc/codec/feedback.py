"""Error feedback: what an encoding lost is added to the next update (Karimireddy et al., arXiv 1901.09847).

    p_t = delta_t + e_t,   sent = C(p_t),   e_{t+1} = p_t - decode(sent)

Pure: the caller keeps the old residual until the update is safe, and chooses which of the two survives.
An encoding that is not contractive (coarse unbiased rounding) would make the residual grow without
bound, so it keeps none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from fedgrpc.codec.layout import Array, Layout, layout_of, spec_of
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadWriter, encode_tensor
from fedgrpc.codec.recipe import Recipe

Keep = Callable[[str, Array], None]


@dataclass(frozen=True)
class Residual:
    """The error still owed, for the tensors that have any; valid for one layout only."""

    layout: Layout = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)

    def for_layout(self, layout: Layout) -> Residual:
        """This residual, or an empty one when the model's layout has changed."""
        return self if self.layout == layout else Residual(layout)


def write_with_feedback(
    delta: Mapping[str, Array],
    residual: Residual,
    recipe: Recipe,
    out: BinaryIO,
    rng: np.random.Generator,
    layout: Layout | None = None,
    keep: Keep | None = None,
) -> tuple[Manifest, Residual]:
    """Write delta + residual to `out`; return its manifest and the residual of the next update.

    `layout` is delta's; give it where a delta computes its tensors when it is asked for them. `keep` takes the
    tensors of the new residual as they come, one at a time; the one that is returned is then without them.
    Neither input is changed. Raises EncodeError as `write_payload` does, the old residual then stays valid.
    """
    layout = layout_of(delta) if layout is None else layout
    owed = residual.for_layout(layout).tensors
    writer = PayloadWriter(out, recipe.compression)
    left: dict[str, Array] = {}
    keep = keep or left.__setitem__
    for name, array in delta.items():
        spec = spec_of(name, array)
        corrected = correct(array, owed.get(name))
        encoding, data = encode_tensor(spec, corrected, recipe, rng)
        writer.add(spec, encoding, data)
        if not encoding.lossless and encoding.contractive:
            keep(name, left_over(corrected, encoding.decode(memoryview(data).toreadonly(), spec)))
    return writer.finish(), Residual(layout, left)


class Corrected(Mapping[str, Array]):
    """What `write_with_feedback` encodes: delta + residual, each tensor computed when it is asked for."""

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
    """delta + owed in delta's dtype, or delta itself when nothing is owed."""
    return delta if owed is None else np.add(delta, owed, dtype=delta.dtype)


def left_over(corrected: Array, decoded: Array) -> Array:
    """corrected - decoded, written into the decoded array where that is allowed."""
    if not decoded.flags.writeable:
        return np.subtract(corrected, decoded)
    return np.subtract(corrected, decoded, out=decoded)
