"""The best version is kept, and an operator goes back to it; a first model that is wrong is not for ever."""

import asyncio
import json
from contextlib import suppress

import grpc
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from fedgrpc.cli.tables import rounds_table
from fedgrpc.errors import UsageError
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from fedgrpc.words import run_line
from tests.federation.test_data_folder import fails_to_start
from tests.support.hand_driven_device import MODEL, PATIENCE_S, HandDrivenDevice, refused, update_of
from tests.support.processes import aggregator_process
from tests.support.running_federation import running_aggregator

ABANDONED, COMMITTED = round_pb2.ROUND_PHASE_ABANDONED, round_pb2.ROUND_PHASE_COMMITTED


async def play(running, devices, change=1.0, scores=None):
    """One round by hand; `scores` are what the workers find of its base version."""
    tasks = await asyncio.gather(*(device.task() for device in devices))
    about = {"evaluation_metrics": scores, "evaluation_example_count": 10} if scores else {}
    pairs = zip(devices, tasks, strict=True)
    await asyncio.gather(*(device.push(task, update_of(change), **about) for device, task in pairs))
    return await running.until_ended(tasks[0].round)


async def two(running):
    return [await running.device("a"), await running.device("b")]


def files(running):
    return sorted(int(path.stem) for path in (running.settings.data_dir / "models").glob("*.safetensors"))


async def test_a_version_whose_norm_jumps_is_told_and_the_good_one_before_it_is_never_pruned(tmp_path):
    async with running_aggregator(tmp_path, rounds=9, keep_versions=2) as running:
        devices = await two(running)
        assert not (await play(running, devices)).jump
        poisoned = await play(running, devices, 1e10)
        assert poisoned.jump == round_pb2.JUMP_NORM
        assert any("far larger" in str(line) for line in rounds_table([poisoned]).lines(None))
        for _ in range(3):
            await play(running, devices)
        run = await running.run()
        assert (run.best.version, run.last.version) == (2, 6)
        assert {2, 5, 6} <= set(files(running)) <= {2, 4, 5, 6}


async def test_the_version_with_the_best_score_is_kept_whatever_comes_after_it(tmp_path):
    async with running_aggregator(tmp_path, rounds=9, keep_versions=1, evaluate=True) as running:
        devices = await two(running)
        for accuracy in (0.5, 0.9, 0.8, 0.3, 0.7, 0.6):
            await play(running, devices, scores={"accuracy": accuracy})
        run = await running.run()
        assert (run.best.version, run.best.metrics["accuracy"]) == (2, 0.9)
        assert "best version 2: accuracy 0.9" in run_line(run)
        assert (await running.round(3)).jump == round_pb2.JUMP_SCORES, "of version 4, a third of the best"
    async with running_aggregator(tmp_path, rounds=9, keep_versions=1, evaluate=True) as running:
        assert (await running.run()).best.version == 2, "after a restart, too"
        await play(running, [HandDrivenDevice(running.stub, name) for name in "ab"], scores={"accuracy": 0.1})
        assert 2 in files(running)


async def test_scores_of_the_first_model_count_too(tmp_path):
    async with running_aggregator(tmp_path, rounds=9, evaluate=True) as running:
        devices = await two(running)
        for loss in (0.1, 0.5, 0.6):
            await play(running, devices, scores={"loss": loss})
        assert (await running.run()).best.version == 1


async def test_a_rollback_goes_on_from_a_kept_version_as_a_new_latest_one(tmp_path):
    about = {"rounds": 3, "server_optimizer": "fedavgm"}
    async with running_aggregator(tmp_path, **about) as running:
        devices = await two(running)
        for _ in range(2):
            await play(running, devices)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        run = (await running.stub.RollBackRun(pb.RollBackRunRequest(version=2, reason="poisoned"))).run
        assert (run.model_version, run.last.rolled_back_to, run.last.trained_rounds) == (4, 2, 1)
        with refused("FAILED_PRECONDITION", "rolled back to version 2", "RoundClosed"):
            await devices[0].push(tasks[0])
        np.testing.assert_array_equal(running.weights(4)["b"], MODEL["b"] + 1.0)
        rounds = await running.rounds()
        assert [(it.number, it.phase, it.committed_version) for it in rounds] == [
            (1, COMMITTED, 2),
            (2, COMMITTED, 3),
            (3, ABANDONED, 0),
            (4, COMMITTED, 4),
        ]
        assert (rounds[-1].rolled_back_to, "poisoned" in rounds[-1].reason) == (2, True)
        # Of the momentum nothing is left: an update of 1 moves the model by 1.
        record = await play(running, devices)
        assert (record.number, record.base_version) == (5, 4)
        np.testing.assert_allclose(running.weights(5)["b"], MODEL["b"] + 2.0)
        await play(running, devices)
        assert (await running.until_finished()).last.trained_rounds == 3


