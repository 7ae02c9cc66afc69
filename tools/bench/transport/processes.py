"""Processes of a benchmark's own, each with a pipe to the one that started it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_SPAWN = multiprocessing.get_context("spawn")
_REPLY_S: Final = 600

Target = Callable[..., None]


@contextmanager
def process(target: Target, patience_s: float = 20.0, **arguments: Any) -> Iterator[Any]:
    """A new process and the pipe to it; at the end it has `patience_s` to end by itself."""
    mine, theirs = _SPAWN.Pipe()
    started = _SPAWN.Process(target=target, args=(theirs,), kwargs=arguments, daemon=True)
    started.start()
    theirs.close()
    try:
        yield mine
        started.join(timeout=patience_s)
    finally:
        started.kill()
        started.join()


@contextmanager
def several(count: int, start: Callable[[int], Any]) -> Iterator[list[Any]]:
    """So many of them, which `start` makes by number; the last one has number 1."""
    if not count:
        yield []
        return
    with start(count) as first, several(count - 1, start) as others:
        yield [first, *others]


def reply(pipe: Any) -> Any:
    """What a process says next. Raises `TimeoutError`."""
    if not pipe.poll(_REPLY_S):
        raise TimeoutError(f"a process said nothing for {_REPLY_S} s")
    return pipe.recv()
