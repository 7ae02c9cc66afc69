"""Secure sums in a tree: each leaf adds up its own workers' updates under masks, and the parent sees the sums."""

import asyncio
import signal
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.hierarchy.parent_rounds import ParentRounds
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.protocol.secure import groups_complaint, secure_groups_to_proto
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.v1 import device_pb2, round_pb2
from tests.faults.points import SECURE_LEAF as SECURE_LEAF_POINTS
from tests.federation.test_secure_sums import DiesInTraining, Killed, ended
from tests.support.hand_driven_device import refused
from tests.support.joining import OUTSIDE, new_token
from tests.support.processes import aggregator_process, free_address
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.running_hierarchy import leaf_process, running_leaf
from tests.support.watched_sums import Watched

MODEL = {"a": np.zeros((3, 5), np.float32), "w": np.linspace(-1, 1, 301, dtype=np.float32)}
SECURE = {"secure": SecurePolicy(secure_bits=8), "clip_norm": 10.0}
ACCEPTED, FAILED = round_pb2.TASK_PHASE_ACCEPTED, round_pb2.TASK_PHASE_FAILED
COMMITTED = round_pb2.ROUND_PHASE_COMMITTED


@pytest.fixture
def watched(monkeypatch):
    return Watched(monkeypatch)


class Drawn(ShiftTrainer):
    """Adds a small shift and noise that the task's seed and round decide."""

    def train(self, weights, job):
        result, rng = super().train(weights, job), np.random.default_rng([job.seed, job.round])
        noisy = {name: (a + 0.01 * rng.normal(size=a.shape)).astype(a.dtype) for name, a in result.weights.items()}
        return replace(result, weights=noisy)


def crew(count):
    return {f"w{k}": Drawn(0.1 * (k + 1), examples=10 * (k + 1)) for k in range(count)}


async def flat(folder, count, **about):
    folder.mkdir()
    save_file(MODEL, folder / "initial.safetensors")
    async with running_aggregator(folder, policy={"min_workers": count, "quorum": 3}, **about) as running:
        workers = [start_worker(running, folder, *each) for each in crew(count).items()]
        run = await running.until_finished()
        await asyncio.gather(*workers)
        return [running.weights(version) for version in range(1, run.model_version + 1)]


@asynccontextmanager
async def tree(folder, places, policy=None, leaf_changes=None, model=MODEL, **about):
    """Aggregators by the way from the root to each: the root is (), and `places` names a worker's way."""
    folder.mkdir(exist_ok=True)
    save_file(model, folder / "initial.safetensors")
    names = sorted({place[: depth + 1] for place in places.values() for depth in range(len(place))}, key=len)
    below = {name: [other[-1] for other in names if other[:-1] == name] for name in [(), *names]}
    policy = {"min_workers": len(below[()]), **(policy or {})}
    async with AsyncExitStack() as stack:
        root = running_aggregator(folder, policy=policy, leaves=tuple(below[()]), **about)
        running = {(): await stack.enter_async_context(root)}
        for name in names:
            own = {key: about[key] for key in ("secure", "clip_norm", "max_examples") if key in about}
            count = len(below[name]) + sum(place == name for place in places.values())
            leaf = running_leaf(
                folder / "-".join(name),
                name[-1],
                running[name[:-1]],
                **{
                    **own,
                    "leaves": tuple(below[name]),
                    "policy": {"min_workers": count, "quorum": 1 if below[name] else 3},
                    **(leaf_changes or {}).get(name, {}),
                },
            )
            running[name] = await stack.enter_async_context(leaf)
        yield running


async def played(folder, places, **about):
    """The versions of a tree, and the records of the root's rounds."""
    async with tree(folder, places, **about) as running:
        pairs = zip(crew(len(places)).items(), places.values(), strict=True)
        workers = [start_worker(running[place], folder, *each) for each, place in pairs]
        run = await running[()].until_finished()
        assert await asyncio.gather(*workers) == [0] * len(workers)
        root = running[()]
        versions = [root.weights(version) for version in range(1, run.model_version + 1)]
        return versions, await root.rounds()


