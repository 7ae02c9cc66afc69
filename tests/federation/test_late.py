"""What comes late: carried on into the next round, counted once and for less, over restarts too; and buffers."""

import asyncio
import hashlib

import numpy as np
import pytest

from fedgrpc.aggregation.scaling import staleness_scale
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.hand_driven_device import MODEL, HandDrivenDevice, chunks, encoded, refused, update_of
from tests.support.processes import aggregator_process
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

ACCEPTED, LATE = round_pb2.TASK_PHASE_ACCEPTED, round_pb2.TASK_PHASE_LATE
# Every worker that has registered is waited for, as long as it takes.
WINDOW = {"late": "carry", "min_workers": 2, "selection_window_s": 30.0}
CARRY = {**WINDOW, "max_participants": 2, "over_selection": 1.5}
HALF = staleness_scale(1)


async def again(running, *names):
    """The same devices, as they come back to an aggregator that was away: a round waits for who has registered."""
    devices = [HandDrivenDevice(running.stub, name) for name in names]
    for device in devices:
        await device.register()
    return devices


async def fleet(running, *names):
    devices = [await running.device(name) for name in names]
    return devices, await asyncio.gather(*(device.task() for device in devices))


def tasks_of(round_):
    return {task.worker: task for task in round_.tasks}


def assert_model(running, version, change):
    np.testing.assert_allclose(running.weights(version)["w"], MODEL["w"] + change, rtol=1e-5)


def digest(running, version):
    path = running.settings.data_dir / "models" / f"{version:06d}.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def with_one_late(running):
    """Round 1 has committed two updates of 1.0; the third worker is still training from version 1."""
    devices, tasks = await fleet(running, "a", "b", "late")
    await devices[2].beat(tasks[2])
    await asyncio.gather(devices[0].push(tasks[0]), devices[1].push(tasks[1]))
    await running.until_ended(1)
    return devices, tasks[2]


async def open_next(running, *devices):
    """Tasks of the next round for these."""
    return await asyncio.gather(*(device.task() for device in devices))


async def test_a_late_update_counts_in_the_next_round_with_a_discount(tmp_path):
    async with running_aggregator(tmp_path, policy=CARRY, rounds=2) as running:
        (a, b, late), task = await with_one_late(running)
        seen = tasks_of(await running.round(1))["late"]
        assert (seen.phase, seen.staleness) == (LATE, 0)
        assert seen.reason == "slow training: enough updates are in; carried into the next round"
        beat = await late.beat(task)
        assert (beat.cancel, beat.HasField("time_left")) == (False, False)
        old, new = {"evaluation_metrics": {"accuracy": 0.0}}, {"evaluation_metrics": {"accuracy": 1.0}}
        count = {"evaluation_example_count": 10}
        assert (await late.push(task, update_of(4.0, n=100), **old, **count)).complete
        assert (await late.push(task, update_of(4.0))).complete
        tasks = await open_next(running, a, b)
        assert {task.model_version for task in tasks} == {2}
        for device, each in zip((a, b), tasks, strict=True):
            await device.push(each, update_of(n=7), **new, **count)
        await running.until_finished()
        # The late one has scored a version of long ago.
        assert (await running.round(1)).metrics["accuracy"] == 1.0
        assert_model(running, 3, 1.0 + (1.0 + 1.0 + HALF * 4.0) / 3)
        # What is a value, not a difference, is not discounted.
        assert running.weights(3)["n"] == round((7 + 7 + 100) / 3)
        record = await running.round(2)
        seen = tasks_of(record)["late"]
        assert (seen.phase, seen.staleness, seen.scale) == (ACCEPTED, 1, pytest.approx(HALF))
        assert [tasks_of(record)[name].scale for name in "ab"] == [1.0, 1.0]
        workers = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
        assert {w.worker: w.rounds_accepted for w in workers} == {"a": 2, "b": 2, "late": 1}
        assert running.kept_updates() == []


