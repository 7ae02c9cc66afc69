"""Data sets of the Hugging Face library `datasets` (extra `fedgrpc[datasets]`) as labelled examples.

    data = load_hugging_face("folder-of-save_to_disk", inputs="image", labels="label", groups="writer_id")

A `TorchTask` returns what it makes of them from `data()`. `--partition groups` then deals whole writers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedgrpc.datasets.dataset import Examples, LabelledData
from fedgrpc.errors import ExtraMissing, UsageError


def load_hugging_face(
    source: str,
    *,
    inputs: str,
    labels: str,
    groups: str | None = None,
    train: str = "train",
    held_out: str = "test",
) -> LabelledData:
    """Load two splits by the names of their columns; `source` is a folder of `save_to_disk`, or a name on the hub.

    A data set without the split `held_out` has no held-out examples. Raises `UsageError` for a missing library,
    split or column, and for what cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ExtraMissing.of("a data set of Hugging Face", "datasets", error) from None
    try:
        found = datasets.load_from_disk(source) if Path(source).is_dir() else datasets.load_dataset(source)
    except Exception as error:  # The library raises errors of many other libraries.
        raise UsageError(f"cannot load the data set {source}: {' '.join(str(error).split())[:300]}") from error
    splits: Mapping[str, Any] = found if isinstance(found, Mapping) else {train: found}
    if train not in splits:
        raise UsageError(f"the data set {source} has no split {train!r}; it has {', '.join(splits)}")
    given = examples_of(splits[train], inputs, labels, groups)
    if held_out not in splits:
        none = np.zeros(0, np.int64)
        return LabelledData(given, given.take(none))
    return LabelledData(given, examples_of(splits[held_out], inputs, labels, groups))


def examples_of(split: Any, inputs: str, labels: str, groups: str | None = None) -> Examples:
    """Return the examples of a `datasets.Dataset`. Raises `UsageError` for a missing column or odd shapes."""
    wanted = [name for name in (inputs, labels, groups) if name is not None]
    if missing := sorted(set(wanted) - set(split.column_names)):
        raise UsageError(f"the data set has no column {missing[0]!r}; it has {', '.join(split.column_names)}")
    # Images come as PIL images, of which numpy makes arrays; lists of numbers as they are.
    arrays = [np.asarray(value) for value in split[inputs]]
    if len({array.shape for array in arrays}) > 1:
        raise UsageError(f"the column {inputs!r} has values of several shapes; make them one shape first")
    targets = np.asarray(split[labels])
    if targets.ndim != 1 or targets.dtype.kind not in "iu":
        raise UsageError(
            f"the column {labels!r} is {targets.dtype}{list(targets.shape)}, not one whole number each"
        )
    own = None
    if groups is not None:
        _, own = np.unique(np.asarray(split[groups]), return_inverse=True)
    return Examples(np.stack(arrays) if arrays else np.zeros((0,)), targets.astype(np.int64), own)
