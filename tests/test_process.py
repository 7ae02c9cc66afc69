"""What a process sets up for itself, and what its children do not take along."""

import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys

import pytest

from fedgrpc import process
from fedgrpc.process import keep_from_children
from fedgrpc.storage.folder import hold_folder

USED = "is used by another"


def run(code, *shell):
    """What a Python program prints; `shell` says how bash runs it."""
    program = [sys.executable, "-c", code]
    command = ["bash", "-c", f'exec "$@" {shell[0]}', "bash", *program] if shell else program
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def in_child(work):
    """Whether `work()`, called in a forked child, is true."""
    pid = os.fork()
    if pid == 0:
        ended = 1
        try:
            ended = 0 if work() else 1
        finally:
            os._exit(ended)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_does_not_hold_the_folder(tmp_path):
    with hold_folder(tmp_path / "a", USED):
        there = os.stat(tmp_path / "a").st_ino

        def holds_nothing():
            return there not in {
                os.fstat(number).st_ino for number in map(int, os.listdir("/proc/self/fd")) if _open(number)
            }

        assert in_child(holds_nothing)
        assert not holds_nothing()


def _open(number):
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def test_a_forked_child_has_neither_end_of_a_connection_of_ours_and_keeps_those_of_the_users(monkeypatch):
    # Tests before this one have served, and the system may give one of their ports to `theirs`.
    monkeypatch.setattr(process, "_endpoints", set())
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as theirs:
        keep_from_children(ours.getsockname()[1])
        with socket.create_connection(ours.getsockname()) as dialled, ours.accept()[0] as accepted:
            mine = [ours.fileno(), dialled.fileno(), accepted.fileno()]
            assert in_child(lambda: not any(map(_open, mine)) and _open(theirs.fileno()))
            assert all(map(_open, mine))


def test_a_forked_child_finalizes_no_garbage_of_its_parents():
    finalized = []

    class Cycle:
        def __init__(self):
            self.itself = self

        def __del__(self):
            finalized.append(True)

    gc.disable()
    try:
        Cycle()
        assert in_child(lambda: gc.collect() is not None and not finalized)
    finally:
        gc.enable()
    gc.collect()
    assert finalized


def test_a_forked_child_has_default_signal_handlers_and_wakes_no_event_loop():
    code = """
import asyncio, os, signal, time
from fedgrpc.process import on_end_signal
heard = []
async def main():
    with on_end_signal(heard.append):
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(9)
        os.kill(pid, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        await asyncio.sleep(0.1)
        print(heard)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        print(heard)
asyncio.run(main())
"""
    assert run(code).stdout.split("\n")[:3] == ["-15", "[]", "[15]"]


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_a_closed_standard_stream_is_not_taken_by_the_next_file(closed, tmp_path):
    code = f"""
import os
from fedgrpc.process import prepare
prepare()
number = os.open({str(tmp_path / "file")!r}, os.O_CREAT | os.O_RDWR)
import sys
print("to nobody", file=sys.stderr)
sys.exit(0 if number > 2 else 9)
"""
    assert run(code, closed).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_process_1_heeds_sigterm_before_anything_is_imported(monkeypatch):
    code = "import fedgrpc.cli, os, signal; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    assert run(code).stdout.strip() == "True"
    assert run(f"import os; os.getpid = lambda: 1\n{code}").stdout.strip() == "False"


def test_grpc_writes_no_lines_of_its_own_unless_it_is_told_to(monkeypatch):
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    code = "from fedgrpc.process import prepare; prepare(); import os; print(os.environ['GRPC_VERBOSITY'])"
    assert run(code).stdout.strip() == "NONE"
    monkeypatch.setenv("GRPC_VERBOSITY", "debug")
    assert run(code).stdout.strip() == "debug"
    assert signal.getsignal(signal.SIGTERM) is not None


def test_a_peak_of_memory_is_forgotten():
    program = (
        "from fedgrpc.process import forget_peak_memory, peak_memory_bytes\n"
        "large = bytearray(200 << 20); del large\n"
        "first = peak_memory_bytes(); forget_peak_memory(); print(first - peak_memory_bytes() > 150 << 20)"
    )
    assert run(program).stdout == "True\n"
