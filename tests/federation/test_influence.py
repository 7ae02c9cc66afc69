"""What one worker can make of a mean, of the scores and of the end of a run: no more than the operator allows."""

import asyncio

import numpy as np
import pytest

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.cli.tables import rounds_table
from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.runs.conditions import Condition
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import device_pb2, round_pb2
from tests.support.hand_driven_device import MODEL, HandDrivenDevice, refused, update_of
from tests.support.running_federation import running_aggregator

HUGE = 1 << 40
LEADING = device_pb2.WORKER_ROLE_AGGREGATOR
SCORING = device_pb2.WORKER_ROLE_EVALUATOR


async def together(running, updates, roles=None):
    """One round by hand: by worker, the change of every float and what its header says; returns the record."""
    about = roles or {}
    devices = {name: await running.device(name, **about.get(name, {})) for name in updates}
    tasks = dict(zip(devices, await asyncio.gather(*(each.task() for each in devices.values())), strict=True))
    await asyncio.gather(
        *(
            devices[name].push(tasks[name], update_of(change), **header)
            for name, (change, header) in updates.items()
        )
    )
    return await running.until_ended(tasks[next(iter(updates))].round)


def moved(running, version=2):
    return float((running.weights(version)["b"] - MODEL["b"]).mean())


def by_worker(round_):
    return {task.worker: task for task in round_.tasks}


async def test_a_count_of_examples_weighs_no_more_than_the_operator_allows(tmp_path):
    async with running_aggregator(tmp_path, max_examples=30) as running:
        round_ = await together(
            running, {"honest": (1.0, {"example_count": 10}), "evil": (-5.0, {"example_count": HUGE})}
        )
        assert {name: task.weight for name, task in by_worker(round_).items()} == {"honest": 10.0, "evil": 30.0}
        assert by_worker(round_)["evil"].example_count == HUGE
        assert moved(running) == pytest.approx((10 - 150) / 40)


async def test_no_worker_has_a_larger_share_of_a_mean_than_the_operator_allows(tmp_path):
    policy = {"min_workers": 4, "max_share": 0.4}
    async with running_aggregator(tmp_path, policy=policy) as running:
        updates = {name: (1.0, {"example_count": 10}) for name in "abc"}
        round_ = await together(running, {**updates, "evil": (-5.0, {"example_count": HUGE})})
        assert by_worker(round_)["evil"].weight == pytest.approx(20.0)
        assert moved(running) == pytest.approx(0.6 * 1.0 - 0.4 * 5.0)
        assert not round_.HasField("dominance")


async def test_a_worker_with_over_half_of_the_mean_of_more_than_three_is_named(tmp_path, capfd):
    async with running_aggregator(tmp_path, policy={"min_workers": 4}) as running:
        updates = {name: (1.0, {"example_count": 10}) for name in "abc"}
        round_ = await together(running, {**updates, "large": (1.0, {"example_count": 70})})
        assert (round_.dominance.worker, round_.dominance.share) == ("large", 0.7)
        assert any("large is 70% of the mean" in str(line) for line in rounds_table([round_]).lines(None))
        assert (await running.rounds())[-1].dominance == round_.dominance


async def test_an_update_beyond_the_norm_is_scaled_down_to_it_and_the_record_says_how_far(tmp_path):
    honest, bound = update_of(1.0), 60.0
    norm = float(np.sqrt(sum((honest[name].astype(np.float64) ** 2).sum() for name in ("w", "b"))))
    async with running_aggregator(tmp_path, clip_norm=bound) as running:
        round_ = await together(running, {"honest": (1.0, {}), "evil": (-1000.0, {})})
        scales = {name: task.scale for name, task in by_worker(round_).items()}
        assert scales == {"honest": 1.0, "evil": pytest.approx(bound / (1000 * norm))}
        assert moved(running) == pytest.approx((1.0 - bound / norm) / 2, rel=1e-5)
        assert running.weights(2)["n"] == 4, "what is no difference is not scaled"


