"""An aggregator that gives a device's neighbours another task to see its update (arXiv 2111.07380).

Whatever it changes, the device masks nothing, and the round is abandoned with the reason.
"""

import asyncio

import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator.task_terms import TaskTerms
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.v1 import round_pb2
from fedgrpc.v1.privacy_pb2 import CommonTerms
from tests.federation.test_secure_sums import MODEL, SHORT
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.watched_sums import Watched

SECURE = {"secure": SecurePolicy(secure_bits=8), "clip_norm": 10.0}


class TwoTasks:
    """A changed aggregator: in round `number`, tasks of all but `target` are as `change` makes them.

    `change(task, common)` changes both, as nobody could tell by one task alone.
    """

    def __init__(self, monkeypatch, number, target, change):
        self.first_common = None
        message = TaskTerms.message

        def changed(terms, worker, token):
            task = message(terms, worker, token)
            common = CommonTerms.FromString(task.secure.common)
            if task.round == 1:
                self.first_common = common
            if task.round == number and worker != target:
                change(task, common)
                task.secure.common = common.SerializeToString(deterministic=True)
            return task

        monkeypatch.setattr(TaskTerms, "message", changed)


async def run_of_four(tmp_path, watched, number):
    """Return the record of round `number` of four workers, and the workers whose masked updates came in it."""
    save_file(MODEL, tmp_path / "initial.safetensors")
    policy = {"min_workers": 4, "quorum": 3, **SHORT}
    async with running_aggregator(tmp_path, **SECURE, policy=policy, rounds=number) as running:
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1 * (k + 1))) for k in range(4)]
        record = await running.until_ended(number)
        version = (await running.run()).model_version
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    # The versions before the round are as ever, and nothing came of the round.
    assert version == number
    assert len(watched.sums) == number - 1
    return record


def reason_of(record, worker):
    return next(task.reason for task in record.tasks if task.worker == worker)


def other_plan(task, common):
    task.plan.learning_rate = common.plan.learning_rate = 1e-9


def other_clip_norm(task, common):
    task.privacy.clip_norm = common.privacy.clip_norm = 1e-9


def other_bounds(task, common):
    for tensor in common.tensors:
        tensor.bound = 1e9


@pytest.mark.parametrize("change", [other_plan, other_clip_norm, other_bounds])
async def test_with_another_task_for_all_neighbours_the_device_masks_nothing(tmp_path, monkeypatch, change):
    TwoTasks(monkeypatch, 1, "w3", change)
    watched = Watched(monkeypatch)
    record = await run_of_four(tmp_path, watched, 1)
    assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
    assert "the shares of 0 neighbours can be opened" in reason_of(record, "w3")
    assert "another task" in reason_of(record, "w3")
    # Its neighbours cannot answer for it, so that their sum stays closed, too.
    assert "0 devices answered for 'w3'" in record.reason


async def test_with_another_version_for_all_neighbours_the_device_masks_nothing(tmp_path, monkeypatch):
    """The neighbours get the version of the round before, whole and right, and their tasks say so."""
    given = TaskTerms.given

    def of_before(terms, worker, token):
        version, context = given(terms, worker, token)
        return (1 if worker != "w3" else version), context

    def other_version(task, common):
        common.model_version, common.model_sha256 = 1, lies.first_common.model_sha256

    monkeypatch.setattr(TaskTerms, "given", of_before)
    lies = TwoTasks(monkeypatch, 2, "w3", other_version)
    watched = Watched(monkeypatch)
    record = await run_of_four(tmp_path, watched, 2)
    assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
    assert "the shares of 0 neighbours can be opened" in reason_of(record, "w3")
    assert "0 devices answered for 'w3'" in record.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda task, common: setattr(task.plan, "learning_rate", 1e-9), "training plan"),
        (lambda task, common: setattr(common, "model_sha256", bytes(32)), "not the one that all devices"),
    ],
)
async def test_a_device_whose_task_is_not_what_all_are_told_gives_it_back(tmp_path, monkeypatch, change, reason):
    TwoTasks(monkeypatch, 1, "w3", change)
    watched = Watched(monkeypatch)
    record = await run_of_four(tmp_path, watched, 1)
    assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
    assert all(reason in reason_of(record, worker) for worker in ("w0", "w1", "w2"))
