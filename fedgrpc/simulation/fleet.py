"""A fleet as a person describes it, checked: classes of devices, their model, and the rules to compare."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy

T = TypeVar("T")
MOST_DEVICES = 1_000_000


@dataclass(frozen=True)
class DeviceClass:
    """Devices of one kind. Times and rates are medians.

    `spread` and `jitter` are sigmas of log-normal factors, between devices and between tasks of one device.
    `train_s`: seconds of local training. Links in megabits per second. A device is reachable for the share
    `available` of the time, for `session_s` at a stretch in the mean (both exponential). `failure`: the share of
    tasks given back.
    """

    name: str
    count: int
    train_s: float
    up_mbit: float
    down_mbit: float
    latency_s: float = 0.05
    spread: float = 0.2
    jitter: float = 0.1
    available: float = 1.0
    session_s: float = 7200.0
    failure: float = 0.0
    examples: int = 500

    def __post_init__(self) -> None:
        for name in ("train_s", "up_mbit", "down_mbit", "session_s", "examples", "count"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} of devices {self.name!r} must be positive, not {value:g}")
        for name in ("latency_s", "spread", "jitter"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} of devices {self.name!r} must not be negative, not {value:g}")
        if not 0 < self.available <= 1:
            raise UsageError(f"available of devices {self.name!r} must be above 0 and at most 1")
        if not 0 <= self.failure < 1:
            raise UsageError(f"failure of devices {self.name!r} must be from 0 to below 1")

    @property
    def away_s(self) -> float:
        """Mean stretch out of reach, seconds."""
        return self.session_s * (1 - self.available) / self.available


@dataclass(frozen=True)
class Payload:
    """What travels: bits of a parameter in each direction, as the encodings have them on the wire."""

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
class Variant:
    """One set of rules to play the fleet by. `commit_s`: what the aggregator needs for a commit."""

    name: str = "as given"
    policy: RoundPolicy = field(default_factory=RoundPolicy)
    payload: Payload = field(default_factory=Payload)
    selection: Literal["uniform", "oort"] = "uniform"
    deadline: Literal["fixed", "learned"] = "fixed"
    commit_s: float = 1.0

    def __post_init__(self) -> None:
        if self.selection not in ("uniform", "oort"):
            raise UsageError(f"selection must be 'uniform' or 'oort', not {self.selection!r}")
        if self.deadline not in ("fixed", "learned"):
            raise UsageError(f"deadline must be 'fixed' or 'learned', not {self.deadline!r}")
        if not 0 <= self.commit_s < math.inf:
            raise UsageError(f"commit_s must not be negative, not {self.commit_s:g}")


@dataclass(frozen=True)
class Fleet:
    """Devices, and the rules to compare on them."""

    classes: tuple[DeviceClass, ...]
    variants: tuple[Variant, ...]

    @property
    def count(self) -> int:
        """How many devices there are."""
        return sum(one.count for one in self.classes)

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Fleet:
        """Read a TOML document: `[[devices]]`, `[model]`, `[rules]` with `[rules.policy]`, and `[[variants]]`.

        A variant changes what it names in its own `model`, `policy` and rules. Raises `UsageError`.
        """
        _check_keys("the fleet file", document, {"devices", "model", "rules", "variants"})
        devices = _tables(document, "devices")
        classes = tuple(_make(DeviceClass, table, "a [[devices]] table") for table in devices)
        if not classes:
            raise UsageError("the fleet file has no [[devices]]")
        fleet = cls(classes, ())
        if fleet.count > MOST_DEVICES:
            raise UsageError(f"{fleet.count} devices are more than {MOST_DEVICES}")
        rules = {**_table(document, "rules"), "model": _table(document, "model")}
        given = _variant(Variant(), rules)
        changed = [_variant(given, table) for table in _tables(document, "variants")]
        return replace(fleet, variants=tuple(changed) or (given,))


def _variant(base: Variant, table: Mapping[str, Any]) -> Variant:
    payload = _changed(base.payload, table.get("model", {}), "a model table")
    policy = _changed(base.policy, table.get("policy", {}), "a policy table")
    rules = {key: value for key, value in table.items() if key not in ("model", "policy")}
    return _changed(replace(base, payload=payload, policy=policy), rules, "a table of rules")


def _changed(base: T, values: Mapping[str, Any], where: str) -> T:
    """`base` with the values that a table names."""
    names = {field_.name for field_ in dataclasses.fields(base)}  # type: ignore[arg-type]
    _check_keys(where, values, names)
    try:
        return replace(base, **values)  # type: ignore[type-var]
    except TypeError as error:
        raise UsageError(f"{where} has a value of the wrong type: {error}") from error


def _make(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    _check_keys(where, values, {field_.name for field_ in fields})
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    if missing:
        raise UsageError(f"{where} has no {missing[0]!r}")
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{where} has a value of the wrong type: {error}") from error


def _check_keys(where: str, values: object, known: set[str]) -> None:
    if not isinstance(values, Mapping):
        raise UsageError(f"{where} must be a table, not {values!r}")
    for key in values:
        if key not in known:
            raise UsageError(f"{where} has an unknown key {key!r}; there are {', '.join(sorted(known))}")


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = document.get(name, {})
    if not isinstance(table, Mapping):
        raise UsageError(f"[{name}] must be a table")
    return table


def _tables(document: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    tables = document.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables):
        raise UsageError(f"[[{name}]] must be tables in double brackets")
    return tables