async def test_a_clipped_update_of_a_part_of_the_model_counts_by_the_norm_of_its_part(tmp_path):
    plans = PlanTable(default=LocalModelPlan(personal_layers=("w",)))
    norm = np.sqrt(40.0) * 10
    async with running_aggregator(tmp_path, clip_norm=norm / 2, local_models=plans) as running:
        devices = [await running.device(name) for name in "ab"]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        part = {name: array for name, array in update_of(10.0).items() if name != "w"}
        await asyncio.gather(*(each.push(task, part) for each, task in zip(devices, tasks, strict=True)))
        round_ = await running.until_ended(1)
        assert [task.scale for task in round_.tasks] == pytest.approx([0.5, 0.5])
        assert moved(running) == pytest.approx(5.0)
        np.testing.assert_array_equal(running.weights(2)["w"], MODEL["w"])


async def test_an_aggregator_nobody_named_weighs_no_more_than_a_worker(tmp_path):
    """Neither by its declared role nor by what its mean says that it weighs."""
    mean = {"merged_updates": 1 << 20, "weight": float(HUGE), "example_count": 10}
    for weights, expected in (({"honest": 0.5, "friend": 0.5}, (0.5, 10.0)), ({}, (10.0, 10.0))):
        folder = tmp_path / str(len(weights))
        folder.mkdir()
        async with running_aggregator(folder, worker_weights=weights) as running:
            round_ = await together(
                running, {"honest": (1.0, {}), "evil": (-5.0, mean)}, {"evil": {"role": LEADING}}
            )
            assert tuple(by_worker(round_)[name].weight for name in ("honest", "evil")) == expected


async def test_a_fixed_weight_is_the_weight_of_an_aggregator_too(tmp_path):
    mean = {"merged_updates": 5, "weight": 50.0, "example_count": 50}
    async with running_aggregator(tmp_path, worker_weights={"leaf": 2.0}, leaves=("leaf",)) as running:
        round_ = await together(running, {"other": (1.0, {}), "leaf": (1.0, mean)}, {"leaf": {"role": LEADING}})
        assert by_worker(round_)["leaf"].weight == 2.0


async def test_a_named_aggregator_weighs_what_its_workers_may(tmp_path):
    mean = {"merged_updates": 5, "weight": 1000.0, "example_count": 1000}
    async with running_aggregator(tmp_path, max_examples=30, leaves=("leaf-*",)) as running:
        round_ = await together(
            running,
            {"other": (1.0, {"example_count": 1000}), "leaf-1": (1.0, mean)},
            {"leaf-1": {"role": LEADING}},
        )
        assert {name: task.weight for name, task in by_worker(round_).items()} == {"other": 30.0, "leaf-1": 150.0}


@pytest.mark.parametrize("role", [LEADING, SCORING])
async def test_a_role_that_the_operator_gives_to_others_is_refused(tmp_path, role):
    async with running_aggregator(tmp_path, leaves=("leaf-*",), evaluators=("judge",)) as running:
        for name, its in (("leaf-1", LEADING), ("judge", SCORING), ("anyone", device_pb2.WORKER_ROLE_TRAINER)):
            await running.device(name, role=its)
        with refused("PERMISSION_DENIED", "worker 'evil' is no", "WrongIdentity"):
            await running.device("evil", role=role)


async def test_a_worker_that_had_a_role_before_others_were_named_has_to_register_again(tmp_path):
    async with running_aggregator(tmp_path) as running:
        await running.device("judge", role=SCORING)
    async with running_aggregator(tmp_path, evaluators=("other",)) as running:
        with refused("NOT_FOUND", "register again", "UnknownWorker"):
            await HandDrivenDevice(running.stub, "judge").poll()


async def second_round(running, devices, scores):
    """Round 1 without scores, then round 2 with these; returns once it has ended."""
    for number, headers in ((1, [{}, {}]), (2, scores)):
        tasks = await asyncio.gather(*(device.task() for device in devices))
        pushes = zip(devices, tasks, headers, strict=True)
        await asyncio.gather(*(device.push(task, **header) for device, task, header in pushes))
        await running.until_ended(number)


