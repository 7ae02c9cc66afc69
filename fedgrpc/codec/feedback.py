"""Error feedback: what an encoding lost is added to the next update (Karimireddy et al., arXiv 1901.09847).

    p_t = delta_t + e_t,   sent = C(p_t),   e_{t+1} = p_t - decode(sent)

Pure: the caller keeps the old residual until the update is safe, and chooses which of the two survives.
An encoding that is not contractive (coarse unbiased rounding) would make the residual grow without
bound, so it keeps none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from fedgrpc.codec.layout import Array, Layout, layout_of, spec_of
from fedgrpc.codec.manifest import Manifest
from fedgrpc.codec.payload import PayloadWriter, encode_tensor
from fedgrpc.codec.recipe import Recipe
from fedgrpc.codec.values import PIECE, pieces


@dataclass(frozen=True)
class Residual:
    """The error still owed, for the tensors that have any; valid for one layout only."""

    layout: Layout = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)

    def for_layout(self, layout: Layout) -> Residual:
        """This residual, or an empty one when the model's layout has changed."""
        return self if self.layout == layout else Residual(layout)


def write_with_feedback(
    delta: Mapping[str, Array], residual: Residual, recipe: Recipe, out: BinaryIO, rng: np.random.Generator
) -> tuple[Manifest, Residual]:
    """Write delta + residual to `out`; return its manifest and the residual of the next update.

    Neither input is changed. Raises EncodeError as `write_payload` does, the old residual then stays valid.
    """
    layout = layout_of(delta)
    owed = residual.for_layout(layout).tensors
    writer = PayloadWriter(out, recipe.compression)
    left: dict[str, Array] = {}
    for name, array in delta.items():
        spec = spec_of(name, array)
        corrected = _sum(array, owed[name]) if name in owed else array
        encoding, data = encode_tensor(spec, corrected, recipe, rng)
        writer.add(spec, encoding, data)
        if not encoding.lossless and encoding.contractive:
            left[name] = _difference(corrected, encoding.decode(memoryview(data).toreadonly(), spec))
    return writer.finish(), Residual(layout, left)


def _sum(left: Array, right: Array) -> Array:
    return np.add(left, right, dtype=left.dtype)


def _difference(corrected: Array, decoded: Array) -> Array:
    """corrected - decoded, into the decoded array where it is ours to write."""
    if not decoded.flags.writeable:
        return np.subtract(corrected, decoded)
    left, right = np.ascontiguousarray(corrected).reshape(-1), decoded.reshape(-1)
    for piece in pieces(left.size, PIECE):
        np.subtract(left[piece], right[piece], out=right[piece])
    return decoded
