"""What a whole process sets up for itself: standard streams, signals, and what a fork takes.

The rule: a forked child holds nothing of its parent's. Users' code forks (`multiprocessing.Pool`, data loaders),
and a child may outlive a parent that was killed. So it gets default signal handlers, no locks and no connections.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_OWNER_ALONE: Final = 0o077
_OPEN_FILES: Final = "/proc/self/fd"

_handles_signals = False
# What each thread that forks had blocked before.
_forking = threading.local()
_locks: set[int] = set()
# Ports and paths of unix sockets that this process listens at or has dialled.
_endpoints: set[int | str] = set()


def prepare() -> None:
    """Make a command's process ready, before it opens anything and before gRPC is imported."""
    _open_standard_streams()
    end_on_sigterm_as_init()
    # gRPC writes its own lines, in a form of its own, between those of the log. Each failure has a line here.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _open_standard_streams() -> None:
    """Where one is closed, the next file opened would take its place, and be written to by whoever complains."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with suppress(OSError):
            os.fstat(number)
            continue
        # The lowest number that is free: this one.
        os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good


def end_on_sigterm_as_init() -> None:
    """As process 1 of a container, heed SIGTERM from the start: without a handler the kernel ignores it."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))


def keep_private() -> None:
    """Let others than this user read none of the files made from now on: models, updates, keys."""
    os.umask(_OWNER_ALONE)


@contextmanager
def told_to_end(handler: Callable[[int], None]) -> Iterator[None]:
    """While the block runs, call `handler` with the number of each SIGTERM and SIGINT, on the running event loop.

    In the main thread only: elsewhere signals are somebody else's.
    """
    global _handles_signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    import asyncio

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, handler, int(number))
    _handles_signals = True
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        _handles_signals = False
        end_on_sigterm_as_init()


def close_in_children(descriptor: int) -> None:
    """Close a lock's file in forked children, for as long as `descriptor` is this process's own."""
    _locks.add(descriptor)


def closed(descriptor: int) -> None:
    """The lock's file is no longer open here."""
    _locks.discard(descriptor)


def keep_from_children(endpoint: int | str) -> None:
    """Close in forked children the sockets of a port, or of a unix socket's path: listened at or dialled."""
    _endpoints.add(endpoint)


def _before_fork() -> None:
    """Hold back signals until the child has handlers of its own: it may be told to end at once."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _let_go() -> None:
    """In a forked child: give up what is the parent's."""
    if _handles_signals:
        # Else a signal to the child writes into the pipe that wakes the parent's event loop.
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _after_fork()
    for descriptor in _locks:
        with suppress(OSError):
            os.close(descriptor)
    _locks.clear()
    if _endpoints:
        _close_sockets()


def _close_sockets() -> None:
    with suppress(OSError):
        for name in os.listdir(_OPEN_FILES):
            with suppress(OSError):
                if _is_ours(int(name)):
                    os.close(int(name))


def _is_ours(descriptor: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    found = socket.socket(fileno=descriptor)
    try:
        return _endpoint(found.getsockname()) in _endpoints or _endpoint(found.getpeername()) in _endpoints
    except OSError:
        # It is not connected.
        return False
    finally:
        found.detach()


def _endpoint(address: object) -> int | str | None:
    """The port of an IP address, the path of a unix one."""
    if isinstance(address, tuple):
        return int(address[1])
    return address if isinstance(address, str) and address else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_let_go)
