"""Devices of unequal size in one federation: slices go out, parts come back, each coordinate has its own mean."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.delta_bases import DeltaBases
from fedgrpc.protocol.tensors import channels_to_proto
from fedgrpc.rpc.retry import Backoff
from fedgrpc.runs.conditions import Condition
from fedgrpc.submodels.channels import ChannelGroup, ChannelMap, Segment
from fedgrpc.submodels.plan import LocalModelPlan, Pruning, Quantization
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings
from tests.support.hand_driven_device import refused
from tests.support.running_federation import running_aggregator

# What it says of its device, or just its class; and its trainer.
Worker = tuple[str | dict[str, Any], Any]
MAP = ChannelMap((ChannelGroup(8),), {"w": ((Segment(0),), (Segment(None, 50),)), "b": ((Segment(0),),)})
SHAPES = {"w": (8, 50), "b": (8,), "n": ()}


class Adder:
    """Adds its own number to every coordinate that it is given; `masks` says where it did."""

    def __init__(self, number: float, keep: np.ndarray | None = None) -> None:
        self.number = number
        self.keep = keep
        self.given: list[dict[str, tuple[int, ...]]] = []

    def channels(self) -> ChannelMap:
        return MAP

    def initial_weights(self) -> Weights:
        rng = np.random.default_rng(7)
        arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items() if shape}
        return {**arrays, "n": np.array(0, np.int64)}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        self.given.append({name: array.shape for name, array in weights.items()})
        trained = {name: array + array.dtype.type(self.number) for name, array in weights.items()}
        if job.local_model is None or job.local_model.pruning is None:
            return TrainResult(trained, 10, 1)
        assert self.keep is not None
        start = {**weights, "w": np.where(self.keep, weights["w"], 0).astype(np.float32)}
        trained["w"] = np.where(self.keep, trained["w"], 0).astype(np.float32)
        return TrainResult(trained, 10, 1, {}, start, {"w": self.keep})

    def evaluate(self, weights: Weights) -> EvalResult:
        return EvalResult(4, {"width": float(len(weights["b"]))})


async def play(folder: Path, workers: Mapping[str, Worker], plans: PlanTable, **changes: Any) -> Outcome:
    """Run these workers (device class, trainer), by name, to the end of the run."""
    given: dict[str, Any] = {
        "initial_model": None,
        "keep_versions": 99,
        "policy": {"min_workers": len(workers)},
        **changes,
    }
    async with asyncio.timeout(250), running_aggregator(folder, local_models=plans, **given) as running:
        settings = [
            WorkerSettings(
                name=name,
                aggregator=running.address,
                state_dir=folder / name,
                serve_address=None,
                backoff=Backoff(0.05, 0.5),
                device=about if isinstance(about, dict) else {"device_class": about},
            )
            for name, (about, _) in workers.items()
        ]
        trainers = [trainer for _, trainer in workers.values()]
        codes = await asyncio.gather(*map(run_worker, settings, trainers))
        assert codes == [0] * len(workers)
        run, rounds = await running.run(), await running.rounds()
        assert run.phase == pb.RUN_PHASE_FINISHED
        return Outcome(rounds, [running.weights(version) for version in range(1, run.model_version + 1)])


@dataclass
class Outcome:
    """The rounds and the model versions of a run, oldest first."""

    rounds: list[round_pb2.Round]
    versions: list[dict[str, np.ndarray]]

    def tasks(self, number: int = -1) -> dict[str, round_pb2.TaskRecord]:
        return {task.worker: task for task in self.rounds[number].tasks}


THREE = PlanTable(LocalModelPlan(), {"half": LocalModelPlan(0.5), "quarter": LocalModelPlan(0.25)})


async def test_each_coordinate_is_averaged_over_those_who_were_given_it(tmp_path: Path) -> None:
    small = Adder(6)
    workers: dict[str, Worker] = {"a": ("full", Adder(1)), "b": ("half", Adder(2)), "c": ("quarter", small)}
    outcome = await play(tmp_path, workers, THREE)
    before, after = outcome.versions
    step = np.array([3, 3, 1.5, 1.5, 1, 1, 1, 1])
    np.testing.assert_allclose(after["b"], before["b"] + step, rtol=1e-6)
    np.testing.assert_allclose(after["w"], before["w"] + step[:, None], rtol=1e-6)
    assert after["n"] == 3
    assert small.given == [{"w": (2, 50), "b": (2,), "n": ()}]
    tasks = outcome.tasks()
    assert tasks["b"].local_model.sub_model == "prefix:0.5"
    assert not tasks["a"].HasField("local_model")
    assert tasks["c"].download_bytes < tasks["b"].download_bytes < tasks["a"].download_bytes
    assert tasks["c"].upload_bytes < tasks["b"].upload_bytes < tasks["a"].upload_bytes


async def test_coordinates_that_nobody_was_given_keep_their_value(tmp_path: Path) -> None:
    """With momentum, too: the optimizer remembers, but does not move what was not trained."""
    plans = PlanTable(LocalModelPlan(0.5))
    workers: dict[str, Worker] = {"a": ("", Adder(1)), "b": ("", Adder(3))}
    outcome = await play(tmp_path, workers, plans, rounds=3, server_optimizer="fedavgm")
    first, last = outcome.versions[0], outcome.versions[-1]
    assert np.array_equal(first["w"][4:], last["w"][4:])
    assert np.array_equal(first["b"][4:], last["b"][4:])
    assert (last["w"][:4] > first["w"][:4] + 6).all()


async def test_rolling_windows_reach_every_channel(tmp_path: Path) -> None:
    plans = PlanTable(LocalModelPlan(0.25, "rolling"))
    outcome = await play(tmp_path, {"a": ("", Adder(1))}, plans, rounds=8)
    moved = outcome.versions[-1]["b"] - outcome.versions[0]["b"]
    np.testing.assert_allclose(moved, 2.0, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["fedavgm", "fedadam"])
async def test_a_coordinate_that_is_left_out_of_a_round_waits_with_what_the_optimizer_remembers_of_it(
    tmp_path: Path, optimizer: str
) -> None:
    """Each channel comes and goes with the window: a dumb loop steps those that are there, and no others."""
    plans = PlanTable(LocalModelPlan(0.25, "rolling"))
    outcome = await play(tmp_path, {"a": ("", Adder(1))}, plans, rounds=9, server_optimizer=optimizer)
    step = server_optimizer(optimizer)
    value = outcome.versions[0]["b"].astype(np.float64)
    state = [tuple(np.zeros(1) for _ in range(step.state_count)) for _ in value]
    for number, version in enumerate(outcome.versions[1:], start=1):
        for channel in (number % 8, (number + 1) % 8):
            moved, state[channel] = step.step(value[channel : channel + 1], np.ones(1), state[channel])
            value[channel] = moved[0]
        np.testing.assert_allclose(version["b"], value, rtol=1e-4)


class Noisy(Adder):
    """Moves every coordinate a little, each by its own amount, and remembers what it began from."""

    def __init__(self) -> None:
        super().__init__(0)
        self.began: dict[int, dict[str, np.ndarray]] = {}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        self.began[job.round] = {name: np.array(array) for name, array in weights.items()}
        rng = np.random.default_rng(job.round)
        moved = {
            name: (array + rng.normal(scale=0.01, size=array.shape)).astype(array.dtype)
            for name, array in weights.items()
        }
        return TrainResult(moved, 10, 1)


async def test_a_slice_whose_channels_stay_comes_as_the_difference_to_what_is_held(tmp_path: Path) -> None:
    plans = PlanTable(classes={"half": LocalModelPlan(0.5), "rolling": LocalModelPlan(0.5, "rolling")})
    staying, moving = Noisy(), Noisy()
    workers: dict[str, Worker] = {"a": ("full", Noisy()), "b": ("half", staying), "c": ("rolling", moving)}
    outcome = await play(tmp_path, workers, plans, rounds=4, download_recipe="int8+zstd")
    held = {path.name for path in (tmp_path / "aggregator" / "delta-bases").glob("*.safetensors")}
    assert not any("rolling" in name for name in held)

    def off_by(trainer: Noisy, number: int, kept: slice) -> float:
        return float(np.abs(trainer.began[number]["w"] - outcome.versions[number - 1]["w"][kept]).max())

    # A step of int8 of the weights at first, and then one of what a round changes of them.
    assert off_by(staying, 1, slice(4)) > 1e-3
    assert all(off_by(staying, number, slice(4)) < 4e-4 for number in (2, 3, 4))
    assert all(off_by(moving, number, slice(number, number + 4)) > 1e-3 for number in (2, 3, 4))
    for number in (1, 2, 3, 4):
        (path,) = (tmp_path / "aggregator" / "delta-bases").glob(f"{number:06d}-*-prefix:0.5.safetensors")
        for name, array in load_file(path).items():
            np.testing.assert_array_equal(staying.began[number][name], array)
    # The next process knows it as what it is.
    delta_bases, digest = DeltaBases(path.parent), bytes.fromhex(path.name.split("-")[1])
    assert delta_bases.open((4, digest, "prefix:0.5")) is not None
    assert not delta_bases.knows((4, digest, ""))


async def test_channels_are_chosen_by_magnitude_of_the_version_that_is_trained(tmp_path: Path) -> None:
    outcome = await play(tmp_path, {"a": ("", Adder(1))}, PlanTable(LocalModelPlan(0.25, "magnitude")))
    before, after = outcome.versions
    largest = np.sort(np.argsort(-(before["w"].astype(float) ** 2).sum(1))[:2])
    assert np.flatnonzero(after["b"] != before["b"]).tolist() == largest.tolist()


async def test_a_pruned_update_counts_only_where_it_was_kept(tmp_path: Path) -> None:
    keep = np.random.default_rng(1).random((8, 50)) < 0.5
    plans = PlanTable(LocalModelPlan(), {"pruned": LocalModelPlan(pruning=Pruning(0.5))})
    workers: dict[str, Worker] = {"a": ("", Adder(1)), "b": ("pruned", Adder(3, keep))}
    outcome = await play(tmp_path, workers, plans)
    before, after = outcome.versions
    np.testing.assert_allclose(after["w"], before["w"] + np.where(keep, 2, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(after["b"], before["b"] + 2, rtol=1e-5)
    tasks = outcome.tasks()
    assert tasks["b"].upload_bytes < 0.62 * tasks["a"].upload_bytes


class Coarse(Adder):
    """Starts from rounded weights, as a quantized or clustered local model does."""

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        start = {name: np.round(array) for name, array in weights.items()}
        trained = {name: array + array.dtype.type(self.number) for name, array in start.items()}
        return TrainResult(trained, 10, 1, {}, start)


async def test_an_update_is_counted_from_the_compressed_model_and_never_from_the_one_that_was_given(
    tmp_path: Path,
) -> None:
    """Counted from w, the rounding itself, up to a half here, would be averaged into the model."""
    plans = PlanTable(LocalModelPlan(), {"coarse": LocalModelPlan(quantization=Quantization(8))})
    workers: dict[str, Worker] = {"a": ("", Adder(1)), "b": ("coarse", Coarse(3))}
    before, after = (await play(tmp_path, workers, plans)).versions
    assert np.abs(before["w"] - np.round(before["w"])).max() > 0.4
    for name in ("w", "b"):
        np.testing.assert_allclose(after[name], before[name] + 2, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    made = tmp_path / "plain", tmp_path / "beside"
    for folder in made:
        folder.mkdir()
    return made


async def test_whole_unpruned_updates_are_fedavg_bit_for_bit_beside_any_plan_table(
    folders: tuple[Path, Path],
) -> None:
    workers: dict[str, Worker] = {"a": ("", Adder(0.1)), "b": ("", Adder(0.7)), "c": ("", Adder(0.3))}
    plain = await play(folders[0], workers, PlanTable(), rounds=3)
    beside = await play(folders[1], workers, THREE, rounds=3)
    for left, right in zip(plain.versions, beside.versions, strict=True):
        assert all(np.array_equal(left[name], right[name]) for name in left)


async def test_a_given_model_is_sliced_from_the_first_round_on(tmp_path: Path) -> None:
    initial = tmp_path / "given.safetensors"
    save_file(dict(Adder(0).initial_weights()), initial)
    small = Adder(1)
    outcome = await play(tmp_path, {"a": ("half", small)}, THREE, rounds=2, initial_model=initial)
    assert [given["b"] for given in small.given] == [(4,), (4,)]
    assert [task["a"].local_model.sub_model for task in map(outcome.tasks, (-2, -1))] == ["prefix:0.5"] * 2


async def test_scores_of_slices_are_not_scores_of_the_version(tmp_path: Path) -> None:
    workers: dict[str, Worker] = {"a": ("full", Adder(1)), "b": ("half", Adder(2))}
    outcome = await play(tmp_path, workers, THREE, rounds=2, evaluate=True)
    scored = [round_ for round_ in outcome.rounds if round_.metrics]
    assert scored
    assert all(round_.metrics["width"] == 8 for round_ in scored)


async def test_a_fleet_of_sub_models_alone_has_a_score_and_can_meet_its_target(tmp_path: Path) -> None:
    plans = PlanTable(LocalModelPlan(0.5))
    about: dict[str, Any] = {"rounds": 9, "evaluate": True, "target": Condition.parse("width>=4")}
    outcome = await play(tmp_path, {"a": ("", Adder(1)), "b": ("", Adder(2))}, plans, **about)
    assert len(outcome.rounds) < 9
    scored = [round_ for round_ in outcome.rounds if round_.metrics]
    assert scored
    assert all(round_.metrics["width"] == 4 and round_.metrics_of_sub_models for round_ in scored)


class Headed(Adder):
    """Scores the sum of its layer `b`, which stays at home: 8 more with each round it has trained."""

    def evaluate(self, weights: Weights) -> EvalResult:
        return EvalResult(4, {"width": float(len(weights["b"])), "head": float(weights["b"].sum())})


async def test_the_closing_evaluation_scores_each_device_with_its_own_layers_and_its_own_sub_model(
    tmp_path: Path,
) -> None:
    classes = {"own": LocalModelPlan(personal_layers=("b",)), "half": LocalModelPlan(0.5)}
    workers: dict[str, Worker] = {"a": ("own", Headed(1)), "b": ("half", Headed(1)), "c": ("", Headed(0))}
    outcome = await play(tmp_path, workers, PlanTable(classes=classes), rounds=2, evaluate=True)
    (closing,) = [round_ for round_ in outcome.rounds if round_.kind == round_pb2.TASK_KIND_EVALUATE]
    tasks = {task.worker: task for task in closing.tasks}
    trained = outcome.versions[0]["b"].sum() + 2 * 8
    assert tasks["a"].evaluation_metrics["head"] == pytest.approx(trained, rel=1e-5)
    assert tasks["b"].evaluation_metrics["width"] == 4
    assert tasks["b"].download_bytes < 0.6 * tasks["c"].download_bytes


class Plain:
    """A trainer that knows no local models."""

    def __init__(self) -> None:
        self._inner = Adder(1)
        self.initial_weights = self._inner.initial_weights
        self.evaluate = self._inner.evaluate

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        return self._inner.train(weights, job)


async def test_a_worker_gets_no_plan_whose_parts_it_does_not_know(tmp_path: Path) -> None:
    pruned = LocalModelPlan(0.5, pruning=Pruning(0.5))
    plans = PlanTable(pruned, {"own": LocalModelPlan(personal_layers=("b",))})
    workers: dict[str, Worker] = {"a": ("", Plain()), "b": ("own", Plain())}
    outcome = await play(tmp_path, workers, plans, rounds=2)
    assert [round_.phase for round_ in outcome.rounds] == [round_pb2.ROUND_PHASE_COMMITTED] * 3
    assert not outcome.tasks()["a"].HasField("local_model")
    assert "pruning" in outcome.tasks()["a"].prediction.reason
    assert outcome.tasks()["b"].local_model.personal_layers == ["b"]


async def test_each_workers_scores_of_the_global_and_of_its_local_model_are_in_the_record(tmp_path: Path) -> None:
    workers: dict[str, Worker] = {"a": ("full", Adder(1)), "b": ("half", Adder(2))}
    tasks = (await play(tmp_path, workers, THREE, evaluate=True)).tasks(-2)
    assert {name: dict(task.evaluation_metrics) for name, task in tasks.items()} == {
        "a": {"width": 8},
        "b": {"width": 4},
    }
    assert tasks["a"].metrics["local_width"] == 8
    assert tasks["b"].metrics["local_width"] == 4


async def test_personal_layers_stay_on_the_device_and_outlive_it(tmp_path: Path) -> None:
    plans = PlanTable(LocalModelPlan(personal_layers=("b",)))
    trainer = Adder(1)
    seen: list[np.ndarray] = []
    train = trainer.train

    def watched(weights: Weights, job: TrainJob) -> TrainResult:
        seen.append(weights["b"].copy())
        return train(weights, job)

    trainer.train = watched  # type: ignore[method-assign]
    outcome = await play(tmp_path, {"a": ("", trainer)}, plans, rounds=3)
    assert all(np.array_equal(version["b"], outcome.versions[0]["b"]) for version in outcome.versions)
    assert not np.array_equal(outcome.versions[-1]["w"], outcome.versions[0]["w"])
    np.testing.assert_allclose(np.diff([array[0] for array in seen]), 1.0, rtol=1e-5)


async def test_a_device_gets_the_largest_plan_that_its_link_can_carry_and_then_what_it_has_shown(
    tmp_path: Path,
) -> None:
    """Both ways the whole model takes 788 s of a round's 600 by the declared rates, and no time on the real link.

    No pause of this machine makes the real link look like that.
    """
    plans = PlanTable(automatic=(LocalModelPlan(1.0), LocalModelPlan(0.5), LocalModelPlan(0.25)))
    link = {"uplink_bits_per_second": 33, "downlink_bits_per_second": 33}
    workers: dict[str, Worker] = {"a": (link, Adder(1)), "b": ("", Adder(2))}
    outcome = await play(tmp_path, workers, plans, rounds=2)
    first, second = outcome.tasks(-2), outcome.tasks(-1)
    assert first["a"].local_model.sub_model == "prefix:0.5"
    assert not first["b"].HasField("local_model")
    assert not second["a"].HasField("local_model")
    # What was expected is kept with the task: by the declared rates first, then by what was seen.
    expected = first["a"].prediction
    assert "a larger one takes" in expected.reason
    assert expected.upload_seconds == pytest.approx(200, rel=0.2)
    assert not expected.HasField("local_seconds")
    again = second["a"].prediction
    assert again.upload_seconds < 100
    assert again.local_seconds > 0
    assert again.peak_memory_bytes > 1 << 20


async def test_bytes_up_are_predicted_by_the_encoding_of_updates_and_then_by_those_that_came(
    tmp_path: Path,
) -> None:
    link = {"uplink_bits_per_second": 1000, "downlink_bits_per_second": 1000}
    workers: dict[str, Worker] = {"a": (link, Noisy()), "b": ("", Noisy())}
    encodings = {"download_recipe": "raw", "upload_recipe": "int8"}
    outcome = await play(tmp_path, workers, PlanTable(), rounds=2, **encodings)
    first, second = (outcome.tasks(number)["a"] for number in (-2, -1))
    elements = sum(array.size for array in outcome.versions[0].values())
    assert first.prediction.upload_seconds == pytest.approx(8 * elements / 1000, rel=0.1)
    assert first.prediction.download_seconds == pytest.approx(first.download_bytes * 8 / 1000)
    rate = first.upload_bytes / first.timings.upload_seconds
    assert second.prediction.upload_seconds * rate == pytest.approx(first.upload_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"w": np.zeros((8, 50), np.float32)}, "sub-model has float32[4, 50]"),
        ({"w#mask": np.zeros(25, np.uint8)}, "no tensor 'w#mask'"),
        ({"b": np.ones(3, np.float32)}, "sub-model has float32[4]"),
    ],
)
async def test_an_update_of_another_part_than_was_given_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], complaint: str
) -> None:
    initial = tmp_path / "given.safetensors"
    save_file(dict(Adder(0).initial_weights()), initial)
    (tmp_path / "aggregator").mkdir()
    (tmp_path / "aggregator" / "channels.pb").write_bytes(channels_to_proto(MAP).SerializeToString())
    policy = {"min_workers": 1}
    async with running_aggregator(tmp_path, local_models=THREE, initial_model=initial, policy=policy) as running:
        device = await running.device("pi", device={"device_class": "half"})
        task = await device.task()
        assert task.local_model.sub_model == "prefix:0.5"
        honest = {"w": np.ones((4, 50), np.float32), "b": np.ones(4, np.float32), "n": np.array(1)}
        with refused("INVALID_ARGUMENT", complaint):  # type: ignore[no-untyped-call]
            await device.push(task, {**honest, **tensors})


async def test_what_a_worker_was_given_is_known_after_a_restart(tmp_path: Path) -> None:
    initial = tmp_path / "given.safetensors"
    save_file(dict(Adder(0).initial_weights()), initial)
    (tmp_path / "aggregator").mkdir()
    (tmp_path / "aggregator" / "channels.pb").write_bytes(channels_to_proto(MAP).SerializeToString())
    policy = {"min_workers": 2}
    about: dict[str, Any] = {"initial_model": initial, "policy": policy, "durable": True}
    part = {"w": np.ones((4, 50), np.float32), "b": np.ones(4, np.float32), "n": np.array(1)}
    whole = {"w": np.full((8, 50), 3, np.float32), "b": np.full(8, 3, np.float32), "n": np.array(3)}
    async with running_aggregator(tmp_path, local_models=THREE, **about) as running:
        small = await running.device("small", device={"device_class": "half"})
        large = await running.device("large", device={"device_class": "full"})
        first, second = await asyncio.gather(small.task(), large.task())
        await small.push(first, part)
    # Even if the operator has changed the plans in between.
    async with running_aggregator(tmp_path, local_models=PlanTable(), **about) as running:
        large = await running.device("large", device={"device_class": "full"})
        await large.push(second, whole)
        await running.until_finished()
        before, after = running.weights(1), running.weights(2)
    step = np.array([2, 2, 2, 2, 3, 3, 3, 3])
    np.testing.assert_allclose(after["b"], before["b"] + step, rtol=1e-6)
