"""Federated algorithms over real connections, against the same played in one process."""

import asyncio
import json

import numpy as np
import pytest

from fedgrpc.aggregation.server_optimizer import PlainStep
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.storage.residual_file import read_residual
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2
from tests.support.quadratics import Quadratic, Termless, play
from tests.support.running_federation import running_aggregator, start_worker

ROUNDS = 3
ONE_AT_A_TIME = RoundPolicy(late="carry", buffer_size=1)


def plan_of(algorithm):
    return TrainingPlan(learning_rate=0.1, momentum=0.0, max_steps=5, algorithm=algorithm)


async def federated(tmp_path, algorithm, **changes):
    """The last version of a run of three devices, and its rounds."""
    about = {"initial_model": None, "rounds": ROUNDS, "policy": {"min_workers": 3}, "evaluate": True, **changes}
    async with running_aggregator(tmp_path, plan=plan_of(algorithm), **about) as running:
        workers = [start_worker(running, tmp_path, f"w{k}", Quadratic(k)) for k in range(3)]
        run = await running.until_finished()
        rounds = [await running.round(number) for number in range(2, ROUNDS + 2)]
        weights = running.weights(run.model_version)
    assert await asyncio.gather(*workers) == [0, 0, 0]
    return weights, rounds


@pytest.mark.parametrize(
    "algorithm",
    ["scaffold:workers=3", "feddyn:alpha=0.5", "fedrep:head=head.*", "ditto", "qfedavg:q=1", "fedprox:mu=0.5"],
)
async def test_a_federation_computes_what_the_paper_says(tmp_path, algorithm):
    wanted, kept = play(
        algorithm_of(algorithm), [Quadratic(k) for k in range(3)], plan_of(algorithm), ROUNDS, PlainStep()
    )
    weights, _ = await federated(tmp_path, algorithm)
    assert weights.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(weights[name], values, rtol=1e-5, err_msg=name)
    for k in range(3):
        for path in (tmp_path / f"w{k}" / "spool").glob("kept"):
            own = _kept(path)
            for name, values in kept[k].items():
                np.testing.assert_allclose(own[name], values, rtol=1e-5, err_msg=name)


def _kept(path):
    """What a device keeps for its only run."""
    text = path.read_bytes()
    length = int.from_bytes(text[-8:], "little")
    return read_residual(path, json.loads(text[-8 - length : -8])["run"]).tensors


async def test_control_variates_double_the_bytes_each_way(tmp_path):
    """They travel as the update does: 4 numbers of 8 bytes, and as many again."""
    (tmp_path / "plain").mkdir(), (tmp_path / "scaffold").mkdir()
    _, plain = await federated(tmp_path / "plain", None)
    _, scaffold = await federated(tmp_path / "scaffold", "scaffold")

    def uploaded(rounds):
        return [task.upload_bytes for round_ in rounds for task in round_.tasks if task.upload_bytes]

    assert set(uploaded(plain)) == {32}
    assert set(uploaded(scaffold)) == {64}


async def test_a_learning_task_that_ignores_the_term_takes_no_part(tmp_path):
    plan = plan_of("fedprox:mu=0.5")
    async with running_aggregator(tmp_path, plan=plan, initial_model=None, policy={"min_workers": 1}) as running:
        worker = start_worker(running, tmp_path, "deaf", Termless(0))
        task = await running.until_task("deaf", round_pb2.TASK_PHASE_FAILED)
        assert "never asked for it" in task.reason
        worker.cancel()


@pytest.mark.parametrize(
    ("algorithm", "changes", "words"),
    [
        ("scaffold", {"clip_norm": 1.0}, "go without scaffold"),
        ("scaffold", {"max_update_norm": 1.0}, "go without scaffold"),
        ("scaffold", {"local_models": PlanTable(LocalModelPlan(width=0.5))}, "local_models go without scaffold"),
        ("feddyn", {"leaves": ("leaf",)}, "leaves: feddyn"),
        ("feddyn", {"server_optimizer": "fedadam"}, "a step of its own"),
        ("fedasync", {}, "buffer_size = 1"),
        ("fedasync", {"policy": ONE_AT_A_TIME, "clip_norm": 1.0}, "neither clip_norm"),
        ("fedasync", {"policy": ONE_AT_A_TIME, "leaves": ("leaf",)}, "leaves"),
        ("fedasync", {"policy": ONE_AT_A_TIME, "aggregation": "median"}, "as it is"),
        ("qfedavg", {"evaluate": False}, "needs the loss"),
        ("fedmagic", {}, "known: fedavg"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_reason(tmp_path, algorithm, changes, words):
    with pytest.raises(UsageError, match=words):
        AggregatorSettings(tmp_path, plan=plan_of(algorithm), **changes)


def test_scaffold_wants_to_know_the_size_of_a_step(tmp_path):
    with pytest.raises(UsageError, match="--learning-rate and --momentum"):
        AggregatorSettings(tmp_path, plan=TrainingPlan(algorithm="scaffold"))


async def test_a_run_tracks_each_round_and_the_scores_of_its_versions(tmp_path):
    path = tmp_path / "rounds.jsonl"
    await federated(tmp_path, None, track=(f"jsonl:{path}",))
    settings, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert settings["settings"]["rounds"] == str(ROUNDS)
    trained = [line for line in lines if line.get("bytes/up")]
    assert {line["step"] for line in trained} >= {1, 2, 3}
    assert all(line["round/updates"] == 3 for line in trained if line["step"])
    assert any("loss" in line for line in lines)


async def test_a_device_imports_no_algorithm_that_its_owner_has_not_allowed(tmp_path):
    reference = "fedgrpc.algorithms.fedprox:FedProx"
    policy = {"min_workers": 1, "quorum": 1}
    plan = plan_of(f"{reference}:mu=0.5")
    async with running_aggregator(tmp_path, plan=plan, policy=policy, initial_model=None) as running:
        refusing = start_worker(running, tmp_path, "refusing", Quadratic(0))
        task = await running.until_task("refusing", round_pb2.TASK_PHASE_FAILED)
        assert "--allow-algorithm" in task.reason
        refusing.cancel()
    (tmp_path / "allowed").mkdir()
    async with running_aggregator(tmp_path / "allowed", plan=plan, policy=policy, initial_model=None) as running:
        allowing = start_worker(
            running, tmp_path, "allowing", Quadratic(0), allow_algorithms=("fedgrpc.algorithms.*",)
        )
        await running.until_finished()
    assert await allowing == 0
