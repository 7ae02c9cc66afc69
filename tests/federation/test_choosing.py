"""What the aggregator learns of its workers, and what it makes of that: deadlines, choices, reasons."""

import asyncio

from prometheus_client import generate_latest

from fedgrpc.rounds.events import LossCause
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, round_pb2
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice, chunks, encoded, refused, update_of
from tests.support.running_federation import running_aggregator

ACCEPTED, EXPIRED, LATE = (
    round_pb2.TASK_PHASE_ACCEPTED,
    round_pb2.TASK_PHASE_EXPIRED,
    round_pb2.TASK_PHASE_LATE,
)
DOWNLOADING, TRAINING, UPLOADING = (
    round_pb2.TASK_PHASE_DOWNLOADING,
    round_pb2.TASK_PHASE_TRAINING,
    round_pb2.TASK_PHASE_UPLOADING,
)
LEARNING = SelectionPolicy(learn_deadline=True)


def again(running, *names):
    return [HandDrivenDevice(running.stub, name) for name in names]


async def fleet(running, *names):
    devices = [await running.device(name) for name in names]
    return devices, await asyncio.gather(*(device.task() for device in devices))


async def records(running):
    reply = await running.stub.ListWorkers(pb.ListWorkersRequest())
    return {record.worker: record for record in reply.workers}


def endings(running_records):
    return {name: dict(record.endings) for name, record in running_records.items()}


def tasks_of(round_):
    return {task.worker: task for task in round_.tasks}


def took(download_s, local_s, upload_s=0.0):
    return device_pb2.Timings(download_seconds=download_s, local_seconds=local_s, upload_seconds=upload_s)


def samples(running):
    text = generate_latest(running.aggregator.coordinator.metrics.registry).decode()
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


async def test_each_worker_is_remembered_by_how_its_tasks_ended_and_what_it_was_too_slow_in(tmp_path):
    names = ("quick", "puller", "trainer", "sender", "absent", "broken", "wrong")
    async with running_aggregator(tmp_path, policy={"min_workers": 7}) as running:
        devices, tasks = await fleet(running, *names)
        by_name = dict(zip(names, zip(devices, tasks, strict=True), strict=True))
        for name, phase in (("puller", DOWNLOADING), ("trainer", TRAINING)):
            device, task = by_name[name]
            await device.beat(task, phase)
        device, task = by_name["sender"]
        manifest, payload = encoded(update_of())
        await device.send(pb.PushUpdateRequest(header=device.header(task, manifest)), *chunks(payload)[:2])
        device, task = by_name["broken"]
        await device.give_back(task)
        device, task = by_name["wrong"]
        with refused("INVALID_ARGUMENT", "example count 0"):
            await device.push(task, example_count=0)
        device, task = by_name["quick"]
        await device.push(task)
        running.pass_time(600)
        await running.until_finished()
        expected = {
            "quick": "accepted",
            "puller": "slow download",
            "trainer": "slow training",
            "sender": "slow upload",
            "absent": "no-show",
            "broken": "failed",
            "wrong": "rejected",
        }
        assert endings(await records(running)) == {name: {how: 1} for name, how in expected.items()}
        seen = samples(running)
        for how in expected.values():
            assert float(seen[f'fedgrpc_task_endings_total{{ending="{how}"}}']) == 1
        for name, task in tasks_of(await running.round()).items():
            slow = expected[name] if name not in ("quick", "broken", "wrong") else ""
            assert task.reason.startswith(slow)
            assert LossCause(task.loss_cause).label == expected[name]
            assert bool(task.reason) == (name != "quick")


