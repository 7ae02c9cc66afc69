"""One secure sum as the aggregator plays it: `step(round, event) -> (round, effects)`.

The rule: `step` changes nothing but returns a new `SecureRound`; an event that the phase does not allow raises,
and nothing has happened. The same events in the same order give the same round, so a round is recovered from its
events. The roster is stored before anybody is told it, and so is the set of updates that count before anybody is
asked about it.

    SHARING --all shared, or TimeUp--> MASKING --all arrived, or TimeUp--> CONFIRMING --> ANSWERING --> ANSWERED
       |                                  |                                    |              |
       +----------------------------------+---- fewer than a threshold --------+--------------+--> ABANDONED

Who counts always has a threshold of neighbours who count: `settled` leaves out others until that holds for all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import TypeAlias

from fedgrpc.errors import RoundClosed, UpdateRefused
from fedgrpc.privacy import shamir
from fedgrpc.privacy.one_time_keys import PublicKeys
from fedgrpc.privacy.secure_sum import CONFIRMATION_BYTES, LEAST_NEIGHBOURS, SEALED_BYTES
from fedgrpc.privacy.unmasking import Unmasking

# What one device sends in a phase: bytes for some of its neighbours, by their names.
Parts: TypeAlias = Mapping[str, bytes]
_NO_PARTS: Mapping[str, Parts] = MappingProxyType({})


class SecurePhase(Enum):
    """Phase of a secure sum: what devices are expected to send."""

    SHARING = 1
    MASKING = 2
    CONFIRMING = 3
    ANSWERING = 4
    ANSWERED = 5
    ABANDONED = 6


@dataclass(frozen=True)
class Shared:
    """`name` deposited sealed shares, one for each of its neighbours."""

    name: str
    boxes: Parts


@dataclass(frozen=True)
class Arrived:
    """The masked update of `name` is here, durably."""

    name: str


@dataclass(frozen=True)
class Withdrawn:
    """No update of `name` counts any more, or it sends none. Too late once devices were asked about it."""

    name: str


@dataclass(frozen=True)
class Confirmed:
    """`name` proved to its neighbours which question it was asked."""

    name: str
    proofs: Parts


@dataclass(frozen=True)
class Answered:
    """`name` answered the question with one share for each neighbour that it could."""

    name: str
    shares: Parts


@dataclass(frozen=True)
class TimeUp:
    """The time of `phase` is over; nothing happens if the round has left it by then."""

    phase: SecurePhase


Event: TypeAlias = Shared | Arrived | Withdrawn | Confirmed | Answered | TimeUp


@dataclass(frozen=True)
class TellRoster:
    """Store `roster`, then tell its devices, each with the shares that are sealed to it (`boxes_for`)."""

    roster: frozenset[str]


@dataclass(frozen=True)
class Ask:
    """Store `arrived`, then ask its devices to confirm that they were asked about it."""

    arrived: frozenset[str]


@dataclass(frozen=True)
class PassOn:
    """Hand `devices` the confirmations of their neighbours (`proofs_for`), upon which they answer."""

    devices: frozenset[str]


@dataclass(frozen=True)
class Unmask:
    """Take the masks from the sum of the updates that arrived, with `answers`."""

    arrived: frozenset[str]
    answers: Mapping[str, Parts]


@dataclass(frozen=True)
class Abandon:
    """The sum cannot be had, for `reason`; nothing of it is told to anybody."""

    reason: str


Effect: TypeAlias = TellRoster | Ask | PassOn | Unmask | Abandon


@dataclass(frozen=True)
class SecureRound:
    """One secure sum, as far as it has come. `parts` are what devices sent, by phase and sender.

    `graph` names the neighbours of each device of the round, which is mutual. `least` updates are to be in a sum.
    """

    session: bytes
    keys: Mapping[str, PublicKeys]
    graph: Mapping[str, tuple[str, ...]]
    points: Mapping[str, int]
    thresholds: Mapping[str, int]
    least: int = LEAST_NEIGHBOURS + 1
    phase: SecurePhase = SecurePhase.SHARING
    boxes: Mapping[str, Parts] = field(default_factory=lambda: _NO_PARTS)
    roster: frozenset[str] = frozenset()
    uploaded: frozenset[str] = frozenset()
    # Those of `uploaded` who count, once that is fixed.
    arrived: frozenset[str] = frozenset()
    proofs: Mapping[str, Parts] = field(default_factory=lambda: _NO_PARTS)
    answers: Mapping[str, Parts] = field(default_factory=lambda: _NO_PARTS)
    # Those who have enough confirmations to answer.
    able: frozenset[str] = frozenset()
    # Those who withdrew before the roster was fixed, and are not on it.
    withdrawn: frozenset[str] = frozenset()

    def boxes_for(self, name: str) -> dict[str, bytes]:
        """Return the shares that are sealed to `name`, by sender, of the roster alone."""
        return _addressed_to(name, self.boxes, self.roster)

    def proofs_for(self, name: str) -> dict[str, bytes]:
        """Return the confirmations for `name`, by sender."""
        return _addressed_to(name, self.proofs, self.arrived)

    @property
    def unmasking(self) -> Unmasking:
        """The round as it is unmasked: neighbours are those of the roster."""
        graph = {name: tuple(other for other in self.graph[name] if other in self.roster) for name in self.roster}
        return Unmasking(self.session, self.keys, graph, self.points, self.thresholds)


def step(round_: SecureRound, event: Event) -> tuple[SecureRound, tuple[Effect, ...]]:
    """Apply one event.

    What a device sent before changes nothing when it comes again, in any phase. Raises UpdateRefused for what does
    not fit, and for a second message that differs; RoundClosed for what comes too late.
    """
    match event:
        case Shared():
            return _shared(round_, event)
        case Arrived():
            return _arrived(round_, event)
        case Withdrawn(name) if round_.phase is SecurePhase.SHARING:
            return _end_sharing_early(replace(round_, withdrawn=round_.withdrawn | {name}))
        case Withdrawn(name):
            _check_phase(round_, SecurePhase.MASKING, name in round_.roster)
            return replace(round_, uploaded=round_.uploaded - {name}), ()
        case Confirmed():
            return _confirmed(round_, event)
        case Answered():
            return _answered(round_, event)
        case TimeUp(phase):
            ends = _PHASE_ENDS.get(phase) if phase is round_.phase else None
            return ends(round_) if ends else (round_, ())


def settled(
    names: Collection[str], graph: Mapping[str, Iterable[str]], thresholds: Mapping[str, int]
) -> frozenset[str]:
    """Return the largest part of `names` in which each has a threshold of its neighbours."""
    left = set(names)
    while lonely := {name for name in left if len(left.intersection(graph[name])) < thresholds[name]}:
        left -= lonely
    return frozenset(left)


_Step: TypeAlias = tuple[SecureRound, tuple[Effect, ...]]


def _shared(round_: SecureRound, event: Shared) -> _Step:
    if _known(round_.boxes, event.name, event.boxes):
        return round_, ()
    _check_phase(round_, SecurePhase.SHARING, event.name in round_.graph)
    if event.boxes.keys() != set(round_.graph[event.name]) or not _sized(event.boxes, SEALED_BYTES):
        raise UpdateRefused(f"{event.name!r} did not seal shares for exactly its neighbours")
    round_ = replace(round_, boxes=_with(round_.boxes, event.name, event.boxes))
    return _end_sharing_early(round_)


def _end_sharing_early(round_: SecureRound) -> _Step:
    """End the phase once nobody's shares are waited for."""
    return (round_, ()) if round_.graph.keys() - round_.boxes.keys() - round_.withdrawn else _end_sharing(round_)