async def test_a_rollback_is_refused_for_versions_that_are_not_kept_and_once_the_run_has_ended(tmp_path):
    async with running_aggregator(tmp_path) as running:
        with refused("NOT_FOUND", "kept are 1", "NotFound"):
            await running.stub.RollBackRun(pb.RollBackRunRequest(version=7))
        await play(running, await two(running))
        await running.until_finished()
        with refused("FAILED_PRECONDITION", "the run has ended", "IllegalTransition"):
            await running.stub.RollBackRun(pb.RollBackRunRequest(version=1))


async def test_a_paused_run_is_rolled_back_and_stays_paused(tmp_path):
    async with running_aggregator(tmp_path, rounds=3) as running:
        await play(running, await two(running))
        await running.stub.PauseRun(pb.PauseRunRequest())
        run = (await running.stub.RollBackRun(pb.RollBackRunRequest(version=1))).run
        assert (run.phase, run.model_version) == (pb.RUN_PHASE_PAUSED, 3)


async def test_a_rolled_back_run_is_where_it_was_after_a_restart(tmp_path):
    async with running_aggregator(tmp_path, rounds=3) as running:
        devices = await two(running)
        await play(running, devices)
        await running.stub.RollBackRun(pb.RollBackRunRequest(version=1))
    async with running_aggregator(tmp_path, rounds=3) as running:
        run = await running.run()
        assert (run.model_version, run.last.rolled_back_to, run.last.trained_rounds) == (3, 1, 0)
        record = await play(running, [HandDrivenDevice(running.stub, name) for name in "ab"])
        assert (record.number, record.committed_version) == (3, 4) or record.number > 2
        np.testing.assert_allclose(running.weights(4)["b"], MODEL["b"] + 1.0)


async def test_a_rollback_that_was_answered_outlives_kill_9_and_one_that_was_not_is_whole_or_nothing(tmp_path):
    async with aggregator_process(tmp_path, "--rounds", 9, "--encoding", "raw") as (process, running):
        devices = await two(running)
        await play(running, devices)
        await running.stub.RollBackRun(pb.RollBackRunRequest(version=1))
        await process.kill()
    before = 3
    for wait_s in (0.003, 0.006, 0.012):
        async with aggregator_process(tmp_path, "--rounds", 9, "--encoding", "raw") as (process, running):
            run = await running.run()
            assert (run.last.rolled_back_to, run.last.trained_rounds) == (1, 0)
            assert run.model_version in (before, before + 1)
            np.testing.assert_array_equal(running.weights(run.model_version)["b"], MODEL["b"])
            before = run.model_version
            asked = asyncio.create_task(_ask(running, 1))
            await asyncio.sleep(wait_s)
            await process.kill()
            await asyncio.gather(asked, return_exceptions=True)


async def _ask(running, version):
    await running.stub.RollBackRun(pb.RollBackRunRequest(version=version))


async def test_a_run_that_began_from_a_wrong_model_begins_anew_without_a_new_folder(tmp_path):
    wrong = {"something/else": np.zeros((4, 4), np.float32)}
    async with running_aggregator(tmp_path, initial_model=None, initialisers=("good*",), rounds=2) as running:
        good = await running.device("good-1")
        await running.device("other")
        task = await good.task()
        assert task.kind == round_pb2.TASK_KIND_INITIALIZE
        await good.push(task, wrong)
        await running.until(lambda run, _: run.model_version == 1)
        run = (await running.stub.RollBackRun(pb.RollBackRunRequest(version=0))).run
        assert (run.HasField("last"), list(run.layout)) == (False, [])
        task = await good.task()
        assert task.kind == round_pb2.TASK_KIND_INITIALIZE
        await good.push(task, MODEL)
        run, _ = await running.until(lambda run, _: run.model_version == 3)
        assert {spec.name for spec in run.layout} == set(MODEL)
        record = await play(running, [good, HandDrivenDevice(running.stub, "other")])
        np.testing.assert_allclose(running.weights(record.committed_version)["b"], MODEL["b"] + 1.0)


