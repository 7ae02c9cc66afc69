"""Conditions on scores, as in `accuracy>=0.9`, and what many reports say of one. Pure.

The rule: the median decides. Fewer than half of the devices can neither fake a good model nor a bad one, whatever
they claim.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fedgrpc.claims import METRIC_NAME_CHARS
from fedgrpc.errors import UsageError

_CONDITION: Final = re.compile(r"\s*([^<>=]+?)\s*(>=|<=)\s*(\S+)\s*")
_MOST_CHARS: Final = 3 * METRIC_NAME_CHARS


@dataclass(frozen=True)
class Condition:
    """A score of this name that is to be at least (`at_least`), or else at most, `value`."""

    name: str
    value: float
    at_least: bool = True

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Read "accuracy>=0.9" or "loss<=0.5". Raises `UsageError`."""
        # The pattern takes time with the cube of the blanks.
        if len(text) <= _MOST_CHARS and (found := _CONDITION.fullmatch(text)) is not None:
            name, sign, number = found.groups()
            try:
                value = float(number)
            except ValueError:
                value = math.nan
            if math.isfinite(value) and name.isprintable() and len(name) <= METRIC_NAME_CHARS:
                return cls(name, value, sign == ">=")
        raise UsageError(f"a condition looks like accuracy>=0.95 or loss<=0.1, not {text[:80]!r}")

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.at_least else '<='}{self.value:g}"

    @property
    def worst(self) -> float:
        """Score of a device that cannot use the model at all."""
        return -math.inf if self.at_least else math.inf

    def met(self, score: float) -> bool:
        """Return whether a score is good enough; NaN is not."""
        return score >= self.value if self.at_least else score <= self.value


class Verdict(Enum):
    """Result of looking at all reports."""

    UNDECIDED = 0
    GOOD = 1
    BAD = 2


@dataclass(frozen=True)
class Judgement:
    """A verdict, and its reason in words."""

    verdict: Verdict
    reason: str


def judge(
    conditions: Sequence[Condition], scores: Sequence[Mapping[str, float]], failures: int, quorum: int
) -> Judgement:
    """Judge a model by the scores of the devices that could use it, and the number of those that could not.

    One bad condition is enough. At least `quorum` devices must have told each score: a failure tells the worst.
    """
    if failures >= quorum and failures > len(scores):
        return Judgement(Verdict.BAD, f"{failures} of {_devices(failures + len(scores))} cannot use it")
    undecided = "" if len(scores) + failures >= quorum else "reports"
    for condition in conditions:
        told = [each[condition.name] for each in scores if condition.name in each]
        values = sorted([*told, *[condition.worst] * failures])
        if len(values) < quorum:
            undecided = undecided or condition.name
            continue
        middle = _median(values, condition.at_least)
        if not condition.met(middle):
            return Judgement(
                Verdict.BAD,
                f"the median {condition.name} of {_devices(len(values))} is {middle:g}, not {condition}",
            )
    if undecided:
        heard = len(scores) + failures
        return Judgement(Verdict.UNDECIDED, f"too few devices have told {undecided}: {heard} of {quorum}")
    return Judgement(Verdict.GOOD, ", ".join(map(str, conditions)) or "most devices can use it")


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _median(values: Sequence[float], at_least: bool) -> float:
    """Return the middle one, and of two middle ones the worse."""
    return values[(len(values) - 1) // 2 if at_least else len(values) // 2]
