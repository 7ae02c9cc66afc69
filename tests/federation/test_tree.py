"""An aggregator given `--upstream` is a worker of the aggregator above it: its update is its own mean, its example
count the sum of its workers', and the result equals the flat one.
"""

import asyncio
from contextlib import AsyncExitStack

import numpy as np
import pytest

from fedgrpc.errors import FedgrpcError
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.submodels.plan import LocalModelPlan, Pruning
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, round_pb2
from tests.federation.test_local_models import Adder, play
from tests.support.hand_driven_device import MODEL
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker
from tests.support.running_hierarchy import running_leaf

ROUNDS = 3


class Drawn(ShiftTrainer):
    """Adds to each float noise that the task's seed and round decide, and tells what it was asked to do."""

    def train(self, weights, job):
        result = super().train(weights, job)
        rng = np.random.default_rng([job.seed, job.round])
        noisy = {
            name: (a + rng.normal(size=a.shape)).astype(a.dtype) if a.dtype.kind == "f" else a + self.examples
            for name, a in weights.items()
        }
        return type(result)(noisy, self.examples, 2, {"train_loss": self.change})


class Unequal(Drawn):
    """Takes as many steps as it has examples, and moves by that."""

    def train(self, weights, job):
        result = super().train(weights, job)
        far = {name: a + (result.weights[name] - a) * self.examples / 50 for name, a in weights.items()}
        far |= {name: a for name, a in result.weights.items() if a.dtype.kind != "f"}
        return type(result)({n: a.astype(weights[n].dtype) for n, a in far.items()}, self.examples, self.examples)


def crew(kind=Drawn):
    """Eight workers of unequal data."""
    return {f"pi-{number}": kind(number, examples=7 + 13 * number) for number in range(8)}


PLAN = TrainingPlan(
    epochs=2, batch_size=7, learning_rate=0.25, momentum=0.5, algorithm="fedprox:mu=0.125", label_adjustment=0.5
)
ABOUT = {"rounds": ROUNDS, "plan": PLAN, "evaluate": True, "seed": 3, "keep_versions": 99}


async def flat(folder, kind=Drawn, about=ABOUT):
    folder.mkdir()
    workers = crew(kind)
    async with running_aggregator(folder, policy={"min_workers": 8}, **about) as running:
        codes = await asyncio.gather(*(start_worker(running, folder, *each) for each in workers.items()))
        assert codes == [0] * 8
        versions = [running.weights(version) for version in range(1, ROUNDS + 2)]
        return versions, await running.rounds(), workers


async def tree(folder, places, kind=Drawn, about=ABOUT):
    """`places` names for each worker the aggregators on the way from the root to it."""
    folder.mkdir()
    workers = crew(kind)
    names = sorted({place[: depth + 1] for place in places for depth in range(len(place))}, key=len)
    children = {name: [other for other in names if other[:-1] == name] for name in names}
    async with AsyncExitStack() as stack:
        root = await stack.enter_async_context(
            running_aggregator(folder, policy={"min_workers": sum(len(name) == 1 for name in names)}, **about)
        )
        running = {(): root}
        for name in names:
            below = len(children[name]) + sum(place == name for place in places)
            folder_of = folder / "-".join(name)
            leaf = running_leaf(folder_of, name[-1], running[name[:-1]], policy={"min_workers": below})
            running[name] = await stack.enter_async_context(leaf)
        pairs = zip(workers.items(), places, strict=True)
        crew_tasks = [start_worker(running[place], folder, *each) for each, place in pairs]
        assert await asyncio.gather(*crew_tasks) == [0] * 8
        assert await asyncio.gather(*(running[name].task for name in names)) == [0] * len(names)
        versions = [root.weights(version) for version in range(1, ROUNDS + 2)]
        return versions, await root.rounds(), workers