async def test_what_is_known_of_workers_outlives_a_restart(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        await b.beat(tasks[1])
        await a.push(tasks[0], timings=took(1000.0, 0.0))
        running.pass_time(600)
        await running.until_finished()
        before = await records(running)
        assert 600.0 < before["b"].expected_timings.local_seconds < 1000.0
        # It cannot have taken longer than it had its task.
        assert 0 < before["a"].expected_timings.download_seconds < 100
    async with running_aggregator(tmp_path) as running:
        after = await records(running)
        assert [after[n].expected_timings for n in "ab"] == [before[n].expected_timings for n in "ab"]
        assert endings(after) == {"a": {"accepted": 1}, "b": {"slow training": 1}}
        assert [(r.rounds_selected, r.rounds_accepted) for r in (after["a"], after["b"])] == [(1, 1), (1, 0)]


async def test_the_deadline_is_learned_of_the_workers_and_stays_after_a_restart(tmp_path):
    policy = {"deadline_s": 600.0, "deadline_floor_s": 300.0}
    settings = {"policy": policy, "choosing": LEARNING, "rounds": 2}
    async with running_aggregator(tmp_path, **settings) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        first = await running.round()
        assert (first.deadline.ToTimedelta().total_seconds(), first.deadline_reason) == (600.0, "")
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        tasks = await asyncio.gather(a.task(), b.task())
        assert 200 < tasks[0].time_left.ToTimedelta().total_seconds() <= 300
        second = await running.round()
        assert second.deadline.ToTimedelta().total_seconds() == 300.0
        assert second.deadline_reason.startswith("2 of 2 are expected within ")
    async with running_aggregator(tmp_path, **settings) as running:
        resumed = await running.round()
        assert (resumed.number, resumed.deadline) == (2, second.deadline)
        assert resumed.deadline_reason == second.deadline_reason
        a, b = again(running, "a", "b")
        tasks = await asyncio.gather(a.task(), b.task())
        assert tasks[0].time_left.ToTimedelta().total_seconds() <= 300
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))
        await running.until_finished()


async def test_a_learned_deadline_is_the_times_that_workers_took(tmp_path):
    """b was seen to train for 100 s, a was not; the round waits for both."""
    policy = {"min_sample_size": 2}
    async with running_aggregator(tmp_path, policy=policy, choosing=LEARNING, rounds=2) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        await b.beat(tasks[1])
        running.pass_time(100)
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1], timings=took(0.0, 0.0)))
        await asyncio.gather(a.task(), b.task())
        learned = (await running.round()).deadline.ToTimedelta().total_seconds()
        assert 120 <= learned < 300
        assert (await running.round()).deadline_reason.endswith("b as the last")


async def test_a_round_commits_early_once_enough_weight_is_in(tmp_path):
    async with running_aggregator(tmp_path, policy={"min_workers": 3, "weight_aim": 30.0}) as running:
        (a, b, _), tasks = await fleet(running, "a", "b", "c")
        await a.push(tasks[0], example_count=10)
        assert not (await b.beat(tasks[1])).cancel
        await b.push(tasks[1], update_of(3.0), example_count=20)
        await running.until_finished()
        round_ = await running.round()
        assert round_.reason == "enough weight is in"
        assert [tasks_of(round_)[name].phase for name in "abc"] == [ACCEPTED, ACCEPTED, LATE]


async def test_weight_that_was_in_before_a_restart_counts_after_it(tmp_path):
    policy = {"min_workers": 3, "weight_aim": 30.0}
    async with running_aggregator(tmp_path, policy=policy) as running:
        (a, _, _), tasks = await fleet(running, "a", "b", "c")
        await a.push(tasks[0], example_count=20)
    async with running_aggregator(tmp_path, policy=policy) as running:
        await again(running, "b")[0].push(tasks[1], example_count=10)
        await running.until_finished()
        assert (await running.round()).reason == "enough weight is in"


