"""Without metrics a device tells nothing of its data but updates: no scores, no counts, no text of an error."""

import asyncio

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.errors import StorageError, TaskUnfit, UsageError
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.trainer import LocalExamples
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import models_pb2, round_pb2
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.released_models import ReleasedModels
from fedgrpc.worker.settings import WorkerSettings
from tests.federation.test_releases import finished_run, refused, start, until_phase
from tests.support.many_runs import QUICK, hosting
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

SECRET = "patient 4711"


@pytest.fixture(autouse=True)
def model(tmp_path):
    save_file({"w": np.zeros(4, np.float32)}, tmp_path / "initial.safetensors")


def private(metrics):
    policy = PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4, metrics=metrics)
    return {"privacy": policy, "clip_norm": 0.5, "evaluate": False}


class Gathered(ShiftTrainer):
    def local_examples(self):
        return LocalExamples(self.examples, ("files", self.examples))


class Careless(ShiftTrainer):
    """Its errors name what is in the data."""

    def train(self, weights, job):
        raise KeyError(SECRET)


@pytest.mark.parametrize("metrics", [True, False])
async def test_a_device_reports_its_losses_and_counts_or_nothing_but_its_times(tmp_path, metrics):
    async with running_aggregator(tmp_path, policy={"min_workers": 1}, **private(metrics)) as running:
        worker = start_worker(running, tmp_path, "w", Gathered(examples=7))
        await running.until_finished()
        (task,) = (await running.round(1)).tasks
        (known,) = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
    told = (task.example_count, dict(task.metrics), known.HasField("new_examples"))
    assert told == ((7, {"train_loss": 1.0}, True) if metrics else (1, {}, False))
    assert not task.evaluation_metrics
    assert await worker == 0


@pytest.mark.parametrize("metrics", [True, False])
async def test_the_text_of_an_error_leaves_a_device_only_where_metrics_do(tmp_path, metrics):
    async with running_aggregator(tmp_path, policy={"min_workers": 1}, **private(metrics)) as running:
        worker = start_worker(running, tmp_path, "w", Careless())

        def failed(_, record):
            return any(task.phase == round_pb2.TASK_PHASE_FAILED for task in record.tasks)

        _, record = await running.until(failed)
        reasons = {task.reason for task in record.tasks if task.phase == round_pb2.TASK_PHASE_FAILED}
        worker.cancel()
    assert all(
        (SECRET in reason) is metrics and "TaskError" in reason + "TaskError" * metrics for reason in reasons
    )


async def refusals(client):
    return [reason for each in await client.workers() for reason in each.refusals.values()]


@pytest.mark.parametrize("metrics", [True, False])
async def test_why_a_device_takes_no_tasks_of_a_run_is_told_by_its_kind_alone(tmp_path, metrics):
    def unfit(registration):
        raise TaskUnfit(SECRET)

    settings = {
        **QUICK,
        **{"privacy": "gaussian", "noise-multiplier": "1", "privacy-cohort": "4", "clip-norm": "1"},
        **({} if metrics else {"metrics": "false"}),
    }
    async with hosting(tmp_path) as (address, client, _):
        await client.submit("a", settings)
        named = WorkerSettings("w", address, tmp_path / "w", serve_address=None, poll_wait_s=2.0)
        worker = asyncio.create_task(run_worker(named, build_trainer=unfit))
        async with asyncio.timeout(30):
            while not (told := await refusals(client)):  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.05)
        worker.cancel()
    assert (SECRET in told[0]) is metrics


async def test_a_release_is_not_scored_by_devices_that_tell_nothing_of_their_data(tmp_path):
    scored = []
    changes = private(False)
    async with finished_run(tmp_path, accuracy_of=scored.append, **changes) as (_, models, _):
        with refused(UsageError):
            await models.StartRelease(start("2"))
        await models.StartRelease(start("2", conditions=()))
        done = await until_phase(models, models_pb2.RELEASE_PHASE_DONE)
        assert [dict(report.scores) for report in done.reports] == [{}, {}]
        assert not scored


@pytest.mark.parametrize("metrics", [True, False])
async def test_why_a_device_does_not_serve_a_release_is_told_by_its_kind_alone(tmp_path, monkeypatch, metrics):
    def full(*_):
        raise StorageError(SECRET)

    async with finished_run(tmp_path, **private(metrics)) as (_, models, _):
        monkeypatch.setattr(ReleasedModels, "publish", full)
        await models.StartRelease(start("2", conditions=()))
        withdrawn = await until_phase(models, models_pb2.RELEASE_PHASE_ROLLED_BACK)
    told = str(withdrawn)
    assert "StorageError" in told or metrics
    assert (SECRET in told) is metrics
