"""Secure sums of the aggregator's machine and the devices' memories: deaths anywhere, replays, bad questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgrpc.codec.layout import Array
from fedgrpc.errors import FedgrpcError, RoundClosed, UpdateRefused
from fedgrpc.privacy.neighbours import neighbours, threshold_of
from fedgrpc.privacy.one_time_keys import Secrets
from fedgrpc.privacy.secure_round import (
    Abandon,
    Answered,
    Arrived,
    Ask,
    Confirmed,
    Event,
    PassOn,
    SecurePhase,
    SecureRound,
    Shared,
    TellRoster,
    TimeUp,
    Unmask,
    settled,
    step,
)
from fedgrpc.privacy.secure_sum import Circle
from fedgrpc.privacy.secure_task import MAX_KEYS, KeyRing, SecureTask

BITS = 20


def opened(count: int, seed: int) -> tuple[SecureRound, dict[str, SecureTask]]:
    """Return a round of `count` devices as it begins, and the devices' sides of it."""
    rng = Random(seed)
    names = [f"w{number:02}" for number in range(count)]
    secrets = {name: Secrets(rng.randbytes(32)) for name in names}
    graph = neighbours(names, np.random.default_rng(seed))
    round_ = SecureRound(
        session=b"run 1, round 4",
        keys={name: secrets[name].public for name in names},
        graph=graph,
        points={name: place for place, name in enumerate(names, start=1)},
        thresholds={name: threshold_of(len(graph[name])) for name in names},
    )
    return round_, {name: SecureTask(_circle(round_, name), secrets[name]) for name in names}


def _circle(round_: SecureRound, name: str) -> Circle:
    around = {other: round_.keys[other] for other in round_.graph[name]}
    return Circle(round_.session, name, around, round_.points, round_.thresholds[name])


@dataclass
class World:
    """One secure sum in which devices die for good by chance, and messages come twice."""

    count: int
    seed: int
    death: float
    log: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.round, self.tasks = opened(self.count, self.seed)
        self.first = self.round
        values = np.random.default_rng(self.seed)
        self.values = {name: values.integers(0, 1 << 12, 30, dtype=np.uint64) for name in self.tasks}
        self.masked: dict[str, Array] = {}
        self.result: Unmask | Abandon | None = None

    def play(self) -> Unmask | Abandon:
        living = self._living(self.tasks)
        effects = self._send(Shared(name, self.tasks[name].sealed_shares()) for name in living)
        while True:
            match effects[-1]:
                case TellRoster(roster):
                    living = self._living(set(living) & roster)
                    effects = self._send([self._mask(name, roster) for name in living])
                case Ask(arrived):
                    living = self._living(set(living) & arrived)
                    effects = self._send([self._confirm(name, arrived) for name in living])
                case PassOn(devices):
                    living = self._living(set(living) & devices)
                    effects = self._send(
                        Answered(name, self.tasks[name].answer(self.round.proofs_for(name))) for name in living
                    )
                case result:
                    assert isinstance(result, Unmask | Abandon)
                    return result

    def unmasked(self, result: Unmask) -> Array:
        total = np.sum([self.masked[name].astype(np.uint64) for name in result.arrived], axis=0)
        return self.round.unmasking.masks(result.arrived, result.answers, BITS).add_to(total)

    def plain(self, result: Unmask) -> Array:
        return np.sum([self.values[name] for name in result.arrived], axis=0) % np.uint64(1 << BITS)

    def _living(self, names: Collection[str]) -> list[str]:
        return [name for name in sorted(names) if self.rng.random() >= self.death]

    def _send(self, events: Collection[Event] | object) -> list[object]:
        effects: list[object] = []
        for event in [*events, TimeUp(self.round.phase)]:  # type: ignore[misc]
            if isinstance(event, TimeUp) and effects:
                break
            effects += self._apply(event)
            # The network delivers what it likes a second time.
            if self.rng.random() < 0.3 and not isinstance(event, TimeUp):
                assert not self._apply(event)
        return effects

    def _apply(self, event: Event) -> tuple[object, ...]:
        self.log.append(event)
        self.round, effects = step(self.round, event)
        return effects

    def _mask(self, name: str, roster: frozenset[str]) -> Event:
        task = self.tasks[name].with_roster(roster, self.round.boxes_for(name))
        self.masked[name] = task.masks(BITS).add_to(self.values[name])
        self.tasks[name] = task.with_masked(sha256(self.masked[name].tobytes()).digest())
        return Arrived(name)

    def _confirm(self, name: str, arrived: frozenset[str]) -> Event:
        self.tasks[name] = self.tasks[name].with_question(arrived)
        return Confirmed(name, self.tasks[name].confirmations())


