"""A fleet as a person describes it, checked: classes of devices, their model, and the rules to compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedgrpc import toml
from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy

MOST_DEVICES = 1_000_000
# Each of them is a worker of the aggregator, and has files.
MOST_LEARNING_DEVICES = 100_000


_SPEEDS = ("train_s", "examples_per_s", "scored_per_s")

_LONGEST_NAME = 200


@dataclass(frozen=True)
class DeviceKind:
    """Devices of one kind. Times and rates are medians.

    `spread` and `jitter` are sigmas of log-normal factors, between devices and between tasks of one device.
    Local training takes `train_s` seconds, or as long as its examples at `examples_per_s`. Scoring goes at
    `scored_per_s` (by default three times as fast), and `overhead_s` is what a task takes besides. Links in
    megabits per second. A device is reachable for the share `available` of the time, for `session_s` at a stretch
    in the mean (both exponential). `failure`: the share of tasks given back. `memory_mb` is what its worker tells
    of its memory; 0: nothing. `device_class` is that of its local-model plan; by default its name.
    """

    name: str
    count: int
    up_mbit: float
    down_mbit: float
    train_s: float | None = None
    examples_per_s: float | None = None
    scored_per_s: float | None = None
    overhead_s: float = 0.0
    latency_s: float = 0.05
    spread: float = 0.2
    jitter: float = 0.1
    available: float = 1.0
    session_s: float = 7200.0
    failure: float = 0.0
    examples: int = 500
    memory_mb: int = 0
    device_class: str = ""

    def __post_init__(self) -> None:
        # Names of devices are names of folders, too.
        if "/" in self.name or not self.name.isprintable() or not 1 <= len(self.name) <= _LONGEST_NAME:
            raise UsageError(
                f"devices {self.name[:80]!r} need a name of 1 to {_LONGEST_NAME} printable characters without '/'"
            )
        if (self.train_s is None) == (self.examples_per_s is None):
            raise UsageError(f"devices {self.name!r} need either train_s or examples_per_s")
        for name in (*_SPEEDS, "up_mbit", "down_mbit", "session_s", "examples", "count"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} of devices {self.name!r} must be positive, not {value:g}")
        for name in ("latency_s", "spread", "jitter", "overhead_s", "memory_mb"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} of devices {self.name!r} must not be negative, not {value:g}")
        if not 0 < self.available <= 1:
            raise UsageError(f"available of devices {self.name!r} must be above 0 and at most 1")
        if not 0 <= self.failure < 1:
            raise UsageError(f"failure of devices {self.name!r} must be from 0 to below 1")

    def task_s(self, examples: float) -> float:
        """Median seconds of training on so many examples, each counted once per epoch."""
        if self.train_s is not None:
            return self.train_s
        assert self.examples_per_s is not None
        return examples / self.examples_per_s

    def scoring_s(self, examples: float) -> float:
        """Median seconds of scoring so many examples."""
        if self.scored_per_s is not None:
            return examples / self.scored_per_s
        return 0.0 if self.examples_per_s is None else examples / (3 * self.examples_per_s)

    @property
    def away_s(self) -> float:
        """Mean stretch out of reach, seconds."""
        return self.session_s * (1 - self.available) / self.available


@dataclass(frozen=True)
class Payload:
    """Transferred model: bits of a parameter in each direction, as the encodings have them on the wire."""

    parameters: int = 1_000_000
    download_bits: float = 32.0
    upload_bits: float = 32.0

    def __post_init__(self) -> None:
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            if not 0 < value < math.inf:
                raise UsageError(f"{field_.name} of the model must be positive, not {value:g}")

    @property
    def download_bytes(self) -> int:
        """Bytes of one model."""
        return math.ceil(self.parameters * self.download_bits / 8)

    @property
    def upload_bytes(self) -> int:
        """Bytes of one update."""
        return math.ceil(self.parameters * self.upload_bits / 8)


@dataclass(frozen=True)
class FleetVariant:
    """One set of rules to play the fleet by. `commit_s`: what the aggregator needs for a commit."""

    name: str = "as given"
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    model: Payload = field(default_factory=Payload)
    selection: Literal["uniform", "oort"] = "uniform"
    deadline: Literal["fixed", "learned"] = "fixed"
    commit_s: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.commit_s < math.inf:
            raise UsageError(f"commit_s must not be negative, not {self.commit_s:g}")


@dataclass(frozen=True)
class DescribedFleet:
    """Devices, and the rules to compare on them."""

    classes: tuple[DeviceKind, ...]
    variants: tuple[FleetVariant, ...]

    @property
    def count(self) -> int:
        """Number of devices."""
        return sum(one.count for one in self.classes)

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> DescribedFleet:
        """Read a TOML document: `[[devices]]`, `[model]`, `[rules]` with `[rules.policy]`, and `[[variants]]`.

        A variant changes what it names in its own `model`, `policy` and rules. Raises `UsageError`.
        """
        if unknown := document.keys() - {"devices", "model", "rules", "variants"}:
            raise UsageError(f"there is no {min(unknown)!r} in a fleet file: devices, model, rules, variants")
        classes = toml.read_all(DeviceKind, document.get("devices", []), "[[devices]]")
        if not classes:
            raise UsageError("the fleet file has no [[devices]]")
        fleet = cls(classes, ())
        if fleet.count > MOST_DEVICES:
            raise UsageError(f"{fleet.count} devices are more than {MOST_DEVICES}")
        given = toml.read(FleetVariant, document.get("rules", {}), "[rules]", FleetVariant())
        model = toml.read(Payload, document.get("model", {}), "[model]", given.model)
        given = replace(given, model=model)
        changed = toml.read_all(FleetVariant, document.get("variants", []), "[[variants]]", given)
        return replace(fleet, variants=changed or (given,))
