"""The values and the norm of an accepted update, whatever form it travels in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedgrpc.aggregation.channels import Selection
from fedgrpc.aggregation.merged import merged_values
from fedgrpc.aggregation.packed import unpacked
from fedgrpc.aggregation.update import AdmissionPolicy, TensorLike, check_values
from fedgrpc.aggregator.uploads import StoredUpdate
from fedgrpc.codec.layout import Layout

Values = Iterator[tuple[TensorLike, np.ndarray]]


def norm_of(stored: StoredUpdate, layout: Layout, plain: bool, selection: Selection | None) -> float:
    """L2 norm of the differences that an update stands for; `selection` is its slice where it is not `plain`.

    Raises as reading it does, and `UpdateRefused` for what admission would refuse.
    """
    file = stored.open()
    with file as reader:
        if stored.header.merged_updates:
            values: Values = merged_values(layout, reader.names, reader.tensor, stored.header.weight)
        elif plain:
            values = file.long_pieces()
        else:
            values = unpacked(layout, reader.names, reader.tensor, selection)
        return check_values(values, AdmissionPolicy())