def placed(**groups):
    """Ways by worker: `a=3` are three workers below the leaf a; m_c is the leaf c below m."""
    ways = [tuple(way.split("_")) for way, count in groups.items() for _ in range(count)]
    return {f"w{k}": way for k, way in enumerate(ways)}


def close(left, right):
    """Equal to within two roundings to float32: of the means that travel, and of their mean."""
    for name in MODEL:
        np.testing.assert_allclose(left[name], right[name], rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize(
    ("places", "groups"),
    [
        (placed(a=3, b=5), [{"w0", "w1", "w2"}, {"w3", "w4", "w5", "w6", "w7"}]),
        (placed(m_c=3, m_d=5), [{"w0", "w1", "w2"}, {"w3", "w4", "w5", "w6", "w7"}]),
    ],
    ids=["two levels", "three levels"],
)
async def test_the_sums_of_leaves_are_of_the_integers_that_one_aggregator_would_have_added(
    tmp_path, watched, places, groups
):
    straight = await flat(tmp_path / "flat", 8, **SECURE)
    ((_, everything),), integers = watched.sums, sorted(map(bytes, watched.plain))
    watched.sums, watched.plain = [], []
    versions, rounds = await played(tmp_path / "tree", places, **SECURE)
    # Seeds and bounds are those of the flat run, so each device rounds to the same integers.
    assert sorted(map(bytes, watched.plain)) == integers
    assert sorted(map(sorted, (sum_.state.arrived for sum_, _ in watched.sums))) == sorted(map(sorted, groups))
    assert np.array_equal(sum(total for _, total in watched.sums), everything)
    close(versions[1], straight[1])
    assert np.abs(versions[1]["w"] - MODEL["w"]).max() > 0.3
    trained = [task for task in rounds[0].tasks if task.merged_updates]
    assert sum(task.merged_updates for task in trained) == sum(task.weight for task in trained) == 8


async def test_leaves_weigh_what_their_devices_weigh_together(tmp_path, watched):
    weighed = {"secure": SecurePolicy(8, secure_weight_bits=6), "clip_norm": 10.0, "max_examples": 63}
    straight = await flat(tmp_path / "flat", 8, **weighed)
    watched.sums, watched.plain = [], []
    versions, rounds = await played(tmp_path / "tree", placed(a=3, b=5), **weighed)
    close(versions[1], straight[1])
    # 10 + 20 + 30, and 40 + 50 + 60 and twice 63: one in 63 is one example.
    assert {task.worker: task.weight for task in rounds[0].tasks} == {"a": 60.0, "b": 276.0}
    assert {task.worker: task.merged_updates for task in rounds[0].tasks} == {"a": 3, "b": 5}


async def test_the_bounds_of_a_leaf_follow_its_own_last_mean(tmp_path, watched):
    versions, rounds = await played(tmp_path / "tree", placed(a=3, b=3), rounds=2, **SECURE)
    assert [round_.phase for round_ in rounds] == [COMMITTED] * 2
    by_leaf = {}
    for sum_, total in watched.sums:
        by_leaf.setdefault(min(sum_.state.arrived), []).append((sum_, sum_.vector.means(total)))
    for first, second in by_leaf.values():
        for name in MODEL:
            assert second[0].vector.bounds[name] == pytest.approx(4 * np.abs(first[1][name]).max())
    # Both leaves have three devices, so the root's step is the plain mean of theirs.
    for number, (before, after) in enumerate(pairwise(versions[:3])):
        for name in MODEL:
            moved = np.mean([sums[number][1][name].astype(np.float32) for sums in by_leaf.values()], 0)
            np.testing.assert_allclose(after[name], before[name] + moved, rtol=3e-7, atol=3e-7)


async def test_a_leaf_whose_bounds_the_disk_has_damaged_goes_on_with_those_of_a_first_round(
    tmp_path, watched, monkeypatch
):
    write = ParentRounds._write_bounds

    def damaged(rounds, means):
        write(rounds, means)
        path = rounds._bounds_path
        path.write_bytes(path.read_bytes()[:-9])

    monkeypatch.setattr(ParentRounds, "_write_bounds", damaged)
    _, rounds = await played(tmp_path / "tree", placed(a=3), rounds=2, **SECURE)
    assert [round_.phase for round_ in rounds] == [COMMITTED] * 2
    first, second = (sum_.vector.bounds for sum_, _ in watched.sums)
    assert first == second


@pytest.fixture
def killed(monkeypatch):
    return Killed(monkeypatch)


def start(running, folder, killed, places, dying=None):
    """Workers by their places; `dying` is a trainer for one of them."""
    for name, trainer in crew(len(places)).items():
        trainer = (dying or {}).get(name, trainer)
        killed.workers[name] = start_worker(running[places[name]], folder, name, trainer)


# Whoever lives has to answer within it, also on a machine that does a dozen other things.
SHORT = {"lease_s": 8.0, "min_workers": 5, "quorum": 3}
FIVE_AND_THREE = placed(a=5, b=3)


@pytest.mark.parametrize(("moment", "counts"), [("shares", 4), ("training", 4), ("proofs", 5), ("answers", 5)])
async def test_a_device_of_a_leaf_dies_and_the_sum_of_those_who_arrived_goes_up(
    tmp_path, watched, killed, moment, counts
):
    changes = {("a",): {"policy": SHORT}}
    async with tree(tmp_path / "tree", FIVE_AND_THREE, leaf_changes=changes, **SECURE) as running:
        loop, dying = asyncio.get_running_loop(), None
        if moment == "training":
            dying = {"w4": DiesInTraining(lambda: loop.call_soon_threadsafe(killed.kill, "w4"))}
        else:
            killed.moments["w4"] = moment
        start(running, tmp_path / "tree", killed, FIVE_AND_THREE, dying)
        await running[()].until_finished()
        (round_,) = await running[()].rounds()
        weights = running[()].weights(2)
        await ended(killed)
    assert killed.killed == ["w4"]
    assert {task.worker: task.merged_updates for task in round_.tasks} == {"a": counts, "b": 3}
    means = {len(sum_.state.arrived): sum_.vector.means(total) for sum_, total in watched.sums}
    for name, before in MODEL.items():
        mean = (counts * means[counts][name] + 3 * means[3][name]) / (counts + 3)
        np.testing.assert_allclose(weights[name], before + mean, rtol=3e-7, atol=3e-7)


async def test_a_leaf_with_too_few_devices_left_gives_its_task_back_and_the_others_go_on(
    tmp_path, watched, killed
):
    changes = {("a",): {"policy": {**SHORT, "min_workers": 4}}}
    places = placed(a=4, b=3)
    async with tree(tmp_path / "tree", places, leaf_changes=changes, **SECURE) as running:
        # Of three that are left for each secret, two have to answer.
        killed.moments |= {"w2": "answers", "w3": "answers"}
        start(running, tmp_path / "tree", killed, places)
        await running[()].until_finished()
        (round_,) = await running[()].rounds()
        weights = running[()].weights(2)
        await ended(killed)
    tasks = {task.worker: task for task in round_.tasks}
    assert (tasks["a"].phase, tasks["b"].phase) == (FAILED, ACCEPTED)
    assert "secure sum is abandoned" in tasks["a"].reason
    assert "fewer than 2" in tasks["a"].reason
    ((sum_, total),) = watched.sums
    assert sum_.state.arrived == {"w4", "w5", "w6"}
    means = sum_.vector.means(total)
    close(weights, {name: before + means[name] for name, before in MODEL.items()})


class Waits(ShiftTrainer):
    """Trains once a worker has been killed."""

    def __init__(self, killed):
        super().__init__(0.1)
        self.killed = killed

    def train(self, weights, job):
        while not (self.killed.killed or job.stop()):
            time.sleep(0.01)
        return super().train(weights, job)


async def test_a_leaf_ends_a_sum_that_the_parent_no_longer_waits_for(tmp_path, killed):
    """Also one whose devices are asked already."""
    policy = {"max_participants": 1, "over_selection": 2.0}
    places = placed(a=3, b=3)
    async with tree(tmp_path / "tree", places, policy=policy, heartbeat_interval_s=0.2, **SECURE) as running:
        # It dies, and its lease is long: the sum of `a` waits. Only then does `b` train.
        killed.moments["w0"] = "answers"
        start(running, tmp_path / "tree", killed, places, {f"w{k}": Waits(killed) for k in (3, 4, 5)})
        record = await running["a",].until_ended(1)
        await running[()].until_finished()
        (round_,) = await running[()].rounds()
        await ended(killed)
    assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
    assert "no longer wants it" in record.reason
    assert {task.worker: task.merged_updates for task in round_.tasks if task.phase == ACCEPTED} == {"b": 3}


async def test_the_lower_clip_norm_of_parent_and_leaf_counts_for_the_leaf_s_devices(tmp_path, watched):
    async with tree(
        tmp_path / "tree",
        placed(a=3, b=3),
        leaf_changes={("a",): {"clip_norm": 0.5}, ("b",): {"clip_norm": 20.0}},
        **SECURE,
    ) as running:
        workers = [
            start_worker(running[place], tmp_path / "tree", name, Drawn(1.0))
            for name, place in placed(a=3, b=3).items()
        ]
        await running[()].until_finished()
        await asyncio.gather(*workers)
    norms = {}
    for sum_, total in watched.sums:
        means = sum_.vector.means(total)
        norms[min(sum_.state.arrived)] = np.sqrt(sum(np.square(mean).sum() for mean in means.values()))
    # Three updates of a length of 17.8 in one direction; rounding makes them a little longer.
    assert norms == {"w0": pytest.approx(0.5, rel=0.02), "w3": pytest.approx(10.0, rel=0.02)}


async def test_a_leaf_keeps_a_lease_of_the_parent_s_time_for_the_answers_of_its_devices(tmp_path, killed):
    deadlines = {}
    for kind, about in {"plain": {}, "masked": SECURE}.items():
        policy = {"deadline_s": 600.0}
        leaf = {("a",): {"policy": {"min_workers": 3, "quorum": 3, "lease_s": 50.0, "deadline_s": 3600.0}}}
        places = placed(a=3)
        async with tree(tmp_path / kind, places, policy=policy, leaf_changes=leaf, **about) as running:
            start(running, tmp_path / kind, killed, places, {name: Waits(killed) for name in places})
            _, round_ = await running["a",].until(lambda _, round_: round_.HasField("deadline"))
            deadlines[kind] = round_.deadline.ToTimedelta().total_seconds()
            await ended(killed)
    assert deadlines["plain"] == pytest.approx(540, abs=10)
    assert deadlines["masked"] == pytest.approx(490, abs=10)


LARGE = {"a": np.zeros((3, 5), np.float32), "w": np.linspace(-1, 1, 4001, dtype=np.float32)}


async def test_leaves_that_sum_a_part_of_the_coordinates_are_averaged_where_each_has_them(tmp_path, watched):
    half = {key: {"secure": SecurePolicy(8, secure_coordinates=0.5)} for key in (("a",), ("b",))}
    places = placed(a=3, b=5)
    async with tree(tmp_path, places, leaf_changes=half, model=LARGE, **SECURE) as running:
        workers = [
            start_worker(running[place], tmp_path, name, Drawn(0.1, weights=LARGE))
            for name, place in places.items()
        ]
        await running[()].until_finished()
        await asyncio.gather(*workers)
        weights = running[()].weights(2)
    sums = {len(sum_.state.arrived): sum_.vector.means(total) for sum_, total in watched.sums}
    known = {count: ~np.isnan(means["w"]) for count, means in sums.items()}
    assert {0.45 < each.mean() < 0.55 for each in known.values()} == {True}
    total = sum(count * np.where(known[count], means["w"], 0.0) for count, means in sums.items())
    weight = sum(count * known[count] for count in sums)
    moved = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    np.testing.assert_allclose(weights["w"], LARGE["w"] + moved, rtol=3e-7, atol=3e-7)
    # What no leaf has stays as it was, bit for bit.
    assert np.array_equal(weights["w"][weight == 0], LARGE["w"][weight == 0])
    assert (weight == 0).any()


SECURE_LEAF = ["--secure-aggregation", 8, "--clip-norm", 10, "--quorum", 3, "--min-workers", 3]


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["training", "shares", "proofs", "answers"])
async def test_a_leaf_that_is_killed_in_any_phase_goes_on_with_its_sum(tmp_path, watched, killed, moment):
    """Its three devices have to answer for each other, so nobody may be lost over the restart."""
    save_file(MODEL, tmp_path / "initial.safetensors")
    address = free_address()
    async with running_aggregator(tmp_path, leaves=("leaf",), policy={"min_workers": 1}, **SECURE) as root:
        async with leaf_process(tmp_path, "leaf", root.address, *SECURE_LEAF, address=address) as (process, _):
            dead = asyncio.get_running_loop().create_future()

            def kill(name):
                killed.moments.clear()
                process.send(signal.SIGKILL)
                if not dead.done():
                    dead.set_result(name)

            killed.kill, killed.pause_s = kill, 0.5
            places, loop, dying = dict.fromkeys(("w0", "w1", "w2"), ()), asyncio.get_running_loop(), None
            if moment == "training":
                dying = {"w2": Kills(0.3, lambda: loop.call_soon_threadsafe(kill, "w2"))}
            else:
                killed.moments["w2"] = moment
            start({(): address}, tmp_path, killed, places, dying)
            await dead
            await process.ended()
        async with leaf_process(tmp_path, "leaf", root.address, *SECURE_LEAF, address=address) as (process, _):
            await root.until_finished()
            (round_,) = await root.rounds()
            weights = root.weights(2)
            await ended(killed)
    assert {task.worker: (task.phase, task.merged_updates) for task in round_.tasks} == {"leaf": (ACCEPTED, 3)}
    mean = mean_of(watched, slice(-3, None))
    close(weights, {name: before + mean[name] for name, before in MODEL.items()})