def assert_equal(first, second):
    (flat_versions, flat_rounds, flat_workers), (versions, rounds, workers) = first, second
    for left, right in zip(flat_versions, versions, strict=True):
        for name in MODEL:
            np.testing.assert_allclose(right[name], left[name], rtol=0, atol=1e-6)
    assert np.abs(flat_versions[-1]["w"] - flat_versions[0]["w"]).max() > 0.1
    for left, right in zip(flat_rounds, rounds, strict=True):
        assert (left.number, left.kind, left.phase) == (right.number, right.kind, right.phase)
        assert sum(task.example_count for task in left.tasks) == sum(task.example_count for task in right.tasks)
        for kept in ("metrics", "training_metrics"):
            mine, theirs = dict(getattr(left, kept)), dict(getattr(right, kept))
            assert mine.keys() == theirs.keys()
            np.testing.assert_allclose(list(theirs.values()), list(mine.values()), rtol=1e-5)
    for name, trainer in flat_workers.items():
        assert [job_of(job) for job in trainer.jobs] == [job_of(job) for job in workers[name].jobs]


def job_of(job):
    hyper = (job.epochs, job.batch_size, job.learning_rate, job.momentum, job.algorithm, job.label_adjustment)
    return *hyper, job.seed, job.round


async def test_a_tree_of_two_or_three_levels_gives_the_flat_result(tmp_path):
    """Weights of all versions, scores, and what each worker was asked to do, its seeds too."""
    result = await flat(tmp_path / "flat")
    assert [len(round_.metrics) for round_ in result[1]] == [1] * ROUNDS + [
        0
    ]  # the last one scores the last version
    two = await tree(tmp_path / "two", [("a",)] * 3 + [("b",)] * 5)
    assert_equal(result, two)
    records = [task for round_ in two[1] for task in round_.tasks if task.kind == round_pb2.TASK_KIND_TRAIN]
    assert {(task.worker, task.merged_updates) for task in records} == {("a", 3), ("b", 5)}
    places = [("m", "c")] * 2 + [("m", "d")] * 2 + [("n", "e")] * 3 + [("n",)]
    three = await tree(tmp_path / "three", places)
    assert_equal(result, three)
    assert {task.merged_updates for round_ in three[1] for task in round_.tasks} == {4}


async def test_updates_of_unequal_steps_are_normalized_in_a_tree_as_they_are_flat(tmp_path):
    """FedNova: what a leaf sends is an update of as many steps as its workers' amount to in the mean."""
    about = {**ABOUT, "plan": TrainingPlan(momentum=0.5, algorithm="fednova")}
    result = await flat(tmp_path / "flat", Unequal, about)
    scales = [task.scale for task in result[1][0].tasks]
    assert max(scales) > 5 * min(scales)
    plain = await flat(tmp_path / "plain", Unequal, {**about, "plan": TrainingPlan(momentum=0.5)})
    assert np.abs(plain[0][-1]["w"] - result[0][-1]["w"]).max() > 0.1
    assert_equal(result, await tree(tmp_path / "two", [("a",)] * 3 + [("b",)] * 5, Unequal, about))
    places = [("m", "c")] * 2 + [("m", "d")] * 2 + [("n", "e")] * 3 + [("n",)]
    assert_equal(result, await tree(tmp_path / "three", places, Unequal, about))


LIMITED = {"policy": {"min_workers": 1, "late": "carry", "buffer_size": 1, "selection_window_s": 1.0}}


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("scaffold", {}),
        ("feddyn:alpha=0.1", {}),
        ("ditto", {}),
        ("fedrep:head=w", {}),
        ("fedbn", {}),
        ("ifca", {}),
        ("qfedavg", {}),
        ("fedasync", LIMITED),
    ],
)
async def test_an_algorithm_that_wants_each_device_s_own_update_refuses_leaves(tmp_path, algorithm, more):
    """Where no --leaf names any, too: a leaf would count as one device, and its devices not at all."""
    plan = TrainingPlan(learning_rate=0.1, momentum=0.5, algorithm=algorithm)
    async with running_aggregator(tmp_path, rounds=1, evaluate=True, plan=plan, **more) as root:
        with pytest.raises(FedgrpcError, match=f"in this run: {algorithm}.*a leaf sends one mean"):
            async with running_leaf(tmp_path / "leaf", "leaf", root):
                pass


class Scorer(ShiftTrainer):
    """Scores what it is given by a number of its own."""

    def evaluate(self, weights):
        return type(super().evaluate(weights))(self.examples, {"score": self.change * (1 + weights["w"].mean())})


