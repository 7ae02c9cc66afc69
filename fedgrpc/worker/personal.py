"""Layers that stay on the device: trained here, never sent, kept across restarts (FedPer, arXiv 1912.00818).

The rule: what is kept was trained whole, and is on the disk once its update is, or not at all. The first round
starts them from the model's own values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import layout_of, spec_of
from fedgrpc.storage.residual_file import read_residual, write_residual
from fedgrpc.trainer import Weights


def restored(given: Weights, path: Path, run: str, is_personal: Callable[[str], bool]) -> Weights:
    """`given` with what was kept in the file `path` in place of its personal layers, where that fits."""
    if not any(map(is_personal, given)):
        return given
    kept = read_residual(path, run).tensors
    fits = {
        name: array
        for name, array in kept.items()
        if name in given and is_personal(name) and spec_of(name, array) == spec_of(name, given[name])
    }
    return {**given, **fits}


def keeping(trained: Weights, run: str, is_personal: Callable[[str], bool]) -> Callable[[Path], None] | None:
    """What writes the personal layers of `trained` to a file; None where there are none."""
    own = {name: array for name, array in trained.items() if is_personal(name)}
    return partial(write_residual, residual=Residual(layout_of(own), own), run=run) if own else None