class Kills(ShiftTrainer):
    """Calls something in its first training, and goes on."""

    def __init__(self, change, kill):
        super().__init__(change)
        self.kill = kill

    def train(self, weights, job):
        kill, self.kill = self.kill, lambda: None
        kill()
        return super().train(weights, job)


def mean_of(watched, three):
    """The mean of the vectors that three devices masked, which are all of one sum."""
    vector, total = watched.vectors[three][0], sum(watched.plain[three])
    return {name: mean.astype(np.float32) for name, mean in vector.means(total).items()}


@pytest.mark.faults
@pytest.mark.parametrize("point", SECURE_LEAF_POINTS)
async def test_a_leaf_that_is_killed_between_two_of_its_writes_makes_the_same_sums(
    tmp_path, watched, killed, point
):
    """The bounds of its second round are those that follow from its first mean."""
    save_file(MODEL, tmp_path / "initial.safetensors")
    address, dying = free_address(), ("-m", "tests.faults.killed_at", point)
    about = {"leaves": ("leaf",), "policy": {"min_workers": 1}, "rounds": 2, **SECURE}
    async with running_aggregator(tmp_path, **about) as root:
        leaf = leaf_process(tmp_path, "leaf", root.address, *SECURE_LEAF, address=address, program=dying)
        async with leaf as (process, _):
            start({(): address}, tmp_path, killed, dict.fromkeys(("w0", "w1", "w2"), ()))
            assert await process.ended() == -signal.SIGKILL
        async with leaf_process(tmp_path, "leaf", root.address, *SECURE_LEAF, address=address):
            await root.until_finished()
            rounds = await root.rounds()
            versions = [root.weights(version) for version in (1, 2, 3)]
            await ended(killed)
    assert [round_.phase for round_ in rounds] == [COMMITTED] * 2
    # What a device trained for a sum that its leaf forgot is not in the last six.
    first, second = mean_of(watched, slice(-6, -3)), mean_of(watched, slice(-3, None))
    close(versions[1], {name: versions[0][name] + first[name] for name in MODEL})
    close(versions[2], {name: versions[1][name] + second[name] for name in MODEL})
    bounds = watched.vectors[-1].bounds
    assert bounds == {name: pytest.approx(4 * np.abs(first[name]).max()) for name in MODEL}


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["shares", "proofs", "answers"])
async def test_a_parent_that_is_killed_takes_the_sum_of_a_leaf_that_went_on(tmp_path, watched, killed, moment):
    save_file(MODEL, tmp_path / "initial.safetensors")
    address = free_address()
    arguments = ["--secure-aggregation", 8, "--clip-norm", 10, "--leaf", "leaf", "--min-workers", 1, "--rounds", 1]
    arguments += ["--encoding", "raw"]
    policy = {"min_workers": 3, "quorum": 3}
    async with (
        aggregator_process(tmp_path, *arguments, address=address) as (process, _),
        running_leaf(tmp_path / "leaf", "leaf", address, policy=policy, **SECURE) as leaf,
    ):
        dead = asyncio.get_running_loop().create_future()

        def kill(name):
            killed.moments.clear()
            process.send(signal.SIGKILL)
            dead.set_result(name)

        killed.kill, killed.pause_s, killed.moments["w2"] = kill, 0.5, moment
        start({(): leaf}, tmp_path, killed, dict.fromkeys(("w0", "w1", "w2"), ()))
        await dead
        await process.ended()
        async with aggregator_process(tmp_path, *arguments, address=address) as (_, root):
            await root.until_finished()
            (round_,) = await root.rounds()
            weights = root.weights(2)
            await ended(killed)
    assert {task.worker: (task.phase, task.merged_updates) for task in round_.tasks} == {"leaf": (ACCEPTED, 3)}
    ((sum_, total),) = watched.sums
    means = sum_.vector.means(total)
    close(weights, {name: before + means[name] for name, before in MODEL.items()})


