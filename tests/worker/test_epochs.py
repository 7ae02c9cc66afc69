"""The log of a worker has a line for each epoch of a task."""

import io
import json
import sys
import threading

import pytest

from fedgrpc.logging import configure
from fedgrpc.protocol.tasks import Task
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.trainer import Epoch
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.worker.throttle import Throttle
from fedgrpc.worker.trainer_calls import Hooks, job_of


@pytest.fixture
def log():
    stream = io.StringIO()
    configure(level="debug", log_format="json", stream=stream)
    yield stream
    configure(level="warning", log_format="console", stream=sys.__stderr__)


@pytest.mark.parametrize(("seconds", "level"), [(204.97, "info"), (0.02, "debug")])
def test_an_epoch_is_logged_with_its_batches_and_seconds_and_short_ones_only_for_debugging(log, seconds, level):
    task = Task("token", "digits", 3, TaskKind.TRAIN, 1, TrainingPlan(), "raw", "raw", "id")
    job = job_of(task, Hooks(threading.Event(), lambda progress: None, Throttle()))
    job.report_epoch(Epoch(1, 5, 781, seconds))
    line = json.loads(log.getvalue())
    assert (line["level"], line["round"], line["epoch"], line["of"]) == (level, 3, 1, 5)
    assert (line["batches"], line["seconds"]) == (781, seconds)
