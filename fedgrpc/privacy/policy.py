"""Settings of central differential privacy at the level of devices, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

from fedgrpc.errors import UsageError

MechanismName = Literal["gaussian", "dp-ftrl", "dp-mf"]
MOST_COHORT: Final = 1 << 32


@dataclass(frozen=True)
class PrivacyPolicy:
    """Rules by which a run releases its versions. Raises `UsageError`.

    `mechanism`: "gaussian" adds independent noise to each version, "dp-ftrl" that of a tree (arXiv 2103.00039),
    "dp-mf" that of a band of as many rounds as `min_separation`, which is then above 1 (arXiv 2505.12128); None:
    versions are released as they are. The noise of a version is `noise_multiplier` times the most that one device
    adds to it; or the least with which all rounds cost at most `target_epsilon` at `delta`. The mean is the sum of
    the clipped differences over `cohort` devices, however many came (arXiv 1710.06963). A device takes part at
    most once in any `min_separation` versions that follow each other. Without `metrics`, devices report no scores,
    losses or counts.
    """

    mechanism: MechanismName | None = None
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float = 1e-5
    cohort: int | None = None
    min_separation: int = 1
    metrics: bool = True

    def __post_init__(self) -> None:
        if self.mechanism not in (None, "gaussian", "dp-ftrl", "dp-mf"):
            raise UsageError(f"privacy must be 'gaussian', 'dp-ftrl' or 'dp-mf', not {self.mechanism!r}")
        if not 0 < self.delta < 1:
            raise UsageError(f"delta must be above 0 and below 1, not {self.delta:g}")
        if self.min_separation < 1:
            raise UsageError(f"min_separation must be at least 1, not {self.min_separation}")
        for name in ("noise_multiplier", "target_epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be a number above 0, not {value:g}")
        if self.cohort is not None and not 1 <= self.cohort <= MOST_COHORT:
            raise UsageError(f"privacy_cohort must be from 1 to {MOST_COHORT}, not {self.cohort}")
        if self.on:
            self._check_on()
        elif (self.noise_multiplier, self.target_epsilon, self.cohort) != (None, None, None):
            raise UsageError("noise_multiplier, target_epsilon and privacy_cohort go with privacy")

    def _check_on(self) -> None:
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise UsageError(
                "privacy needs either noise_multiplier or target_epsilon, from which noise is computed"
            )
        if self.cohort is None:
            raise UsageError("privacy needs privacy_cohort: the count of devices that sums are divided by")
        if self.mechanism == "dp-mf" and self.min_separation == 1:
            raise UsageError(
                "privacy = 'dp-mf' needs min_separation above 1: its noise cancels over so many versions"
            )

    @property
    def on(self) -> bool:
        """True if versions are released with noise."""
        return self.mechanism is not None