async def test_an_upload_that_is_under_way_when_its_round_ends_goes_on(tmp_path):
    async with running_aggregator(tmp_path, policy=CARRY, rounds=2) as running:
        devices, tasks = await fleet(running, "a", "b", "late")
        manifest, payload = encoded(update_of(4.0))
        call = devices[2].stub.PushUpdate()
        await call.write(pb.PushUpdateRequest(header=devices[2].header(tasks[2], manifest)))
        first, *rest = chunks(payload)
        await call.write(first)
        await devices[2].until_held(tasks[2], len(first.chunk.data))
        await asyncio.gather(devices[0].push(tasks[0]), devices[1].push(tasks[1]))
        await running.until_ended(1)
        for message in rest:
            await call.write(message)
        await call.done_writing()
        assert (await call).complete
        tasks = await open_next(running, *devices[:2])
        await asyncio.gather(devices[0].push(tasks[0]), devices[1].push(tasks[1]))
        await running.until_finished()
        assert_model(running, 3, 1.0 + (1.0 + 1.0 + HALF * 4.0) / 3)


FLAGS = (
    *("--late", "carry", "--selection-window", "30s", "--max-participants", "2", "--over-selection", "1.5"),
    *("--rounds", "2", "--algorithm", "fednova"),
)


class Killable:
    """An aggregator process on `folder`; `restart` is kill -9 and another process, where `kills` says so."""

    def __init__(self, folder, kills):
        self.folder = folder
        self.kills = kills

    async def __aenter__(self):
        self._place = aggregator_process(self.folder, *FLAGS)
        self._process, self.running = await self._place.__aenter__()
        return self

    async def __aexit__(self, *exception):
        await self._place.__aexit__(*exception)

    async def restart(self, *names):
        """The same devices, calling the aggregator that runs now."""
        if self.kills:
            await self._process.kill()
            await self.__aexit__(None, None, None)
            await self.__aenter__()
        return await again(self.running, *names)


@pytest.fixture(scope="module")
def made():
    """What each way to the end has made: hashes of the versions."""
    return {}


@pytest.mark.faults
@pytest.mark.parametrize("kills", [False, True])
async def test_a_carried_update_is_counted_once_with_the_same_bits_over_kills(tmp_path, made, kills):
    """Killed while it is under way, once it is accepted, and in the round that takes it: as if never killed."""
    async with Killable(tmp_path, kills) as it:
        _, task = await with_one_late(it.running)
        (late,) = await it.restart("late")
        manifest, payload = encoded(update_of(4.0))
        header = pb.PushUpdateRequest(header=late.header(task, manifest, steps=4))
        assert not (await late.send(header, *chunks(payload)[:2])).complete
        (late,) = await it.restart("late")
        held = (await late.held(task)).committed_size_bytes
        assert held == 2 * 2048
        assert (await late.send(header, *chunks(payload, held))).complete
        a, b = await it.restart("a", "b")
        tasks = await open_next(it.running, a, b)
        await a.push(tasks[0], update_of(2.0), steps=2)
        (b,) = await it.restart("b")
        await b.push(tasks[1], update_of(3.0), steps=3)
        await it.running.until_finished()
        record = await it.running.round(2)
        assert {t.worker: (t.phase, t.staleness, t.steps) for t in record.tasks} == {
            "late": (ACCEPTED, 1, 4),
            "a": (ACCEPTED, 0, 2),
            "b": (ACCEPTED, 0, 3),
        }
        assert_model(it.running, 3, 1.0 + (3.0 + 3.0 + HALF * 3.0) / 3)
        assert it.running.kept_updates() == []
        made[kills] = (digest(it.running, 2), digest(it.running, 3))
    assert len(set(made.values())) == 1


async def test_a_stale_task_is_over_when_its_worker_asks_for_another(tmp_path):
    # No round is to open with the first two that ask.
    async with running_aggregator(tmp_path, policy={**CARRY, "min_workers": 3}, rounds=2) as running:
        (a, b, late), task = await with_one_late(running)
        coming = asyncio.create_task(late.task())
        await running.until_task("late", round_pb2.TASK_PHASE_FAILED)
        new = [*await open_next(running, a, b), await coming]
        assert (new[2].token != task.token, new[2].model_version, new[2].round) == (True, 2, 2)
        with refused("FAILED_PRECONDITION", "its worker has lost it", "RoundClosed"):
            await late.push(task, update_of(100.0))
        await asyncio.gather(*(device.push(each) for device, each in zip((a, b), new[:2], strict=True)))
        await running.until_finished()
        assert_model(running, 3, 2.0)


