"""Central differential privacy over real connections: noise, its ledger, and who takes part."""

import asyncio
import json
from contextlib import closing

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from fedgrpc.aggregator.private_releases import KEY_FILE, PrivateReleases
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.cli.privacy import COMMAND
from fedgrpc.errors import StorageError, UsageError
from fedgrpc.privacy.accounting import Gaussian, PrivacyLoss
from fedgrpc.privacy.adaptive_clip import next_clip_norm
from fedgrpc.privacy.noise import RoundNoise
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.running_federation import ShiftTrainer, running_aggregator, start_worker

GAUSSIAN = PrivacyPolicy("gaussian", noise_multiplier=2.0, cohort=4)
PRIVATE = {"privacy": GAUSSIAN, "clip_norm": 0.5}
MODEL = {"a": np.zeros((3, 5), np.float32), "w": np.arange(9, dtype=np.float32)}
NORM = np.sqrt(sum(array.size for array in MODEL.values()))


async def run_of(tmp_path, count=2, shift=1.0, **changes):
    """A finished run of workers that add `shift` to everything; its last weights and rounds."""
    changes = {**PRIVATE, **changes}
    save_file(MODEL, tmp_path / "initial.safetensors")
    changes["policy"] = {"min_workers": count, **changes.get("policy", {})}
    async with running_aggregator(tmp_path, **changes) as running:
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer(shift)) for k in range(count)]
        run = await running.until_finished()
        weights, rounds = running.weights(run.model_version), await running.rounds()
    await asyncio.gather(*workers)
    return weights, rounds, run


def stored(tmp_path):
    with closing(RunStore(tmp_path / "aggregator" / DATABASE, read_only=True)) as store:
        return store.releases()


def key_of(tmp_path):
    return (tmp_path / "aggregator" / KEY_FILE).read_bytes()


async def test_a_version_is_the_clipped_sum_over_the_cohort_plus_the_noise_of_its_step(tmp_path):
    weights, _, _ = await run_of(tmp_path, rounds=2)
    key = key_of(tmp_path)
    assert (tmp_path / "aggregator" / KEY_FILE).stat().st_mode & 0o777 == 0o600
    for name, first in MODEL.items():
        # Two devices of a cohort of four, each no longer than 0.5, in two rounds; deviation 2 * 0.5 / 4.
        moved = 2 * (2 * 0.5 / NORM) / 4
        noise = sum(RoundNoise(key, step).normals(name, first.size) for step in (1, 2)).reshape(first.shape)
        np.testing.assert_allclose(weights[name], first + moved + 0.25 * noise, rtol=1e-5, atol=1e-6)
    assert [(each.step, each.count, each.rules.noise_multiplier) for each in stored(tmp_path)] == [
        (1, 2, 2.0),
        (2, 2, 2.0),
    ]


async def test_the_file_of_a_version_with_noise_tells_no_scores_which_have_none(tmp_path):
    _, rounds, _ = await run_of(tmp_path, rounds=2, evaluate=True)
    assert all(task.evaluation_metrics for round_ in rounds for task in round_.tasks)
    for version in (2, 3):
        with safe_open(tmp_path / "aggregator" / "models" / f"{version:06d}.safetensors", "numpy") as file:
            assert "scores" not in " ".join(file.metadata())


async def test_the_model_under_dp_ftrl_carries_the_noise_of_a_tree(tmp_path):
    policy = PrivacyPolicy("dp-ftrl", noise_multiplier=1.0, cohort=1)
    weights, _, _ = await run_of(tmp_path, 1, 0.0, privacy=policy, clip_norm=1.0, rounds=4)
    key = key_of(tmp_path)
    for name, first in MODEL.items():
        noise = sum(RoundNoise(key, step, tree=True).normals(name, first.size) for step in range(1, 5))
        # After four rounds it is that of one node, and not of four.
        np.testing.assert_allclose(weights[name] - first, noise.reshape(first.shape), rtol=1e-4, atol=1e-5)


async def test_the_model_under_dp_mf_carries_the_noise_of_a_band(tmp_path):
    policy = PrivacyPolicy("dp-mf", noise_multiplier=1.0, cohort=1, min_separation=2)
    alone = {"min_workers": 1, "max_participants": 1}
    weights, _, _ = await run_of(tmp_path, 3, 0.0, privacy=policy, clip_norm=1.0, rounds=3, policy=alone)
    key = key_of(tmp_path)
    for name, first in MODEL.items():
        drawn = [RoundNoise(key, step).normals(name, first.size) for step in (1, 2, 3)]
        # Half of each round's noise is taken back in the next one.
        noise = 0.5 * drawn[0] + 0.5 * drawn[1] + drawn[2]
        np.testing.assert_allclose(weights[name] - first, noise.reshape(first.shape), rtol=1e-4, atol=1e-5)