async def test_a_leaf_without_masks_gives_the_tasks_of_a_parent_that_wants_them_back(tmp_path):
    """None of its devices is asked for an update, and the other leaf goes on."""
    plain = {("a",): {"secure": SecurePolicy(), "clip_norm": None}}
    trainers = {f"w{k}": Drawn(0.1) for k in range(6)}
    places = placed(a=3, b=3)
    async with tree(tmp_path / "tree", places, leaf_changes=plain, **SECURE) as running:
        workers = [
            start_worker(running[places[name]], tmp_path / "tree", name, trainer)
            for name, trainer in trainers.items()
        ]
        await running[()].until_finished()
        await asyncio.gather(*workers)
        (round_,) = await running[()].rounds()
    tasks = {task.worker: task for task in round_.tasks}
    assert tasks["a"].phase == FAILED
    assert "give this leaf --secure-aggregation 8" in tasks["a"].reason
    assert tasks["b"].merged_updates == 3
    assert [len(trainer.jobs) for trainer in trainers.values()] == [0] * 3 + [1] * 3


@pytest.mark.parametrize(
    ("told", "own", "reason"),
    [
        (SecurePolicy(8), SecurePolicy(8), ""),
        (SecurePolicy(8, secure_colluding=1), SecurePolicy(8, secure_colluding=2, secure_neighbours=6), ""),
        (None, SecurePolicy(), ""),
        (None, SecurePolicy(8), "its parent has not"),
        (SecurePolicy(6), SecurePolicy(), "--secure-aggregation 6"),
        (SecurePolicy(8), SecurePolicy(6), "the parent has --secure-aggregation 8"),
        (SecurePolicy(8, 4), SecurePolicy(8), "--secure-weight-bits 4"),
        (SecurePolicy(8, secure_colluding=2), SecurePolicy(8, secure_colluding=1), "--secure-colluding 2"),
    ],
)
def test_a_leaf_does_as_its_parent_s_operator_promises_or_says_why_not(told, own, reason):
    leaf = round_pb2.LeafInstructions(secure=None if told is None else secure_groups_to_proto(told))
    found = groups_complaint(leaf, own)
    assert reason in found
    assert bool(reason) == bool(found)


