"""Encodings negotiated by link: a slow worker and a fast one in one federation, each with what suits it."""

import asyncio

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedgrpc.trainer import EvalResult, TrainResult
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.round_pb2 import TASK_KIND_TRAIN
from fedgrpc.worker.throttle import Throttle
from tests.support.hand_driven_device import PATIENCE_S, HandDrivenDevice, refused
from tests.support.running_federation import running_aggregator, start_worker

UPLOAD = "entropy:c=1,rounding=nearest+zstd below 1mbit | int8+zstd | raw"
DIFFERENCE = "entropy:c=1,rounding=nearest+zstd below 1mbit | int8+zstd | raw"
BY_LINK = {"download_recipe": "int8+zstd | raw", "difference_recipe": DIFFERENCE, "upload_recipe": UPLOAD}
COARSE, FINE = "entropy:c=1.0,rounding=nearest+zstd", "int8+zstd"
# As a worker is told them: with every key.
FULL = {
    COARSE: "entropy:c=1.0,rounding=nearest+zstd:1",
    FINE: "int8:block=256,rounding=stochastic+zstd:1",
}
SLOW = Throttle(link_bits_per_second=400_000)


@pytest.fixture(autouse=True)
def initial_model(tmp_path):
    """As trained weights are: nothing that zstd could make small."""
    write_model(tmp_path, 40)


def write_model(tmp_path, columns):
    rng = np.random.default_rng(3)
    model = {"w": rng.normal(size=(50, columns)), "b": rng.normal(size=columns)}
    tensors = {name: values.astype(np.float32) for name, values in model.items()}
    save_file({**tensors, "n": np.array(3, np.int64)}, tmp_path / "initial.safetensors")


class Approaches:
    """Goes a third of the way to its own goal, and remembers what it was given."""

    def __init__(self, seed, columns=40):
        rng = np.random.default_rng(seed)
        self.goal = {"w": rng.normal(size=(50, columns)), "b": rng.normal(size=columns)}
        self.given = {}

    def initial_weights(self):
        raise AssertionError("the aggregator has a model")

    def train(self, weights, job):
        self.given[job.round] = {name: np.array(values) for name, values in weights.items()}
        moved = {n: (a + (self.goal[n] - a) / 3).astype(a.dtype) for n, a in weights.items() if n != "n"}
        return TrainResult({**moved, "n": weights["n"] + 1}, 10, 1, {})

    def evaluate(self, weights):
        return EvalResult(10, {"distance": self.distance(weights)})

    def distance(self, weights):
        return float(sum(((weights[name] - goal) ** 2).sum() for name, goal in self.goal.items()))


def held_on_disk(running, version):
    found = (running.settings.data_dir / "delta-bases").glob(f"{version:06d}-*.safetensors")
    return {path.stem.partition("-")[2]: load_file(path) for path in found}


async def federate(running, tmp_path, **workers):
    """Run the workers to the end of the run; `workers` are trainer and settings by name."""
    tasks = [start_worker(running, tmp_path, name, trainer, **how) for name, (trainer, how) in workers.items()]
    assert await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE_S) == [0] * len(tasks)


def recipes_of(rounds, worker):
    records = [task for it in rounds for task in it.tasks if task.worker == worker and it.kind == TASK_KIND_TRAIN]
    return [(task.download_recipe, task.difference_recipe, task.upload_recipe) for task in records]


def same(one, other):
    return all(np.array_equal(one[name], values) for name, values in other.items())


