"""tools/bench/peers watches other frameworks' processes from outside."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tools.bench.peers.rounds import read_marks, run_logged
from tools.bench.peers.watch import Group, Watch

_BUSY = "while True: sum(range(10_000))"
_PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {_BUSY!r}])  # {{mark}}"


def test_a_group_has_a_process_and_what_it_starts_and_nothing_else(tmp_path: Path) -> None:
    mark = str(tmp_path)
    group = Group(lambda command: mark in command)
    watch = Watch(group)
    watch.start()
    parent = subprocess.Popen([sys.executable, "-c", _PARENT.format(mark=mark)])
    try:
        _until(lambda: len(group()) == 2)
        child = next(process for process in group() if process.pid != parent.pid)
        assert child.ppid() == parent.pid
        _until(lambda: watch.cpu_s(0, time.time()) > 0.2)
    finally:
        for process in psutil.Process(parent.pid).children():
            process.kill()
        parent.wait()
    watch.stop()
    assert watch.peak_mb() > 5
    _until(lambda: not group())


def test_marks_are_spans_of_rounds(tmp_path: Path) -> None:
    (tmp_path / "marks").write_text("begin 1.0\nend 2.5\nbegin 3.0\nend 3.5\n")
    assert read_marks(tmp_path / "marks") == [(1.0, 2.5), (3.0, 3.5)]


def test_a_framework_that_fails_says_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such app"):
        run_logged([sys.executable, "-c", "raise SystemExit('no such app')"], tmp_path, {})


def _until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.05)
