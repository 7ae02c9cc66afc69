"""Privacy loss of releases: what epsilon(delta) a row of noisy sums has cost one device.

Adjacent are two runs of which one has a device, with all its updates, that the other lacks. For noise of several
rounds the other run has the device with updates of zero, so that both choose the same devices. The rule: a loss is
never understated. Composition is exact where all releases are plain Gaussian mechanisms, and an upper bound
otherwise.

A Gaussian mechanism whose sum moves by at most `sensitivity`, with noise of `noise_multiplier * sensitivity`, is
mu-GDP with mu = 1 / noise_multiplier (Dong, Roth, Su, arXiv 1905.02383). It fulfills, exactly
(Balle, Wang, arXiv 1805.06530, theorem 8):

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon * Phi(-mu/2 - epsilon/mu)

and a row of them is one with mu^2 = sum_i mu_i^2. Once a release sampled its devices, all are added up as Renyi
divergences of integer orders instead (Mironov, arXiv 1702.07476).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Final

from fedgrpc.privacy.banded import sensitivity_squared

# Below this, the tail of the normal distribution is its asymptotic series: erfc would soon underflow.
_FAR_TAIL: Final = -25.0
# A subsampled mechanism is bounded at these orders. The best one falls with epsilon: 2 at 100, hundreds at 0.1.
ORDERS: Final = (*range(2, 64), *range(64, 256, 8), *range(256, 1025, 64))
_MAX_MULTIPLIER: Final = 1e6


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian mechanism; `noise_multiplier` is its noise's standard deviation over its sensitivity, above 0."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier)

    def renyi(self, order: int) -> float:
        """Return the Renyi divergence of `order`: alpha / (2 sigma^2)."""
        return order / (2 * self.noise_multiplier**2)


@dataclass(frozen=True)
class SampledGaussian:
    """A Gaussian mechanism over a Poisson sample: each device takes part with the chance `rate`, above 0 to 1."""

    noise_multiplier: float
    rate: float

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier)
        if not 0 < self.rate <= 1:
            raise ValueError(f"a sampling rate is above 0 and at most 1, not {self.rate}")

    # A run repeats few mechanisms, and is asked about for every round.
    @lru_cache(maxsize=4096)  # noqa: B019
    def renyi(self, order: int) -> float:
        """Return the Renyi divergence of the integer `order`, from 2 (arXiv 1908.10530, section 3.3).

        exp((a-1) D_a) = sum_{k=0..a} binom(a, k) (1-q)^(a-k) q^k exp((k^2 - k) / (2 sigma^2))
        """
        if self.rate == 1:
            return Gaussian(self.noise_multiplier).renyi(order)
        terms = [
            _log_binomial(order, k)
            + (order - k) * math.log1p(-self.rate)
            + k * math.log(self.rate)
            + (k * k - k) / (2 * self.noise_multiplier**2)
            for k in range(order + 1)
        ]
        return max(0.0, _log_sum_exp(terms)) / (order - 1)


@dataclass(frozen=True)
class TreeGaussian:
    """The first `rounds` prefix sums of a DP-FTRL run, each the sum of the noisy nodes of a binary tree.

    (Kairouz et al., arXiv 2103.00039.) A node of level j is the sum of 2^j rounds. The noise of each node is
    `noise_multiplier` times the most that one device adds to one round. A device takes part at most once in any
    `separation` rounds that follow each other.
    """

    noise_multiplier: float
    rounds: int
    separation: int

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier)
        if self.rounds < 1 or self.separation < 1:
            raise ValueError("a tree has at least one round, and a separation of at least one round")

    @property
    def participations(self) -> int:
        """The most rounds that one device took part in."""
        return -(-self.rounds // self.separation)

    @property
    def sensitivity_squared(self) -> float:
        """An upper bound of how far one device moves all nodes together, in units of its share of a round.

        The node v of level j holds at most m_j = min(k, ceil(2^j / separation)) of a device's k participations, so
        a level has sum_v n_v^2 <= m_j * sum_v n_v <= m_j * k. Only nodes that are complete are released.
        """
        levels = range(self.rounds.bit_length())
        most = (min(self.participations, -(-(1 << level) // self.separation)) for level in levels)
        return float(self.participations * sum(most))

    @property
    def as_gaussian(self) -> Gaussian:
        """All nodes as one mechanism: noise is equal in each, so that their joint shift counts."""
        return Gaussian(self.noise_multiplier / math.sqrt(self.sensitivity_squared))

    def renyi(self, order: int) -> float:
        """Return the Renyi divergence of `order` of all nodes together."""
        return self.as_gaussian.renyi(order)


@dataclass(frozen=True)
class BandedGaussian:
    """The first `rounds` releases of a DP-MF run, whose noise is that of `fedgrpc.privacy.banded`.

    The independent noise behind it is `noise_multiplier` times the most that one device adds to one round. A
    device takes part at most once in any `separation` rounds that follow each other.
    """

    noise_multiplier: float
    rounds: int
    separation: int
    bands: int

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier)
        if self.rounds < 1 or self.separation < 1 or self.bands < 1:
            raise ValueError("banded noise has at least one round, one band, and a separation of one round")

    @property
    def as_gaussian(self) -> Gaussian:
        """All releases as one mechanism."""
        square = sensitivity_squared(self.rounds, self.separation, self.bands)
        return Gaussian(self.noise_multiplier / math.sqrt(square))

    def renyi(self, order: int) -> float:
        """Return the Renyi divergence of `order` of all releases together."""
        return self.as_gaussian.renyi(order)


Mechanism = Gaussian | SampledGaussian | TreeGaussian | BandedGaussian


@dataclass(frozen=True)
class PrivacyLoss:
    """Privacy cost of a row of independent mechanisms on the same devices. No mechanism: nothing."""

    mechanisms: tuple[Mechanism, ...] = ()

    def epsilon(self, delta: float) -> float:
        """Return the least epsilon known at `delta`, from 0. Raises ValueError unless 0 < delta < 1."""
        if not 0 < delta < 1:
            raise ValueError(f"delta is above 0 and below 1, not {delta}")
        if not self.mechanisms:
            return 0.0
        mus = [_mu(mechanism) for mechanism in self.mechanisms]
        if all(mu is not None for mu in mus):
            return _gaussian_epsilon(math.hypot(*(mu for mu in mus if mu is not None)), delta)
        return self._renyi_epsilon(delta)

    def _renyi_epsilon(self, delta: float) -> float:
        """Return the best epsilon of all orders (Canonne, Kamath, Steinke, arXiv 2004.00010, proposition 12)."""
        # Rounds mostly repeat the same mechanism, and one is dear to compute.
        times: dict[Mechanism, int] = {}
        for mechanism in self.mechanisms:
            times[mechanism] = times.get(mechanism, 0) + 1
        bounds: list[float] = [
            sum(n * mechanism.renyi(order) for mechanism, n in times.items())
            + math.log1p(-1 / order)
            - (math.log(delta) + math.log(order)) / (order - 1)
            for order in ORDERS
        ]
        return max(0.0, min(bounds))


def least_multiplier(epsilon: float, delta: float, planned: Callable[[float], PrivacyLoss]) -> float:
    """Return the least noise multiplier with which what is `planned` costs at most `epsilon` at `delta`.

    `planned` returns the loss of all rounds for a multiplier, and falls as that grows. The result is rounded up,
    to a part in 10^6 or less. Raises ValueError if `epsilon` is not above 0, or where no multiplier up to 10^6 is
    enough.
    """
    if not epsilon > 0:
        raise ValueError(f"a target epsilon is above 0, not {epsilon}")
    if planned(_MAX_MULTIPLIER).epsilon(delta) > epsilon:
        raise ValueError(f"no noise makes these rounds cost at most {epsilon} at a delta of {delta}")
    return _least(1e-3, _MAX_MULTIPLIER, lambda multiplier: planned(multiplier).epsilon(delta) <= epsilon)


def _check_multiplier(multiplier: float) -> None:
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise ValueError(f"a noise multiplier is a number above 0, not {multiplier}")


def _mu(mechanism: Mechanism) -> float | None:
    """Return the mu of a mechanism that is exactly Gaussian; None for another."""
    if isinstance(mechanism, TreeGaussian | BandedGaussian):
        mechanism = mechanism.as_gaussian
    if isinstance(mechanism, SampledGaussian):
        return 1 / mechanism.noise_multiplier if mechanism.rate == 1 else None
    return 1 / mechanism.noise_multiplier


def _log_phi(x: float) -> float:
    """Return log(Phi(x)) of the standard normal distribution."""
    if x > _FAR_TAIL:
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    # Abramowitz, Stegun 26.2.12, three terms: a relative error under 1e-7 from here on.
    series = 1 - 1 / x**2 + 3 / x**4 - 15 / x**6
    return -x * x / 2 - math.log(-x) - math.log(2 * math.pi) / 2 + math.log(series)


def _gaussian_delta(mu: float, epsilon: float) -> float:
    head = math.exp(_log_phi(mu / 2 - epsilon / mu))
    return head - math.exp(min(0.0, epsilon + _log_phi(-mu / 2 - epsilon / mu)))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    if _gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = next(2.0**exponent for exponent in count() if _gaussian_delta(mu, 2.0**exponent) <= delta)
    return _least(0.0, high, lambda epsilon: _gaussian_delta(mu, epsilon) <= delta)


def _least(low: float, high: float, fits: Callable[[float], bool]) -> float:
    """Return the least number that fits, rounded up: `high` fits, and so does all above one that does."""
    while high - low > 1e-9 * max(high, 1e-3):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_sum_exp(terms: list[float]) -> float:
    most = max(terms)
    return most + math.log(sum(math.exp(term - most) for term in terms))