async def test_an_update_that_is_too_stale_is_dropped(tmp_path):
    async with running_aggregator(tmp_path, policy={**CARRY, "max_staleness": 1}, rounds=2) as running:
        (a, b, late), task = await with_one_late(running)
        assert not (await late.beat(task)).cancel
        tasks = await open_next(running, a, b)
        # The deadline of this round is none of its.
        assert (await late.beat(task)).HasField("time_left") is False
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        ended = await running.until_ended(2)
        assert tasks_of(ended)["late"].reason == "slow training: enough updates are in"
        assert (await late.beat(task)).cancel
        with refused("FAILED_PRECONDITION", "the task is late", "RoundClosed"):
            await late.push(task, update_of(100.0))
        await running.until_finished()
        assert_model(running, 3, 2.0)


async def test_a_refused_carried_update_harms_nobody(tmp_path):
    async with running_aggregator(tmp_path, policy=CARRY, rounds=2) as running:
        (a, b, late), task = await with_one_late(running)
        with refused("INVALID_ARGUMENT", "example count 0"):
            await late.push(task, update_of(100.0), example_count=0)
        # It asks for no other task; until it counts as away it is waited for.
        running.pass_time(300)
        tasks = await open_next(running, a, b)
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        await running.until_finished()
        assert_model(running, 3, 2.0)


async def test_what_was_accepted_for_an_abandoned_round_counts_in_the_next(tmp_path):
    policy = {"late": "carry", "quorum": 2}
    async with running_aggregator(tmp_path, policy=policy) as running:
        (one, two), tasks = await fleet(running, "one", "two")
        assert (await one.push(tasks[0], update_of(3.0))).complete
        running.pass_time(600)
        assert (await running.until_ended(1)).phase == round_pb2.ROUND_PHASE_ABANDONED
        again_task = await two.task()
        assert again_task.round == 2
        assert (await two.push(again_task)).complete
        await running.until_finished()
        assert_model(running, 2, 2.0)
        assert tasks_of(await running.round())["one"].staleness == 0


async def test_what_is_late_at_the_end_of_the_run_is_told_so(tmp_path):
    async with running_aggregator(tmp_path, policy=CARRY, rounds=1) as running:
        (_, _, late), task = await with_one_late(running)
        await running.until_finished()
        assert (await late.beat(task)).cancel
        with refused("FAILED_PRECONDITION", "no round is left", "RoundClosed"):
            await late.push(task)
        assert running.kept_updates() == []
    async with running_aggregator(tmp_path, policy=CARRY, rounds=2) as running:
        a, b, late = await again(running, "a", "b", "late")
        tasks = await open_next(running, a, b, late)
        assert {task.round for task in tasks} == {2}


async def test_a_version_that_a_carried_task_starts_from_is_kept(tmp_path):
    async with running_aggregator(tmp_path, policy=CARRY, rounds=4, keep_versions=1) as running:
        (a, b, late), task = await with_one_late(running)
        for _ in range(2):
            tasks = await open_next(running, a, b)
            await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
            await running.until_ended(tasks[0].round)
        header, _ = await late.pull(task)
        assert header.version == 1
        assert (await late.push(task)).complete
        tasks = await open_next(running, a, b)
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        await running.until_finished()
        assert tasks_of(await running.round(4))["late"].staleness == 3
        assert running.weights(5) is not None
        with refused("NOT_FOUND", ""):
            await late.pull(version=1)


BUFFER = {**WINDOW, "buffer_size": 2}