async def test_scores_that_end_a_run_count_by_no_more_than_the_examples_of_the_update(tmp_path):
    async with running_aggregator(tmp_path, rounds=4, target=Condition("accuracy", 0.95)) as running:
        devices = [await running.device("evil"), await running.device("honest")]
        lie = {"evaluation_metrics": {"accuracy": 1.0}, "evaluation_example_count": 2**40, "example_count": 10}
        truth = {"evaluation_metrics": {"accuracy": 0.1}, "evaluation_example_count": 5, "example_count": 10}
        await second_round(running, devices, [lie, truth])
        assert (await running.round(1)).metrics["accuracy"] == pytest.approx((10 * 1.0 + 5 * 0.1) / 15)
        assert (await running.run()).phase == pb.RUN_PHASE_RUNNING


@pytest.mark.parametrize(("named", "versions"), [((), 5), (("jud*",), 4)])
async def test_scores_of_an_evaluator_end_a_run_only_where_the_operator_named_it(tmp_path, named, versions):
    about = {"rounds": 4, "target": Condition("accuracy", 0.95), "evaluators": named}
    async with running_aggregator(tmp_path, **about) as running:
        devices = [await running.device("a"), await running.device("b")]
        await second_round(running, devices, [{}, {}])
        judge = await running.device("judge", role=SCORING)
        task = await judge.task()
        lie = {"evaluation_metrics": {"accuracy": 1.0}, "evaluation_example_count": 1}
        await judge.send(pb.PushUpdateRequest(header=pb.UpdateHeader(worker="judge", token=task.token, **lie)))
        assert (await running.round(2)).evaluator_metrics["accuracy"] == 1.0, "it is shown either way"
        # The third round is open already; the fourth is not, where the run is over.
        for _ in range(versions - 3):
            tasks = await asyncio.gather(*(device.task() for device in devices))
            await asyncio.gather(*(device.push(task) for device, task in zip(devices, tasks, strict=True)))
        # The evaluator, which has not scored the last version, is waited for until it counts as away.
        running.pass_time(300)
        run = await running.until_finished()
        assert run.model_version == versions
        assert run.reason == ("version 3 has accuracy>=0.95" if named else "all 4 rounds are done")


async def test_weight_that_ends_a_round_early_is_weight_that_counts(tmp_path):
    """One claim of 2^40 examples must not make everybody else late."""
    for limit in ({"max_examples": 100}, {"policy": {"max_share": 0.5}}):
        folder = tmp_path / next(iter(limit))
        folder.mkdir()
        policy = {"min_workers": 3, "weight_aim": 1000.0, **limit.pop("policy", {})}
        async with running_aggregator(folder, policy=policy, **limit) as running:
            devices = [await running.device(name) for name in ("evil", "a", "b")]
            tasks = await asyncio.gather(*(device.task() for device in devices))
            await devices[0].push(tasks[0], example_count=HUGE)
            assert (await running.round()).phase == round_pb2.ROUND_PHASE_REPORTING
            for device, task in zip(devices[1:], tasks[1:], strict=True):
                await device.push(task, example_count=100)
            accepted = [task.phase for task in (await running.until_ended(1)).tasks]
            assert accepted == [round_pb2.TASK_PHASE_ACCEPTED] * 3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be"),
        ({"clip_norm": 1.0, "plan": TrainingPlan(algorithm="fednova")}, "clip_norm goes without fednova"),
        ({"max_examples": 0}, "max_examples must be"),
        (
            {"policy": RoundPolicy(max_share=0.3), "local_models": PlanTable(default=LocalModelPlan(width=0.5))},
            "max_share goes without local_models",
        ),
    ],
)
def test_limits_that_would_not_hold_are_refused_with_the_reason(tmp_path, changes, reason):
    with pytest.raises(UsageError, match=reason):
        AggregatorSettings(tmp_path, **changes)
