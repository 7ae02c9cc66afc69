"""What an aggregator takes up from its data folder, state by state. Killing it is in `test_crashes`."""

import asyncio
import contextlib
import sqlite3
import time
from types import SimpleNamespace

import numpy as np
import pytest

from fedgrpc.protocol.tensors import manifest_from_proto
from fedgrpc.runs.conditions import Condition
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.hand_driven_device import MODEL, HandDrivenDevice, encoded, update_of
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.stored_updates import chunk

ABANDONED, COMMITTED = round_pb2.ROUND_PHASE_ABANDONED, round_pb2.ROUND_PHASE_COMMITTED


def again(running, *names):
    return [HandDrivenDevice(running.stub, name) for name in names]


async def tasks_out(running, *names):
    devices = [await running.device(name) for name in names]
    return devices, await asyncio.gather(*(device.task() for device in devices))


def away_for(running, seconds):
    """So much time passes while no aggregator runs on this folder."""
    with contextlib.closing(sqlite3.connect(running.settings.data_dir / "run.sqlite")) as database, database:
        database.execute("UPDATE rounds SET deadline_at = deadline_at - ? WHERE open = 1", (seconds,))


async def test_a_deadline_that_passed_meanwhile_closes_the_round_with_who_had_reported(tmp_path):
    async with running_aggregator(tmp_path, policy={"deadline_s": 300.0}) as running:
        (a, _), tasks = await tasks_out(running, "a", "b")
        await a.push(tasks[0])
    away_for(running, 300.0)
    # It is the round's own deadline that counts, not that of the settings now.
    async with running_aggregator(tmp_path, policy={"deadline_s": 600.0}) as running:
        await running.until_finished()
        round_ = await running.round()
        assert [task.phase for task in round_.tasks] == [
            round_pb2.TASK_PHASE_ACCEPTED,
            round_pb2.TASK_PHASE_LATE,
        ]
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 1, rtol=1e-6)


@pytest.mark.parametrize("days", [0, 30])
async def test_what_was_finished_while_the_aggregator_was_away_counts_although_the_deadline_has_passed(
    tmp_path, monkeypatch, days
):
    """It was away for an hour, or its wall clock was set 30 days ahead."""
    policy = {"quorum": 2, "deadline_s": 300.0, "reconnect_grace_s": 60.0}
    async with running_aggregator(tmp_path, policy=policy) as running:
        (a, _), tasks = await tasks_out(running, "a", "b")
        await a.push(tasks[0])
    if days:
        clock = SimpleNamespace(time=lambda: time.time() + days * 86_400)
        monkeypatch.setattr("fedgrpc.aggregator.recovered_rounds.time", clock)
    else:
        away_for(running, 3600.0)
    async with running_aggregator(tmp_path, policy=policy) as running:
        assert 55 < (await running.round()).time_left.ToSeconds() <= 60
        _, b = again(running, "a", "b")
        await b.push(tasks[1])
        await running.until_finished()
        round_ = await running.round()
        assert round_.phase == COMMITTED
        assert round_.reconnect_grace.ToSeconds() == 60
        assert round_.duration_seconds < 400


async def test_a_deadline_that_passed_meanwhile_without_the_quorum_abandons_the_round(tmp_path):
    policy = {"quorum": 2}
    async with running_aggregator(tmp_path, policy=policy) as running:
        (a, _), tasks = await tasks_out(running, "a", "b")
        await a.push(tasks[0])
    away_for(running, 600.0)
    async with running_aggregator(tmp_path, policy=policy) as running:
        assert (await running.until_ended(1)).phase == ABANDONED
        devices = again(running, "a", "b")
        tasks = await asyncio.gather(*(device.task() for device in devices))
        assert {task.round for task in tasks} == {2}
        await asyncio.gather(*(device.push(task) for device, task in zip(devices, tasks, strict=True)))
        assert (await running.until_finished()).model_version == 2


async def test_the_time_left_goes_on_from_where_it_was(tmp_path):
    async with running_aggregator(tmp_path) as running:
        _, tasks = await tasks_out(running, "a", "b")
        left_s = tasks[0].time_left.ToTimedelta().total_seconds()
        assert 500 < left_s <= 600
    away_for(running, 200.0)
    async with running_aggregator(tmp_path) as running:
        task = await again(running, "a")[0].task()
        assert 300 < task.time_left.ToTimedelta().total_seconds() <= left_s - 200.0


async def test_more_rounds_continue_a_finished_run_and_fewer_leave_it_finished(tmp_path):
    async with running_aggregator(tmp_path, rounds=1) as running:
        (a, b), tasks = await tasks_out(running, "a", "b")
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        await running.until_finished()
    async with running_aggregator(tmp_path, rounds=1) as running:
        await running.until_finished()
    async with running_aggregator(tmp_path, rounds=2) as running:
        a, b = again(running, "a", "b")
        tasks = await asyncio.gather(a.task(), b.task())
        assert (tasks[0].round, tasks[0].model_version) == (2, 2)
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        assert (await running.until_finished()).model_version == 3


