"""Secure sums over real connections: what the aggregator makes of masked updates, and of those who die."""

import asyncio
import signal
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregation.admission import AdmissionPolicy
from fedgrpc.aggregator import secure_sums, stored_sum
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.update_checks import ExpectedUpdate, MaskedWords, examine
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.manifest import Limits
from fedgrpc.errors import UpdateRefused, UsageError
from fedgrpc.privacy import shamir
from fedgrpc.privacy.masks import packed_bytes, unpack_words
from fedgrpc.privacy.one_time_keys import PublicKeys, Secrets, public_of, seed_check_of
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.privacy.secure_vector import SecureVector
from fedgrpc.protocol.secure import MASKED, keys_to_proto, secure_terms_from_proto
from fedgrpc.rounds.policy import RoundPolicy, TaskKind
from fedgrpc.runs.task_context import LocalTask
from fedgrpc.runs.weighing import Weighing
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from fedgrpc.worker import client
from fedgrpc.worker.secure_memory import SecureMemory
from tests.faults.points import SECURE as POINTS
from tests.support.hand_driven_device import encoded, refused
from tests.support.many_runs import QUICK, hosting, until
from tests.support.processes import aggregator_process, free_address, reconnected
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.watched_sums import Watched

MODEL = {"a": np.zeros((3, 5), np.float32), "w": np.linspace(-1, 1, 301, dtype=np.float32)}
SECURE = {"secure": SecurePolicy(secure_bits=8), "clip_norm": 10.0}


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


def changes_for(tmp_path, count=4, **changes):
    save_file(MODEL, tmp_path / "initial.safetensors")
    policy = {"min_workers": count, "quorum": 3, **changes.pop("policy", {})}
    return {**SECURE, **changes, "policy": policy}


async def test_the_unmasked_sum_of_four_workers_is_bit_for_bit_that_of_their_integers(tmp_path, watched):
    async with running_aggregator(tmp_path, **changes_for(tmp_path, rounds=2)) as running:
        workers = [
            start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1 * (k + 1), examples=10 * (k + 1)))
            for k in range(4)
        ]
        run = await running.until_finished()
        first, second = running.weights(2), running.weights(run.model_version)
        rounds = await running.rounds()
    await asyncio.gather(*workers)
    assert len(watched.sums) == 2
    assert len(watched.plain) == 8
    for number, (sum_, total) in enumerate(watched.sums):
        plain = sum(watched.plain[4 * number : 4 * number + 4])
        assert np.array_equal(total, plain)
        assert int(total[-1]) == 4
        assert sum_.state.arrived == {f"w{k}" for k in range(4)}
    # All weigh the same: the model moves by the mean of the shifts, to within a step of the grid.
    steps = [2 * sum_.vector.bounds["w"] / 255 for sum_, _ in watched.sums]
    for name, start in MODEL.items():
        np.testing.assert_allclose(first[name] - start, 0.25, atol=steps[0])
        np.testing.assert_allclose(second[name] - first[name], 0.25, atol=steps[1])
    # Nothing of a device's examples is told.
    assert {task.example_count for round_ in rounds for task in round_.tasks} == {1}
    # The bounds follow the last mean.
    assert watched.sums[1][0].vector.bounds["w"] < watched.sums[0][0].vector.bounds["w"]


