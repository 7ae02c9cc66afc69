"""Secure sums of virtual devices that die anywhere, against the plain sum."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.codec.layout import Array
from fedgrpc.errors import UpdateRefused
from fedgrpc.privacy.masks import Masks
from fedgrpc.privacy.neighbours import degree_of, neighbours, threshold_of
from fedgrpc.privacy.one_time_keys import (
    PublicKeys,
    Secrets,
    pair_mask_key,
    roster_digest,
    self_mask_key,
    session_of,
)
from fedgrpc.privacy.secure_sum import CONFIRMATION_BYTES, SEALED_BYTES, Circle, Participant
from fedgrpc.privacy.streams import word_dtype
from fedgrpc.privacy.unmasking import SumLost, Unmasking

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
        self.secrets = {name: Secrets(self.rng.randbytes(32)) for name in self.names}
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
        sealed = {name: self.devices[name].sealed_shares() for name in who}
        assert all(len(box) == SEALED_BYTES for boxes in sealed.values() for box in boxes.values())
        # The aggregator tells only the keys of devices that have shared to those that mask.
        self.graph = {
            name: tuple(other for other in around if other in sealed)
            for name, around in self.graph.items()
            if name in sealed
        }
        self.sealed = {name: {other: sealed[other][name] for other in self.graph[name]} for name in sealed}
        # Thresholds stay those of the whole graph, under which the shares were made.
        self.devices = {name: self.among(name, set(sealed)) for name in sealed}

    def among(self, name: str, roster: set[str]) -> Participant:
        return Participant(self.devices[name].circle.within(roster), self.secrets[name])

    def masked_sum(self, who: Collection[str]) -> Array:
        total = np.zeros(self.size, word_dtype(BITS))
        for name in who:
            total += self.devices[name].masked(self.values[name], BITS)
        return total

    def confirmed(self, who: Collection[str], arrived: Collection[str]) -> dict[str, dict[str, bytes]]:
        """Return the confirmations of the devices `who`, by receiver and sender."""
        sent = {name: self.devices[name].confirmations(set(arrived)) for name in who}
        assert all(len(proof) == CONFIRMATION_BYTES for proofs in sent.values() for proof in proofs.values())
        return {
            name: {other: proofs[name] for other, proofs in sent.items() if name in proofs}
            for name in self.devices
        }

    def ask(self, who: Collection[str], arrived: Collection[str]) -> None:
        confirmed = self.confirmed(who, arrived)
        for name in who:
            self.answers[name] = self.answer(name, arrived, confirmed)

    def answer(
        self, name: str, arrived: Collection[str], confirmed: dict[str, dict[str, bytes]] | None = None
    ) -> dict[str, bytes]:
        proofs = (confirmed or self.confirmed(arrived, arrived))[name]
        return self.devices[name].answer(set(arrived), proofs, self.sealed[name])

    def unmasked(self, total: Array, arrived: Collection[str]) -> Array:
        unmasking = Unmasking(SESSION, self.keys, self.graph, self.points, self.thresholds)
        return unmasking.masks(set(arrived), self.answers, BITS).add_to(total)

    def plain_sum(self, who: Collection[str]) -> Array:
        return sum(self.values[name] for name in who) % (1 << BITS)  # type: ignore[return-value]


def _lost(rng: Random, names: Collection[str], share: float) -> list[str]:
    return sorted(rng.sample(sorted(names), len(names) - int(len(names) * share)))


@pytest.mark.parametrize("count", [3, 16, 24, pytest.param(256, marks=pytest.mark.faults)])
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
    world.ask(world.names, world.names)
    world.answers = {name: world.answers[name] for name in world.names[:8]}
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
    world.share(world.names)
    world.values["w000"] = np.zeros(world.size, np.uint64)
    masked = world.devices["w000"].masked(world.values["w000"], BITS)
    counts = np.bincount(masked >> np.uint32(BITS - 8), minlength=256)
    expected = world.size / 256
    # Chi squared with 255 degrees of freedom: above 370 with a chance of 3e-6.
    assert ((counts - expected) ** 2 / expected).sum() < 370
    another = VirtualRound(3, seed=6, size=1 << 16)
    another.share(another.names)
    other = another.devices["w000"].masked(world.values["w000"], BITS)
    assert abs(np.corrcoef(masked, other)[0, 1]) < 0.02


def test_devices_who_sent_wrong_shares_are_asked_last() -> None:
    world = VirtualRound(24, seed=3)
    world.share(world.names)
    total = world.masked_sum(world.names)
    world.ask(world.names, world.names)
    for name in world.names[5:10]:
        world.answers[name] = dict.fromkeys(world.answers[name], b"\1" * 33)
    assert np.array_equal(world.unmasked(total, world.names), world.plain_sum(world.names))


@pytest.mark.parametrize("wrong", [b"", b"\1" * 32, b"\1" * 10_000])
def test_a_share_of_another_size_is_none(wrong: bytes) -> None:
    world = VirtualRound(5, seed=3)
    world.share(world.names)
    total = world.masked_sum(world.names)
    world.ask(world.names, world.names)
    world.answers["w002"] = dict.fromkeys(world.answers["w002"], wrong)
    assert np.array_equal(world.unmasked(total, world.names), world.plain_sum(world.names))


def test_a_device_that_is_not_on_the_roster_is_in_no_sum() -> None:
    world = VirtualRound(5, seed=3)
    world.share(world.names[:4])
    world.ask(world.names[:4], world.names[:4])
    with pytest.raises(ValueError, match="roster"):
        world.unmasked(np.zeros(3, np.uint64), world.names)


class TestParticipant:
    def _world(self, count: int = 8) -> VirtualRound:
        world = VirtualRound(count, seed=7)
        world.share(world.names)
        return world

    def test_a_sum_without_the_device_itself_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match="does not hold this device"):
            self._world().devices["w000"].confirmations({f"w{number:03}" for number in range(1, 8)})

    def test_a_sum_of_too_few_is_refused(self) -> None:
        with pytest.raises(UpdateRefused, match="fewer than"):
            self._world().devices["w000"].confirmations({"w000", "w001", "w002"})

    def test_an_answer_takes_a_threshold_of_neighbours_who_were_asked_the_same(self) -> None:
        world = self._world()
        everyone = set(world.names)
        confirmed = world.confirmed(world.names, everyone)["w000"]
        few = {name: confirmed[name] for name in world.names[1:4]}
        with pytest.raises(UpdateRefused, match="3 neighbours confirm"):
            world.devices["w000"].answer(everyone, few, world.sealed["w000"])
        assert world.devices["w000"].answer(everyone, few | {"w004": confirmed["w004"]}, world.sealed["w000"])

    def test_who_does_not_confirm_is_not_counted_for_the_least_size_that_a_device_wants(self) -> None:
        """Keys of a former round, whose masks are known by now, would else make a small sum look large."""
        world, everyone = self._world(), {f"w{number:03}" for number in range(8)}
        confirmed = world.confirmed(world.names, everyone)["w000"]
        device = Participant(replace(world.devices["w000"].circle, least=8), world.secrets["w000"])
        few = {name: confirmed[name] for name in world.names[1:7]}
        with pytest.raises(UpdateRefused, match="6 neighbours confirm this question, fewer than 7"):
            device.answer(everyone, few, world.sealed["w000"])
        assert device.answer(everyone, confirmed, world.sealed["w000"])

    def test_a_question_that_others_were_not_asked_is_not_answered(self) -> None:
        # An aggregator would else name other dropped devices to each, and learn the sum of two.
        world = self._world()
        others = world.confirmed(world.names, world.names)["w000"]
        with pytest.raises(UpdateRefused, match="0 neighbours confirm"):
            world.devices["w000"].answer(set(world.names) - {"w005"}, others, world.sealed["w000"])

    def test_masks_of_devices_who_were_told_different_rosters_do_not_cancel(self) -> None:
        world = self._world(4)
        world.devices["w000"] = world.among("w000", {"w000", "w001", "w002"} | {"w003", "w009"})
        total = world.masked_sum(world.names)
        confirmed = world.confirmed(world.names[1:], world.names)
        assert not world.devices["w000"].circle.neighbours.keys() ^ set(world.names[1:])
        with pytest.raises(UpdateRefused, match="0 neighbours confirm"):
            world.answer("w000", world.names, confirmed)
        for name in world.names[1:]:
            world.answers[name] = world.answer(name, world.names, confirmed)
        assert not np.array_equal(world.unmasked(total, world.names), world.plain_sum(world.names))

    def test_without_a_roster_there_are_no_masks(self) -> None:
        world = self._world()
        with pytest.raises(UpdateRefused, match="roster"):
            Participant(world.circle("w000"), world.secrets["w000"]).masks(BITS)

    def test_confirmations_of_one_neighbour_do_not_pass_for_anothers(self) -> None:
        world = self._world()
        proof = world.confirmed(world.names, world.names)["w000"]["w001"]
        with pytest.raises(UpdateRefused, match="1 neighbours confirm"):
            world.devices["w000"].answer(
                set(world.names), dict.fromkeys(world.names[1:], proof), world.sealed["w000"]
            )

    @pytest.mark.parametrize("other", ["w004", "nobody"])
    def test_shares_that_were_changed_or_are_anothers_are_left_out(self, other: str) -> None:
        world = self._world()
        box = bytearray(world.sealed["w000"].get(other, world.sealed["w000"]["w003"]))
        box[20] ^= other == "nobody"
        world.sealed["w000"]["w003"] = bytes(box)
        assert world.answer("w000", world.names).keys() == set(world.names) - {"w000", "w003"}

    def test_a_neighbour_that_seals_rubbish_to_all_is_named(self) -> None:
        world = self._world()
        for name in world.names:
            world.sealed[name]["w003"] = bytes(SEALED_BYTES)
        total = world.masked_sum(world.names)
        world.ask(world.names, world.names)
        with pytest.raises(SumLost, match="0 devices answered for 'w003'"):
            world.unmasked(total, world.names)

    def test_shares_are_the_same_after_a_restart_and_others_in_another_circle(self) -> None:
        world = VirtualRound(8, seed=7)
        circle, secrets = world.circle("w000"), world.secrets["w000"]
        first = Participant(circle, secrets).sealed_shares()
        assert Participant(circle, Secrets(secrets.master)).sealed_shares() == first
        fewer = Participant(circle.within(set(world.names[:7])), secrets).sealed_shares()
        # Neither nonce nor ciphertext comes again: two messages under one nonce would tell their difference.
        assert all(fewer[name][:12] != first[name][:12] for name in fewer)
        assert all(fewer[name][12:44] != first[name][12:44] for name in fewer)

    def test_a_key_of_low_order_is_refused(self) -> None:
        world = self._world()
        world.keys["w001"] = PublicKeys(bytes(32), bytes(32), bytes(32))
        with pytest.raises(UpdateRefused, match="low order"):
            Participant(world.circle("w000").within(set(world.names)), world.secrets["w000"]).masks(BITS)

    def test_copies_of_keys_are_refused(self) -> None:
        world = self._world()
        world.keys["w001"] = world.keys["w002"]
        with pytest.raises(UpdateRefused, match="copy"):
            world.circle("w000")
        world.keys["w001"] = world.keys["w000"]
        with pytest.raises(UpdateRefused, match="copy"):
            Participant(world.circle("w000"), world.secrets["w000"])

    def test_a_copied_masking_key_cancels_no_mask(self) -> None:
        # The copy of a neighbour's key, on the other side of a device's name, would else take its mask away.
        world = VirtualRound(3, seed=7)
        streams = [
            Masks([(key, 1)], BITS).add_to(np.zeros(64, np.uint64)) for key in self._keys_with_copies(world)
        ]
        assert not np.array_equal(streams[0], streams[1])

    def _keys_with_copies(self, world: VirtualRound) -> list[bytes]:
        secret, public = world.secrets["w001"].masking, world.keys["w002"].masking
        return [pair_mask_key(secret, public, SESSION, "w001", name) for name in ("w000", "w002")]

    def test_devices_of_another_task_than_their_neighbours_cannot_be_unmasked(self) -> None:
        """An aggregator that gives all neighbours of a device a task of no effect would else see its update."""
        world = VirtualRound(6, seed=7)
        others, target = world.names[1:], world.names[0]
        elsewhere = session_of(b"another task")
        for name in others:
            circle = replace(world.devices[name].circle, session=elsewhere)
            world.devices[name] = Participant(circle, world.secrets[name])
            world.values[name][:] = 0
        world.share(world.names)
        for name in world.names:
            trusts_others = name != target
            own = world.devices[name]
            if trusts_others:
                own.check_shares(world.sealed[name])
            else:
                with pytest.raises(UpdateRefused, match="another task"):
                    own.check_shares(world.sealed[name])
        # Should it send its vector nevertheless: it confirms to nobody, and answers nothing.
        with pytest.raises(UpdateRefused, match="0 neighbours confirm"):
            world.answer(target, world.names)
        # Its neighbours answer for each other, in either way, and have no share of either secret of it.
        for arrived in (world.names, others):
            confirmed = world.confirmed(others, arrived)
            assert all(target not in world.answer(name, arrived, confirmed) for name in others)
        # All self seeds, were they known, leave the masks of its pairs.
        total = world.masked_sum(world.names)
        for name in world.names:
            session = SESSION if name == target else elsewhere
            key = self_mask_key(world.secrets[name].self_seed, roster_digest(session, world.names))
            total = Masks([(key, -1)], BITS).add_to(total)
        assert (total == world.values[target]).sum() <= 1

    @pytest.mark.parametrize(("threshold", "colluding"), [(0, 0), (3, 0), (8, 0), (4, 1), (5, 3)])
    def test_a_threshold_that_opens_both_secrets_or_cannot_be_reached_is_refused(
        self, threshold: int, colluding: int
    ) -> None:
        world = self._world()
        with pytest.raises(UpdateRefused, match="threshold"):
            Circle(SESSION, "w000", world.circle("w000").neighbours, world.points, threshold, colluding)

    def test_a_sum_of_two_is_refused(self) -> None:
        world = self._world()
        with pytest.raises(UpdateRefused, match="joins secure sums of 3 at least"):
            world.circle("w000").within({"w000", "w001"})

    @pytest.mark.parametrize("point", [0, 2, 1 << 32])
    def test_places_that_no_round_has_are_refused(self, point: int) -> None:
        world = self._world()
        world.points["w000"] = point
        with pytest.raises(UpdateRefused, match="places"):
            world.circle("w000")

    def test_the_text_of_secrets_tells_nothing(self) -> None:
        assert repr(Secrets(bytes(range(32)))) == "Secrets()"


@given(
    count=st.one_of(st.integers(2, 130), st.sampled_from([256, 999])),
    seed=st.integers(0, 1000),
    wanted=st.sampled_from([0, 4, 6, 50]),
)
@settings(max_examples=30)
def test_neighbours_are_mutual_and_as_many_as_the_degree_says(count: int, seed: int, wanted: int) -> None:
    names = [str(number) for number in range(count)]
    graph = neighbours(names, np.random.default_rng(seed), wanted)
    assert {len(around) for around in graph.values()} == {degree_of(count, wanted)}
    assert degree_of(count, wanted) == min(count - 1, wanted or degree_of(count))
    assert all(name in graph[other] and other != name for name in names for other in graph[name])
    assert len({len(set(around)) for around in graph.values()}) == 1


@given(degree=st.integers(2, 200), share=st.floats(0, 1))
def test_honest_neighbours_never_make_two_thresholds_with_those_who_answer_twice(
    degree: int, share: float
) -> None:
    colluding = int(share * degree / 2)
    threshold = threshold_of(degree, colluding)
    honest = degree - colluding
    assert 2 * threshold > honest + 2 * colluding
    assert threshold <= degree