def _end_sharing(round_: SecureRound) -> _Step:
    roster = settled(round_.boxes.keys() - round_.withdrawn, round_.graph, round_.thresholds)
    if len(roster) < round_.least:
        return _abandoned(round_, f"{len(roster)} devices have shared and can be in a sum", round_.least)
    return replace(round_, phase=SecurePhase.MASKING, roster=roster), (TellRoster(roster),)


def _arrived(round_: SecureRound, event: Arrived) -> _Step:
    if event.name in round_.uploaded:
        return round_, ()
    _check_phase(round_, SecurePhase.MASKING, event.name in round_.roster)
    round_ = replace(round_, uploaded=round_.uploaded | {event.name})
    return _end_masking(round_) if round_.uploaded == round_.roster else (round_, ())


def _end_masking(round_: SecureRound) -> _Step:
    arrived = settled(round_.uploaded, round_.graph, round_.thresholds)
    if len(arrived) < round_.least:
        return _abandoned(round_, f"{len(arrived)} masked updates can be in a sum", round_.least)
    asked = replace(round_, phase=SecurePhase.CONFIRMING, arrived=arrived)
    reason = _missing(asked, arrived)
    return _abandoned(asked, reason) if reason else (asked, (Ask(arrived),))


def _confirmed(round_: SecureRound, event: Confirmed) -> _Step:
    if _known(round_.proofs, event.name, event.proofs):
        return round_, ()
    _check_phase(round_, SecurePhase.CONFIRMING, event.name in round_.arrived)
    wanted = round_.arrived.intersection(round_.graph[event.name])
    if event.proofs.keys() != wanted or not _sized(event.proofs, CONFIRMATION_BYTES):
        raise UpdateRefused(f"{event.name!r} did not confirm to exactly its neighbours in the sum")
    round_ = replace(round_, proofs=_with(round_.proofs, event.name, event.proofs))
    return _end_confirming(round_) if round_.proofs.keys() == round_.arrived else (round_, ())