async def test_a_sum_of_a_quarter_of_the_coordinates_is_right_there_and_the_model_stays_as_it_is_elsewhere(
    tmp_path, watched
):
    model = {"w": np.linspace(-1, 1, 40_000, dtype=np.float32), "b": np.zeros(10, np.float32)}
    save_file(model, tmp_path / "initial.safetensors")
    secure = {"secure": SecurePolicy(secure_bits=8, secure_coordinates=0.25), "clip_norm": 100.0}
    policy = {"min_workers": 4, "quorum": 3}
    # An optimizer with momentum would go on where a round says nothing.
    async with running_aggregator(
        tmp_path, **secure, policy=policy, rounds=2, server_optimizer="fedadam", download_recipe="raw"
    ) as running:
        workers = [
            start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1 * (k + 1), weights=model)) for k in range(4)
        ]
        await running.until_finished()
        versions, rounds = [running.weights(version) for version in (1, 2, 3)], await running.rounds()
    await asyncio.gather(*workers)
    chosen = []
    for number, (sum_, total) in enumerate(watched.sums):
        assert np.array_equal(total, sum(watched.plain[4 * number : 4 * number + 4]))
        means = sum_.vector.means(total)
        there = ~np.isnan(means["w"])
        assert 0.23 < there.mean() < 0.27
        np.testing.assert_allclose(means["w"][there], 0.25, atol=2 * sum_.vector.bounds["w"] / 255)
        before, after = versions[number : number + 2]
        assert np.array_equal(before["w"][~there], after["w"][~there])
        assert (before["w"][there] != after["w"][there]).all()
        assert (before["b"] != after["b"]).all()
        chosen.append(there)
        # Ten bits a coordinate: 8, and 2 for the sum of four.
        expected = packed_bytes(int(there.sum()) + 10 + 1, 10)
        assert {task.upload_bytes for task in rounds[number].tasks} == {expected}
    assert not np.array_equal(*chosen)


def moved(weights, shifts, sum_):
    """Whether the model went by the mean of these shifts, to within a step of the grid."""
    for name, start in MODEL.items():
        step = 2 * sum_.vector.bounds[name] / 255
        np.testing.assert_allclose(weights[name] - start, np.mean(shifts), atol=step)


class DiesInTraining(ShiftTrainer):
    """A trainer during which its worker is killed."""

    def __init__(self, kill):
        super().__init__()
        self.kill = kill

    def train(self, weights, job):
        self.kill()
        while not job.stop():
            time.sleep(0.01)
        return super().train(weights, job)


class Killed:
    """Kills workers of this process at a moment of their secure sum, once each."""

    def __init__(self, monkeypatch):
        self.workers, self.moments, self.killed, self.pause_s = {}, {}, [], 3600.0
        exchange = client.AggregatorClient.exchange

        async def watched(calls, token, kind, parts, wait_s):
            if self.moments.get(calls.caller.worker) == kind:
                self.kill(calls.caller.worker)
                await asyncio.sleep(self.pause_s)
            return await exchange(calls, token, kind, parts, wait_s)

        monkeypatch.setattr(client.AggregatorClient, "exchange", watched)

    def kill(self, name):
        self.moments.pop(name, None)
        self.killed.append(name)
        asyncio.get_running_loop().call_soon(self.workers[name].cancel)


@pytest.fixture
def killed(monkeypatch):
    return Killed(monkeypatch)


def start_all(running, tmp_path, killed, count, trainers=None):
    for k in range(count):
        trainer = (trainers or {}).get(f"w{k}") or ShiftTrainer(0.1 * (k + 1))
        killed.workers[f"w{k}"] = start_worker(running, tmp_path, f"w{k}", trainer)


async def ended(killed):
    """Cancel what still runs, so that no worker outlives its test."""
    for worker in killed.workers.values():
        worker.cancel()
    await asyncio.gather(*killed.workers.values(), return_exceptions=True)


SHORT = {"lease_s": 3.0}


@pytest.mark.parametrize(
    ("moment", "counts"),
    # Who shares nothing is in no sum. Who dies in training has masks in the sum of others, and no update.
    [("shares", 4), ("training", 4), ("proofs", 5), ("answers", 5)],
)
async def test_one_of_five_workers_dies_and_the_sum_of_all_who_arrived_is_right(
    tmp_path, watched, killed, moment, counts
):
    async with running_aggregator(tmp_path, **changes_for(tmp_path, 5, policy=SHORT)) as running:
        loop = asyncio.get_running_loop()
        if moment == "training":
            dying = {"w4": DiesInTraining(lambda: loop.call_soon_threadsafe(killed.kill, "w4"))}
        else:
            killed.moments["w4"], dying = moment, None
        start_all(running, tmp_path, killed, 5, dying)
        await running.until_finished()
        weights, (round_,) = running.weights(2), await running.rounds()
        await ended(killed)
    assert killed.killed == ["w4"]
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED
    ((sum_, total),) = watched.sums
    assert sum_.state.arrived == {f"w{k}" for k in range(counts)}
    # Of one that died in its training there are no integers.
    assert np.array_equal(total, sum(watched.plain[:counts]) if counts == 5 else sum(watched.plain))
    moved(weights, [0.1 * (k + 1) for k in range(counts)], sum_)