@given(count=st.integers(3, 12), seed=st.integers(0, 10_000), death=st.sampled_from([0.0, 0.05, 0.1, 0.3]))
@settings(max_examples=30, deadline=None)
def test_whoever_dies_the_sum_is_that_of_those_who_count_or_the_round_is_abandoned(
    count: int, seed: int, death: float
) -> None:
    world = World(count, seed, death)
    result = world.play()
    if isinstance(result, Abandon):
        assert death > 0
        assert "abandoned" in result.reason
        assert world.round.phase is SecurePhase.ABANDONED
        return
    assert len(result.arrived) > threshold_of(count - 1)
    assert np.array_equal(world.unmasked(result), world.plain(result))


@pytest.mark.faults
@pytest.mark.parametrize(("count", "death"), [(64, 0.1), (256, 0.08)])
def test_large_rounds_in_which_devices_die_at_every_phase_have_the_plain_sum(count: int, death: float) -> None:
    world = World(count, seed=count, death=death)
    result = world.play()
    assert isinstance(result, Unmask)
    assert np.array_equal(world.unmasked(result), world.plain(result))


def test_nothing_that_a_device_sends_besides_its_masked_update_depends_on_the_update() -> None:
    worlds = [World(6, seed=3, death=0.0) for _ in range(2)]
    worlds[1].values["w02"] = worlds[1].values["w02"] * np.uint64(7)
    results = [world.play() for world in worlds]
    assert worlds[0].log == worlds[1].log
    assert results[0] == results[1]
    assert not np.array_equal(worlds[0].masked["w02"], worlds[1].masked["w02"])


@given(count=st.integers(3, 8), seed=st.integers(0, 1000), death=st.sampled_from([0.0, 0.1]))
@settings(max_examples=10, deadline=None)
def test_a_round_is_recovered_from_its_events(count: int, seed: int, death: float) -> None:
    world = World(count, seed, death)
    result = world.play()
    again, effects = world.first, ()
    for event in world.log:
        again, told = step(again, event)
        effects = (*effects, *told)
    assert again == world.round
    assert effects[-1] == result


def test_a_round_of_three_takes_all_of_them() -> None:
    round_, tasks = opened(3, seed=1)
    for name in ("w00", "w01"):
        round_, _ = step(round_, Shared(name, tasks[name].sealed_shares()))
    assert step(round_, TimeUp(SecurePhase.MASKING)) == (round_, ())
    round_, effects = step(round_, TimeUp(SecurePhase.SHARING))
    assert effects == (
        Abandon("the secure sum is abandoned: 0 devices have shared and can be in a sum, fewer than 3"),
    )
    assert step(round_, TimeUp(SecurePhase.SHARING)) == (round_, ())


def test_who_has_too_few_neighbours_is_left_out_and_so_are_those_who_counted_on_it() -> None:
    ring = {"a": ("b", "c"), "b": ("a", "c"), "c": ("a", "b", "d"), "d": ("c", "e"), "e": ("d",)}
    thresholds = {"a": 2, "b": 2, "c": 2, "d": 2, "e": 1}
    assert settled("abcde", ring, thresholds) == frozenset("abcde")
    assert settled("abcd", ring, thresholds) == frozenset("abc")
    assert settled("bcde", ring, thresholds) == frozenset()


class TestMessagesThatAreRefused:
    def test_shares_for_others_than_the_neighbours(self) -> None:
        round_, tasks = opened(4, seed=1)
        boxes = tasks["w00"].sealed_shares()
        for wrong in ({}, {"w01": boxes["w01"]}, boxes | {"w09": boxes["w01"]}, dict.fromkeys(boxes, b"short")):
            with pytest.raises(UpdateRefused, match="exactly its neighbours"):
                step(round_, Shared("w00", wrong))

    def test_a_second_message_that_differs(self) -> None:
        round_, tasks = opened(4, seed=1)
        boxes = tasks["w00"].sealed_shares()
        round_, _ = step(round_, Shared("w00", boxes))
        with pytest.raises(UpdateRefused, match="something else before"):
            step(round_, Shared("w00", boxes | {"w01": bytes(len(boxes["w01"]))}))

    def test_devices_of_other_rounds(self) -> None:
        round_, _ = opened(4, seed=1)
        with pytest.raises(UpdateRefused, match="no part"):
            step(round_, Shared("stranger", {}))

    def test_updates_before_the_roster_is_fixed(self) -> None:
        round_, _ = opened(4, seed=1)
        with pytest.raises(RoundClosed, match="sharing"):
            step(round_, Arrived("w00"))

    def test_messages_of_an_abandoned_round(self) -> None:
        round_, _ = step(opened(4, seed=1)[0], TimeUp(SecurePhase.SHARING))
        for event in (Arrived("w00"), Confirmed("w00", {}), Answered("w00", {})):
            with pytest.raises(RoundClosed, match="abandoned"):
                step(round_, event)

    def test_answers_about_devices_who_are_no_neighbours(self) -> None:
        world = World(4, seed=1, death=0)
        world.play()
        answering = replace(world.round, phase=SecurePhase.ANSWERING, answers={})
        for wrong in ({"w09": bytes(33)}, {"w01": bytes(10_000)}):
            with pytest.raises(UpdateRefused, match="did not answer for its neighbours"):
                step(answering, Answered("w00", wrong))


