"""SHA-256 of a model as whoever decodes it has it: equal for two devices only if they train from the same values.

The rule: everything that gives a byte its meaning is in it (names, dtypes, roles, shapes), and nothing of how the
model travelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256

import numpy as np

from fedgrpc.codec.layout import Array, TensorSpec


def model_digest(tensors: Iterable[tuple[TensorSpec, Array]]) -> bytes:
    """Return the digest of all tensors in the order of their manifest (protos/WIRE.md, section 10).

    One tensor is in memory at a time where they are read on access.
    """
    total = sha256()
    for spec, array in tensors:
        for part in _about(spec):
            total.update(len(part).to_bytes(4) + part)
        total.update(np.ascontiguousarray(array, spec.numpy_dtype).reshape(-1).view(np.uint8).data)
    return total.digest()


def _about(spec: TensorSpec) -> Iterator[bytes]:
    yield from (spec.name.encode(), spec.dtype.encode(), spec.role.encode())
    # Each has a known length, so no list runs into the next one.
    yield b"".join(extent.to_bytes(8) for extent in spec.shape)
    yield len(spec.tied_names).to_bytes(4)
    yield from (name.encode() for name in spec.tied_names)
