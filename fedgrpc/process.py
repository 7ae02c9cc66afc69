"""Setup of a whole process: standard streams, signals, memory, threads, and what a fork takes along.

The rule: a forked child holds nothing of its parent's. Users' code forks (`multiprocessing.Pool`, data loaders),
and a child may outlive a parent that was killed. So it gets default signal handlers, no locks and no connections,
and collects none of its parent's garbage.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.util
import os
import resource
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

# <malloc.h>
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_ARENAS: Final = 1
# <sys/prctl.h>
_PR_SET_PDEATHSIG: Final = 1
# Larger blocks come from the system and go back to it. glibc accepts no higher threshold.
_LARGE_BYTES: Final = 32 << 20
_KEPT_BYTES: Final = 256 << 20
# New objects before the youngest generation is collected, then collections of it before the older ones are.
_GC_THRESHOLDS: Final = (2_000, 10, 1_000)

_handles_signals = False
# Signal mask of each forking thread before the fork.
_forking = threading.local()
_locks: set[int] = set()
# Ports and unix paths that this process listens at or has connected to.
_endpoints: set[int | str] = set()


def prepare() -> None:
    """Make a command's process ready, before it opens anything and before gRPC is imported."""
    _open_standard_streams()
    end_on_sigterm_as_init()
    # gRPC writes lines of its own format between those of the log. Each failure is logged here anyway.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _open_standard_streams() -> None:
    """Open closed streams on /dev/null: else the next file opened takes their number and gets error messages."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with suppress(OSError):
            os.fstat(number)
            continue
        # The system gives the lowest free number, which is this one.
        os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for good


def end_on_sigterm_as_init() -> None:
    """End on SIGTERM from the start as process 1 of a container: without a handler the kernel ignores it."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))


def keep_private() -> None:
    """Make files private to this user from now on: models, updates, keys."""
    os.umask(_OWNER_ALONE)


def reuse_memory() -> bool:
    """Make glibc keep memory for reuse. Return False where the C library is another or the user has tuned it.

    By default glibc gives each thread an arena of its own, takes blocks of a megabyte from the system and gives
    them back again and again. The system clears each page again, which costs more than hashing what is written
    there. One arena for all threads, which keeps what a round of a large model needs, avoids that cost. Call this
    before threads start.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = ((_M_ARENA_MAX, _ARENAS), (_M_MMAP_THRESHOLD, _LARGE_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return all(mallopt(option, value) for option, value in options)


def collect_rarely() -> None:
    """Collect garbage rarely, for a process with many connections. Call it once everything is imported.

    Reference counts free nearly everything; the collector only finds cycles. A full collection stops the process
    for a tenth of a second with 2,000 connections. By default one comes every few seconds, and finds nothing: what
    lives as long as a connection is no garbage.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def rest_while_waiting() -> None:
    """Let OpenMP's idle threads sleep rather than spin, unless the user has chosen (`OMP_WAIT_POLICY`).

    By default they spin for some milliseconds after each operation. Two workers on one machine then take each
    other's cores, and train ten times slower. Call it before torch is imported, which reads the variable once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_threads(count: int) -> None:
    """Let each numeric library use `count` threads. Call it before PyTorch and OpenMP are imported.

    Libraries that are loaded already, such as NumPy's BLAS, are limited by threadpoolctl, which comes with
    scikit-learn.
    """
    os.environ["OMP_NUM_THREADS"] = str(count)
    if importlib.util.find_spec("threadpoolctl") is not None:
        importlib.import_module("threadpoolctl").threadpool_limits(count)


def forget_peak_memory() -> None:
    """Let `peak_memory_bytes` count from now on, where Linux allows it: "5" clears the peak (proc(5))."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory_bytes() -> int:
    """Return the largest resident memory of this process since `forget_peak_memory`, or since its start."""
    with suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes(pid: int) -> int:
    """Resident memory of a process of Linux now; 0 without such a process."""
    with suppress(OSError), open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def used_cpu_s(pid: int) -> float:
    """User and system time of a process of Linux so far; 0 without such a process."""
    with suppress(OSError), open(f"/proc/{pid}/stat") as file:
        # Behind the name, which may hold anything.
        user, system = file.read().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, on Linux (prctl(2), PR_SET_PDEATHSIG)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def on_end_signal(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` while the block runs, with the number of each SIGTERM and SIGINT, on the running event loop.

    Does nothing outside the main thread: signals belong to the program around it there.
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


@contextmanager
def kept_from_children(descriptor: int) -> Iterator[None]:
    """Close the file of a lock in every child that is forked while the block runs."""
    _locks.add(descriptor)
    try:
        yield
    finally:
        _locks.discard(descriptor)


def keep_from_children(endpoint: int | str) -> None:
    """Close in forked children the sockets of a port or unix path, whether listening or connected."""
    _endpoints.add(endpoint)


def _before_fork() -> None:
    """Block signals until the child has its own handlers: one may come right after the fork."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _let_go() -> None:
    """Release what belongs to the parent, in a forked child."""
    # Freeing a finished gRPC call takes gRPC's locks, which a thread of the parent may have held at the fork.
    gc.freeze()
    if _handles_signals:
        # The wake-up pipe is shared: a signal to the child would wake the parent's event loop.
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
        # The socket is not connected.
        return False
    finally:
        found.detach()


def _endpoint(address: object) -> int | str | None:
    """Return the port of an IP address, or the path of a unix socket."""
    if isinstance(address, tuple):
        return int(address[1])
    return address if isinstance(address, str) and address else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_let_go)
