"""Secure sums of virtual devices that die anywhere, against the plain sum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.codec.layout import Array
from fedgrpc.errors import EncodeError, UpdateRefused, UsageError
from fedgrpc.privacy.fixed_point import FixedPoint
from fedgrpc.privacy.neighbours import degree_of, neighbours, threshold_of
from fedgrpc.privacy.secure_sum import (
    SEALED_BYTES,
    Circle,
    Participant,
    PublicKeys,
    Secrets,
    SumLost,
    Unmasking,
)
from fedgrpc.privacy.streams import word_dtype

SESSION = b"run 1, round 4"
BITS = 20


@dataclass
class VirtualRound:
    """A round of `count` devices in one process: every message is passed on by hand."""

    count: int
    seed: int
    size: int = 40
    answers: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.names = [f"w{number:03}" for number in range(self.count)]
        self.points = {name: place for place, name in enumerate(self.names, start=1)}
        self.secrets = {name: Secrets.drawn(self.rng.randbytes) for name in self.names}
        self.keys = {name: secrets.public for name, secrets in self.secrets.items()}
        self.graph = neighbours(self.names, np.random.default_rng(self.seed))
        self.thresholds = {name: threshold_of(len(around)) for name, around in self.graph.items()}
        self.devices = {name: Participant(self.circle(name), self.secrets[name]) for name in self.names}
        draws = np.random.default_rng(self.seed)
        self.values = {name: draws.integers(0, 1 << 12, self.size, dtype=np.uint64) for name in self.names}

    def circle(self, name: str) -> Circle:
        around = {other: self.keys[other] for other in self.graph[name]}
        return Circle(SESSION, name, around, self.points, self.thresholds[name])

    def share(self, who: Collection[str]) -> None:
        """The devices `who` live long enough to deposit their sealed shares."""
        sealed = {name: self.devices[name].sealed_shares(self.rng.randbytes) for name in who}
        assert all(len(box) == SEALED_BYTES for boxes in sealed.values() for box in boxes.values())
        # The aggregator tells only the keys of devices that have shared to those that mask.
        self.graph = {
            name: tuple(other for other in around if other in sealed)
            for name, around in self.graph.items()
            if name in sealed
        }
        self.sealed = {name: {other: sealed[other][name] for other in self.graph[name]} for name in sealed}
        # Thresholds stay those of the whole graph, under which the shares were made.
        self.devices = {name: Participant(self.circle(name), self.secrets[name]) for name in sealed}

    def masked_sum(self, who: Collection[str]) -> Array:
        total = np.zeros(self.size, word_dtype(BITS))
        for name in who:
            total += self.devices[name].masked(self.values[name], BITS)
        return total

    def ask(self, who: Collection[str], arrived: Collection[str]) -> None:
        for name in who:
            self.answers[name] = self.devices[name].answer(set(arrived), self.sealed[name], None)

    def unmasked(self, total: Array, arrived: Collection[str]) -> Array:
        unmasking = Unmasking(SESSION, self.keys, self.graph, self.points, self.thresholds)
        return unmasking.masks(set(arrived), self.answers, BITS).add_to(total)

    def plain_sum(self, who: Collection[str]) -> Array:
        return sum(self.values[name] for name in who) % (1 << BITS)  # type: ignore[return-value]


def _lost(rng: Random, names: Collection[str], share: float) -> list[str]:
    return sorted(rng.sample(sorted(names), len(names) - int(len(names) * share)))


@pytest.mark.parametrize("count", [3, 16, 40, pytest.param(256, marks=pytest.mark.faults)])
def test_the_unmasked_sum_is_the_plain_sum_bit_for_bit(count: int) -> None:
    world = VirtualRound(count, seed=count)
    world.share(world.names)
    total = world.masked_sum(world.names)
    world.ask(world.names, world.names)
    assert np.array_equal(world.unmasked(total, world.names), world.plain_sum(world.names))


@pytest.mark.parametrize("phase", ["before sharing", "before its vector", "before its answer", "anywhere"])
@pytest.mark.parametrize("count", [4, 16, pytest.param(64, marks=pytest.mark.faults)])
def test_devices_that_die_change_who_is_in_the_sum_and_nothing_else(count: int, phase: str) -> None:
    world = VirtualRound(count, seed=count)
    dying = 1 / 3 if phase != "anywhere" else 0.12
    alive = world.names
    if phase in ("before sharing", "anywhere"):
        alive = _lost(world.rng, alive, dying)
    world.share(alive)
    if phase in ("before its vector", "anywhere"):
        alive = _lost(world.rng, alive, dying)
    arrived, total = alive, world.masked_sum(alive)
    if phase in ("before its answer", "anywhere"):
        alive = _lost(world.rng, alive, dying)
    world.ask(alive, arrived)
    assert np.array_equal(world.unmasked(total, arrived), world.plain_sum(arrived))


@pytest.mark.faults
def test_a_round_of_256_lives_through_the_death_of_a_third() -> None:
    world = VirtualRound(256, seed=1)
    world.share(world.names)
    arrived = _lost(world.rng, world.graph, 1 / 6)
    total = world.masked_sum(arrived)
    world.ask(_lost(world.rng, arrived, 1 / 5), arrived)
    assert len(world.answers) == 172
    assert np.array_equal(world.unmasked(total, arrived), world.plain_sum(arrived))


def test_too_few_answers_lose_the_round_and_nothing_is_opened() -> None:
    world = VirtualRound(16, seed=2)
    world.share(world.names)
    total = world.masked_sum(world.names)
    world.ask(world.names[:8], world.names)
    with pytest.raises(SumLost, match="answered"):
        world.unmasked(total, world.names)


def test_one_device_that_sends_wrong_shares_does_not_lose_the_round() -> None:
    world = VirtualRound(16, seed=3)
    world.share(world.names)
    arrived = world.names[1:]
    total = world.masked_sum(arrived)
    world.ask(arrived, arrived)
    world.answers["w004"] = dict.fromkeys(world.answers["w004"], b"\1" * 33)
    assert np.array_equal(world.unmasked(total, arrived), world.plain_sum(arrived))


def test_many_wrong_shares_are_found() -> None:
    world = VirtualRound(4, seed=3)
    world.share(world.names)
    total = world.masked_sum(world.names)
    world.ask(world.names, world.names)
    for name in world.names[:2]:
        world.answers[name] = dict.fromkeys(world.answers[name], bytes(33))
    with pytest.raises(SumLost, match="do not fit"):
        world.unmasked(total, world.names)


def test_masked_values_of_one_device_look_uniform_whatever_its_update_is() -> None:
    world = VirtualRound(3, seed=5, size=1 << 16)
    world.values["w000"] = np.zeros(world.size, np.uint64)
    masked = world.devices["w000"].masked(world.values["w000"], BITS)
    counts = np.bincount(masked >> np.uint32(BITS - 8), minlength=256)
    expected = world.size / 256
    # Chi squared with 255 degrees of freedom: above 370 with a chance of 3e-6.
    assert ((counts - expected) ** 2 / expected).sum() < 370
    other = VirtualRound(3, seed=6, size=1 << 16).devices["w000"].masked(world.values["w000"], BITS)
    assert abs(np.corrcoef(masked, other)[0, 1]) < 0.02


class TestQuestionsThatAreRefused:
    def _world(self) -> VirtualRound:
        world = VirtualRound(8, seed=7)
        world.share(world.names)
        return world

    def test_a_second_question_about_other_devices(self) -> None:
        world = self._world()
        device, first = world.devices["w000"], set(world.names)
        device.answer(first, world.sealed["w000"], None)
        with pytest.raises(UpdateRefused, match="two answers"):
            device.answer(first - {"w005"}, world.sealed["w000"], first)

    def test_the_same_question_again_has_the_same_answer(self) -> None:
        world = self._world()
        device, arrived = world.devices["w000"], set(world.names[:7])
        again = Participant(world.circle("w000"), world.secrets["w000"])
        first = device.answer(arrived, world.sealed["w000"], None)
        assert again.answer(arrived, world.sealed["w000"], arrived) == first

    def test_a_sum_without_the_device_itself(self) -> None:
        world = self._world()
        with pytest.raises(UpdateRefused, match="does not hold this device"):
            world.devices["w000"].answer(set(world.names[1:]), world.sealed["w000"], None)

    def test_a_sum_of_too_few(self) -> None:
        world = self._world()
        with pytest.raises(UpdateRefused, match="fewer than"):
            world.devices["w000"].answer({"w000", "w001", "w002"}, world.sealed["w000"], None)

    def test_shares_that_were_changed(self) -> None:
        world = self._world()
        box = bytearray(world.sealed["w000"]["w003"])
        box[5] ^= 1
        with pytest.raises(UpdateRefused, match="changed"):
            world.devices["w000"].answer(set(world.names), {"w003": bytes(box)}, None)

    def test_shares_of_one_neighbour_passed_off_as_anothers(self) -> None:
        world = self._world()
        with pytest.raises(UpdateRefused, match="changed"):
            world.devices["w000"].answer(set(world.names), {"w003": world.sealed["w000"]["w004"]}, None)

    def test_a_key_of_low_order(self) -> None:
        world = self._world()
        world.keys["w001"] = PublicKeys(bytes(32), bytes(32), bytes(32))
        with pytest.raises(UpdateRefused, match="low order"):
            Participant(world.circle("w000"), world.secrets["w000"]).masked(world.values["w000"], BITS)

    @pytest.mark.parametrize("threshold", [0, 3, 8])
    def test_a_threshold_that_would_open_both_secrets_or_cannot_be_reached(self, threshold: int) -> None:
        world = self._world()
        with pytest.raises(UpdateRefused, match="threshold"):
            Circle(SESSION, "w000", world.circle("w000").neighbours, world.points, threshold)


@given(count=st.one_of(st.integers(2, 130), st.sampled_from([256, 999])), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_neighbours_are_mutual_and_as_many_as_the_degree_says(count: int, seed: int) -> None:
    names = [str(number) for number in range(count)]
    graph = neighbours(names, np.random.default_rng(seed))
    assert {len(around) for around in graph.values()} == {degree_of(count)}
    assert all(name in graph[other] and other != name for name in names for other in graph[name])
    assert len({len(set(around)) for around in graph.values()}) == 1


@given(degree=st.integers(1, 200))
def test_two_disjoint_sets_of_neighbours_never_both_reach_the_threshold(degree: int) -> None:
    assert degree < 2 * threshold_of(degree) <= 2 * degree


class TestFixedPoint:
    @given(
        bits=st.integers(2, 12),
        weights=st.lists(st.integers(1, 255), min_size=1, max_size=20),
        seed=st.integers(0, 2**32),
    )
    def test_the_mean_of_the_sum_is_the_mean_of_the_values_within_a_step(
        self, bits: int, weights: list[int], seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        grid = FixedPoint(bound=0.5, bits=bits, weight_bits=8, count=len(weights))
        values = rng.uniform(-0.5, 0.5, (len(weights), 30))
        total = sum(grid.encode(row, weight, rng) for row, weight in zip(values, weights, strict=True))
        assert int(np.max(total)).bit_length() <= grid.sum_bits
        mean = np.average(values, axis=0, weights=weights)
        assert np.abs(grid.mean(np.asarray(total), sum(weights)) - mean).max() <= grid.step * (1 + 1e-9)

    def test_rounding_has_no_bias(self) -> None:
        grid = FixedPoint(bound=1.0, bits=2, weight_bits=0, count=1)
        drawn = grid.encode(np.full(200_000, 0.123), 1, np.random.default_rng(0))
        assert grid.mean(drawn, 1).mean() == pytest.approx(0.123, abs=0.004)

    def test_values_beyond_the_bound_are_clipped_to_it(self) -> None:
        grid = FixedPoint(bound=1.0, bits=8, weight_bits=0, count=1)
        ends = grid.mean(grid.encode(np.array([-7.0, 7.0]), 1, np.random.default_rng(0)), 1)
        assert ends.tolist() == pytest.approx([-1.0, 1.0])

    @pytest.mark.parametrize("weight", [0, -1, 256])
    def test_a_weight_that_does_not_fit_is_refused(self, weight: int) -> None:
        with pytest.raises(EncodeError, match="weight"):
            FixedPoint(1.0, 8, 8, 4).encode(np.zeros(3), weight, np.random.default_rng(0))

    def test_values_that_are_no_numbers_are_refused(self) -> None:
        with pytest.raises(EncodeError, match="NaN"):
            FixedPoint(1.0, 8, 0, 1).encode(np.array([np.nan]), 1, np.random.default_rng(0))

    @pytest.mark.parametrize("wrong", [(0.0, 8, 0, 1), (np.inf, 8, 0, 1), (1.0, 1, 0, 1), (1.0, 24, 32, 2000)])
    def test_a_grid_that_cannot_be_is_refused(self, wrong: tuple[float, int, int, int]) -> None:
        with pytest.raises(UsageError, match="secure sum"):
            FixedPoint(*wrong)