async def test_a_run_that_met_its_target_stays_finished_until_another_is_set(tmp_path):
    """A supervisor that starts the aggregator again whenever it ends must not train the model further."""
    goal = {"rounds": 50, "evaluate": True, "target": Condition("mean", 1.5)}
    async with running_aggregator(tmp_path, **goal) as running:
        crew = [start_worker(running, tmp_path, name, ShiftTrainer()) for name in ("a", "b")]
        assert await asyncio.gather(*crew) == [0, 0]
        ended = await running.until_finished()
        assert ended.model_version < 51
    async with running_aggregator(tmp_path, **goal) as running:
        run = await running.until_finished()
        assert (run.model_version, run.reason) == (ended.model_version, ended.reason)
    async with running_aggregator(tmp_path, **{**goal, "target": Condition("mean", 2.5)}) as running:
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING


@pytest.mark.parametrize("phase", ["Pause", "Stop"])
async def test_a_run_that_was_paused_or_stopped_still_is(tmp_path, phase):
    async with running_aggregator(tmp_path) as running:
        await getattr(running.stub, f"{phase}Run")(getattr(pb, f"{phase}RunRequest")())
    async with running_aggregator(tmp_path) as running:
        run = await running.run()
        assert run.phase == {"Pause": pb.RUN_PHASE_PAUSED, "Stop": pb.RUN_PHASE_STOPPED}[phase]
        a, b = [await running.device(name) for name in "ab"]
        replies = await asyncio.gather(a.poll(0.6), b.poll(0.6))
        assert not any(reply.HasField("task") for reply in replies)
        assert {reply.run_ended for reply in replies} == {phase == "Stop"}


def accepted_on_disk(running, device, task, tensors):
    """As if the aggregator had died between making the update durable and counting it."""
    message, payload = encoded(tensors)
    manifest = manifest_from_proto(message)
    upload = UploadJournal(running.settings.data_dir / "uploads").begin(
        device.header(task, message, example_count=1), manifest
    )
    upload.append([chunk(payload, 0, len(payload))])
    upload.finish()
    upload.seal()


async def test_an_update_made_durable_by_a_process_that_then_died_counts(tmp_path):
    async with running_aggregator(tmp_path) as running:
        devices, tasks = await tasks_out(running, "a", "b")
    for device, task in zip(devices, tasks, strict=True):
        accepted_on_disk(running, device, task, update_of(2.0))
    async with running_aggregator(tmp_path) as running:
        await running.until_finished()
        assert {task.phase for task in (await running.round()).tasks} == {round_pb2.TASK_PHASE_ACCEPTED}
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + 2, rtol=1e-6)
        assert running.kept_updates() == []


async def test_two_initial_models_made_durable_by_a_process_that_then_died_give_one(tmp_path):
    """The first worker was replaced, and both had sent theirs when the aggregator died."""
    changes = {"initial_model": None, "policy": {"min_workers": 1, "lease_s": 1.0}}
    async with running_aggregator(tmp_path, **changes) as running:
        first = await running.device("first")
        task = await first.task()
        second = await running.device("second")
        other = await second.task()
        assert {task.kind, other.kind} == {round_pb2.TASK_KIND_INITIALIZE}
    for device, given in ((first, task), (second, other)):
        accepted_on_disk(running, device, given, MODEL)
    async with running_aggregator(tmp_path, **changes) as running:
        await running.until(lambda run, _: run.model_version == 1)
        np.testing.assert_array_equal(running.weights(1)["w"], MODEL["w"])


async def test_a_finished_round_is_remembered_with_its_scores(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, evaluate=True) as running:
        (a, b), tasks = await tasks_out(running, "a", "b")
        assert tasks[0].evaluate
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        tasks = await asyncio.gather(a.task(), b.task())
        scores = {"evaluation_metrics": {"accuracy": 0.5}, "evaluation_example_count": 4}
        await asyncio.gather(a.push(tasks[0], **scores), b.push(tasks[1]))
        await running.until(lambda run, _: run.model_version == 3)
    async with running_aggregator(tmp_path, rounds=2, evaluate=True) as running:
        first, second = [item for item in await running.rounds() if item.kind == round_pb2.TASK_KIND_TRAIN]
        assert dict(first.metrics) == {"accuracy": 0.5}
        assert (first.phase, second.phase, second.committed_version) == (COMMITTED, COMMITTED, 3)
        workers = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
        assert {(item.rounds_selected, item.rounds_accepted) for item in workers} == {(2, 2)}
        assert {item.state for item in workers} == {pb.WORKER_STATE_AWAY}


async def test_what_a_process_that_died_left_behind_is_swept_up(tmp_path):
    async with running_aggregator(tmp_path) as running:
        pass
    folder = running.settings.data_dir
    (folder / "uploads" / "nobodys.part").write_bytes(b"x" * 100)
    (folder / "uploads" / "nobodys.update").write_bytes(b"x" * 100)
    (folder / "encoded" / "000001-0123456789abcdef.payload").write_bytes(b"x")
    async with running_aggregator(tmp_path) as running:
        assert running.kept_updates() == []
        (a, b), tasks = await tasks_out(running, "a", "b")
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        await running.until_finished()
