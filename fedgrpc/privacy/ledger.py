"""The ledger of a run: every release of a version with noise, and what all of them cost one device.

The rule: a release is entered before the noisy version is written, and an entry is never taken back. What was
entered is counted, whether its version came to be or not. So the loss told is never less than the loss there is.

Adjacent are two runs of which one leaves a device out of all sums, of updates and of counts: both choose the same
devices. Where devices are sampled, each by a coin of its own, a run without the device is the same as that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise, takewhile
from types import MappingProxyType

from fedgrpc.errors import UpdateRefused, UsageError
from fedgrpc.privacy.accounting import (
    BandedGaussian,
    Gaussian,
    Mechanism,
    PrivacyLoss,
    SampledGaussian,
    TreeGaussian,
    least_multiplier,
)
from fedgrpc.privacy.adaptive_clip import count_deviation, next_clip_norm, update_multiplier
from fedgrpc.privacy.banded import MOST_BANDS
from fedgrpc.privacy.noise import RoundNoise
from fedgrpc.privacy.policy import MechanismName, PrivacyPolicy


@dataclass(frozen=True)
class ReleaseRules:
    """Rules of every release of a run.

    The noise of a coordinate has the standard deviation `deviation`, in units of the model. `rate`: each device is
    sampled with that chance; None: nothing is assumed of the choice. `clip_quantile`: a noisy count is released
    besides, by which the clip norm follows this quantile; both together have the noise of `noise_multiplier`.
    `bands`: of how many rounds a round's noise is, with "dp-mf".
    """

    mechanism: MechanismName
    noise_multiplier: float
    clip_norm: float
    cohort: int
    min_separation: int = 1
    rate: float | None = None
    clip_quantile: float | None = None
    bands: int = 1

    @property
    def deviation(self) -> float:
        """The standard deviation of a mean's noise: z C / N."""
        multiplier = self.noise_multiplier
        if self.clip_quantile is not None:
            multiplier = update_multiplier(multiplier, self.cohort)
        return multiplier * self.clip_norm / self.cohort

    @property
    def tree(self) -> bool:
        """True if the noise of the releases is that of one tree."""
        return self.mechanism == "dp-ftrl"

    @property
    def joint(self) -> bool:
        """True if releases share noise, so that all of them together are one mechanism."""
        return self.mechanism != "gaussian"

    def noise(self, key: bytes, step: int) -> RoundNoise:
        """Return the noise of the release `step` under a run's noise key."""
        return RoundNoise(key, step, self.tree, self.bands)


@dataclass(frozen=True)
class PrivateRelease:
    """One entry: `step` counts releases from 1. `count` updates are in the sum, whose tokens `updates` digests.

    `next_clip_norm`: that of the rounds after this one.
    """

    step: int
    round: int
    version: int
    count: int
    updates: bytes
    rules: ReleaseRules
    next_clip_norm: float

    def adapted(self, fits: int, noise: RoundNoise) -> PrivateRelease:
        """Return the release with the clip norm that follows from it: `fits` of its updates were not clipped."""
        rules = self.rules
        if rules.clip_quantile is None:
            return self
        added = count_deviation(rules.noise_multiplier, rules.cohort) * noise.of_count()
        norm = next_clip_norm(rules.clip_norm, rules.clip_quantile, fits, self.count, added, rules.cohort)
        return replace(self, next_clip_norm=norm)


def digest_of(tokens: Iterable[str]) -> bytes:
    """Return a digest of a set of updates, by their tokens (16 bytes)."""
    return hashlib.sha256("\n".join(sorted(tokens)).encode()).digest()[:16]


