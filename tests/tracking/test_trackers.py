"""Every tracker writes what it is told, where its own library finds it again."""

import json
import subprocess
import sys
import threading
import time
from typing import ClassVar

import pytest

from fedgrpc.errors import UsageError
from fedgrpc.tracking.rounds import figures
from fedgrpc.tracking.tracker import TRACKERS, tracker_of
from fedgrpc.tracking.tracking import Tracking
from fedgrpc.v1 import round_pb2


class Noted:
    """A tracker that notes its calls; with a target of "broken" its figures raise."""

    calls: ClassVar[list[tuple]] = []

    def __init__(self, target):
        self.target = target

    def begin(self, run, settings):
        self.calls.append(("begin", run, settings))

    def log(self, step, values, at_s):
        if self.target == "broken":
            raise RuntimeError("no room")
        self.calls.append(("log", step, values, at_s))

    def end(self):
        self.calls.append(("end",))


def told(tracker):
    tracker.begin("run", {"rounds": "2"})
    tracker.log(1, {"loss": 0.5, "bytes/up": 10.0}, 100.0)
    tracker.log(2, {"loss": 0.25}, 101.5)
    tracker.end()


def test_lines_of_json_are_appended(tmp_path):
    path = tmp_path / "rounds.jsonl"
    told(tracker_of(f"jsonl:{path}"))
    told(tracker_of(f"jsonl:{path}"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:3] == [
        {"run": "run", "settings": {"rounds": "2"}},
        {"run": "run", "step": 1, "at_s": 100.0, "loss": 0.5, "bytes/up": 10.0},
        {"run": "run", "step": 2, "at_s": 101.5, "loss": 0.25},
    ]
    assert lines[3:] == lines[:3]


@pytest.mark.extras
def test_tensorboard_finds_every_scalar_and_the_settings(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra fedgrpc[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(tracker_of(f"tensorboard:{tmp_path}"))
    found = EventAccumulator(str(tmp_path / "run"))
    found.Reload()
    assert [(event.step, event.value, event.wall_time) for event in found.Scalars("loss")] == [
        (1, 0.5, 100.0),
        (2, 0.25, 101.5),
    ]
    assert found.Scalars("bytes/up")[0].value == 10
    assert b"rounds = 2" in found.Tensors("settings")[0].tensor_proto.string_val[0]


@pytest.mark.extras
def test_mlflow_finds_the_run_and_goes_on_with_it_after_a_restart(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra fedgrpc[mlflow]")
    pytest.importorskip("sqlalchemy", reason="needs the extra fedgrpc[mlflow]")
    path = tmp_path / "mlflow.db"
    first = tracker_of(f"mlflow:{path}")
    first.begin("run", {"rounds": "2"})
    first.log(1, {"loss": 0.5}, 100.0)
    again = tracker_of(f"mlflow:{path}")
    again.begin("run", {"rounds": "2"})
    again.log(2, {"loss": 0.25}, 101.0)
    again.end()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}")
    (run,) = client.search_runs([client.get_experiment_by_name("fedgrpc").experiment_id])
    assert run.data.params == {"rounds": "2"}
    assert [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "loss")] == [
        (1, 0.5),
        (2, 0.25),
    ]
    assert run.info.status == "FINISHED"


@pytest.mark.extras
def test_weights_and_biases_writes_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra fedgrpc[wandb]")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    # A process of its own: the library has a helper process, which writes the last records as its parent ends.
    code = "from tests.tracking.test_trackers import told, tracker_of; told(tracker_of('wandb:fedgrpc-tests'))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    until = time.monotonic() + 60
    while b"loss" not in file.read_bytes():
        assert time.monotonic() < until, "no figures were written"
        time.sleep(0.1)


def test_a_broken_tracker_costs_its_figures_and_no_others(caplog):
    Noted.calls.clear()
    tracking = Tracking([Noted("broken"), Noted("good")])
    tracking.begin("run", {})
    tracking.log(1, {"loss": 1.0}, 5.0)
    tracking.log(2, {"loss": 0.5}, 6.0)
    tracking.end()
    assert [call[0] for call in Noted.calls] == ["begin", "begin", "log", "log", "end"]


def test_a_tracker_that_hangs_does_not_hold_up_the_run():
    hanging = threading.Event()

    class Hanging(Noted):
        def log(self, step, values, at_s):
            hanging.wait(60)

    tracking = Tracking([Hanging("")])
    tracking.begin("run", {})
    for step in range(5000):
        tracking.log(step, {"loss": 1.0}, 0.0)
    hanging.set()
    tracking.end()


def test_a_class_of_ones_own_is_a_tracker():
    assert tracker_of(f"{__name__}:Noted:place").target == "place"


@pytest.mark.parametrize("text", ["jsonl", "paper:", "paper:1", "json:JSONDecoder:", "no.such:A:", "jsonl:/no/x"])
def test_a_text_that_names_no_tracker_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as refused:
        tracker_of(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "jsonl"])
def test_without_its_library_a_tracker_names_the_extra(name, monkeypatch):
    for module in ("tensorboard", "tensorboard.summary.writer.event_file_writer", "mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"fedgrpc\[{name}\]"):
        tracker_of(f"{name}:x")


def test_the_figures_of_a_round_have_bytes_updates_and_all_scores():
    record = round_pb2.Round(
        number=3,
        duration_seconds=2.5,
        metrics={"loss": 0.5, "odd": float("nan")},
        evaluator_metrics={"loss": 0.75},
        training_metrics={"loss": 0.25},
        tasks=[
            round_pb2.TaskRecord(phase=round_pb2.TASK_PHASE_ACCEPTED, download_bytes=5, upload_bytes=3),
            round_pb2.TaskRecord(phase=round_pb2.TASK_PHASE_LATE, download_bytes=5),
        ],
    )
    assert figures(record) == {
        "loss": 0.5,
        "evaluator/loss": 0.75,
        "train/loss": 0.25,
        "round/seconds": 2.5,
        "round/updates": 1.0,
        "bytes/down": 10.0,
        "bytes/up": 3.0,
    }
