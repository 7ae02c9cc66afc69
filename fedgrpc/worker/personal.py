"""Layers that stay on the device: trained here, never sent, kept across restarts (FedPer, arXiv 1912.00818).

    personal    the tensors, of one run

The rule: what is kept was trained whole. The first round starts them from the model's own values.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedgrpc.codec.feedback import Residual
from fedgrpc.codec.layout import layout_of, spec_of
from fedgrpc.worker.disk import UNFINISHED, storage_errors, sync
from fedgrpc.worker.residual_file import read_residual, write_residual
from fedgrpc.worker.trainer import Weights

_NAME: Final = "personal"


class PersonalLayers:
    """The personal layers in one folder. Slow: run its methods in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def restored(self, given: Weights, run: str, is_personal: Callable[[str], bool]) -> Weights:
        """`given` with what was kept in place of its personal layers, where that fits."""
        if not any(map(is_personal, given)):
            return given
        kept = read_residual(self._folder / _NAME, run).tensors
        fits = {
            name: array
            for name, array in kept.items()
            if name in given and is_personal(name) and spec_of(name, array) == spec_of(name, given[name])
        }
        return {**given, **fits}

    def keep(self, trained: Weights, run: str, is_personal: Callable[[str], bool]) -> None:
        """Keep the personal layers of `trained`. Raises StorageError."""
        own = {name: array for name, array in trained.items() if is_personal(name)}
        if not own:
            return
        unfinished = self._folder / (UNFINISHED + _NAME)
        with storage_errors(self._folder):
            write_residual(unfinished, Residual(layout_of(own), own), run)
            sync(unfinished)
            unfinished.replace(self._folder / _NAME)
            sync(self._folder)
