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

from fedgrpc.cli.as_json import json_text
from fedgrpc.cli.demo.processes import die_with, make_fleet
from fedgrpc.cli.demo.report import make_report, verdict_line
from fedgrpc.v1.aggregator_pb2 import Run
from fedgrpc.v1.round_pb2 import Round, RoundPhase, TaskKind
from tests.support.command_line import fedgrpc, running_command

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
    assert report["metric"] == "accuracy"
    assert len(report["scores"]) == len(report["pooled_scores"]) == 4
    assert report["scores"][-1] > 0.9
    assert report["traffic"]["upload_bytes"] < 0.3 * report["traffic"]["plain_upload_bytes"]
    assert "jetson-nano-2gb-1" in [worker["worker"] for worker in report["workers"] if worker["missed"]]


REGRESSION = """
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from fedgrpc.torch.task import TorchTask

class Sums(TorchTask):
    def model(self):
        return nn.Linear(3, 1)

    def data(self, path):
        x = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x.sum(1, keepdim=True))
        return data, data

    def loss(self, outputs, targets):
        return functional.mse_loss(outputs, targets)

    def metrics(self, outputs, targets):
        return {"mae": (outputs - targets).abs().mean()}

class Broken(Sums):
    def loss(self, outputs, targets):
        if outputs.requires_grad:
            raise RuntimeError("my loss is broken")
        return super().loss(outputs, targets)
"""


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_demo_of_a_regression_shows_its_own_metric(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(REGRESSION)
    asked = ("--task", "own_task:Sums", "--partition", "iid", "--workers", "2", "--rounds", "2", "--epochs", "1")
    ended = fedgrpc("demo", *asked, "--out", "out", cwd=tmp_path)
    assert ended.code == 0, ended.error
    assert re.search(r"mae \S+ federated, \S+ pooled \(iid, 2 workers\)", ended.out), ended.out
    assert "accuracy" not in ended.out
    report = json.loads((tmp_path / "out" / "rounds.json").read_text(), parse_constant=refuse)
    assert report["metric"] == "mae"
    assert len(report["scores"]) == 2
    assert all(score > 0 for score in report["scores"])


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_demo_of_a_numpy_task_gives_each_device_all_of_its_data(tmp_path: Path) -> None:
    asked = ("--task", "bring_your_own_numpy", "--workers", "2", "--rounds", "2", "--epochs", "1")
    ended = fedgrpc("demo", *asked, "--out", "out", cwd=tmp_path)
    assert ended.code == 0, ended.error
    assert "takes no --partition" in ended.out
    report = json.loads((tmp_path / "out" / "rounds.json").read_text(), parse_constant=refuse)
    assert report["metric"] == "accuracy"
    assert {worker["example_count"] for worker in report["workers"]} == {1442}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--task", "own_task:Broken"), "my loss is broken"),
        (("--task", "own_task:Sums", "--deadline", "20ms", "--straggler-round", "0"), "deadline of 0.02 s passed"),
    ],
)
@pytest.mark.faults
def test_the_demo_ends_with_the_reason_once_three_rounds_in_a_row_brought_nothing(
    tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "own_task.py").write_text(REGRESSION)
    ended = fedgrpc("demo", *arguments, "--partition", "iid", "--workers", "2", "--out", "out", cwd=tmp_path)
    assert ended.code == 1, ended.out
    *shown, last = ended.error.strip().splitlines()
    assert re.fullmatch(rf"error: 3 rounds in a row ended without an update: .*{reason}.*", last)
    # The traceback of the user's code, once.
    assert [line for line in shown if line.startswith("Traceback")] == shown[:1]
    assert bool(shown) == ("Broken" in arguments[1])
    assert ended.out.count("abandoned") == 3
    assert reason in ended.out


def test_a_report_without_scores_is_json_all_the_same() -> None:
    committed = Round(kind=TaskKind.TASK_KIND_TRAIN, phase=RoundPhase.ROUND_PHASE_COMMITTED)
    for scores, metric in (({}, "loss"), ({"loss": 1.0}, "loss"), ({"loss": 1.0, "auc": 0.5}, "auc")):
        report = make_report(Run(), [committed, Round(evaluator_metrics=scores)], [scores], 1.0)
        assert report.metric == metric
        written = json.loads(json_text(report.as_json()), parse_constant=refuse)
        assert written["scores"] == [None]
        assert written["pooled_scores"] == [scores.get(metric)]
        assert verdict_line(report) == "no scores"


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_stays_behind_when_the_demo_is_ended(number: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "demo.log"
    with running_command("demo", "--workers", "2", "--out", str(tmp_path / "out"), log=log) as demo:
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