@pytest.mark.faults
async def test_of_24_workers_with_12_neighbours_each_a_third_dies_and_the_sum_is_right(
    tmp_path, watched, killed, monkeypatch
):
    """Two die before they share, two in training, two before they confirm, two before they answer."""
    names = sorted(f"w{k}" for k in range(24))
    # The aggregator draws the ring by this number. Every third on it dies, so 8 of 12 neighbours are left.
    monkeypatch.setattr(secure_sums.secrets, "randbits", lambda bits: 7)
    dead = [names[place] for place in np.random.default_rng(7).permutation(24)[::3]]
    changes = changes_for(tmp_path, 24, policy={"lease_s": 15.0})
    changes["secure"] = SecurePolicy(secure_bits=8, secure_neighbours=12)
    async with running_aggregator(tmp_path, **changes) as running:
        loop = asyncio.get_running_loop()
        killed.moments |= dict(zip(dead[2:], ["shares"] * 2 + ["proofs"] * 2 + ["answers"] * 2, strict=True))

        def dies_in_training(name):
            return DiesInTraining(lambda: loop.call_soon_threadsafe(killed.kill, name))

        start_all(running, tmp_path, killed, 24, {name: dies_in_training(name) for name in dead[:2]})
        await running.until_finished()
        weights, (round_,) = running.weights(2), await running.rounds()
        await ended(killed)
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED, round_.reason
    assert sorted(killed.killed) == sorted(dead)
    ((sum_, total),) = watched.sums
    assert {len(around) for around in sum_.state.graph.values()} == {12}
    # Who shared nothing is in no sum; who died in training has masks in it, and no update.
    assert sum_.state.arrived == set(names) - set(dead[:4])
    assert np.array_equal(total, sum(watched.plain))
    assert len(watched.plain) == 20
    means = sum_.vector.means(total)
    assert all(np.array_equal(weights[name], (MODEL[name] + means[name]).astype(np.float32)) for name in MODEL)


async def test_a_round_is_abandoned_with_its_reason_when_too_few_can_answer(tmp_path, watched, killed):
    async with running_aggregator(tmp_path, **changes_for(tmp_path, 4, policy=SHORT)) as running:
        # Three neighbours have each device's secrets, and two of them must answer.
        killed.moments |= {"w2": "answers", "w3": "answers"}
        start_all(running, tmp_path, killed, 4)
        record = await running.until_ended(1)
        assert not watched.sums
        assert (await running.run()).model_version == 1
        await ended(killed)
    assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
    assert "secure sum is abandoned" in record.reason
    assert "fewer than 2" in record.reason


async def test_a_worker_that_restarts_after_its_upload_answers_from_its_disk(tmp_path, watched, killed):
    async with running_aggregator(tmp_path, **changes_for(tmp_path, 3, policy={"lease_s": 60.0})) as running:
        # Of three, all have to answer.
        killed.moments["w2"] = "answers"
        start_all(running, tmp_path, killed, 3)
        await asyncio.wait([killed.workers["w2"]], timeout=60)
        await asyncio.gather(killed.workers["w2"], return_exceptions=True)
        killed.workers["w2"] = start_worker(running, tmp_path, "w2", ShiftTrainer(9.0))
        await running.until_finished()
        weights = running.weights(2)
        await ended(killed)
    ((sum_, total),) = watched.sums
    assert np.array_equal(total, sum(watched.plain))
    moved(weights, [0.1, 0.2, 0.3], sum_)


