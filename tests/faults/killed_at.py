"""`fedgrpc`, to die at one named point: `python -m tests.faults.killed_at POINT aggregator ...`

The program is the one that users run. In this process alone, one of its functions is wrapped before it starts, and
the wrapper sends SIGKILL to the process: nothing is flushed, closed or said goodbye to. Nothing of this is in the
package itself.
"""

import functools
import importlib
import inspect
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

from fedgrpc.cli.main import main
from fedgrpc.protocol.tasks import Task


def _any(*_, **__):
    return True


@dataclass(frozen=True)
class Point:
    """Where a process dies: before or after a call of `target`.

    `when` picks calls by their arguments, `count` which of those it is, `since_round` from which round on a worker
    counts them. `sigterm_at` is a target whose first call so counted sends SIGTERM first.
    """

    target: str
    moment: str = "before"
    when: Callable[..., bool] = _any
    count: int = 1
    since_round: int = 0
    sigterm_at: str | None = None


class _Counted:
    """Calls of one target, and what is done at the one that counts."""

    def __init__(self, point, act):
        self._left = point.count
        self._point = point
        self._act = act

    def __call__(self, *arguments, **named):
        if _round() < self._point.since_round or not self._point.when(*arguments, **named):
            return
        self._left -= 1
        if self._left == 0:
            self._act()


_rounds = [0]


def _round():
    return _rounds[-1]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def wrap(target, moment, hook):
    """Replace the function that `target` ("package.module:Class.method") names by one that calls `hook` too."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    setattr(owner, name, _hooked(getattr(owner, name), moment, hook))


def _hooked(inner, moment, hook):
    if inspect.iscoroutinefunction(inner):

        @functools.wraps(inner)
        async def hooked(*arguments, **named):
            if moment == "before":
                hook(*arguments, **named)
            result = await inner(*arguments, **named)
            if moment == "after":
                hook(*arguments, **named)
            return result

        return hooked

    @functools.wraps(inner)
    def hooked(*arguments, **named):
        if moment == "before":
            hook(*arguments, **named)
        result = inner(*arguments, **named)
        if moment == "after":
            hook(*arguments, **named)
        return result

    return hooked


def _note_round(*arguments):
    _rounds.append(next(task.round for task in arguments if isinstance(task, Task)))


def arm(point):
    """Lay the trap."""
    if point.since_round:
        wrap("fedgrpc.worker.leased_tasks:LeasedTasks.perform", "before", _note_round)
    if point.sigterm_at is not None:
        wrap(point.sigterm_at, "before", _Counted(Point("", since_round=point.since_round), terminate))
    wrap(point.target, point.moment, _Counted(point, kill))


if __name__ == "__main__":
    from tests.faults.points import AGGREGATOR, CARRYING, PRIVATE, SECURE, SECURE_LEAF, WORKER

    arm({**AGGREGATOR, **CARRYING, **PRIVATE, **SECURE, **SECURE_LEAF, **WORKER}[sys.argv[1]])
    main(sys.argv[2:])