async def test_a_parent_of_secure_leaves_takes_no_update_but_a_sum_of_three_or_more(tmp_path):
    save_file(MODEL, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, leaves=("leaf",), policy={"min_workers": 1}, **SECURE) as root:
        with pytest.raises(FedgrpcError, match="summed at leaves, under masks; connect it to a leaf"):
            await start_worker(root, tmp_path, "w", ShiftTrainer())
        leaf = await root.device("leaf", role=device_pb2.WORKER_ROLE_AGGREGATOR)
        task = await leaf.task()
        assert (task.leaf.secure.bits, task.leaf.clip_norm) == (8, 10.0)
        assert not task.HasField("secure")
        with refused("INVALID_ARGUMENT", "3 devices or more, this one is of 2"):
            await leaf.push(task, MODEL, merged_updates=2, weight=2.0)


@pytest.mark.parametrize(("first", "then"), [({}, SECURE), (SECURE, {})], ids=["switched on", "switched off"])
async def test_an_open_round_ends_where_leaves_have_begun_sums_of_the_other_kind(tmp_path, first, then):
    save_file(MODEL, tmp_path / "initial.safetensors")
    about = {"leaves": ("leaf",), "policy": {"min_workers": 1}, "address": free_address()}
    async with running_aggregator(tmp_path, **about, **first) as root:
        leaf = await root.device("leaf", role=device_pb2.WORKER_ROLE_AGGREGATOR)
        await leaf.task()
    async with running_aggregator(tmp_path, **about, **then) as root:
        record = await root.until_ended(1)
        leaf = await root.device("leaf", role=device_pb2.WORKER_ROLE_AGGREGATOR)
        task = await leaf.task()
    assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
    assert "secure_aggregation has changed" in record.reason
    assert (task.round, task.leaf.HasField("secure")) == (2, bool(then))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"privacy": PrivacyPolicy(metrics=False), "evaluate": False}, "no metrics"),
        ({"privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4)}, "privacy"),
        ({"clip_norm": None}, "clip_norm"),
        ({"secure": SecurePolicy(8, secure_neighbours=4)}, "each leaf has its own"),
        ({"secure": SecurePolicy(8, secure_coordinates=0.5)}, "each leaf has its own"),
        ({"aggregation": "median"}, "rules look at single updates"),
    ],
)
def test_settings_that_secure_leaves_cannot_keep_are_refused(tmp_path, changes, reason):
    # What each sum needs, each leaf has: its own quorum of three.
    good = AggregatorSettings(tmp_path, **SECURE, leaves=("a*",), policy=RoundPolicy(quorum=1))
    with pytest.raises(UsageError, match=reason):
        replace(good, **changes)


