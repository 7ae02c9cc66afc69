"""A process that is killed in a training leaves the plan for the next one to tell."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedgrpc.errors import TaskError
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.submodels.plan import LocalModelPlan, Memory
from fedgrpc.worker import training_mark
from fedgrpc.worker.training_mark import TrainingMark

KILLED = """
import os, signal, sys
from pathlib import Path
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import LocalModelPlan, Memory
from fedgrpc.worker.training_mark import TrainingMark
with TrainingMark(Path(sys.argv[1])).during("task-1", LocalTask(LocalModelPlan(memory=Memory(4)), SubModel(0.5))):
    os.kill(os.getpid(), signal.SIGKILL)
"""
PLAN = LocalModelPlan(0.5, memory=Memory(4))


def kill(path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert ended.returncode == -signal.SIGKILL


def test_the_plan_that_has_killed_two_processes_is_told_and_its_task_refused(tmp_path: Path) -> None:
    path = tmp_path / "training"
    kill(path)
    kill(path)
    mark = TrainingMark(path)
    assert mark.too_large == PLAN
    mark.check("task-2")
    with pytest.raises(TaskError, match=r"were killed in it: width = 0\.5"):
        mark.check("task-1")
    assert TrainingMark(path).too_large is None


def test_one_killed_process_trains_again(tmp_path: Path) -> None:
    kill(tmp_path / "training")
    mark = TrainingMark(tmp_path / "training")
    assert mark.too_large is None
    mark.check("task-1")
    with mark.during("task-2", LocalTask()):
        left = (tmp_path / "training").read_bytes()
    # Another task that is killed, too, is another task.
    (tmp_path / "training").write_bytes(left)
    assert TrainingMark(tmp_path / "training").too_large is None


def test_a_training_that_ends_or_fails_leaves_no_mark(tmp_path: Path) -> None:
    path = tmp_path / "training"
    mark = TrainingMark(path)
    with mark.during("task-1", LocalTask()):
        assert path.exists()
    with pytest.raises(RuntimeError), mark.during("task-1", LocalTask()):
        raise RuntimeError
    assert not path.exists()


def test_a_mark_of_another_boot_was_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "training"
    kill(path)
    kill(path)
    (tmp_path / "boot_id").write_bytes(b"another\n")
    monkeypatch.setattr(training_mark, "_BOOT_ID", tmp_path / "boot_id")
    assert TrainingMark(path).too_large is None


@pytest.mark.parametrize("content", [b"", b"\n", b"x\ny\n2\n\xff\xff", b"x\ny\nz\n", bytes(range(192, 256))])
def test_a_mark_that_says_nothing_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "training").write_bytes(content)
    assert TrainingMark(tmp_path / "training").too_large is None