async def test_a_run_begun_anew_takes_its_first_model_from_a_file_at_the_next_start(tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"v": np.ones(3, np.float32)}, other)
    async with running_aggregator(tmp_path, rounds=3) as running:
        await play(running, await two(running))
        await running.stub.PauseRun(pb.PauseRunRequest())
    await fails_to_start(tmp_path, UsageError, "not the model that the run .* began from", initial_model=other)
    async with running_aggregator(tmp_path, rounds=3) as running:
        await running.stub.RollBackRun(pb.RollBackRunRequest(version=0))
    async with running_aggregator(tmp_path, rounds=3, initial_model=other) as running:
        run = await running.run()
        assert ([spec.name for spec in run.layout], run.last.trained_rounds) == (["v"], 0)
    async with running_aggregator(tmp_path, rounds=3, initial_model=other) as running:
        assert (await running.run()).model_version == run.model_version, "the same file changes nothing"


async def test_the_same_initial_model_is_taken_at_each_start_in_whatever_order_its_file_has_it(tmp_path):
    async with running_aggregator(tmp_path, rounds=2) as running:
        await play(running, await two(running))
    turned = tmp_path / "turned.safetensors"
    save_file(dict(reversed(MODEL.items())), turned, {"author": "somebody"})
    async with running_aggregator(tmp_path, rounds=2, initial_model=turned) as running:
        assert (await running.run()).model_version == 2


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"../../x": np.zeros(4, np.float32)}, "that is a path"),
        ({"/etc/x": np.zeros(4, np.float32)}, "that is a path"),
        ({"a\\b": np.zeros(4, np.float32)}, "that is a path"),
        ({"w": np.zeros(4, np.float32), "w#weights": np.zeros(4)}, "#weights"),
        ({"w": np.zeros(4, np.float32), "w#mask": np.zeros(1, np.uint8)}, "#mask"),
        ({"a\nb": np.zeros(4, np.float32)}, "printable"),
        ({"x" * 1001: np.zeros(4, np.float32)}, "printable"),
        ({f"{i:05}" + "n" * 990: np.zeros(1, np.float32) for i in range(2500)}, "too many for one message"),
    ],
)
async def test_a_first_model_is_refused_for_what_a_file_would_be_refused_for(tmp_path, tensors, reason):
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    await fails_to_start(tmp_path, UsageError, reason, initial_model=path)
    async with running_aggregator(tmp_path, initial_model=None) as running:
        device = await running.device("evil")
        task = await device.task()
        with refused("INVALID_ARGUMENT", reason, "UpdateRefused"):
            await device.push(task, tensors)
        assert not (await running.run()).model_version


async def test_a_first_model_of_a_worker_is_no_larger_than_the_operator_allows(tmp_path):
    async with running_aggregator(tmp_path, initial_model=None, max_model_bytes=8000) as running:
        device = await running.device("evil")
        with refused("INVALID_ARGUMENT", "--max-model", "UpdateRefused"):
            await device.push(await device.task(), MODEL)


async def test_only_those_whom_the_operator_names_give_the_first_model(tmp_path):
    async with running_aggregator(tmp_path, initial_model=None, initialisers=("bench",)) as running:
        stranger, bench = await running.device("stranger"), await running.device("bench")
        waiting = asyncio.create_task(stranger.task())
        assert (await bench.task()).kind == round_pb2.TASK_KIND_INITIALIZE
        assert not waiting.done()
        waiting.cancel()


async def test_a_models_file_says_what_it_is_of(tmp_path):
    async with running_aggregator(tmp_path, run_name="fleet-7", rounds=2, evaluate=True) as running:
        devices = await two(running)
        for accuracy in (0.25, 0.5):
            await play(running, devices, scores={"accuracy": accuracy})
        with safe_open(running.settings.data_dir / "models" / "000003.safetensors", "numpy") as file:
            about = file.metadata()
        assert (about["run"], about["round"], about["version"]) == ("fleet-7", "2", "3")
        assert json.loads(about["base_scores"]) == {"accuracy": 0.5}


async def fail(running, device, reason):
    task = await device.task()
    await device.give_back(task, reason)
    return task.round


