"""Rules on stored updates, read a piece at a time, against the same on whole arrays."""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import fedgrpc.aggregator.robust_merge as module
from fedgrpc.aggregation.partial_update import pack
from fedgrpc.aggregation.robust.aggregation import aggregation_of
from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.commit import ModelCommit
from fedgrpc.aggregator.robust_merge import judged
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.codec.layout import layout_of
from fedgrpc.errors import UnusableUpdate, UpdateRefused, UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.runs.merge import Merge
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.submodels.plan import LocalModelPlan
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.v1 import round_pb2
from tests.support.hand_driven_device import MODEL, update_of
from tests.support.running_federation import running_aggregator
from tests.support.stored_updates import accept

TEXTS = [
    "median",
    "trimmed-mean:0.2",
    "geometric-median",
    "krum:f=1",
    "multi-krum:f=1",
    "centered-clip",
    "nnm+median",
]
BASE = {"w": np.zeros((20, 7), np.float32), "b": np.zeros(7, np.float32), "n": np.array(3, np.int64)}
SCALES = {"u0": 1.0, "u1": 0.5, "u2": 1.0, "u3": 1.0, "u4": 2.0, "u5": 1.0}


def update(seed):
    rng = np.random.default_rng(seed)
    return {
        "w": rng.normal(0, 1, (20, 7)).astype(np.float32),
        "b": rng.normal(0, 1, 7).astype(np.float32),
        "n": np.array(3 + seed, np.int64),
    }


def commit(tmp_path, aggregation, merge, updates, recipe="raw"):
    """The model that a rule makes of these updates, and the merge that it made."""
    journal = UploadJournal(tmp_path / "uploads")
    for token, tensors in updates.items():
        accept(journal, token, tensors, recipe)
    path = tmp_path / "1.safetensors"
    write_model(path, layout_of(BASE), BASE.values())
    base = ModelFile.open(path)
    merge = judged(aggregation_of(aggregation), merge, journal.load, base.layout)
    files = ModelCommit(base, None, server_optimizer("fedavg"), merge, journal.load)
    files.write(tmp_path / "2.safetensors", tmp_path / "state")
    made = ModelFile.open(tmp_path / "2.safetensors")
    return {spec.name: made.named(spec.name) for spec in made.layout}, merge


def by_hand(aggregation, updates, scales):
    given = np.stack(
        [
            s * np.concatenate([u["w"].ravel(), u["b"]]).astype(np.float64)
            for u, s in zip(updates, scales, strict=True)
        ]
    )
    verdict = aggregation_of(aggregation).judge(given @ given.T)
    return (verdict.combine(given) if verdict.combine else verdict.shares @ given), verdict.distances


