"""The norm of an accepted update, whatever form it travels in, and what is told of a model as a whole."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Final

import numpy as np

from fedgrpc.aggregation.admission import AdmissionPolicy, TensorLike, check_values, sum_of_squares
from fedgrpc.aggregation.partial_aggregate import partial_aggregate_values
from fedgrpc.aggregation.partial_update import unpack_all
from fedgrpc.codec.layout import Layout
from fedgrpc.storage.model_file import ModelFile
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.submodels.channels import KeptChannels

_PIECE: Final = 1 << 20
Values = Iterator[tuple[TensorLike, np.ndarray]]


def model_norm(model: ModelFile) -> float:
    """L2 norm of the float tensors of a model, read in pieces. Raises `StorageError`."""
    square = 0.0
    for index, spec in enumerate(model.layout):
        for start in range(0, spec.size if spec.is_float else 0, _PIECE):
            square += sum_of_squares(model.part(index, start, min(start + _PIECE, spec.size)))
    return math.sqrt(square)


def content_digest(model: ModelFile) -> bytes:
    """SHA-256 of names, types, shapes and values of a model, in whatever order its file has them.

    Raises `StorageError`.
    """
    digest = hashlib.sha256()
    for index in sorted(range(len(model.layout)), key=lambda each: model.layout[each].name):
        spec = model.layout[index]
        digest.update(f"{spec.name}\0{spec.dtype}\0{spec.shape}\0".encode())
        inner = hashlib.sha256()
        for start in range(0, spec.size, _PIECE):
            inner.update(model.part(index, start, min(start + _PIECE, spec.size)).view(np.uint8).data)
        digest.update(inner.digest())
    return digest.digest()


def norm_of(stored: StoredUpdate, layout: Layout, plain: bool, kept: KeptChannels | None) -> float:
    """L2 norm of the differences that an update stands for; `kept` are the channels of one that is not `plain`.

    Raises as reading it does, and `UpdateRefused` for what admission would refuse.
    """
    file = stored.open()
    with file as reader:
        if stored.header.merged_updates:
            values: Values = partial_aggregate_values(layout, reader.names, reader.tensor, stored.header.weight)
        elif plain:
            values = file.long_pieces()
        else:
            values = unpack_all(layout, reader.names, reader.tensor, kept)
        return check_values(values, AdmissionPolicy())
