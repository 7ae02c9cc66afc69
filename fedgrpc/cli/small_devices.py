"""Remarks of `fedgrpc check` on small devices: what of a learning task would go wrong on a Raspberry Pi.

The rule: memory is what this machine has measured, and the rest is read off the model. Nothing is guessed of time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, Final

from fedgrpc.codec.layout import Layout
from fedgrpc.trainer import SliceableTrainer, Trainer, small_device_remarks
from fedgrpc.words import size

_MIB: Final = 1 << 20
# Memory of usual boards, and what their system and another container take of it.
BOARDS_MIB: Final = (512, 1024, 2048, 4096, 8192)
SYSTEM_MIB: Final = 200
_SHORT: Final = ("float16", "bfloat16")
_SLOW: Final = "in 16 bits, for which a Raspberry Pi has no fast arithmetic: float32 is faster there"


def fitting_board(peak_bytes: int) -> int | None:
    """Return the MiB of the smallest usual board that holds a process of `peak_bytes`; None: none does."""
    return next((each for each in BOARDS_MIB if peak_bytes <= (each - SYSTEM_MIB) * _MIB), None)


def remarks_on(trainer: Trainer, layout: Layout, peak_bytes: int) -> Iterator[str]:
    """Yield what a device of little memory, few cores and no fast 16-bit arithmetic would make of the task."""
    board = fitting_board(peak_bytes)
    if board is None or board > BOARDS_MIB[0]:
        needed = "none of the usual boards" if board is None else f"a board of {board // 1024} GB or more"
        cure = "batch" if not isinstance(trainer, SliceableTrainer) else "batch, micro_batches or checkpoint"
        yield f"a step takes {size(peak_bytes)} with all libraries, which fits {needed}; try a smaller {cure}"
    if wide := [spec.name for spec in layout if spec.dtype == "float64"]:
        yield f"{wide[0]!r} is float64: twice the bytes and the memory of float32, on every device"
    if short := [spec.name for spec in layout if spec.dtype in _SHORT]:
        yield f"{short[0]!r} is {_SLOW}"
    yield from small_device_remarks(trainer)


def threads_in_use() -> int | None:
    """Return how many threads PyTorch computes with; None where it is not loaded."""
    torch: Any = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())