@pytest.mark.parametrize("recipe", ["raw", "raw+zstd", "float16"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_rule_on_files_is_the_rule_on_whole_arrays(tmp_path, monkeypatch, text, recipe):
    monkeypatch.setattr(module, "_MOST_ELEMENTS", 66)
    updates = {f"u{seed}": update(seed) for seed in range(6)}
    if recipe == "float16":
        updates = {t: {**u, "w": u["w"].astype(np.float16).astype(np.float32)} for t, u in updates.items()}
        updates = {t: {**u, "b": u["b"].astype(np.float16).astype(np.float32)} for t, u in updates.items()}
    merge = Merge(dict.fromkeys(updates, 5.0), SCALES)
    made, merge = commit(tmp_path, text, merge, updates, recipe)
    wanted, distances = by_hand(text, list(updates.values()), list(SCALES.values()))
    np.testing.assert_allclose(np.concatenate([made["w"].ravel(), made["b"]]), wanted, atol=1e-5)
    assert list(merge.distances.values()) == pytest.approx(list(distances))


@pytest.mark.parametrize("text", ["median", "trimmed-mean:0.2"])
def test_partial_updates_are_combined_over_those_that_cover_a_coordinate(tmp_path, text):
    masks = [np.random.default_rng(100 + seed).random((20, 7)) < 0.5 for seed in range(5)]
    full = {f"u{seed}": update(seed) for seed in range(5)}
    packed = {
        token: {**pack("w", tensors["w"], mask), "b": tensors["b"]}
        for (token, tensors), mask in zip(full.items(), masks, strict=True)
    }
    merge = Merge(dict.fromkeys(packed, 1.0), sub_models=dict.fromkeys(packed))
    made, merge = commit(tmp_path, text, merge, packed)
    stack = np.stack(
        [np.where(mask, u["w"], np.nan).ravel() for u, mask in zip(full.values(), masks, strict=True)]
    )
    wanted = np.nan_to_num(aggregation_of(text).rule.combine(stack.astype(np.float64)))
    np.testing.assert_allclose(made["w"].ravel(), wanted, atol=1e-6)
    assert not merge.distances


def test_an_update_of_weight_zero_has_no_vote(tmp_path):
    updates = {f"u{seed}": update(seed) for seed in range(3)}
    made, merge = commit(tmp_path, "median", Merge({"u0": 1.0, "u1": 0.0, "u2": 1.0}), updates)
    np.testing.assert_allclose(made["b"], (updates["u0"]["b"] + updates["u2"]["b"]) / 2, atol=1e-6)
    assert merge.weights == {"u0": 1.0, "u1": 0.0, "u2": 1.0}


def test_too_few_updates_and_means_of_leaves_are_refused(tmp_path):
    journal = UploadJournal(tmp_path / "uploads")
    with pytest.raises(UpdateRefused, match="needs 5 updates"):
        judged(aggregation_of("krum:f=1"), Merge({"a": 1.0}), journal.load, ())
    with pytest.raises(UnusableUpdate, match="mean of several"):
        judged(aggregation_of("median"), Merge({"a": 1.0}, merged={"a": 3.0}), journal.load, ())


@dataclass(frozen=True)
class Own:
    """Base of rules of an operator's own, each with another fault. A subclass of a dataclass is one."""

    least: ClassVar[int] = 2


class Raises(Own):
    def combine(self, updates):
        raise KeyError("no such\nkey")


class Narrow(Own):
    def combine(self, updates):
        return updates[:, 1:].mean(axis=0)


class Empty(Own):
    def combine(self, updates):
        return np.full(updates.shape[1], np.nan)


class RaisesShares(Own):
    def shares(self, gram):
        raise ValueError("no shares")


class NaNShares(Own):
    def shares(self, gram):
        return np.full(len(gram), np.nan)


class NoShares(Own):
    def shares(self, gram):
        return np.zeros(len(gram))


FAULTS = [
    ("Raises", "KeyError: 'no such"),
    ("Narrow", "shape"),
    ("Empty", "NaN for a coordinate of w that some of the 3 updates have"),
    ("RaisesShares", "ValueError: no shares"),
    ("NaNShares", "sum above 0"),
    ("NoShares", "sum above 0"),
]


@pytest.mark.parametrize(("name", "words"), FAULTS)
def test_a_rule_of_ones_own_that_fails_refuses_the_commit_with_the_reason(tmp_path, name, words):
    updates = {f"u{seed}": update(seed) for seed in range(3)}
    with pytest.raises(UpdateRefused, match=words):
        commit(tmp_path, f"{__name__}:{name}", Merge(dict.fromkeys(updates, 1.0)), updates)


@pytest.mark.parametrize("name", ["Raises", "NaNShares"])
async def test_a_rule_of_ones_own_that_fails_ends_rounds_and_pauses_the_run(tmp_path, name):
    policy = {"min_workers": 2, "quorum": 2}
    async with running_aggregator(tmp_path, policy=policy, aggregation=f"{__name__}:{name}") as running:
        devices = [await running.device(worker) for worker in "ab"]
        for number in (1, 2, 3):
            tasks = await asyncio.gather(*(device.task() for device in devices))
            for device, task in zip(devices, tasks, strict=True):
                await device.push(task, update_of(1.0))
            # The next one may have begun already.
            round_ = await running.until_ended(number)
            assert round_.phase == round_pb2.ROUND_PHASE_ABANDONED
            assert "the aggregation rule" in round_.reason
        run, _ = await running.until(lambda run, _: run.paused_reason)
        assert "3 rounds in a row" in run.paused_reason


@pytest.mark.parametrize("text", ["median", "krum:f=1", "geometric-median", "nnm+trimmed-mean:0.2"])
async def test_a_round_with_an_attacker_ends_near_the_honest_and_its_record_shows_who_is_odd(tmp_path, text):
    policy = {"min_workers": 5, "quorum": 5}
    async with running_aggregator(tmp_path, policy=policy, aggregation=text) as running:
        devices = [await running.device(name) for name in "abcde"]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        for device, task, change in zip(devices, tasks, (1.0, 1.1, 0.9, 1.05, -500.0), strict=True):
            await device.push(task, update_of(change))
        await running.until_finished()
        moved = running.weights(2)["w"] - MODEL["w"]
        assert 0.89 < moved.mean() < 1.11
        distances = {task.worker: task.distance for task in (await running.round()).tasks}
        assert all(task.phase == round_pb2.TASK_PHASE_ACCEPTED for task in (await running.round()).tasks)
    assert distances["e"] > 100 * max(distances[name] for name in "abcd")


async def test_updates_are_clipped_to_the_quantile_of_their_round(tmp_path):
    async with running_aggregator(tmp_path, policy={"min_workers": 3}, clip_quantile=0.5) as running:
        devices = [await running.device(name) for name in "abc"]
        tasks = await asyncio.gather(*(device.task() for device in devices))
        for device, task, change in zip(devices, tasks, (1.0, 2.0, 40.0), strict=True):
            await device.push(task, update_of(change))
        await running.until_finished()
        scales = {task.worker: task.scale for task in (await running.round()).tasks}
        np.testing.assert_allclose(running.weights(2)["w"] - MODEL["w"], 5 / 3, rtol=1e-5)
    assert scales == pytest.approx({"a": 1.0, "b": 1.0, "c": 0.05})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation": "krum:f=1"}, "set --quorum"),
        ({"aggregation": "geometric-median", "local_models": PlanTable(LocalModelPlan(width=0.5))}, "no distance"),
        ({"aggregation": "nnm+median", "local_models": PlanTable(LocalModelPlan(width=0.5))}, "no distance"),
        ({"aggregation": "median", "leaves": ("leaf",)}, "leaves: aggregation"),
        ({"clip_quantile": 0.5, "leaves": ("leaf",)}, "leaves: aggregation and clip_quantile"),
        ({"clip_quantile": 0.0}, "above 0"),
        ({"aggregation": "average"}, "known: median"),
        (
            {"aggregation": "median", "plan": TrainingPlan(learning_rate=1.0, momentum=0.0, algorithm="scaffold")},
            "goes without scaffold",
        ),
    ],
)
def test_what_a_rule_is_not_defined_for_is_refused_with_the_reason(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        AggregatorSettings(tmp_path, **changes)


def test_coordinate_rules_go_with_local_models_of_a_part(tmp_path):
    settings = AggregatorSettings(
        tmp_path, aggregation="median", local_models=PlanTable(LocalModelPlan(width=0.5)), policy=RoundPolicy()
    )
    assert algorithm_of(settings.plan.algorithm).companions == ()