async def test_a_slow_worker_and_a_fast_one_travel_in_different_encodings_and_both_train(tmp_path):
    slow, fast, spare = Approaches(1), Approaches(2), Approaches(3)
    async with running_aggregator(
        tmp_path, rounds=6, keep_versions=9, policy={"min_workers": 3}, **BY_LINK
    ) as running:
        await federate(
            running,
            tmp_path,
            slow=(slow, {"throttle": SLOW}),
            fast=(fast, {"throttle": Throttle(link_bits_per_second=1e9)}),
            # It lists no more than it must, whatever its link.
            spare=(spare, {"throttle": SLOW, "encodings": ("raw",)}),
        )
        rounds = await running.rounds()
        workers = {it.worker: it for it in (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers}
        versions = {number: running.weights(number) for number in range(1, 8)}
        forms = {number: held_on_disk(running, number) for number in range(1, 7)}
    assert set(recipes_of(rounds, "slow")) == {("int8+zstd", COARSE, COARSE)}
    assert set(recipes_of(rounds, "fast")) == {(FINE, FINE, FINE)}
    assert set(recipes_of(rounds, "spare")) == {("raw", "", "raw")}
    assert [len(it.tasks) for it in rounds if it.kind == TASK_KIND_TRAIN] == [3] * 6
    by_worker = {task.worker: task for task in rounds[4].tasks}
    up = {name: task.upload_bytes for name, task in by_worker.items()}
    down = {name: task.download_bytes for name, task in by_worker.items()}
    assert up["slow"] < up["fast"] / 2 < up["spare"] / 4
    assert down["slow"] < down["fast"] / 2 < down["spare"] / 4
    assert (workers["slow"].upload_recipe, workers["fast"].upload_recipe) == (COARSE, FINE)
    assert workers["slow"].uplink_bytes_per_second <= 50_000
    # All three trained, from what the aggregator knows them to hold, bit for bit.
    for number in range(1, 7):
        one_form = {int(same(kept, slow.given[number])) for kept in forms[number].values()}
        assert 1 in one_form
        assert any(same(kept, fast.given[number]) for kept in forms[number].values())
        assert same(versions[number], spare.given[number])
        assert len(forms[number]) == (1 if number == 1 else 2)
    assert not same(slow.given[6], fast.given[6])
    # What a coarse difference loses is in the next one: both stay as close to the version as one difference is.
    for trainer in (slow, fast):
        assert max(float(np.abs(trainer.given[6][name] - versions[6][name]).max()) for name in ("w", "b")) < 0.2
    mean = {name: (slow.goal[name] + fast.goal[name] + spare.goal[name]) / 3 for name in ("w", "b")}
    begun, ended = (
        float(sum(((versions[number][name] - mean[name]) ** 2).sum() for name in mean)) for number in (1, 7)
    )
    # Without any loss it would be (2/3)^12 = 0.008 of it.
    assert ended < 0.05 * begun


async def test_a_link_is_known_by_what_went_over_it_and_after_a_restart_still(tmp_path):
    """The worker declares nothing; its first updates tell."""
    undeclared = {"uplink_bits_per_second": 0, "downlink_bits_per_second": 0}
    columns = 500
    write_model(tmp_path, columns)
    slow = {"throttle": Throttle(link_bits_per_second=600_000), "device": undeclared}
    how = {"policy": {"min_workers": 1}, "keep_versions": 9, **BY_LINK}
    async with running_aggregator(tmp_path, rounds=3, **how) as running:
        await federate(running, tmp_path, slow=(Approaches(1, columns), slow))
        first, *others = recipes_of(await running.rounds(), "slow")
    assert first == (FINE, FINE, FINE)
    assert others == [("int8+zstd", COARSE, COARSE)] * 2
    async with running_aggregator(tmp_path, rounds=4, **how) as running:
        (known,) = (await running.stub.ListWorkers(pb.ListWorkersRequest())).workers
        for rate in (known.uplink_bytes_per_second, known.downlink_bytes_per_second):
            assert 0 < rate <= 80_000
        await federate(running, tmp_path, slow=(Approaches(1, columns), slow))
        assert recipes_of(await running.rounds(), "slow")[-1] == ("int8+zstd", COARSE, COARSE)


async def test_recipes_are_those_of_the_task_for_as_long_as_it_lasts(tmp_path):
    one_alone = {"min_workers": 1}
    async with running_aggregator(tmp_path, rounds=2, policy=one_alone, **BY_LINK) as running:
        device = await running.device("a", device={"uplink_bits_per_second": 9_000})
        task = await device.task()
        assert task.upload_recipe == FULL[COARSE]
        assert task.uplink_bytes_per_second == 9_000 / 8
        # It says something else of itself now, and polls again for the same task.
        await device.register(device={"uplink_bits_per_second": 9_000_000})
        assert (await device.task()).upload_recipe == FULL[COARSE]
    async with running_aggregator(tmp_path, rounds=2, policy=one_alone, **BY_LINK) as running:
        device = await running.device("a", device={"uplink_bits_per_second": 9_000_000})
        again = await device.task()
        assert (again.token, again.upload_recipe) == (task.token, FULL[COARSE])
        assert (await running.round()).tasks[0].upload_recipe == COARSE
        update = {"w": np.ones((50, 40), np.float32), "b": np.ones(40, np.float32), "n": np.array(4)}
        await device.push(again, update)
        await running.until_ended(1)
        assert (await device.task()).upload_recipe == FULL[FINE]


async def test_who_registered_when_the_run_had_other_encodings_is_sent_to_register_again(tmp_path):
    async with running_aggregator(tmp_path, rounds=2, upload_recipe="int8 | raw") as running:
        device = await running.device("old", encodings=["raw"])
        assert not (await device.poll(wait_s=0.01)).HasField("task")
    async with running_aggregator(tmp_path, rounds=2, upload_recipe="int8") as running:
        device = HandDrivenDevice(running.stub, "old")
        with refused("NOT_FOUND", "register again: worker 'old' knows no encoding", "UnknownWorker"):
            await device.poll(wait_s=0.01)
        with refused("INVALID_ARGUMENT", "'old' knows no encoding of this run's updates, int8", "UsageError"):
            await device.register(encodings=["raw"])


async def test_a_worker_program_that_knows_nothing_usable_ends_with_the_reason(tmp_path):
    async with running_aggregator(tmp_path, upload_recipe="int8+zstd | int4") as running:
        worker = start_worker(running, tmp_path, "bare", Approaches(1), encodings=("float16",))
        with pytest.raises(Exception, match="'bare' knows no encoding of this run's updates"):
            await asyncio.wait_for(worker, PATIENCE_S)