async def test_the_clip_norm_follows_the_quantile_of_norms_and_devices_get_it_with_their_task(tmp_path):
    adaptive = {"clip_quantile": 0.5, "rounds": 3}
    weights, _, _ = await run_of(tmp_path, **adaptive)
    entries, key = stored(tmp_path), key_of(tmp_path)
    norm, moved = 0.5, {name: first.astype(np.float64) for name, first in MODEL.items()}
    for step, entry in enumerate(entries, start=1):
        noise = RoundNoise(key, step)
        assert (entry.rules.clip_norm, entry.rules.clip_quantile) == (norm, 0.5)
        for name, first in MODEL.items():
            # Both of a cohort of four are longer, and are scaled down to the norm of this round.
            drawn = entry.rules.deviation * noise.normals(name, first.size).reshape(first.shape)
            moved[name] += 2 * (norm / NORM) / 4 + drawn
        # sigma_b is 2, which is more than a twentieth of four.
        norm = next_clip_norm(norm, 0.5, 0, 2, 2.0 * noise.of_count(), 4)
        assert entry.next_clip_norm == norm
    for name in MODEL:
        np.testing.assert_allclose(weights[name], moved[name], rtol=1e-5, atol=1e-6)
    # A restart goes on with the norm that has been found, and not with the first.
    async with running_aggregator(tmp_path, **{**PRIVATE, **adaptive}) as running:
        assert running.aggregator.coordinator.machine.clip_norm == norm
    folder = await asyncio.to_thread(told, "--data-dir", str(tmp_path / "aggregator"))
    assert folder["rules"]["clip_norm"] == norm


async def test_updates_that_fit_let_the_clip_norm_fall(tmp_path):
    quiet = PrivacyPolicy("gaussian", noise_multiplier=1e-3, cohort=2)
    await run_of(tmp_path, shift=0.01, privacy=quiet, clip_norm=1.0, clip_quantile=0.5, rounds=3)
    norms = [entry.next_clip_norm for entry in stored(tmp_path)]
    # With sigma_b = 0.1 of two devices the share is near 1: C exp(-0.2 * 0.5) each round.
    assert norms == pytest.approx([np.exp(-0.1 * step) for step in (1, 2, 3)], rel=0.1)


async def test_a_run_ends_before_it_costs_more_than_its_target(tmp_path):
    policy = PrivacyPolicy("gaussian", target_epsilon=1.0, cohort=4)
    _, rounds, run = await run_of(tmp_path, privacy=policy, rounds=2)
    assert run.reason.startswith("all 2 rounds")
    # More rounds under the same target and the noise of the two that were planned: none is left.
    spent = PrivacyPolicy("gaussian", target_epsilon=0.9, cohort=4)
    async with running_aggregator(tmp_path, **{**PRIVATE, "privacy": spent}, rounds=9) as running:
        assert "epsilon of 0.9" in (await running.until_finished()).reason
        assert len(await running.rounds()) == len(rounds)
    assert len(stored(tmp_path)) == 2


async def test_a_commit_that_is_done_again_enters_nothing_and_draws_the_same_noise(tmp_path, monkeypatch):
    """The disk fails once behind the entry: the round is committed by a second try."""
    entered, real = [], PrivateReleases.enter

    async def failing(self, round_, merge):
        noise = await real(self, round_, merge)
        entered.append(None if noise is None else noise("w", 0, 3))
        if len(entered) == 1:
            raise StorageError("the disk is full")
        return noise

    monkeypatch.setattr(PrivateReleases, "enter", failing)
    await run_of(tmp_path)
    assert len(entered) == 2
    np.testing.assert_array_equal(*entered)
    assert len(stored(tmp_path)) == 1


async def test_a_device_rests_for_as_many_versions_as_the_separation_says(tmp_path):
    policy = PrivacyPolicy("dp-ftrl", noise_multiplier=1.0, cohort=4, min_separation=3)
    only_one = {"min_workers": 1, "max_participants": 1}
    _, rounds, _ = await run_of(tmp_path, 3, privacy=policy, rounds=5, policy=only_one)
    took_part = [{task.worker for task in record.tasks} for record in rounds]
    assert len(took_part) == 5
    for first in range(3):
        assert len(set().union(*took_part[first : first + 3])) == 3
    # A restart has not forgotten it.
    again = {**PRIVATE, "privacy": policy, "policy": only_one}
    async with running_aggregator(tmp_path, **again, rounds=9) as running:
        assert running.aggregator.coordinator.machine.ledger.resting == took_part[-1] | took_part[-2]


async def test_a_poisson_sample_may_be_empty_and_its_version_is_noise_alone(tmp_path):
    sampled = {"poisson_rate": 1e-9, "quorum": 0}
    weights, rounds, _ = await run_of(tmp_path, policy=sampled, rounds=1)
    assert [len(record.tasks) for record in rounds] == [0]
    (entry,) = stored(tmp_path)
    assert (entry.count, entry.rules.rate) == (0, 1e-9)
    for name, first in MODEL.items():
        noise = RoundNoise(key_of(tmp_path), 1).normals(name, first.size).reshape(first.shape)
        np.testing.assert_allclose(weights[name], first + 0.25 * noise, rtol=1e-5, atol=1e-6)


async def test_a_poisson_sample_of_all_takes_all(tmp_path):
    _, rounds, _ = await run_of(tmp_path, policy={"poisson_rate": 1.0, "quorum": 0}, rounds=2)
    assert [len(record.tasks) for record in rounds] == [2, 2]