async def test_a_run_pauses_itself_after_three_rounds_abandoned_for_one_reason_and_says_which(tmp_path):
    async with running_aggregator(tmp_path, policy={"min_workers": 1}) as running:
        device = await running.device("a")
        for number in (1, 2, 3):
            assert await fail(running, device, "task x:Y raised ValueError: no data (x.py:7)") == number
        run, _ = await running.until(lambda run, _: run.phase == pb.RUN_PHASE_PAUSED)
        assert "3 rounds in a row" in run.paused_reason
        assert "a: task x:Y raised ValueError: no data (x.py:7)" in run.paused_reason
        assert run.paused_reason in run_line(run)
    async with running_aggregator(tmp_path, policy={"min_workers": 1}) as running:
        run = await running.run()
        assert (run.phase, "ValueError" in run.paused_reason) == (pb.RUN_PHASE_PAUSED, True), (
            "after a restart, too"
        )
        run = (await running.stub.ResumeRun(pb.ResumeRunRequest())).run
        assert (run.phase, run.paused_reason) == (pb.RUN_PHASE_RUNNING, "")
        device = HandDrivenDevice(running.stub, "a")
        await device.push(await device.task())
        await running.until_finished()


@pytest.mark.faults
async def test_workers_that_give_tasks_back_at_the_last_moment_pause_no_run_that_others_can_do(tmp_path):
    policy = {"min_workers": 2, "quorum": 2, "max_participants": 2, "deadline_s": 1.5}
    async with running_aggregator(tmp_path, rounds=1, policy=policy) as running, asyncio.timeout(PATIENCE_S):

        async def take_part(name):
            device = await running.device(name)
            while (await running.run()).phase == pb.RUN_PHASE_RUNNING:
                reply = await device.poll(wait_s=0.5)
                if reply.HasField("task") and name.startswith("evil"):
                    await asyncio.sleep(max(0.0, reply.task.time_left.ToMicroseconds() / 1e6 - 0.2))
                    with suppress(grpc.aio.AioRpcError):
                        await device.give_back(reply.task, "out of luck")
                elif reply.HasField("task"):
                    await asyncio.sleep(0.5)
                    with suppress(grpc.aio.AioRpcError):
                        await device.push(reply.task)

        await asyncio.gather(*map(take_part, ("a", "b", "evil-1", "evil-2")))
        assert (await running.run()).phase == pb.RUN_PHASE_FINISHED


async def test_a_round_that_went_well_begins_the_count_anew(tmp_path):
    async with running_aggregator(tmp_path, rounds=3, policy={"min_workers": 1}) as running:
        device = await running.device("a")
        for _ in range(2):
            for _ in range(2):
                await fail(running, device, "out of luck")
            await device.push(await device.task())
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING


@pytest.mark.faults
async def test_a_want_of_workers_is_no_reason_to_pause(tmp_path):
    async with running_aggregator(tmp_path, policy={"min_workers": 1, "selection_timeout_s": 0.1}) as running:
        await running.until(lambda _, round_: round_.number >= 4)
        device = await running.device("a")
        for _ in range(4):
            await device.task()
            await running.stub.Leave(pb.LeaveRequest(worker="a"))
            await device.register()
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING


@pytest.mark.parametrize(
    ("before", "after"), [("fedavgm", "fedadam"), ("fedadam", "fedyogi"), ("fedadam", "fedavg")]
)
async def test_another_server_optimizer_on_a_used_folder_begins_its_state_anew(tmp_path, before, after):
    async with running_aggregator(tmp_path, rounds=3, server_optimizer=before) as running:
        await play(running, await two(running))
    async with running_aggregator(tmp_path, rounds=3, server_optimizer=after) as running:
        devices = [HandDrivenDevice(running.stub, name) for name in "ab"]
        for _ in range(2):
            assert (await play(running, devices)).phase == COMMITTED
        await running.until_finished()


async def test_another_model_on_a_used_folder_is_refused(tmp_path):
    async with running_aggregator(tmp_path, rounds=3, model="lenet") as running:
        await play(running, await two(running))
    await fails_to_start(tmp_path, UsageError, "model 'cnn' is not that of the run", model="cnn", rounds=3)


async def test_a_score_may_have_any_name(tmp_path):
    """A name that a log line has itself must not end the driver."""
    names = ("version", "round", "event", "run", "updates", "worker", "file", "by", "level")
    async with running_aggregator(tmp_path, rounds=2, evaluate=True) as running:
        devices = await two(running)
        for _ in range(2):
            await play(running, devices, scores=dict.fromkeys(names, 0.5))
        assert dict((await running.round(1)).metrics) == dict.fromkeys(names, 0.5)
        tasks = await asyncio.gather(*(device.task() for device in devices))
        assert {task.kind for task in tasks} == {round_pb2.TASK_KIND_EVALUATE}, "the driver goes on"
