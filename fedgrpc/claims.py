"""Claims: numbers and texts that a peer says of itself, and the range of each.

The rule: a claim is checked where its message becomes a value, so that nothing unbounded travels further.

    a number that decides (counts, steps, weights, scores)    out of its range, the message is refused for good
    a number that informs (times, memory, rates, devices)     over its range, it counts as the most of it
    a text (reasons, classes, labels)                         becomes one short line of printable characters

The ranges leave room: a million of the largest claims can be added, and any two multiplied, in float64. A sum that
travels on in a message saturates (`Range.total`), since a message holds no more than 64 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from fedgrpc.errors import LayoutError

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class Range(Generic[N]):
    """Numbers from `least` to `most`, both included, of a claim called `name`."""

    name: str
    least: N
    most: N

    def checked(self, value: N) -> N:
        """Return `value`. Raises `LayoutError` where it is out of range; NaN always is."""
        if not self.least <= value <= self.most:
            raise LayoutError(f"{self.name} {value:g} is not from {self.least:g} to {self.most:g}")
        return value

    def clamped(self, value: N) -> N:
        """Return the number of the range next to `value`; NaN counts as the least."""
        return min(value, self.most) if value >= self.least else self.least

    def total(self, values: Iterable[N]) -> N:
        """Return the sum of `values`, as far as the range goes."""
        return self.clamped(sum(values, start=self.least - self.least))


@dataclass(frozen=True)
class Text:
    """One line of at most `most_chars` printable characters."""

    most_chars: int

    def cleaned(self, text: str) -> str:
        """Return `text` with control characters as blanks, blanks in a row as one, and what is too long cut."""
        # Cut first: the text may be as long as a message.
        return " ".join(printable(text[: 4 * self.most_chars]).split())[: self.most_chars]


def printable(text: str) -> str:
    """Return `text` with a blank for each character that is not printable, such as what terminals obey."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " for char in text)


EXAMPLES: Final = Range("the example count", 0, 1 << 40)
STEPS: Final = Range("the number of steps", 0, 1 << 40)
MERGED_UPDATES: Final = Range("the number of merged updates", 0, 1 << 32)
# A count of examples, or a sum of such.
WEIGHT: Final = Range("the weight", 0.0, float(1 << 40))
# Of a difference, to which it is scaled down. Its square, and shares of it, fit float64.
CLIP_NORM: Final = Range("the clip norm", 1e-30, 1e30)
ACCUMULATED_STEPS: Final = Range("the number of accumulated steps", 0.0, float(1 << 50))
# The error of an update relative to its norm, squared.
NOISE_RATIO: Final = Range("the noise ratio", 0.0, 1e6)
# Bounds of float32, so that a reader in any language holds them.
SCORE: Final = Range("a score", -1e30, 1e30)
# Norm of a tensor of an update: squares of its elements fit float32, in which optimizers keep them.
MAX_TENSOR_NORM: Final = 1e18
# 30 years.
SECONDS: Final = Range("a time", 0.0, 1e9)
BYTES_PER_SECOND: Final = Range("a rate", 0.0, 1e15)
BITS_PER_SECOND: Final = Range("a rate", 0, 10**16)
MEMORY_BYTES: Final = Range("a size", 0, 1 << 50)
PAYLOAD_BYTES: Final = Range("a size", 0, 1 << 50)
CORES: Final = Range("the number of cores", 0, 1 << 16)
# Numbers of versions and rounds: databases have 63 bits, JSON 53.
NUMBER: Final = Range("a number", 0, 1 << 53)

REASON: Final = Text(500)
LABEL: Final = Text(128)
METRIC_NAME_CHARS: Final = 64
METRICS: Final = 64
