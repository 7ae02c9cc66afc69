"""`fedgrpc simulate EXPERIMENT.toml` as its users run it."""

from __future__ import annotations

import csv
import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from fedgrpc import toml
from fedgrpc.simulation.fleet import DeviceKind
from tests.support.command_line import ROOT, fedgrpc, running_command

EXPERIMENT = """
[learning]
task = "tests.support.simulated_task:Blobs"
partition = "iid"
[aggregator]
rounds = 3
epochs = 2
min-workers = 4
encoding = "int8+zstd"
[[devices]]
name = "pi"
count = 4
examples_per_s = 100.0
up_mbit = 8.0
down_mbit = 40.0
"""


def _file(folder: Path, text: str = EXPERIMENT) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def _simulate(folder: Path, *arguments: str, text: str = EXPERIMENT):
    path = _file(folder, text)
    out = str(folder / "out")
    return fedgrpc("simulate", str(path), "--out", out, "--jobs", "1", *arguments, cwd=ROOT)


def test_an_experiment_is_played_shown_and_kept(tmp_path: Path) -> None:
    ended = _simulate(tmp_path, "--plot", str(tmp_path / "p.png"))
    assert ended.code == 0, ended.error
    assert "4 devices" in ended.out
    assert "accuracy" in ended.out
    rows = list(csv.DictReader((tmp_path / "out" / "versions.csv").open()))
    assert [row["version"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["eval_accuracy"]) > float(rows[0]["eval_accuracy"])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    again = _simulate(tmp_path)
    assert again.code == 2
    assert "--resume" in again.error
    resumed = _simulate(tmp_path, "--resume", "--json")
    assert resumed.code == 0, resumed.error
    assert [row["version"] for row in json.loads(resumed.out)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("rounds = 3", "rouns = 3", "did you mean 'rounds'"),
        ("rounds = 3", "rounds = 'many'", "[aggregator] rounds"),
        ('partition = "iid"', "data_set = 1", "data_set"),
        ("examples_per_s = 100.0", "", "train_s or examples_per_s"),
        ("[aggregator]", "[rules]", "rules"),
        ("simulated_task:Blobs", "no_such_task", "no module"),
        ("rounds = 3", 'rounds = 3\ndata_dir = "x"', "--out"),
    ],
)
def test_a_wrong_experiment_is_one_line_and_exit_code_2(
    old: str, new: str, complaint: str, tmp_path: Path
) -> None:
    ended = _simulate(tmp_path, text=EXPERIMENT.replace(old, new))
    assert ended.code == 2, ended.error
    assert complaint in ended.error
    assert ended.error.count("\n") == 1


def test_a_profile_is_the_description_of_a_device() -> None:
    ended = fedgrpc("profile", "--task", "tests.support.simulated_task:Blobs", "--seconds", "0.1", cwd=ROOT)
    assert ended.code == 0, ended.error
    (kind,) = toml.read_all(DeviceKind, toml.parse(ended.out)["devices"], "[[devices]]")
    assert kind.examples_per_s is not None
    assert kind.examples_per_s > 0
    assert kind.memory_mb > 0


def test_a_trace_is_generated_and_played(tmp_path: Path) -> None:
    out = tmp_path / "trace.csv"
    ended = fedgrpc("trace", "generate", "--devices", "4", "--days", "1", "--out", str(out))
    assert ended.code == 0, ended.error
    assert "4 devices" in ended.out
    text = EXPERIMENT + f'[availability]\ntrace = "{out}"\n'
    played = _simulate(tmp_path, "--hours", "0.01", text=text)
    assert played.code == 0, played.error


@pytest.mark.faults
def test_ctrl_c_ends_it_at_once_with_its_processes_and_keeps_what_is_done(tmp_path: Path) -> None:
    path = _file(tmp_path, EXPERIMENT.replace("rounds = 3", "rounds = 100000"))
    arguments = ("simulate", str(path), "--out", str(tmp_path / "out"), "--jobs", "2")
    with running_command(*arguments, log=tmp_path / "log", cwd=ROOT) as process:
        history = tmp_path / "out" / "history.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until and not (history.exists() and history.read_text().count("\n") > 3):
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        psutil.wait_procs(children, timeout=30)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert "--resume goes on" in (tmp_path / "log").read_text()
    done = history.read_text().count("\n")
    path.write_text(EXPERIMENT.replace("rounds = 3", f"rounds = {done + 2}"))
    resumed = fedgrpc(*arguments[:-1], "1", "--resume", cwd=ROOT)
    assert resumed.code == 0, resumed.error
