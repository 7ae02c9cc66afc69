"""Secure sums among peers that send anything: nobody stops, and what is committed is the right sum."""

import asyncio
from collections import Counter
from random import Random

import grpc
import grpc.aio
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator import task_terms
from fedgrpc.aggregator.secure_sums import SecureSums
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.protocol.secure import secure_task_to_proto
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from fedgrpc.worker import client
from tests.fuzz.mutate import invented, spoiled
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.watched_sums import Watched

MODEL = {"w": np.linspace(-1, 1, 301, dtype=np.float32)}
SECURE = {"secure": SecurePolicy(secure_bits=8), "clip_norm": 10.0}
# What a call may be answered with. INTERNAL and UNKNOWN say that nobody has thought of it.
ANSWERS = {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"}


def made_up(rnd, worker, token, sent):
    """A call that no device makes: any content, or that of this one with other names, sizes or values."""
    request, size = invented(pb.ExchangePartsRequest, rnd), rnd.choice((94, 33, 16))
    if rnd.random() < 0.8:
        kind = rnd.choice(("shares", "proofs", "answers"))
        parts = getattr(request, kind).parts
        getattr(request, kind).SetInParent()
        for name in rnd.sample(sorted(sent), rnd.randrange(len(sent))):
            parts[name] = rnd.randbytes(size)
    if request.WhichOneof("content") == "answers":
        # An answer of fewer shares, or of none, is one: the device's own.
        request.answers.parts["nobody"] = rnd.randbytes(size)
    request.worker, request.token = worker, token
    request.wait.Clear()
    return request


class Vandal:
    """Each worker of this process makes calls of no sense before each of its own to a secure sum."""

    def __init__(self, monkeypatch):
        self.seen = Counter()
        rnd, exchange = Random(4), client.AggregatorClient.exchange

        async def first(calls, token, kind, parts, wait_s):
            for _ in range(10):
                request = made_up(rnd, calls.caller.worker, token, parts)
                try:
                    await calls._stub.ExchangeParts(request, metadata=calls.caller.metadata, timeout=60)
                    self.seen["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    self.seen[error.code().name] += 1
            return await exchange(calls, token, kind, parts, wait_s)

        monkeypatch.setattr(client.AggregatorClient, "exchange", first)


async def test_an_aggregator_refuses_what_no_device_sends_and_has_the_right_sum(tmp_path, monkeypatch):
    watched, vandal = Watched(monkeypatch), Vandal(monkeypatch)
    save_file(MODEL, tmp_path / "initial.safetensors")
    policy = {"min_workers": 4, "quorum": 3}
    async with running_aggregator(tmp_path, **SECURE, policy=policy, rounds=3) as running:
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1 * (k + 1))) for k in range(4)]
        await running.until_finished()
        rounds = await running.rounds()
    await asyncio.gather(*workers)
    assert [each.phase for each in rounds] == [round_pb2.ROUND_PHASE_COMMITTED] * 3, rounds
    for number, (_, total) in enumerate(watched.sums):
        assert np.array_equal(total, sum(watched.plain[4 * number : 4 * number + 4]))
    assert vandal.seen.keys() <= ANSWERS
    assert vandal.seen.total() >= 3 * 4 * 3 * 10


@pytest.mark.faults
async def test_devices_outlive_an_aggregator_that_tells_them_anything(tmp_path, monkeypatch):
    """Tasks, rosters and proofs are spoiled in the first rounds: devices refuse, and then have an honest one."""
    rnd, spoiling = Random(5), asyncio.Event()
    spoiling.set()
    exchange = SecureSums.exchange

    def task_told(sum_, worker):
        message = secure_task_to_proto(sum_, worker)
        return spoiled(message, rnd) if spoiling.is_set() and rnd.random() < 0.5 else message

    async def parts_told(sums, request):
        response = await exchange(sums, request)
        return spoiled(response, rnd) if spoiling.is_set() and rnd.random() < 0.5 else response

    monkeypatch.setattr(task_terms, "secure_task_to_proto", task_told)
    monkeypatch.setattr(SecureSums, "exchange", parts_told)
    save_file(MODEL, tmp_path / "initial.safetensors")
    policy = {"min_workers": 4, "quorum": 3, "lease_s": 2.0}
    async with running_aggregator(tmp_path, **SECURE, policy=policy, rounds=20) as running:
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1)) for k in range(4)]
        for number in range(1, 7):
            await ended(running, number)
        spoiling.clear()
        # Which was the last one that was told of in another way is not known.
        committed = [await ended(running, number) for number in range(7, 10)][-1]
        assert not any(worker.done() for worker in workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    assert committed.phase == round_pb2.ROUND_PHASE_COMMITTED, committed.reason


async def ended(running, number):
    """The record of a round, of a run that is resumed whenever it has paused itself."""
    over = asyncio.create_task(running.until_ended(number))
    while not over.done():
        if (await running.run()).phase == pb.RUN_PHASE_PAUSED:
            await running.stub.ResumeRun(pb.ResumeRunRequest())
        await asyncio.wait([over], timeout=0.5)
    return await over