async def test_what_the_aggregator_gets_of_a_device_looks_like_chance_and_tells_one_secret(
    tmp_path, watched, monkeypatch
):
    """The transcript of a round: masked words, shares, proofs and answers of one device."""
    packed, parts = {}, defaultdict(list)
    add, exchange = secure_sums._add_masked, client.AggregatorClient.exchange

    def add_masked(total, load, token, bits):
        with load(token).open() as reader:
            packed[load(token).header.worker] = unpack_words(reader.tensor(MASKED), total.size, bits)
        add(total, load, token, bits)

    async def heard(calls, token, kind, sent, wait_s):
        parts[calls.caller.worker].append((kind, dict(sent)))
        return await exchange(calls, token, kind, sent, wait_s)

    monkeypatch.setattr(secure_sums, "_add_masked", add_masked)
    monkeypatch.setattr(client.AggregatorClient, "exchange", heard)
    large = {"w": np.zeros(40_000, np.float32)}
    save_file(large, tmp_path / "initial.safetensors")
    policy = {"min_workers": 4, "quorum": 3}
    async with running_aggregator(tmp_path, **SECURE, policy=policy) as running:
        # Every device sends the same value in every element: without masks there would be one or two words.
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.01, weights=large)) for k in range(4)]
        await running.until_finished()
    await asyncio.gather(*workers)
    ((sum_, _),) = watched.sums
    plain = watched.plain[0][:-1].astype(np.float64)
    assert len(np.unique(plain)) <= 2
    for name, words in packed.items():
        counts = np.bincount(words >> 4, minlength=64)
        expected = words.size / 64
        # Chi-square with 63 degrees of freedom: above 160 is less likely than 1e-9.
        assert ((counts - expected) ** 2 / expected).sum() < 160, name
        # Neighbouring words, and words of two devices, go together by chance alone: six deviations.
        assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 6 / np.sqrt(words.size)
        others = [other for other in packed if other != name]
        assert all(abs(np.corrcoef(words, packed[o])[0, 1]) < 6 / np.sqrt(words.size) for o in others)
    # One share of each neighbour and device: all of them of the self seeds, since everybody's update came.
    for name, secret in sum_.state.keys.items():
        told = {w: dict(parts[w])["answers"][name] for w in packed if w != name}
        points = {sum_.state.points[w]: int.from_bytes(share) for w, share in told.items()}
        seed = shamir.combine(points).to_bytes(32)
        assert seed_check_of(seed) == secret.seed_check
        assert public_of(seed) != secret.masking


async def test_a_run_beside_others_has_secure_sums_too(tmp_path):
    settings = {"secure_aggregation": "8", "clip_norm": "10", "quorum": "3", "min_workers": "3", "rounds": "2"}
    async with hosting(tmp_path) as (address, operator, _):
        await operator.submit("plain", {**QUICK, "rounds": "2"})
        await operator.submit("masked", {**QUICK, **settings})
        workers = [
            start_worker(address, tmp_path, f"w{k}", ShiftTrainer(0.5, weights={"w": np.zeros(40, np.float32)}))
            for k in range(3)
        ]
        await until(operator, lambda runs: all(run.phase == pb.RUN_PHASE_FINISHED for run in runs.values()))
        rounds = await operator.of("masked").all_rounds()
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    trained = [round_ for round_ in rounds if round_.kind == round_pb2.TASK_KIND_TRAIN]
    assert [round_.phase for round_ in trained] == [round_pb2.ROUND_PHASE_COMMITTED] * 2
    assert {task.upload_recipe for round_ in trained for task in round_.tasks} == {"raw"}


async def test_a_device_joins_no_sum_whose_threshold_is_too_low_for_the_neighbours_that_it_mistrusts(tmp_path):
    async with running_aggregator(tmp_path, **changes_for(tmp_path, 4, policy=SHORT)) as running:
        workers = [
            # Two of three neighbours answer for each: one that answers both ways is enough to open the fourth.
            start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1), secure_colluding=int(k == 3))
            for k in range(4)
        ]
        await running.until_finished()
        (round_,) = await running.rounds()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    reasons = {task.worker: task.reason for task in round_.tasks if task.phase == round_pb2.TASK_PHASE_FAILED}
    assert reasons.keys() == {"w3"}
    assert "threshold" in reasons["w3"]