async def test_a_buffer_commits_every_so_many_updates_and_waits_for_nobody(tmp_path):
    async with running_aggregator(tmp_path, policy=BUFFER, rounds=3) as running:
        (a, b, slow), (task_a, task_b, task_slow) = await fleet(running, "a", "b", "slow")
        await slow.beat(task_slow)
        await asyncio.gather(a.push(task_a), b.push(task_b))
        await running.until_ended(1)
        # Whoever is done goes on at once, from the version that there now is.
        task_a, task_b = await asyncio.gather(a.task(), b.task())
        assert {task_a.model_version, task_b.model_version} == {2}
        await asyncio.gather(a.beat(task_a), b.beat(task_b))
        await slow.push(task_slow, update_of(4.0))
        await a.push(task_a)
        ended = await running.until_ended(2)
        assert {name: t.staleness for name, t in tasks_of(ended).items() if t.phase == ACCEPTED} == {
            "slow": 1,
            "a": 0,
        }
        assert_model(running, 3, 1.0 + (1.0 + HALF * 4.0) / 2)
        assert not (await b.beat(task_b)).cancel
        task_a = await a.task()
        await b.push(task_b)
        await a.push(task_a)
        await running.until_finished()
        assert {t.staleness for t in tasks_of(await running.round(3)).values() if t.phase == ACCEPTED} == {0, 1}
        assert_model(running, 4, 1.0 + (1.0 + HALF * 4.0) / 2 + (1.0 + HALF) / 2)


ONE_AT_A_TIME = {**WINDOW, "buffer_size": 1}


@pytest.mark.parametrize("s", ["constant", "polynomial,a=1", "hinge,a=2,b=1"])
async def test_fedasync_mixes_in_the_model_that_a_device_has_trained_from_the_version_that_it_got(tmp_path, s):
    text = f"fedasync:alpha=0.5,s={s}"
    plan = {"plan": TrainingPlan(algorithm=text), "download_recipe": "raw", "upload_recipe": "raw"}
    async with running_aggregator(tmp_path, policy=ONE_AT_A_TIME, rounds=4, keep_versions=1, **plan) as running:
        (a, slow), (task, late) = await fleet(running, "a", "slow")
        await slow.beat(late)
        # Version 1, and what each of the next ones is mixed of: what its device got, and the difference.
        models, mixing = {1: np.zeros(1)}, algorithm_of(text).mixing

        async def mixed(device, its_task, change):
            got, version = its_task.model_version, len(models)
            await device.push(its_task, update_of(change))
            await running.until_ended(version)
            share = mixing(version - got)
            models[version + 1] = (1 - share) * models[version] + share * (models[got] + change)
            assert_model(running, version + 1, models[version + 1])

        await mixed(a, task, 1.0)
        await mixed(a, await a.task(), 2.0)
        await mixed(slow, late, 4.0)
        assert late.model_version == 1
        # The next round opens once both have come back.
        task, _ = await asyncio.gather(a.task(), slow.task())
        await mixed(a, task, 8.0)
        await running.until_finished()


async def test_fedasync_finds_the_version_of_an_old_update_after_a_restart(tmp_path):
    about = {"policy": ONE_AT_A_TIME, "keep_versions": 1, "download_recipe": "raw", "upload_recipe": "raw"}
    about["plan"] = TrainingPlan(algorithm="fedasync:alpha=0.5,a=1")
    async with running_aggregator(tmp_path, rounds=3, **about) as running:
        (a, slow), (task, late) = await fleet(running, "a", "slow")
        await slow.beat(late)
        await a.push(task, update_of(1.0))
        await running.until_ended(1)
        assert_model(running, 2, 0.5)
    async with running_aggregator(tmp_path, rounds=2, **about) as running:
        (slow,) = await again(running, "slow")
        await slow.push(late, update_of(4.0))
        await running.until_finished()
        # The old update starts from version 1, and is mixed into version 2 by a quarter.
        assert_model(running, 3, 0.75 * 0.5 + 0.25 * 4.0)


@pytest.mark.parametrize("policy", [BUFFER, CARRY])
async def test_real_workers_bring_a_run_that_carries_to_its_end(tmp_path, policy):
    async with running_aggregator(tmp_path, policy=policy, rounds=5) as running:
        workers = [start_worker(running, tmp_path, name, ShiftTrainer(1.0)) for name in ("a", "b", "c")]
        await running.until_finished()
        counted = [
            sum(task.phase == ACCEPTED for task in record.tasks)
            for record in await running.rounds()
            if record.tasks
        ]
        assert len(counted) == 5
        assert min(counted) >= 2
        for worker in workers:
            assert await worker == 0