async def test_a_trickling_upload_gives_up_its_slot_and_is_replaced_in_the_round(tmp_path):
    policy = {"lease_s": 100.0, "min_sample_size": 2, "max_participants": 2}
    async with running_aggregator(tmp_path, policy=policy) as running:
        (a, slow), tasks = await fleet(running, "a", "slow")
        spare = await running.device("spare")
        reply = asyncio.create_task(spare.task())
        manifest, payload = encoded(update_of(100.0))
        call = slow.stub.PushUpdate()
        await call.write(pb.PushUpdateRequest(header=slow.header(tasks[1], manifest)))

        async def trickle():
            """Whenever a few bytes were noted 40 s pass: its lease never runs out."""
            noted = 0.0
            for message in chunks(payload, chunk_bytes=4):
                await call.write(message)
                await asyncio.sleep(0.05)
                seen = tasks_of(await running.round())["slow"]
                if seen.phase == UPLOADING and seen.progress > noted:
                    noted = seen.progress
                    running.pass_time(40)

        assert (await a.push(tasks[0])).complete
        await running.until_polling("spare")
        trickling = asyncio.create_task(trickle())
        assert (await spare.push(await reply, update_of(3.0))).complete
        await running.until_finished()
        lost = tasks_of(await running.round())["slow"]
        assert lost.phase == EXPIRED
        assert lost.reason.startswith("slow upload: ")
        assert "bytes are due in" in lost.reason
        trickling.cancel()
        call.cancel()
        await asyncio.gather(trickling, return_exceptions=True)


async def test_workers_are_chosen_by_lot_and_the_record_says_so(tmp_path):
    async with running_aggregator(tmp_path) as running:
        (a, b), tasks = await fleet(running, "a", "b")
        assert {task.chosen for task in (await running.round()).tasks} == {"one of 2 by lot"}
        await asyncio.gather(a.push(tasks[0]), b.push(tasks[1]))


async def test_the_useful_are_chosen_and_the_record_says_why_even_after_a_restart(tmp_path):
    """Once all have been tried: the one with the highest loss, and the one who has waited longest."""
    policy = {"min_workers": 3, "max_participants": 2}
    oort = SelectionPolicy(selection="oort", fairness=0.5, exploration=0.0)
    settings = {"policy": policy, "choosing": oort, "rounds": 4}
    loss = {"a": 1e15, "b": 0.1, "c": 0.1}
    async with running_aggregator(tmp_path, **settings) as running:
        devices = {name: await running.device(name) for name in "abc"}
        polls = {name: asyncio.create_task(device.task()) for name, device in devices.items()}
        for number in (1, 2, 3):
            await running.until(lambda _, it, n=number: it.number == n and len(it.tasks) == 2)
            # All take equally long: to be useful is also to be fast.
            running.pass_time(10)
            for task in (await running.round(number)).tasks:
                device, token = devices[task.worker], await polls[task.worker]
                told = {"train_loss": loss[task.worker]}
                await device.push(token, metrics=told, timings=took(0.0, 10.0))
                polls[task.worker] = asyncio.create_task(device.task())
        _, last = await running.until(lambda _, it: it.number == 4 and len(it.tasks) == 2)
        record = {task.worker: task.chosen for task in last.tasks}
        chosen = dict(record)
        assert chosen.pop("a").startswith("utility ")
        assert set(chosen.values()) == {"has waited for 2 rounds"}
        for poll in polls.values():
            poll.cancel()
    async with running_aggregator(tmp_path, **settings) as running:
        assert {task.worker: task.chosen for task in (await running.round()).tasks} == record


async def test_a_round_opens_when_its_window_has_passed_though_a_worker_polled_again_meanwhile(tmp_path):
    """Two of three come, again and again, as workers do; the third is alive, and never comes."""
    policy = {"selection_window_s": 600.0, "lease_s": 10_000.0}
    async with running_aggregator(tmp_path, policy=policy) as running:
        a, b, _ = [await running.device(name) for name in ("a", "b", "away")]
        coordinator = running.aggregator.coordinator

        async def until(condition):
            async with asyncio.timeout(PATIENCE_S):
                while not condition(coordinator.machine.round.state):
                    coordinator.wake.set()
                    await asyncio.sleep(0.02)

        waiting = asyncio.create_task(a.task())
        polled = asyncio.create_task(b.poll(wait_s=PATIENCE_S))
        await until(lambda round_: round_.ready_at is not None)
        running.pass_time(400.0)
        polled.cancel()
        await until(lambda round_: round_.short_since is not None)
        again = asyncio.create_task(b.task())
        await until(lambda round_: round_.short_since is None)
        running.pass_time(400.0)
        tasks = await asyncio.wait_for(asyncio.gather(waiting, again), PATIENCE_S)
        assert [task.round for task in tasks] == [1, 1]