@dataclass(frozen=True)
class Ledger:
    """Releases of a run by `rules`, oldest first, and the step that each device was last chosen for.

    The loss is told at `delta`. No release is affordable that takes it above `target_epsilon`.
    """

    rules: ReleaseRules
    delta: float
    target_epsilon: float | None = None
    releases: tuple[PrivateRelease, ...] = ()
    last_steps: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def next_step(self) -> int:
        """The step of the next release."""
        return len(self.releases) + 1

    def release_of(self, round_number: int, version: int, tokens: Sequence[str]) -> PrivateRelease:
        """Return the release of this sum: the one entered before a crash, else the next one, to be entered.

        The same round with other updates is another release: two sums under one noise would tell their difference.
        So is the same sum over another cohort: noise for a larger one would be too little.
        Raises `UpdateRefused` when it is not affordable any more.
        """
        updates, cohort = digest_of(tokens), self.rules.cohort
        # Entries of one round follow each other.
        for known in takewhile(lambda each: each.round == round_number, reversed(self.releases)):
            if (known.version, known.updates, known.rules.cohort) == (version, updates, cohort):
                return known
        if not self.affordable:
            raise UpdateRefused(f"one more release would cost more than an epsilon of {self.target_epsilon:g}")
        rules = self.rules_of(round_number)
        return PrivateRelease(self.next_step, round_number, version, len(tokens), updates, rules, rules.clip_norm)

    def rules_of(self, round_number: int) -> ReleaseRules:
        """Return the rules of the next release, if it is of this round: of the last entry's, or of a later one."""
        # Its devices have clipped their updates by what they were given, whatever a first entry has made of it.
        if self.releases and self.releases[-1].round == round_number:
            return replace(self.rules, clip_norm=self.releases[-1].rules.clip_norm)
        return self.rules

    def entered(self, release: PrivateRelease) -> Ledger:
        """Return the ledger with one more release."""
        if release.step != self.next_step:
            raise ValueError(f"release {release.step} cannot follow {len(self.releases)} others")
        rules = replace(self.rules, clip_norm=release.next_clip_norm)
        return replace(self, rules=rules, releases=(*self.releases, release))

    def chosen(self, workers: Iterable[str]) -> Ledger:
        """Return the ledger after these devices were chosen for the next release."""
        if self.rules.min_separation == 1:
            return self
        new = dict.fromkeys(workers, self.next_step)
        return replace(self, last_steps=MappingProxyType({**self.last_steps, **new}))

    @property
    def resting(self) -> frozenset[str]:
        """Devices that took part less than `min_separation` releases ago."""
        since = self.next_step - self.rules.min_separation
        return frozenset(worker for worker, step in self.last_steps.items() if self._last_of_round(step) > since)

    def _last_of_round(self, step: int) -> int:
        """Return the last step of the round of that step: the sum that was released may be its second one."""
        for before, after in pairwise(self.releases[max(0, step - 1) :]):
            if before.round != after.round:
                break
            step = after.step
        return step

    def loss(self, more: int = 0) -> PrivacyLoss:
        """Return what all releases, and `more` that follow by the present rules, cost a device."""
        return loss_of([*(release.rules for release in self.releases), *[self.rules] * more])

    def epsilon(self, more: int = 0) -> float:
        """Return that loss at `delta`."""
        return _epsilon(self.loss(more), self.delta)

    @cached_property
    def affordable(self) -> bool:
        """True if one more release keeps to the target."""
        return self.target_epsilon is None or self.epsilon(more=1) <= self.target_epsilon


@lru_cache(maxsize=4096)
def _epsilon(loss: PrivacyLoss, delta: float) -> float:
    return loss.epsilon(delta)


def loss_of(releases: Sequence[ReleaseRules]) -> PrivacyLoss:
    """Return what releases by these rules cost a device, in their order.

    Of independent noise, a device is in those that cost it most, of all that its separation allows. Joint noise
    counts as one mechanism: a run has one, under one noise multiplier.
    """
    joint = [rules for rules in releases if rules.joint]
    mechanisms: list[Mechanism] = _worst([rules for rules in releases if not rules.joint])
    if joint:
        least = min(rules.noise_multiplier for rules in joint)
        about = least, len(joint), min(rules.min_separation for rules in joint)
        mechanisms.append(TreeGaussian(*about) if joint[0].tree else BandedGaussian(*about, joint[0].bands))
    return PrivacyLoss(tuple(mechanisms))


