"""An experiment as its file describes it: devices, a learning task, and the settings of its aggregator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedgrpc import toml
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError
from fedgrpc.simulation.fleet import MOST_LEARNING_DEVICES, DeviceKind
from fedgrpc.simulation.traces import Trace

_TABLES = ("devices", "learning", "aggregator", "availability")
_NO_OPTIONS: Mapping[str, str] = MappingProxyType({})

# Builds the settings of an aggregator from its table, as from the settings file of `fedgrpc aggregator`.
ReadSettings = Callable[[Mapping[str, Any]], AggregatorSettings]


@dataclass(frozen=True)
class Learning:
    """Learning task and data of the devices, named as the flags of `fedgrpc worker` name them.

    `partition` gives each device its part of the data; None: each has all of it. `seed` is that of the split and
    of the first model. Versions are scored on all held-out data once in `evaluate_every` rounds; 0: never. A
    commit takes `commit_s` virtual seconds.
    """

    task: str
    model: str | None = None
    data: str | None = None
    partition: str | None = None
    device: str = "cpu"
    seed: int = 0
    threads: int = 1
    evaluate_every: int = 1
    commit_s: float = 0.0
    options: Mapping[str, str] = field(default_factory=lambda: _NO_OPTIONS)

    def __post_init__(self) -> None:
        if self.evaluate_every < 0:
            raise UsageError(f"evaluate_every must be 0 or more, not {self.evaluate_every}")
        if not 0 <= self.commit_s < float("inf"):
            raise UsageError(f"commit_s must not be negative, not {self.commit_s:g}")

    @classmethod
    def parse(cls, table: Any) -> Learning:
        """Read `[learning]`. Raises `UsageError`."""
        if not isinstance(table, Mapping):
            raise UsageError(f"[learning] is a table, not {table!r}")
        options = table.get("options", {})
        if not isinstance(options, Mapping):
            raise UsageError(f"options of [learning] are a table, not {options!r}")
        others = {name: value for name, value in table.items() if name != "options"}
        texts = {str(name): _text(value) for name, value in options.items()}
        return replace(toml.read(cls, others, "[learning]"), options=texts)

    def __getstate__(self) -> dict[str, Any]:
        # Sent to other processes, which take no read-only view of a dictionary.
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)} | {
            "options": dict(self.options)
        }


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Availability:
    """Times at which devices can be reached: by their classes, or by a trace (`fedgrpc.simulation.traces`)."""

    trace: str | None = None

    def read(self) -> Trace | None:
        """Read the trace; None without one. Raises `UsageError`."""
        if self.trace is None:
            return None
        try:
            return Trace.parse(Path(self.trace).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {self.trace}: {error.strerror}") from error
        except (UnicodeDecodeError, UsageError) as error:
            raise UsageError(f"{self.trace}: {error}") from error


@dataclass(frozen=True)
class Experiment:
    """A whole experiment; `settings` without a data folder of its own. `document` is what it was read from."""

    classes: tuple[DeviceKind, ...]
    learning: Learning
    settings: AggregatorSettings
    availability: Availability = Availability()
    document: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        """Number of devices."""
        return sum(each.count for each in self.classes)

    @classmethod
    def parse(cls, document: Mapping[str, Any], read_settings: ReadSettings) -> Experiment:
        """Read a document: `[[devices]]`, `[learning]`, `[aggregator]`, `[availability]`. Raises `UsageError`."""
        if unknown := document.keys() - set(_TABLES):
            raise UsageError(f"there is no {min(unknown)!r} in an experiment: {', '.join(_TABLES)}")
        classes = toml.read_all(DeviceKind, document.get("devices", []), "[[devices]]")
        if not classes:
            raise UsageError("the experiment has no [[devices]]")
        experiment = cls(
            classes,
            Learning.parse(document.get("learning", {})),
            read_settings(document.get("aggregator", {})),
            toml.read(Availability, document.get("availability", {}), "[availability]"),
            dict(document),
        )
        if experiment.count > MOST_LEARNING_DEVICES:
            raise UsageError(f"{experiment.count} devices that learn are more than {MOST_LEARNING_DEVICES}")
        return experiment

    def in_folder(self, folder: Path) -> AggregatorSettings:
        """Return the settings for a run in that folder. What waits for people or networks waits for nothing."""
        settings = self.settings
        return replace(
            settings,
            data_dir=folder,
            max_workers=max(settings.max_workers, self.count + 1),
            # Each poll waits until there is a task: nobody waits for an answer that says nothing.
            poll_wait_s=1e9,
            # Often enough to keep a lease. More would only take time.
            heartbeat_interval_s=settings.heartbeat_interval_s or 0.45 * settings.policy.lease_s,
            durable=False,
            stay=False,
        )
