"""As in test_bad_input, of all calls but uploads: tokens, names, wishes and questions that cannot be."""

import pytest

from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.federation.test_bad_input import finishes_with_both, two_devices
from tests.support.hand_driven_device import HandDrivenDevice, refused
from tests.support.running_federation import running_aggregator

CALLS = {
    "PushUpdate": lambda device, task: device.push(task),
    "QueryPush": lambda device, task: device.held(task),
    "Heartbeat": lambda device, task: device.beat(task),
    "ExchangeParts": lambda device, task: device.exchange(task),
    "ReportFailure": lambda device, task: device.give_back(task),
}


@pytest.mark.parametrize("token", ["no-such-token", "", "../../etc/passwd", "\0", "t" * 10_000])
async def test_an_unknown_token_is_not_found(tmp_path, token):
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        for call in CALLS.values():
            with refused("NOT_FOUND", "no task has this token", "UnknownTask"):
                await call(bad, pb.Task(token=token))
        await finishes_with_both(running, bad, task, good, good_task)


async def test_another_workers_token_is_a_wrong_identity(tmp_path):
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        for call in CALLS.values():
            with refused("PERMISSION_DENIED", "the token belongs to another worker", "WrongIdentity"):
                await call(bad, good_task)
        await finishes_with_both(running, bad, task, good, good_task)


async def test_a_worker_that_has_not_registered_is_told_so(tmp_path):
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        stranger = HandDrivenDevice(running.stub, "stranger")
        with refused("NOT_FOUND", "worker 'stranger' has not registered here", "UnknownWorker"):
            await stranger.poll()
        with refused("NOT_FOUND", "has not registered", "UnknownWorker"):
            await stranger.beat(good_task)
        await finishes_with_both(running, bad, task, good, good_task)


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "../evil", "a\nb", "naïve"])
async def test_a_name_that_cannot_be_is_refused(tmp_path, name):
    async with running_aggregator(tmp_path) as running:
        with refused("INVALID_ARGUMENT", "a worker's name is 1 to 64 of letters", "UsageError"):
            await HandDrivenDevice(running.stub, name).register()


async def test_a_registration_without_a_common_encoding_or_over_the_limits_is_refused(tmp_path):
    async with running_aggregator(tmp_path, upload_recipe="int8+zstd", max_workers=1) as running:
        with refused(
            "INVALID_ARGUMENT",
            "'old' knows no encoding of this run's updates, int8+zstd; it lists raw",
            "UsageError",
        ):
            await HandDrivenDevice(running.stub, "old").register(encodings=["raw"])
        # Nothing is assumed of who lists nothing.
        for lacking in ({"encodings": []}, {"compressions": []}):
            with refused("INVALID_ARGUMENT", "knows no encoding of this run's updates", "UsageError"):
                await HandDrivenDevice(running.stub, "silent").register(**lacking)
        with refused("INVALID_ARGUMENT", "a registration of", "UsageError"):
            await HandDrivenDevice(running.stub, "large").register(encodings=["int8", "raw", "x" * 30_000])
        await HandDrivenDevice(running.stub, "first").register(encodings=["int8"])
        await HandDrivenDevice(running.stub, "first").register(encodings=["uniform8", "raw"])
        # A worker that has done nothing yet makes room for another.
        await HandDrivenDevice(running.stub, "second").register()
        with refused("NOT_FOUND", "worker 'first' has not registered here", "UnknownWorker"):
            await HandDrivenDevice(running.stub, "first").poll()


async def test_a_phase_that_is_not_a_workers_to_say_is_refused(tmp_path):
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        with refused("INVALID_ARGUMENT", "accepted is not for a worker to say", "LayoutError"):
            await bad.beat(task, round_pb2.TASK_PHASE_ACCEPTED)
        with refused("INVALID_ARGUMENT", "unknown task phase", "LayoutError"):
            await bad.beat(task, 77)
        for progress in (float("nan"), float("inf"), -5.0):
            assert not (await bad.beat(task, progress=progress)).cancel
        await finishes_with_both(running, bad, task, good, good_task)


async def test_impossible_wishes_for_a_model_are_refused(tmp_path):
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        with refused("NOT_FOUND", "there is no model version 18446744073709551615 here", "NotFound"):
            await bad.pull(version=2**64 - 1)
        with refused("OUT_OF_RANGE", "offset 9000 is beyond the payload of 8168 bytes", "WrongOffset"):
            await bad.pull(task, offset=9000)
        with refused("NOT_FOUND", "", "UnknownTask"):
            await bad.pull(pb.Task(token="unknown"))
        with refused("PERMISSION_DENIED", "the token belongs to another worker", "WrongIdentity"):
            await bad.pull(good_task)
        for digest in (b"a", bytes(15), bytes(17), bytes(32), bytes(10_000)):
            with refused("INVALID_ARGUMENT", "16 bytes", "LayoutError"):
                await bad.pull(task, base=(1, digest))
            with refused("INVALID_ARGUMENT", "16 bytes", "LayoutError"):
                await bad.poll(held=(1, digest))
        await finishes_with_both(running, bad, task, good, good_task)


async def test_impossible_questions_of_operators_are_refused(tmp_path):
    async with two_devices(tmp_path) as (running, bad, task, good, good_task):
        for number in (5, 2**63, 2**64 - 1):
            with refused("NOT_FOUND", f"there is no round {number}", "NotFound"):
                await running.round(number)
        for page in ("x", "-1", "²", "9" * 5000):
            with refused("INVALID_ARGUMENT", "the page token is not one that ListRounds gave", "UsageError"):
                await running.stub.ListRounds(pb.ListRoundsRequest(page_token=page))
        for rate_hz in (float("nan"), -1.0, float("inf")):
            watch = running.stub.WatchRounds(pb.WatchRoundsRequest(max_rate_hz=rate_hz))
            assert (await watch.read()).run.name == "default"
            watch.cancel()
        await finishes_with_both(running, bad, task, good, good_task)


async def test_a_poll_may_ask_for_any_wait_and_waits_no_longer_than_the_aggregator_allows(tmp_path):
    async with running_aggregator(tmp_path, poll_wait_s=0.1) as running:
        device = await running.device("eager")
        for wait_s in (-5.0, 0.0, 1e9):
            request = pb.PollTaskRequest(worker="eager", wait=duration_to_proto(wait_s))
            assert not (await running.stub.PollTask(request, timeout=20)).HasField("task")
        assert not (await device.poll(0)).run_ended