async def test_a_device_joins_no_sum_of_fewer_devices_than_it_wants(tmp_path):
    """A malicious aggregator could else run a round of the one that it is after and of two of its own."""
    async with running_aggregator(tmp_path, **changes_for(tmp_path, 4, policy=SHORT)) as running:
        workers = [
            start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1), secure_min_workers=5 if k == 3 else 4)
            for k in range(4)
        ]
        record = await running.until_ended(1)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    reasons = {task.worker: task.reason for task in record.tasks if task.phase == round_pb2.TASK_PHASE_FAILED}
    assert "makes 4, and it joins secure sums of 5 at least" in reasons["w3"]
    # Three are left, too few for each of them.
    assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
    assert not running.kept_updates()


def masked_update(size_bytes, last=0):
    packed = np.zeros(size_bytes, np.uint8)
    packed[-1] = last
    return {MASKED: packed}


async def test_what_a_device_may_not_send_is_refused_and_harms_its_own_task_alone(tmp_path):
    async with running_aggregator(tmp_path, **changes_for(tmp_path, 4, policy=SHORT)) as running:
        others = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1)) for k in range(3)]
        bad = await running.device("bad")
        memory = SecureMemory(tmp_path / "bad")
        keys = memory.public_keys()
        request = pb.PollTaskRequest(worker="bad", one_time_keys=keys_to_proto(keys))
        request.wait.FromSeconds(60)
        while not (reply := await running.stub.PollTask(request)).HasField("task"):
            pass
        task = reply.task
        terms = secure_terms_from_proto(task.secure, "bad")
        shares = memory.begin(task.token, terms.circle, keys).sealed_shares()
        size = packed_bytes(terms.vector.size, terms.vector.sum_bits)
        with refused("INVALID_ARGUMENT", "exactly its neighbours"):
            await bad.exchange(task, shares={"w0": shares["w0"]})
        with refused("INVALID_ARGUMENT", "too many or too long"):
            await bad.exchange(task, shares={"w0": b"x" * 1000})
        with refused("FAILED_PRECONDITION", "takes no such message"):
            await bad.exchange(task, answers={"w0": b"x" * 33})
        told = await bad.exchange(task, shares=shares)
        while not told.ready:
            told = await bad.exchange(task, shares=shares)
        assert set(told.roster) == {"bad", "w0", "w1", "w2"}
        with refused("INVALID_ARGUMENT", "something else before"):
            await bad.exchange(task, shares={name: bytes(94) for name in shares})
        assert terms.vector.size * terms.vector.sum_bits % 8
        with refused("INVALID_ARGUMENT", "behind the last word"):
            await bad.push(task, masked_update(size, 0xFF), example_count=1)
        run = await running.until_finished()
        (round_,) = await running.rounds()
    await asyncio.gather(*others)
    assert run.model_version == 2
    assert {record.worker: record.phase for record in round_.tasks} == {
        "bad": round_pb2.TASK_PHASE_REJECTED,
        **dict.fromkeys(("w0", "w1", "w2"), round_pb2.TASK_PHASE_ACCEPTED),
    }


async def polled_until_task(running, name, keys):
    request = pb.PollTaskRequest(worker=name, one_time_keys=keys_to_proto(keys))
    request.wait.FromSeconds(5)
    while (await running.stub.PollTask(request)).HasField("task"):
        pass


async def refused_until_the_end(running, name, keys):
    request = pb.PollTaskRequest(worker=name, one_time_keys=keys_to_proto(keys))
    request.wait.FromSeconds(1)
    while not (answer := await running.stub.PollTask(request)).run_ended:
        assert not answer.HasField("task")


@pytest.mark.parametrize(
    "keys",
    [
        # A point of low order agrees on nothing: each of its neighbours would refuse the whole sum.
        [PublicKeys(bytes(32), bytes([1]) + bytes(31), b"c" * 32)],
        # Copies of each other, which a device refuses to have as neighbours.
        [Secrets(b"k" * 32).public, replace(Secrets(b"l" * 32).public, sealing=Secrets(b"k" * 32).public.sealing)],
    ],
)
async def test_devices_with_keys_that_no_neighbour_takes_lose_their_task_and_the_others_have_their_sum(
    tmp_path, keys
):
    async with running_aggregator(tmp_path, **changes_for(tmp_path, 3 + len(keys), policy=SHORT)) as running:
        polls = []
        for number, each in enumerate(keys):
            await running.device(f"bad{number}")
            polls.append(asyncio.create_task(polled_until_task(running, f"bad{number}", each)))
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer(0.1)) for k in range(3)]
        record = await running.until_ended(1)
        await running.until_finished()
        for task in [*polls, *workers]:
            task.cancel()
        await asyncio.gather(*polls, *workers, return_exceptions=True)
    assert record.phase == round_pb2.ROUND_PHASE_COMMITTED, record.reason
    told = {task.worker: task.reason for task in record.tasks if task.worker.startswith("bad")}
    assert len(told) == len(keys)
    assert all("one-time keys" in reason for reason in told.values())


