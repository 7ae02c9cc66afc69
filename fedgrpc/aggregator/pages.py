"""Answers that would be larger than a message: pages of the tasks of a round, and of workers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final, TypeVar

from google.protobuf.message import Message

from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.v1.round_pb2 import TASK_PHASE_ACCEPTED, Round

# `WatchRounds` has the run beside it, with the layout of a model of any size that is taken.
MAX_PAGE_BYTES: Final = MAX_MESSAGE_BYTES // 4
_MAX_ITEMS: Final = 1 << 31
# Tag and length of an item.
_FRAME_BYTES: Final = 8

M = TypeVar("M", bound=Message)


def page_of(record: Round, start: int = 0, size: int = 0, max_bytes: int = MAX_PAGE_BYTES) -> tuple[Round, int]:
    """The round with its tasks from number `start` on: up to `size` of them (0: all), as many as fit.

    The other is the number to continue from; 0: that was the last page.
    """
    if not start and not size and record.ByteSize() <= max_bytes:
        return record, 0
    page = Round()
    page.CopyFrom(record)
    del page.tasks[:]
    given = fitting(islice(record.tasks, start, None), size, max_bytes - page.ByteSize())
    page.tasks.extend(given)
    stop = start + len(given)
    page.tasks_left_out = len(record.tasks) - len(given)
    page.accepted_left_out = _accepted(record.tasks) - _accepted(given)
    return page, stop if stop < len(record.tasks) else 0


def fitting(items: Iterable[M], size: int = 0, max_bytes: int = MAX_PAGE_BYTES) -> list[M]:
    """The first of them, up to `size` (0: all) and `max_bytes` together, but one at least."""
    page: list[M] = []
    for item in islice(items, size or _MAX_ITEMS):
        max_bytes -= item.ByteSize() + _FRAME_BYTES
        if page and max_bytes < 0:
            break
        page.append(item)
    return page


def _accepted(tasks: Iterable[Message]) -> int:
    return sum(task.phase == TASK_PHASE_ACCEPTED for task in tasks)  # type: ignore[attr-defined]
