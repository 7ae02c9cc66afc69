"""What operators may do and see."""

import asyncio
import dataclasses
import threading

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fedgrpc.protocol.plans import policy_from_proto
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.channel import open_channel
from fedgrpc.runs.conditions import Condition
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, round_pb2
from tests.support.hand_driven_device import MODEL, PATIENCE_S, refused, update_of
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

COMMITTED = round_pb2.ROUND_PHASE_COMMITTED


async def play(running, devices, change=1.0):
    """One round by hand; returns its tasks."""
    tasks = await asyncio.gather(*(device.task() for device in devices))
    pairs = zip(devices, tasks, strict=True)
    await asyncio.gather(*(device.push(task, update_of(change)) for device, task in pairs))
    return tasks


async def test_a_paused_run_finishes_its_round_and_opens_no_other_until_it_is_resumed(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running:
        devices = [await running.device("a"), await running.device("b")]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        paused = (await running.stub.PauseRun(pb.PauseRunRequest())).run
        assert paused.phase == pb.RUN_PHASE_PAUSED
        pairs = zip(devices, tasks, strict=True)
        await asyncio.gather(*(device.push(task) for device, task in pairs))
        assert (await running.until_ended(1)).phase == COMMITTED
        replies = await asyncio.gather(*(device.poll(0.7) for device in devices))
        assert not any(reply.HasField("task") or reply.run_ended for reply in replies)
        assert (await running.stub.ResumeRun(pb.ResumeRunRequest())).run.phase == pb.RUN_PHASE_RUNNING
        await play(running, devices)
        assert (await running.until_finished()).model_version == 3
        for call in (running.stub.PauseRun(pb.PauseRunRequest()), running.stub.ResumeRun(pb.ResumeRunRequest())):
            with refused("FAILED_PRECONDITION", "the run has ended: all 2 rounds are done"):
                await call


async def test_a_stopped_run_abandons_its_round_and_tells_every_worker(tmp_path):
    async with running_aggregator(tmp_path, rounds=5) as running:
        devices = [await running.device("a"), await running.device("b")]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        idle = await running.device("c")
        waiting = asyncio.create_task(idle.poll(30))
        await asyncio.sleep(0.1)
        run = (await running.stub.StopRun(pb.StopRunRequest(reason="enough\nfor today"))).run
        assert (run.phase, run.reason) == (pb.RUN_PHASE_STOPPED, "enough for today")
        assert (await running.stub.StopRun(pb.StopRunRequest(reason="again"))).run.reason == "enough for today"
        assert (await asyncio.wait_for(waiting, 20)).run_ended
        assert (await devices[0].poll()).run_ended
        beat = await devices[0].beat(tasks[0])
        assert (beat.cancel, "enough for today" in beat.reason) == (True, True)
        with refused("FAILED_PRECONDITION", "enough for today", "RoundClosed"):
            await devices[0].push(tasks[0])
        rounds = await running.rounds()
        assert [(item.phase, item.reason) for item in rounds] == [
            (round_pb2.ROUND_PHASE_ABANDONED, "enough for today")
        ]


async def test_nobody_is_told_of_the_end_before_it_is_stored(tmp_path):
    """A worker that was told is gone: the next process must not go on with the run."""
    async with running_aggregator(tmp_path) as running:
        device = await running.device("a")
        store = running.aggregator.coordinator.store
        asked, goes_on, save = asyncio.Event(), threading.Event(), store.save_run
        loop = asyncio.get_running_loop()

        def slowly(*about):
            loop.call_soon_threadsafe(asked.set)
            assert goes_on.wait(PATIENCE_S)
            return save(*about)

        store.save_run = slowly
        stopping = running.stub.StopRun(pb.StopRunRequest())
        await asked.wait()
        assert not (await device.poll(0.1)).run_ended
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING
        goes_on.set()
        assert (await stopping).run.phase == pb.RUN_PHASE_STOPPED
        assert (await device.poll()).run_ended


async def test_rounds_are_listed_newest_first_in_pages(tmp_path):
    async with running_aggregator(tmp_path, rounds=5) as running:
        devices = [await running.device("a"), await running.device("b")]
        for _ in range(5):
            await play(running, devices)
        await running.until_finished()
        pages, token = [], ""
        while True:
            page = await running.stub.ListRounds(pb.ListRoundsRequest(page_size=2, page_token=token))
            pages.append([item.number for item in page.rounds])
            if not (token := page.next_page_token):
                break
        assert pages == [[5, 4], [3, 2], [1]]
        assert [item.committed_version for item in await running.rounds()] == [2, 3, 4, 5, 6]
        assert (await running.round(3)).committed_version == 4
        assert [len((await running.round(number)).tasks) for number in (1, 5)] == [2, 2]


async def test_rounds_too_large_for_one_message_come_in_more_pages(tmp_path):
    async with running_aggregator(tmp_path) as running:
        coordinator = running.aggregator.coordinator
        tasks = [round_pb2.TaskRecord(worker=f"worker-{i}", reason="x" * 500) for i in range(2000)]
        for number in range(1, 21):
            record = round_pb2.Round(number=number, phase=COMMITTED, tasks=tasks)
            await coordinator.in_database(coordinator.store.finish_round, record, [], {}, None)
        seen, token = [], ""
        while not seen or token:
            page = await running.stub.ListRounds(pb.ListRoundsRequest(page_token=token))
            seen += [item.number for item in page.rounds]
            token = page.next_page_token
        assert seen == list(range(20, 0, -1))


async def test_a_round_tells_of_each_task_and_where_its_time_went(tmp_path):
    async with running_aggregator(tmp_path) as running:
        device = await running.device("a", device=device_pb2.DeviceProfile(device_class="jetson-nano"))
        other = await running.device("b")
        task, other_task = await asyncio.gather(device.task(), other.task())
        timings = device_pb2.Timings(download_seconds=1.0, local_seconds=2.0, upload_seconds=900.0)
        about = {"timings": timings, "metrics": {"train_loss": 0.5}, "peak_memory_bytes": 77, "example_count": 30}
        about["tensor_bytes"] = 66
        await device.push(task, **about)
        await other.push(other_task, metrics={"train_loss": 1.5})
        await running.until_finished()
        round_ = await running.round()
        seen = next(item for item in round_.tasks if item.worker == "a")
        assert (seen.kind, seen.device_class) == (round_pb2.TASK_KIND_TRAIN, "jetson-nano")
        assert (seen.example_count, seen.weight, seen.peak_memory_bytes) == (30, 30.0, 77)
        assert seen.tensor_bytes == 66
        assert (seen.download_bytes, seen.upload_bytes, seen.progress) == (8168, 8168, 1.0)
        assert (seen.timings.download_seconds, seen.timings.local_seconds) == (1.0, 2.0)
        assert 0 < seen.timings.upload_seconds < 100
        assert 0 < seen.timings.global_seconds < 100
        assert dict(seen.metrics) == {"train_loss": 0.5}
        assert round_.training_metrics["train_loss"] == pytest.approx((30 * 0.5 + 10 * 1.5) / 40)
        assert (round_.number, round_.phase, round_.kind) == (1, COMMITTED, round_pb2.TASK_KIND_TRAIN)
        assert (round_.base_version, round_.committed_version) == (1, 2)
        assert 0 < round_.duration_seconds < 100
        assert not round_.HasField("time_left")


async def test_a_watch_shows_the_first_state_the_changes_and_the_end(tmp_path):
    async with running_aggregator(tmp_path) as running:
        watch = aiter(running.stub.WatchRounds(pb.WatchRoundsRequest(max_rate_hz=20)))
        seen = [await anext(watch)]
        devices = [await running.device("a"), await running.device("b")]
        await play(running, devices)
        async for message in watch:
            seen.append(message)
        assert seen[0].run.phase == pb.RUN_PHASE_RUNNING
        assert seen[-1].run.phase == pb.RUN_PHASE_FINISHED
        assert seen[-1].run.reason == "all 1 rounds are done"
        assert seen[-1].round.phase == COMMITTED


async def test_workers_are_listed_with_what_they_do(tmp_path):
    async with running_aggregator(tmp_path) as running:
        devices = [await running.device("a"), await running.device("b")]
        scorer = await running.device("c", role=device_pb2.WORKER_ROLE_EVALUATOR)
        waiting = asyncio.create_task(scorer.task())
        tasks = await asyncio.gather(*(device.task() for device in devices))
        await waiting
        await devices[0].beat(tasks[0], progress=0.25)
        workers = {item.worker: item for item in (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers}
        assert [workers[name].state for name in "ab"] == [pb.WORKER_STATE_BUSY] * 2
        assert workers["c"].role == device_pb2.WORKER_ROLE_EVALUATOR
        assert (workers["a"].task_phase, workers["a"].progress) == (round_pb2.TASK_PHASE_TRAINING, 0.25)
        assert (workers["b"].task_phase, workers["b"].progress) == (round_pb2.TASK_PHASE_OFFERED, 0.0)
        assert [workers["a"].rounds_selected, workers["a"].rounds_accepted] == [1, 0]
        await asyncio.gather(*(device.push(task) for device, task in zip(devices, tasks, strict=True)))
        await running.until(lambda run, _: run.model_version == 2)
        # The evaluator, which has not scored the new version, is waited for until it counts as away.
        running.pass_time(300)
        await running.until_finished()
        workers = {item.worker: item for item in (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers}
        assert workers["a"].state == pb.WORKER_STATE_AWAY
        assert workers["a"].last_seen_ago.ToTimedelta().total_seconds() >= 300
        assert [workers["a"].rounds_selected, workers["a"].rounds_accepted] == [1, 1]


async def test_the_run_tells_its_settings_layout_and_progress(tmp_path):
    changes = {"run_name": "fleet-7", "rounds": 3, "target": Condition("accuracy", 0.9), "model": "LeNet"}
    async with running_aggregator(tmp_path, **changes) as running:
        run = await running.run()
        assert (run.name, run.phase, run.model_version, run.total_rounds) == (
            "fleet-7",
            pb.RUN_PHASE_RUNNING,
            1,
            3,
        )
        assert {spec.name: list(spec.shape) for spec in run.layout} == {"w": [50, 40], "b": [40], "n": []}
        assert run.settings["policy.min_workers"] == "2"
        assert policy_from_proto(run.policy) == running.settings.policy
        assert run.settings["target.name"] == "accuracy"
        assert run.settings["model"] == "LeNet"
        assert run.started_at.seconds > 1_600_000_000
        devices = [await running.device("a"), await running.device("b")]
        await play(running, devices)
        run, _ = await running.until(lambda run, _: run.current_round == 2)
        assert run.model_version == 2


async def test_registration_tells_the_limits_and_intervals(tmp_path):
    changes = {"policy": {"lease_s": 9.0}, "poll_wait_s": 7.0, "learning_task": "a.b:C", "model": "MLP"}
    async with running_aggregator(tmp_path, max_chunk_bytes=1000, max_payload_bytes=10_000, **changes) as running:
        reply = await (await running.device("a")).register()
        assert (reply.poll_wait.seconds, reply.heartbeat_interval.seconds, reply.lease.seconds) == (7, 3, 9)
        assert (reply.max_chunk_bytes, reply.max_payload_bytes) == (1000, 10_000)
        assert (reply.learning_task, reply.model) == ("a.b:C", "MLP")


async def test_health_is_serving_while_rounds_are_played_and_not_when_it_ends(tmp_path):
    async with running_aggregator(tmp_path) as running, open_channel(running.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "fedgrpc.v1.Aggregator"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service="fedgrpc.v1.Aggregator"))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        running.stop()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_version_is_given_to_anybody_as_it_is_from_any_offset(tmp_path):
    async with running_aggregator(tmp_path, download_recipe="float16 above 1gbit | int8+zstd") as running:
        device = await running.device("a")
        _, payload = await device.pull(version=1)
        for offset in (0, 1, 8167, 8168):
            header, rest = await device.pull(version=1, offset=offset)
            assert rest == payload[offset:]
            assert (header.version, header.manifest.size_bytes) == (1, 8168)
        for version in (0, 1):
            tensors = await device.model(version=version)
            np.testing.assert_array_equal(tensors["w"], MODEL["w"])
            assert tensors["n"] == 3


async def test_evaluators_score_every_version_and_the_workers_say_what_they_find(tmp_path):
    async with running_aggregator(tmp_path, rounds=3, evaluate=True) as running:
        scorer = ShiftTrainer(examples=5)
        crew = [
            start_worker(running, tmp_path, "eval", scorer, role=WorkerRole.EVALUATOR),
            start_worker(running, tmp_path, "a", ShiftTrainer(1.0, 10)),
            start_worker(running, tmp_path, "b", ShiftTrainer(4.0, 20)),
        ]
        assert await asyncio.gather(*crew) == [0, 0, 0]
        rounds = await running.rounds()
        trained = [item for item in rounds if item.kind == round_pb2.TASK_KIND_TRAIN]
        assert [item.committed_version for item in trained] == [2, 3, 4]
        for number, item in enumerate(trained, start=1):
            assert item.metrics["mean"] == pytest.approx(3.0 * number, abs=1e-4)
            assert item.training_metrics["train_loss"] == pytest.approx(3.0)
        assert trained[-1].evaluator_metrics["mean"] == pytest.approx(9.0, abs=1e-4)
        assert scorer.scored[-1] == pytest.approx(9.0, abs=1e-4)
        closing = rounds[-1]
        assert (closing.kind, closing.base_version, closing.phase) == (round_pb2.TASK_KIND_EVALUATE, 4, COMMITTED)
        np.testing.assert_allclose(running.weights(4)["w"], MODEL["w"] + 9.0, rtol=1e-5)
        assert running.weights(4)["n"] == 6


async def test_the_target_ends_the_run_early(tmp_path):
    async with running_aggregator(tmp_path, rounds=50, evaluate=True, target=Condition("mean", 3.5)) as running:
        crew = [start_worker(running, tmp_path, name, ShiftTrainer()) for name in ("a", "b")]
        assert await asyncio.gather(*crew) == [0, 0]
        run = await running.run()
        assert (run.phase, run.model_version < 10) == (pb.RUN_PHASE_FINISHED, True)
        assert "has mean>=3.5" in run.reason


@pytest.mark.parametrize(
    ("weights", "mean"),
    [
        ({"a": 1.0, "b": 3.0}, (1 + 3 * 5) / 4),
        ({"b": 3.0}, (10 * 1 + 3 * 5) / 13),
        ({"a": 0.0}, 5.0),
        ({}, (10 + 100) / 30),
    ],
)
async def test_the_operator_may_set_the_weight_of_each_worker(tmp_path, weights, mean):
    """p_m instead of the example counts of 10 and 20, which those who are not named keep."""
    async with running_aggregator(tmp_path, worker_weights=weights) as running:
        crew = [
            start_worker(running, tmp_path, "a", ShiftTrainer(1.0, 10)),
            start_worker(running, tmp_path, "b", ShiftTrainer(5.0, 20)),
        ]
        assert await asyncio.gather(*crew) == [0, 0]
        np.testing.assert_allclose(running.weights(2)["w"], MODEL["w"] + mean, rtol=1e-5)


async def test_initial_weights_are_asked_of_the_first_who_comes_and_nobody_else_is_waited_for(tmp_path):
    async with running_aggregator(tmp_path, initial_model=None, policy={"selection_window_s": 600.0}) as running:
        await running.device("looks-only")
        first = await running.device("first")
        assert (await first.task()).kind == round_pb2.TASK_KIND_INITIALIZE


async def test_without_a_file_the_first_worker_gives_the_initial_model(tmp_path):
    weights = {name: array + 1 for name, array in MODEL.items()}
    weights = {name: array.astype(MODEL[name].dtype) for name, array in weights.items()}
    # The one who only looks is not waited for.
    async with running_aggregator(tmp_path, initial_model=None, policy={"selection_window_s": 0.1}) as running:
        device = await running.device("early")
        with refused("NOT_FOUND", "there is no model version yet", "NotFound"):
            await device.pull()
        crew = [start_worker(running, tmp_path, name, ShiftTrainer(1.0, 10, weights)) for name in ("a", "b")]
        assert await asyncio.gather(*crew) == [0, 0]
        rounds = await running.rounds()
        assert [(item.number, item.kind) for item in rounds] == [
            (0, round_pb2.TASK_KIND_INITIALIZE),
            (1, round_pb2.TASK_KIND_TRAIN),
        ]
        np.testing.assert_array_equal(running.weights(1)["w"], weights["w"])
        np.testing.assert_allclose(running.weights(2)["w"], weights["w"] + 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("tensors", "recipe", "reason"),
    [
        ({}, "raw", "the update has no tensors"),
        (MODEL, "float16", "initial weights come lossless"),
        ({"__metadata__": np.zeros(3, np.float32)}, "raw", "may be called '__metadata__'"),
    ],
)
async def test_initial_weights_that_cannot_be_are_refused_and_another_worker_is_asked(
    tmp_path, tensors, recipe, reason
):
    # Where the round ends before the other one polls, the next waits that long for this one, which is silent.
    policy = {"min_workers": 1, "selection_window_s": 0.2}
    async with running_aggregator(tmp_path, initial_model=None, policy=policy) as running:
        bad = await running.device("bad")
        task = await bad.task()
        good = await running.device("good")
        waiting = asyncio.create_task(good.task())
        with refused("INVALID_ARGUMENT", reason, "UpdateRefused"):
            await bad.push(task, tensors, recipe)
        assert (await good.push(await waiting, MODEL)).complete
        run, _ = await running.until(lambda run, _: run.model_version == 1)
        assert len(run.layout) == 3


async def test_the_plan_reaches_the_trainers(tmp_path):
    names = [field.name for field in dataclasses.fields(TrainingPlan) if field.name != "upload_reserve_s"]
    values = {name: 0.125 * number for number, name in enumerate(names, start=1)}
    plan = TrainingPlan(**values | {"max_steps": 7, "batch_size": 5, "momentum": 0.0, "algorithm": "fedavg"})
    async with running_aggregator(tmp_path, plan=plan, rounds=2, seed=3) as running:
        trainers = [ShiftTrainer(), ShiftTrainer()]
        crew = [start_worker(running, tmp_path, f"w{i}", trainer) for i, trainer in enumerate(trainers)]
        assert await asyncio.gather(*crew) == [0, 0]
    jobs = [job for trainer in trainers for job in trainer.jobs]
    for job in jobs:
        assert {name: getattr(job, name) for name in names} == {name: getattr(plan, name) for name in names}
    assert sorted(job.round for job in jobs) == [1, 1, 2, 2]
    assert len({job.seed for job in jobs}) == 4