@pytest.mark.faults
@pytest.mark.parametrize("point", POINTS)
async def test_an_aggregator_that_is_killed_as_it_gives_tasks_still_answers_whom_it_cannot_give_one(
    tmp_path, point
):
    save_file(MODEL, tmp_path / "initial.safetensors")
    address = free_address()
    arguments = ["--secure-aggregation", 8, "--clip-norm", 10, "--quorum", 3, "--min-workers", 4, "--rounds", 1]
    dying = ("-m", "tests.faults.killed_at", point)
    low_order = PublicKeys(bytes(32), bytes([1]) + bytes(31), b"c" * 32)
    async with aggregator_process(tmp_path, *arguments, address=address, program=dying) as (process, running):
        bad = await running.device("bad")
        asking = asyncio.create_task(polled_until_task(running, "bad", low_order))
        workers = [start_worker(address, tmp_path, f"w{k}", ShiftTrainer(0.1 * (k + 1))) for k in range(3)]
        assert await process.ended() == -signal.SIGKILL
        await asyncio.gather(asking, return_exceptions=True)
    async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
        (bad,) = reconnected(running, bad)
        await bad.register()
        # For as long as the others take to come back: four are wanted.
        asking = asyncio.create_task(refused_until_the_end(running, "bad", low_order))
        await running.until_finished()
        (round_,) = await running.rounds()
        await asking
    await asyncio.gather(*workers, return_exceptions=True)
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED, round_.reason
    phases = {task.worker: task.phase for task in round_.tasks}
    assert phases == {
        "bad": round_pb2.TASK_PHASE_REJECTED,
        **dict.fromkeys(("w0", "w1", "w2"), round_pb2.TASK_PHASE_ACCEPTED),
    }
    assert "one-time keys" in next(task.reason for task in round_.tasks if task.worker == "bad")


@pytest.mark.parametrize(
    ("tensors", "changes", "reason"),
    [
        (masked_update(473 + 1), {"example_count": 1}, "473 bytes"),
        (masked_update(473), {"example_count": 2}, "one example"),
        ({"a": MODEL["a"], "w": MODEL["w"]}, {"example_count": 1}, "473 bytes"),
    ],
)
def test_the_header_of_a_masked_update_is_checked_before_its_bytes(tensors, changes, reason):
    manifest, _ = encoded(tensors)
    header = pb.UpdateHeader(worker="w", token="t", manifest=manifest, steps=1, **changes)
    layout = layout_of(MODEL)
    limits, weighing = Limits(), Weighing({})
    expected = ExpectedUpdate(
        *(TaskKind.TRAIN, layout, LocalTask(), None, False, limits, AdmissionPolicy(), 1 << 20, weighing),
        MaskedWords(315, 12),
    )
    assert expected.masked.size_bytes == 473
    with pytest.raises(UpdateRefused, match=reason):
        examine(header, expected)


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["shares", "proofs", "answers"])
async def test_an_aggregator_that_is_killed_in_any_phase_goes_on_with_the_sum(
    tmp_path, killed, monkeypatch, moment
):
    """All three have to answer for each other, so nobody may be lost over the restart."""
    save_file(MODEL, tmp_path / "initial.safetensors")
    plain, pieces = [], SecureVector.pieces

    def watched_pieces(vector, update, examples, rng):
        found = list(pieces(vector, update, examples, rng))
        plain.append((vector, np.concatenate(found)))
        return iter(found)

    monkeypatch.setattr(SecureVector, "pieces", watched_pieces)
    address = free_address()
    arguments = ["--secure-aggregation", 8, "--clip-norm", 10, "--quorum", 3, "--min-workers", 3, "--rounds", 1]
    async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
        dead = asyncio.get_running_loop().create_future()
        killed.kill = lambda name: (killed.moments.clear(), process.send(signal.SIGKILL), dead.set_result(name))
        killed.moments["w2"] = moment
        killed.pause_s = 0.5
        start_all(running, tmp_path, killed, 3)
        await dead
        await process.ended()
    async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
        await process.until("round resumed")
        await running.until_finished()
        weights, (round_,) = running.weights(2), await running.rounds()
        await ended(killed)
    assert round_.phase == round_pb2.ROUND_PHASE_COMMITTED
    assert [task.phase for task in round_.tasks] == [round_pb2.TASK_PHASE_ACCEPTED] * 3
    vector = plain[0][0]
    means = vector.means(sum(integers for _, integers in plain))
    for name, start in MODEL.items():
        # The sum itself stays in the process: what it made of the model is the same, to the last bit.
        assert np.array_equal(weights[name], (start + means[name]).astype(np.float32))