async def test_operators_see_the_ledger(tmp_path):
    save_file(MODEL, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, **PRIVATE, rounds=3) as running:
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer()) for k in range(2)]
        await running.until_finished()
        ledger = (await running.stub.GetPrivacy(pb.GetPrivacyRequest())).ledger
        assert [entry.version for entry in ledger.releases] == [2, 3, 4]
        assert ledger.planned == 0
    await asyncio.gather(*workers)


async def test_the_command_tells_epsilon_of_each_version_and_of_those_planned(tmp_path):
    policy = PrivacyPolicy("gaussian", target_epsilon=2.0, cohort=4)
    save_file(MODEL, tmp_path / "initial.safetensors")
    async with running_aggregator(tmp_path, privacy=policy, clip_norm=0.5, rounds=3) as running:
        workers = [start_worker(running, tmp_path, f"w{k}", ShiftTrainer()) for k in range(2)]
        await running.until_finished()
        live = await asyncio.to_thread(told, "--aggregator", running.address)
    await asyncio.gather(*workers)
    folder = await asyncio.to_thread(told, "--data-dir", str(tmp_path / "aggregator"))
    assert folder == live
    multiplier = live["rules"]["noise_multiplier"]
    for count, release in enumerate(live["releases"], start=1):
        expected = PrivacyLoss((Gaussian(multiplier),) * count).epsilon(1e-5)
        assert release["epsilon"] == pytest.approx(expected, abs=1e-9)
    assert live["epsilon"] == pytest.approx(2.0, rel=1e-5)
    assert live["planned"] == []


def told(*flags):
    answer = CliRunner().invoke(COMMAND, [*flags, "--json"])
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


async def test_a_ledger_without_its_key_is_not_continued(tmp_path):
    await run_of(tmp_path)
    (tmp_path / "aggregator" / KEY_FILE).unlink()
    with pytest.raises(UsageError, match="is missing"):
        async with running_aggregator(tmp_path, **PRIVATE):
            pass


async def test_a_run_with_noise_does_not_go_on_without(tmp_path):
    await run_of(tmp_path)
    with pytest.raises(UsageError, match="would not be"):
        async with running_aggregator(tmp_path):
            pass


async def test_a_model_with_statistics_is_refused_by_name(tmp_path):
    names = {"bn.running_mean": np.zeros(3, np.float32), "w": np.zeros(3, np.float32)}
    async with running_aggregator(tmp_path, **PRIVATE, initial_model=None, policy={"min_workers": 1}) as running:
        worker = start_worker(running, tmp_path, "w", ShiftTrainer(weights=names))
        record = await running.until_ended(0)
        assert record.phase == round_pb2.ROUND_PHASE_ABANDONED
        assert "bn.running_mean" in record.reason
        worker.cancel()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_norm": None}, "clip_norm"),
        ({"worker_weights": {"pi": 2.0}}, "weight"),
        ({"policy": RoundPolicy(max_share=0.5)}, "max_share"),
        ({"policy": RoundPolicy(weight_aim=10.0)}, "weight_aim"),
        ({"policy": RoundPolicy(late="carry")}, "late"),
        ({"policy": RoundPolicy(late="carry", buffer_size=3)}, "late"),
        ({"leaves": ("leaf-*",)}, "leaf"),
        ({"local_models": PlanTable(LocalModelPlan(width=0.5))}, "local_models"),
        ({"local_models": PlanTable(LocalModelPlan(personal_layers=("head.*",)))}, "local_models"),
        ({"choosing": SelectionPolicy("oort")}, "selection"),
        ({"plan": TrainingPlan(algorithm="fednova")}, "fednova"),
        ({"clip_quantile": 1.0}, "clip_quantile"),
        (
            {"clip_quantile": 0.5, "privacy": PrivacyPolicy("dp-ftrl", noise_multiplier=1.0, cohort=4)},
            "clip_quantile",
        ),
        ({"plan": TrainingPlan(algorithm="qfedavg:q=1")}, "qfedavg"),
        ({"privacy": PrivacyPolicy("gaussian", target_epsilon=1.0, cohort=4), "rounds": None}, "rounds"),
        ({"privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4, metrics=False)}, "evaluate"),
        (
            {
                "privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4, metrics=False),
                "evaluate": False,
                "policy": RoundPolicy(min_new_examples=3),
            },
            "min_new_examples",
        ),
        (
            {
                "privacy": PrivacyPolicy("dp-ftrl", noise_multiplier=1.0, cohort=4),
                "policy": RoundPolicy(quorum=0, poisson_rate=0.5),
            },
            "poisson_rate",
        ),
        (
            {"privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=4, min_separation=2)},
            "max_participants",
        ),
        ({"privacy": PrivacyPolicy(), "policy": RoundPolicy(quorum=0, poisson_rate=0.5)}, "poisson_rate"),
    ],
)
def test_what_would_break_the_accounting_is_refused_by_name(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        AggregatorSettings(tmp_path, **{**PRIVATE, **changes})