@given(seed=st.integers(0, 100_000))
@settings(max_examples=40, deadline=None)
def test_messages_in_any_order_and_of_anybody_are_taken_or_refused_and_never_break_the_round(seed: int) -> None:
    rng = Random(seed)
    played = World(4, seed=1, death=0.0)
    played.play()
    names = [*played.tasks, "stranger"]
    parts = [event.boxes for event in played.log if isinstance(event, Shared)]
    parts += [event.proofs for event in played.log if isinstance(event, Confirmed)]
    parts += [event.shares for event in played.log if isinstance(event, Answered)]
    parts += [{}, {"stranger": b""}]
    strange = [
        kind(rng.choice(names), rng.choice(parts)) for kind in (Shared, Confirmed, Answered) for _ in range(10)
    ]
    strange += [Arrived(rng.choice(names)), TimeUp(rng.choice(list(SecurePhase)))]
    round_, ends = played.first, []
    # The round's own messages run through, so that the strange ones meet every phase.
    for event in [each for own in played.log for each in (*rng.sample(strange, 3), own)]:
        before = round_
        try:
            round_, effects = step(round_, event)
        except (UpdateRefused, RoundClosed):
            effects = ()
            assert round_ is before
        ends += [effect for effect in effects if isinstance(effect, Unmask | Abandon)]
    assert len(ends) <= 1
    assert round_.phase.value >= before.phase.value


class AdversarialDevice:
    """A device asked at will, which dies before or after it stores; it notes what it sent."""

    def __init__(self, task: SecureTask, rng: Random) -> None:
        self.stored, self.rng = task, rng
        self.told: dict[str, set[bytes]] = defaultdict(set)
        self.rosters: set[frozenset[str]] = set()
        self.questions: set[frozenset[str]] = set()
        self.updates: set[bytes] = set()
        self.boxes: set[bytes] = set()

    def _store(self, task: SecureTask) -> bool:
        """Return whether the device lives to send what follows. It may die before or after the value is stored."""
        dies = self.rng.random()
        if dies >= 0.15:
            self.stored = task
        return dies >= 0.3

    def share(self) -> None:
        self.boxes.add(b"".join(box for _, box in sorted(self.stored.sealed_shares().items())))

    def tell_roster(self, roster: Collection[str], sealed: Mapping[str, bytes]) -> None:
        task = self.stored.with_roster(frozenset(roster), sealed)
        if self._store(task):
            self.rosters.add(task.roster or frozenset())

    def mask(self) -> None:
        values = np.random.default_rng(self.rng.getrandbits(32)).integers(0, 1 << BITS, 8, dtype=np.uint64)
        masked = self.stored.masks(BITS).add_to(values).tobytes()
        if self._store(self.stored.with_masked(sha256(masked).digest())):
            self.updates.add(masked)

    def ask(self, arrived: Collection[str]) -> dict[str, bytes]:
        task = self.stored.with_question(frozenset(arrived))
        if not self._store(task):
            return {}
        self.questions.add(frozenset(arrived))
        return self.stored.confirmations()

    def answer(self, confirmed: Mapping[str, bytes]) -> None:
        for name, share in self.stored.answer(confirmed).items():
            self.told[name].add(share)


@given(seed=st.integers(0, 100_000))
@settings(max_examples=15, deadline=None)
def test_whatever_devices_are_asked_they_never_tell_two_secrets_nor_mask_twice(seed: int) -> None:
    rng = Random(seed)
    _, tasks = opened(5, seed % 7)
    names = sorted(tasks)
    devices = {name: AdversarialDevice(tasks[name], rng) for name in names}
    boxes = {
        name: {other: tasks[other].sealed_shares()[name] for other in names if other != name} for name in names
    }
    proofs: dict[str, dict[str, bytes]] = defaultdict(dict)
    questions = [frozenset(names), frozenset(names[:4]), frozenset(names[1:])]
    for _ in range(150):
        name = rng.choice(names)
        device = devices[name]
        try:
            match rng.randrange(5):
                case 0:
                    device.share()
                case 1:
                    roster = frozenset(names) if rng.random() < 0.8 else rng.choice(questions)
                    device.tell_roster(roster, boxes[name])
                case 2:
                    device.mask()
                case 3:
                    for other, proof in device.ask(rng.choice(questions)).items():
                        proofs[other][name] = proof
                case 4:
                    device.answer(proofs[name])
        except UpdateRefused:
            pass
    for device in devices.values():
        assert all(len(shares) == 1 for shares in device.told.values())
        assert max(map(len, (device.rosters, device.questions, device.updates, device.boxes))) <= 1
    answered = [device.stored.arrived for device in devices.values() if device.told]
    assert len(set(answered)) <= 1