async def test_devices_that_send_masked_updates_alone_train_below_a_leaf(tmp_path):
    """With certificates of the leaf's own authority, and keys that are signed for the run of the parent."""
    policy = {"min_workers": 3, "quorum": 3}
    save_file(MODEL, tmp_path / "initial.safetensors")
    root = running_aggregator(tmp_path, leaves=("leaf",), policy={"min_workers": 1}, **SECURE, **OUTSIDE)
    async with root as root:
        token = await new_token(root, "leaf", names="leaf")
        below = running_leaf(tmp_path / "leaf", "leaf", root, join=token, policy=policy, **SECURE, **OUTSIDE)
        async with below as leaf:
            workers = [
                start_worker(
                    *(leaf, tmp_path, f"w{k}", ShiftTrainer(0.1 * (k + 1), weights=MODEL)),
                    join=await new_token(leaf, names=f"w{k}"),
                    only_secure=True,
                )
                for k in range(3)
            ]
            await root.until_finished()
            assert await asyncio.gather(*workers) == [0] * 3
        (round_,) = await root.rounds()
        weights = root.weights(2)
    assert {task.worker: task.merged_updates for task in round_.tasks} == {"leaf": 3}
    for name, before in MODEL.items():
        np.testing.assert_allclose(weights[name], before + 0.2, atol=2 * 10 / 255)