async def test_a_round_whose_sum_the_disk_has_damaged_is_abandoned_and_the_run_goes_on(tmp_path):
    save_file(MODEL, tmp_path / "initial.safetensors")
    address = free_address()
    arguments = ["--secure-aggregation", 8, "--clip-norm", 10, "--quorum", 3, "--min-workers", 3, "--rounds", 1]
    async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
        workers = [
            start_worker(running, tmp_path, f"w{k}", DiesInTraining(lambda: None) if k == 0 else ShiftTrainer(0.1))
            for k in range(3)
        ]
        await running.until_task("w0", round_pb2.TASK_PHASE_TRAINING)
        await process.kill()
    path = tmp_path / "aggregator" / stored_sum.FILE
    path.write_bytes(path.read_bytes().replace(b'"least": 3', b'"least": 2'))
    async with aggregator_process(tmp_path, *arguments, address=address) as (process, running):
        record = await running.until_ended(1)
        assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
        assert "damaged" in record.reason
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clip_norm": None}, "clip_norm"),
        ({"policy": RoundPolicy(quorum=2)}, "quorum"),
        ({"policy": RoundPolicy(quorum=3, late="carry")}, "late"),
        ({"aggregation": "median"}, "rules look at single updates"),
        ({"max_update_norm": 1.0}, "max_update_norm"),
        ({"clip_quantile": 0.5}, "clip_quantile"),
        ({"worker_weights": {"w0": 1.0}}, "weight"),
        ({"max_examples": 5}, "secure_weight_bits"),
        ({"local_models": PlanTable(LocalModelPlan(width=0.5))}, "local_models"),
        ({"difference_recipe": "entropy:c=1+zstd"}, "difference_recipe"),
        ({"download_recipe": "auto"}, "one download_recipe"),
        ({"plan": TrainingPlan(upload_reserve_s=1.0)}, "upload_reserve_s"),
        ({"plan": TrainingPlan(algorithm="qfedavg:q=1", learning_rate=0.1)}, "differences"),
        ({"secure": SecurePolicy(8, secure_colluding=2)}, "secure_colluding"),
        (
            {"secure": SecurePolicy(8, secure_colluding=4, secure_neighbours=4), "policy": RoundPolicy(quorum=20)},
            "secure_colluding",
        ),
        (
            {
                "privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4),
                "secure": SecurePolicy(8, secure_weight_bits=4),
                "max_examples": 5,
            },
            "all updates weigh the same",
        ),
        (
            {
                "privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4),
                "secure": SecurePolicy(8, secure_coordinates=0.5),
            },
            "secure_coordinates",
        ),
        (
            {
                "privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4),
                "policy": RoundPolicy(quorum=0, poisson_rate=0.5),
            },
            "quorum",
        ),
    ],
)
def test_settings_that_need_single_updates_are_refused_with_the_reason(tmp_path, changes, reason):
    good = AggregatorSettings(tmp_path, **SECURE, policy=RoundPolicy(quorum=3))
    with pytest.raises(UsageError, match=reason):
        replace(good, **changes)