def _end_confirming(round_: SecureRound) -> _Step:
    able = frozenset(
        name
        for name in round_.proofs
        if len(round_.proofs.keys() & set(round_.graph[name])) >= round_.thresholds[name]
    )
    reason = _missing(round_, able)
    if reason:
        return _abandoned(round_, reason)
    return replace(round_, phase=SecurePhase.ANSWERING, able=able), (PassOn(able),)


def _answered(round_: SecureRound, event: Answered) -> _Step:
    if _known(round_.answers, event.name, event.shares):
        return round_, ()
    _check_phase(round_, SecurePhase.ANSWERING, event.name in round_.able)
    around = round_.roster.intersection(round_.graph[event.name])
    if not event.shares.keys() <= around or not _sized(event.shares, shamir.SHARE_BYTES):
        raise UpdateRefused(f"{event.name!r} did not answer for its neighbours")
    round_ = replace(round_, answers=_with(round_.answers, event.name, event.shares))
    return _end_answering(round_) if round_.answers.keys() == round_.able else (round_, ())


def _end_answering(round_: SecureRound) -> _Step:
    reason = _missing(round_, round_.answers.keys())
    if reason:
        return _abandoned(round_, reason)
    return replace(round_, phase=SecurePhase.ANSWERED), (Unmask(round_.arrived, round_.answers),)


def _missing(round_: SecureRound, answering: AbstractSet[str]) -> str:
    """Return why the masks could not be taken away if `answering` answered, else ""."""
    for name in sorted(round_.roster):
        around = round_.roster.intersection(round_.graph[name])
        # One who dropped out and has no neighbour in the sum has no mask in it either.
        if name not in round_.arrived and not around & round_.arrived:
            continue
        if len(around & answering) < round_.thresholds[name]:
            return f"{len(around & answering)} can answer for {name!r}, fewer than {round_.thresholds[name]}"
    return ""


def _abandoned(round_: SecureRound, reason: str, least: int = 0) -> _Step:
    reason = f"{reason}, fewer than {least}" if least else reason
    return replace(round_, phase=SecurePhase.ABANDONED), (Abandon(f"the secure sum is abandoned: {reason}"),)


def _check_phase(round_: SecureRound, phase: SecurePhase, named: bool) -> None:
    if round_.phase is not phase:
        raise RoundClosed(f"this secure sum takes no such message: it is {round_.phase.name.lower()}")
    if not named:
        raise UpdateRefused("this device has no part in this phase of the secure sum")


def _known(sent: Mapping[str, Parts], name: str, parts: Parts) -> bool:
    if name in sent and sent[name] != parts:
        raise UpdateRefused(f"{name!r} sent something else before, and each device is heard once")
    return name in sent


def _sized(parts: Parts, size_bytes: int) -> bool:
    return all(len(part) == size_bytes for part in parts.values())


def _with(sent: Mapping[str, Parts], name: str, parts: Parts) -> Mapping[str, Parts]:
    return MappingProxyType({**sent, name: MappingProxyType(dict(parts))})


def _addressed_to(name: str, sent: Mapping[str, Parts], senders: AbstractSet[str]) -> dict[str, bytes]:
    return {sender: parts[name] for sender, parts in sent.items() if sender in senders and name in parts}


_PHASE_ENDS = {
    SecurePhase.SHARING: _end_sharing,
    SecurePhase.MASKING: _end_masking,
    SecurePhase.CONFIRMING: _end_confirming,
    SecurePhase.ANSWERING: _end_answering,
}