def _worst(releases: Sequence[ReleaseRules]) -> list[Mechanism]:
    """Return the mechanisms of the releases that cost one device most.

    Those `separation` apart with the largest sum of 1 / z^2, which is what the loss of Gaussian mechanisms grows
    with. Best sum of the first i: max(best(i - 1), best(i - separation) + 1 / z_i^2).
    """
    separation = min((rules.min_separation for rules in releases), default=1)
    if separation == 1:
        return [_mechanism(rules) for rules in releases]
    best = [0.0]
    for count, rules in enumerate(releases, start=1):
        best.append(max(best[-1], best[max(0, count - separation)] + rules.noise_multiplier**-2))
    worst, count = [], len(releases)
    while count:
        if best[count] == best[count - 1]:
            count -= 1
        else:
            worst.append(_mechanism(releases[count - 1]))
            count = max(0, count - separation)
    return worst


def _mechanism(rules: ReleaseRules) -> Mechanism:
    if rules.rate is None:
        return Gaussian(rules.noise_multiplier)
    return SampledGaussian(rules.noise_multiplier, rules.rate)


def ledger_of(
    policy: PrivacyPolicy,
    clip_norm: float,
    rate: float | None,
    planned: int | None,
    releases: Sequence[PrivateRelease] = (),
    last_steps: Mapping[str, int] = MappingProxyType({}),
    clip_quantile: float | None = None,
) -> Ledger:
    """Return the ledger of a run with `planned` more releases after `releases` (None: nobody knows how many).

    With `clip_quantile`, `clip_norm` is that of the first release. Raises `UsageError` where the rules of former
    releases forbid those of today, or no noise is enough.
    """
    assert policy.mechanism is not None
    assert policy.cohort is not None
    if clip_quantile is not None and releases:
        clip_norm = releases[-1].next_clip_norm
    bands = min(MOST_BANDS, policy.min_separation) if policy.mechanism == "dp-mf" else 1
    rules = ReleaseRules(
        policy.mechanism, 1.0, clip_norm, policy.cohort, policy.min_separation, rate, clip_quantile, bands
    )
    multiplier = policy.noise_multiplier
    if multiplier is None:
        multiplier = _computed(policy, rules, planned, releases)
    ledger = Ledger(
        replace(rules, noise_multiplier=multiplier),
        policy.delta,
        policy.target_epsilon,
        tuple(releases),
        MappingProxyType(dict(last_steps)),
    )
    if releases:
        _check_same(releases[-1].rules, ledger.rules)
    return ledger


def _computed(
    policy: PrivacyPolicy, rules: ReleaseRules, planned: int | None, releases: Sequence[PrivateRelease]
) -> float:
    """Return the least noise multiplier with which all that is planned keeps to the target."""
    assert policy.target_epsilon is not None
    # Joint noise is that of all its steps, and stays as it began.
    if releases and rules.joint:
        return releases[-1].rules.noise_multiplier
    if planned is None:
        raise UsageError("target_epsilon needs rounds: noise is computed for all of them")
    if not planned:
        return releases[-1].rules.noise_multiplier if releases else 1.0
    former = [release.rules for release in releases]

    def loss(multiplier: float) -> PrivacyLoss:
        return loss_of([*former, *[replace(rules, noise_multiplier=multiplier)] * planned])

    try:
        return least_multiplier(policy.target_epsilon, policy.delta, loss)
    except ValueError as error:
        # Spent already: the run ends before its next round.
        if releases:
            return releases[-1].rules.noise_multiplier
        raise UsageError(str(error)) from error


def _check_same(before: ReleaseRules, now: ReleaseRules) -> None:
    """Raise `UsageError` where releases of the run by other rules leave no loss that could be told."""
    fixed = ["mechanism", "min_separation", "rate"]
    if before.joint:
        # All steps share the noise.
        fixed += ["noise_multiplier", "clip_norm", "cohort", "bands"]
    for name in fixed:
        if getattr(before, name) != getattr(now, name):
            raise UsageError(
                f"the {name} of this run's privacy was {getattr(before, name)} and cannot become "
                f"{getattr(now, name)}: its loss could not be told; take another data folder"
            )
