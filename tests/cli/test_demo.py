"""The demo as its users run it, in a short form; and that nothing of it stays behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from fedgrpc.cli.demo.devices import make_fleet
from fedgrpc.cli.demo.processes import die_with
from tests.cli.process import fedgrpc, running

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


def test_five_devices_are_two_raspberry_pi_4_two_jetson_nano_and_a_jetson_nano_2gb() -> None:
    names = sorted(device.name for device in make_fleet(5))
    assert names == ["jetson-nano-1", "jetson-nano-2", "jetson-nano-2gb-1", "raspberry-pi-4-1", "raspberry-pi-4-2"]
    assert len({device.name for device in make_fleet(64)}) == 64


@pytest.mark.timeout(300)
def test_the_demo_trains_reports_and_writes_its_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = fedgrpc(
        *("demo", "--workers", "3", "--rounds", "4", "--straggler-round", "2", "--deadline", "6s"),
        *("--partition", "dirichlet:1", "--out", str(out)),
        timeout_s=280,
    )
    assert ended.code == 0, ended.error
    assert "jetson-nano-2gb-1 hangs" in ended.out
    # In round 2, or in the next one where the update was sent before the stop came. A machine that is busy with
    # something else for so long may make another one late, too.
    late = r"round [23] · committed · [12] of 3 updates · .* jetson-nano-2gb-1 late"
    assert re.search(late, ended.out), ended.out
    for heading in ("T_local", "T_upload", "T_global", "T_download", "pooled", "of plain float32"):
        assert heading in ended.out
    assert (out / "model.safetensors").stat().st_size > 1000
    assert (out / "rounds.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "rounds.json").read_text())
    assert len(report["accuracy"]) == len(report["pooled_accuracy"]) == 4
    assert report["accuracy"][-1] > 0.9
    assert report["traffic"]["upload_bytes"] < 0.3 * report["traffic"]["plain_upload_bytes"]
    assert "jetson-nano-2gb-1" in [worker["worker"] for worker in report["workers"] if worker["missed"]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_stays_behind_when_the_demo_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "demo.log"
    with running("demo", "--workers", "2", "--out", str(tmp_path / "out"), log=log) as demo:
        children = _children(demo, 4)
        demo.send_signal(number)
        code = demo.wait(timeout=300)
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive
    assert code == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in log.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only an orderly end ends the children")
def test_a_child_whose_parent_went_before_it_could_ask_ends_at_once() -> None:
    """Its parent is another one, as for the child of a demo that was killed within `fork`."""
    nap = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(nap, preexec_fn=partial(die_with, os.getppid())) as orphan:
        assert orphan.wait(timeout=50) == -signal.SIGKILL


def _children(demo: subprocess.Popen[bytes], count: int) -> list[psutil.Process]:
    """The demo's processes, once there are as many."""
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        children: list[psutil.Process] = psutil.Process(demo.pid).children(recursive=True)
        if len(children) >= count:
            return children
        time.sleep(0.05)
    raise AssertionError("the demo did not start its processes")
