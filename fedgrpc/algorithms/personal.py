"""Tensors that stay on a device: choosing them, putting a device's own in place, and sending none of them.

A personal tensor is sent as it was received, so its difference is zero and the aggregator's copy stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from fnmatch import fnmatchcase

import numpy as np

from fedgrpc.algorithms.algorithm import Received, Weights
from fedgrpc.errors import UsageError


def matching(names: Collection[str], patterns: tuple[str, ...]) -> list[str]:
    """Return the names that match a glob. Raises `UsageError` where none does, or all do."""
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not found or len(found) == len(names):
        which = "all tensors" if found else "no tensor"
        raise UsageError(f"{'+'.join(patterns)} matches {which} of the model, so nothing would be shared or kept")
    return found


def with_own(received: Received, names: Collection[str]) -> Weights:
    """Return the model with the device's own values of these tensors; at first they are the model's."""
    kept = received.kept
    return {
        name: kept[name] if name in names and name in kept else values for name, values in received.model.items()
    }


def without(weights: Weights, received: Received, is_own: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """Return what is sent of trained weights: personal tensors as they were received."""
    return {name: received.model[name] if is_own(name) else values for name, values in weights.items()}
