"""The release of a model version to devices: first to canaries, then to the rest, or back. Pure.

    CANARY        the canaries serve the version to their applications, and report scores
    ROLLOUT       every device does
    DONE          it is what every device serves
    ROLLED_BACK   reports were bad, or too few in time: every device serves again what it served before
    ABORTED       an operator said so; the same

The rule: `step` is the only way to change. It gives the same release for the same event and time, whichever
process asks, so a release outlives the processes on both sides. Times are of the aggregator's wall clock, in
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

from fedgrpc.errors import IllegalTransition, UsageError
from fedgrpc.runs.conditions import Condition, Judgement, Verdict, judge

MAX_CONDITIONS: Final = 16
MAX_AFTER_S: Final = 90 * 86_400.0
# Devices look this many times at their own data while they are watched.
_LOOKS: Final = 4
# So many devices a message names.
_NAMED: Final = 5
_SHORTEST_INTERVAL_S: Final = 0.5
_LONGEST_INTERVAL_S: Final = 3600.0


class ReleasePhase(Enum):
    """Phase of a release. The numbers are stored, and those of the message."""

    CANARY = 1
    ROLLOUT = 2
    DONE = 3
    ROLLED_BACK = 4
    ABORTED = 5

    @property
    def active(self) -> bool:
        """True until the release has ended."""
        return self in (ReleasePhase.CANARY, ReleasePhase.ROLLOUT)


@dataclass(frozen=True)
class DeviceReport:
    """Word of one device that has the version: its scores, or why it cannot use it; first told at `since`."""

    since: float
    scores: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    failure: str = ""


@dataclass(frozen=True)
class Release:
    """One release. `previous` is the version that devices go back to; 0: the one that they train on.

    The canaries are watched for `after_s` from when more than half of them have reported, and so are all devices
    afterwards. Where the canaries have not decided within `within_s`, the release is rolled back.
    """

    number: int
    version: int
    canaries: frozenset[str]
    conditions: tuple[Condition, ...]
    after_s: float
    within_s: float
    started_at: float
    previous: int = 0
    started_by: str = ""
    phase: ReleasePhase = ReleasePhase.CANARY
    entered_at: float = 0.0
    reason: str = ""
    reports: Mapping[str, DeviceReport] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if not self.canaries:
            raise UsageError(
                "a release needs a device to begin with, and none is known that trains: start workers with --stay"
            )
        if len(self.conditions) > MAX_CONDITIONS:
            raise UsageError(f"a release has at most {MAX_CONDITIONS} conditions, not {len(self.conditions)}")
        if not 0 < self.after_s <= MAX_AFTER_S:
            raise UsageError(f"after must be from above 0 to {MAX_AFTER_S:g} s, not {self.after_s:g}")
        if not self.after_s < self.within_s <= 2 * MAX_AFTER_S:
            raise UsageError(f"within must be longer than after, {self.after_s:g} s, not {self.within_s:g}")

    @property
    def quorum(self) -> int:
        """Number of canaries that decide: more than half of them."""
        return len(self.canaries) // 2 + 1

    @property
    def score_interval_s(self) -> float:
        """Seconds between two scores of one device."""
        return min(max(self.after_s / _LOOKS, _SHORTEST_INTERVAL_S), _LONGEST_INTERVAL_S)

    def serves(self, device: str) -> bool:
        """Return whether the device is to serve the version now."""
        first = self.phase is ReleasePhase.CANARY and device in self.canaries
        return first or self.phase in (ReleasePhase.ROLLOUT, ReleasePhase.DONE)

    @property
    def watched_since(self) -> float | None:
        """Time from which a quorum of canaries was watched; None: there is no quorum yet."""
        times = sorted(report.since for name, report in self.reports.items() if name in self.canaries)
        return times[self.quorum - 1] if len(times) >= self.quorum else None

    @property
    def judgement(self) -> Judgement:
        """Judgement of the release from the reports so far."""
        heard = list(self.reports.values())
        quorum = max(self.quorum, len(heard) // 2 + 1 if self.phase is ReleasePhase.ROLLOUT else 0)
        scores = [report.scores for report in heard if not report.failure]
        return judge(self.conditions, scores, len(heard) - len(scores), quorum)

    @property
    def next_at(self) -> float:
        """Time at which the release changes without any event but the time; infinite: never."""
        if not self.phase.active:
            return math.inf
        if self.phase is ReleasePhase.ROLLOUT:
            return self.entered_at + self.after_s
        if self.watched_since is None or self.judgement.verdict is not Verdict.GOOD:
            return self.entered_at + self.within_s
        return self.watched_since + self.after_s


@dataclass(frozen=True)
class Reported:
    """A device that serves the version has scored it, or cannot use it."""

    device: str
    scores: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    failure: str = ""


@dataclass(frozen=True)
class DeviceGone:
    """A device may take part no more: it was revoked, renamed or forgotten."""

    device: str


@dataclass(frozen=True)
class TimePassed:
    """Time has passed."""


@dataclass(frozen=True)
class AbortAsked:
    """An operator ends the release."""

    reason: str


ReleaseEvent = Reported | DeviceGone | TimePassed | AbortAsked


def step(release: Release, event: ReleaseEvent, now: float) -> Release:
    """Return the release after an event. Raises `IllegalTransition` for one that has ended."""
    if not release.phase.active:
        raise IllegalTransition(f"release {release.number} has ended: {release.phase.name.lower()}")
    return _settled(_HANDLERS[type(event)](release, event, now), now)


def _report(release: Release, event: Reported, now: float) -> Release:
    if not release.serves(event.device):
        return release
    known = release.reports.get(event.device)
    report = DeviceReport(now if known is None else known.since, event.scores, event.failure)
    return replace(release, reports=MappingProxyType({**release.reports, event.device: report}))


def _forget(release: Release, event: DeviceGone, now: float) -> Release:
    reports = {name: report for name, report in release.reports.items() if name != event.device}
    canaries = release.canaries - {event.device}
    if not canaries:
        return _ended(release, ReleasePhase.ROLLED_BACK, "no canary is left", now)
    return replace(release, canaries=canaries, reports=MappingProxyType(reports))


def _abort(release: Release, event: AbortAsked, now: float) -> Release:
    return _ended(release, ReleasePhase.ABORTED, event.reason or "aborted by an operator", now)


def _settled(release: Release, now: float) -> Release:
    """Return the release in the phase that its reports and the time ask for."""
    if not release.phase.active:
        return release
    judgement = release.judgement
    if judgement.verdict is Verdict.BAD:
        return _ended(release, ReleasePhase.ROLLED_BACK, judgement.reason, now)
    if now < release.next_at:
        return release
    if release.phase is ReleasePhase.ROLLOUT:
        return _ended(release, ReleasePhase.DONE, release.reason, now)
    if judgement.verdict is Verdict.GOOD:
        return replace(release, phase=ReleasePhase.ROLLOUT, entered_at=now, reason=judgement.reason)
    return _ended(release, ReleasePhase.ROLLED_BACK, f"{judgement.reason}, and the time is over", now)


def _ended(release: Release, phase: ReleasePhase, reason: str, now: float) -> Release:
    return replace(release, phase=phase, reason=reason, entered_at=now)


_HANDLERS: Mapping[type, Callable[..., Release]] = {
    Reported: _report,
    DeviceGone: _forget,
    TimePassed: lambda release, event, now: release,
    AbortAsked: _abort,
}


@dataclass(frozen=True)
class Wanted:
    """Version that a device is to serve to its applications, and the release that says so.

    `score_interval_s`: score it that often, and report; None: do not. `without_scores`: report without scoring.
    """

    version: int
    release: int
    score_interval_s: float | None = None
    without_scores: bool = False


@dataclass(frozen=True)
class Releases:
    """The releases of one run: the last that was done, and the one in progress."""

    done: Release | None = None
    active: Release | None = None

    def wanted(self, device: str) -> Wanted | None:
        """Return what the device is to serve; None: the version that it trains on."""
        active = self.active
        if active is not None and active.serves(device):
            return Wanted(active.version, active.number, active.score_interval_s)
        return None if self.done is None else Wanted(self.done.version, self.done.number)

    @property
    def versions(self) -> frozenset[int]:
        """Versions that devices may ask for: none of them may be let go."""
        return frozenset(each.version for each in (self.done, self.active) if each is not None)

    def with_release(self, release: Release) -> Releases:
        """Return these with a release as it is now."""
        if release.phase.active:
            return replace(self, active=release)
        done = release if release.phase is ReleasePhase.DONE else self.done
        return Releases(done, None)


def canaries_of(devices: list[str], canary: str, rank: Callable[[str], float]) -> frozenset[str]:
    """Choose the canaries: "10%" or "3" of the devices, those of the least `rank`, or the devices "pi-1,pi-2".

    Raises `UsageError`.
    """
    text = canary.strip()
    ranked = sorted(devices, key=lambda device: (rank(device), device))
    if text.endswith("%"):
        share = _number(text[:-1], canary) / 100
        if not 0 < share <= 1:
            raise UsageError(f"canary must be above 0% and at most 100%, not {canary[:80]!r}")
        return frozenset(ranked[: math.ceil(share * len(ranked))])
    if text.isdigit():
        count = int(_number(text, canary))
        if not 1 <= count <= len(ranked):
            raise UsageError(f"canary must be from 1 to the number of devices, {len(ranked)}, not {count}")
        return frozenset(ranked[:count])
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    if unknown := sorted(names - set(devices)):
        known = f"it has {', '.join(sorted(devices)[:_NAMED])}" if devices else "it has none"
        raise UsageError(f"{unknown[0][:80]!r} is no device of this run that is alive; {known}")
    return names


def _number(text: str, canary: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"canary looks like 10%, 3 or pi-1,pi-2, not {canary[:80]!r}")
    return value