def with_roster(tasks: Mapping[str, SecureTask], name: str, roster: Collection[str] = ()) -> SecureTask:
    """Return the task of a device that is told the roster, of all without one."""
    roster = frozenset(roster or tasks)
    boxes = {other: tasks[other].sealed_shares()[name] for other in roster - {name}}
    return tasks[name].with_roster(roster, boxes)


class TestSecureTask:
    def test_an_update_is_needed_before_a_question_is_answered(self) -> None:
        _, tasks = opened(4, seed=1)
        task = with_roster(tasks, "w00")
        with pytest.raises(UpdateRefused, match="sent no update"):
            task.with_question(frozenset(tasks))

    def test_masks_are_used_once(self) -> None:
        _, tasks = opened(4, seed=1)
        task = with_roster(tasks, "w00").with_masked(bytes(32))
        assert task.with_masked(bytes(32)) == task
        with pytest.raises(UpdateRefused, match="used"):
            task.masks(BITS)
        with pytest.raises(UpdateRefused, match="masked update"):
            task.with_masked(b"\1" * 32)

    @pytest.mark.parametrize("roster", [{"w01", "w02", "w03"}, {"w00", "w01"}])
    def test_a_roster_without_the_device_or_of_too_few_is_refused(self, roster: set[str]) -> None:
        _, tasks = opened(4, seed=1)
        with pytest.raises(UpdateRefused, match=r"roster|neighbours"):
            tasks["w00"].with_roster(roster, {})

    def test_a_device_wants_as_many_in_the_sum_as_its_owner_said(self) -> None:
        _, tasks = opened(6, seed=1)
        names = frozenset(tasks)
        task = replace(tasks["w00"], circle=replace(tasks["w00"].circle, least=5))
        with pytest.raises(UpdateRefused, match="makes 4, and it joins secure sums of 5"):
            task.with_roster(names - {"w01", "w02"}, {})
        masked = with_roster({**tasks, "w00": task}, "w00").with_masked(bytes(32))
        # Enough for the threshold, and for the aggregator.
        with pytest.raises(UpdateRefused, match="3 neighbours are in the sum, fewer than 4"):
            masked.with_question(names - {"w01", "w02"})
        assert masked.with_question(names - {"w01"}).confirmations().keys() == names - {"w00", "w01"}

    def test_a_device_whose_neighbours_were_told_another_task_masks_nothing(self) -> None:
        _, tasks = opened(5, seed=1)
        for name in ("w01", "w02"):
            tasks[name] = replace(tasks[name], circle=replace(tasks[name].circle, session=b"another task"))
        # Two of four are of its task, and three are wanted: one more than half of them.
        with pytest.raises(UpdateRefused, match="2 neighbours can be opened, fewer than 3"):
            with_roster(tasks, "w00")
        tasks["w01"] = replace(tasks["w01"], circle=replace(tasks["w01"].circle, session=b"run 1, round 4"))
        assert with_roster(tasks, "w00").masks(BITS)

    def test_before_the_roster_nothing_is_masked(self) -> None:
        _, tasks = opened(4, seed=1)
        with pytest.raises(UpdateRefused, match="roster"):
            tasks["w00"].masks(BITS)
        with pytest.raises(UpdateRefused, match="roster"):
            tasks["w00"].with_masked(bytes(32))


class TestKeyRing:
    def test_a_key_is_taken_once(self) -> None:
        ring = KeyRing().filled(3, Random(1).randbytes)
        public = ring.unused[1].public
        ring, secrets = ring.take(public)
        assert secrets.public == public
        assert len(ring.unused) == 2
        with pytest.raises(FedgrpcError, match="one-time key"):
            ring.take(public)
        assert len(ring.filled(3, Random(2).randbytes).unused) == 3
        assert ring.filled(1, Random(2).randbytes) == ring

    def test_a_ring_has_an_end(self) -> None:
        assert len(KeyRing().filled(10_000, Random(1).randbytes).unused) == MAX_KEYS