@pytest.mark.parametrize("evaluate", [True, False], ids=["with a closing round", "without"])
async def test_what_evaluators_below_a_leaf_find_reaches_the_root(tmp_path, evaluate):
    """By their examples, with those of the root's own; also of the last version, of which no leaf has a round."""
    about = {"rounds": 2, "evaluate": evaluate, "keep_versions": 99}
    async with (
        running_aggregator(tmp_path, policy={"min_workers": 2}, **about) as root,
        running_leaf(tmp_path / "m", "m", root, policy={"min_workers": 1}) as middle,
        running_leaf(tmp_path / "c", "c", middle, policy={"min_workers": 1}) as leaf,
    ):
        scorers = {"top": (root, 1.0, 10), "inner": (middle, 2.0, 20), "low": (leaf, 4.0, 10)}
        crew_tasks = [
            start_worker(place, tmp_path, name, Scorer(*about), role=WorkerRole.EVALUATOR)
            for name, (place, *about) in scorers.items()
        ]
        for place, names in (
            (root, ["top", "m.evaluators"]),
            (middle, ["inner", "c.evaluators"]),
            (leaf, ["low"]),
        ):
            for name in names:
                await place.until_known(name)
        crew_tasks += [
            start_worker(root, tmp_path, "a", ShiftTrainer()),
            start_worker(leaf, tmp_path, "b", ShiftTrainer()),
        ]
        assert await asyncio.gather(*crew_tasks) == [0] * 5
        trained = [item for item in await root.rounds() if item.kind == round_pb2.TASK_KIND_TRAIN]
        last = root.weights(trained[-1].committed_version)["w"].mean()
        wanted = (1.0 * 10 + 2.0 * 20 + 4.0 * 10) / 40 * (1 + last)
        assert dict(trained[-1].evaluator_metrics) == {"score": pytest.approx(wanted, rel=1e-5)}
        roles = {item.worker: item.role for item in (await root.stub.ListWorkers(pb.ListWorkersRequest())).workers}
    assert roles["m.evaluators"] == roles["top"] == device_pb2.WORKER_ROLE_EVALUATOR


KEEP = np.random.default_rng(1).random((8, 50)) < 0.5
PLANS = PlanTable(
    LocalModelPlan(),
    {
        "half": LocalModelPlan(0.5),
        "rolling": LocalModelPlan(0.25, "rolling"),
        "pruned": LocalModelPlan(pruning=Pruning(0.5)),
        "personal": LocalModelPlan(personal_layers=("b",)),
    },
)


def devices():
    """Of every class, and by the first letter of its name under one of two aggregators."""
    return {
        "a1": ("full", Adder(1)),
        "a2": ("half", Adder(2)),
        "a3": ("rolling", Adder(3)),
        "a4": ("pruned", Adder(4, KEEP)),
        "b1": ("half", Adder(5)),
        "b2": ("personal", Adder(6)),
    }


async def test_slices_masks_and_weights_under_two_aggregators_give_the_flat_result(tmp_path):
    """From an untrained model: the request for it, channels, plans by class and p_m reach the devices."""
    weights = {"a1": 1.5, "a3": 0.25, "b1": 4.0}
    about = {"rounds": 3, "worker_weights": weights, "keep_versions": 99}
    for name in ("flat", "tree"):
        (tmp_path / name).mkdir()
    outcome = await play(tmp_path / "flat", devices(), PLANS, **about)
    folder, given = tmp_path / "tree", {"local_models": PLANS, "initial_model": None}
    async with (
        running_aggregator(folder, **given, **about) as root,
        running_leaf(folder / "a", "a", root, policy={"min_workers": 4}) as a,
        running_leaf(folder / "b", "b", root, policy={"min_workers": 2}) as b,
    ):
        above = {"a": a, "b": b}
        crew_tasks = [
            start_worker(above[name[0]], folder, name, trainer, device={"device_class": kind})
            for name, (kind, trainer) in devices().items()
        ]
        assert await asyncio.gather(*crew_tasks) == [0] * 6
        versions = [root.weights(version) for version in range(1, 5)]
        records = (await root.rounds())[-1].tasks
    for flat_version, version in zip(outcome.versions, versions, strict=True):
        assert version["n"] == flat_version["n"]
        for name in ("w", "b"):
            np.testing.assert_allclose(version[name], flat_version[name], rtol=0, atol=2e-6)
    assert {task.worker: task.weight for task in records} == {"a": 1.5 + 10 + 0.25 + 10, "b": 4.0 + 10}
