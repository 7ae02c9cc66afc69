"""The devices of a simulated fleet: what each can do, whether it can be reached now, and the task it works on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fedgrpc.rounds.events import Progress, TaskPhase
from fedgrpc.simulation.draws import DeviceDraws
from fedgrpc.simulation.fleet import DeviceKind
from fedgrpc.simulation.traces import Trace

_MBIT_BYTES = 1e6 / 8


class Devices:
    """All devices; a device is its index. Times in seconds, rates in bytes per second.

    Whether a device can be reached is a chain of exponential stretches, or as a trace has it, and played only as
    far as somebody has asked. What a device draws does not depend on the order in which devices are asked.
    """

    def __init__(self, classes: Sequence[DeviceKind], seed: int, trace: Trace | None = None) -> None:
        rng = np.random.default_rng([seed, 1])
        counts = [one.count for one in classes]
        self.classes = tuple(classes)
        self.count = sum(counts)
        self.class_of = np.repeat(np.arange(len(classes)), counts)
        self.names = [f"{one.name}-{i}" for one in classes for i in range(one.count)]
        self.index = {name: i for i, name in enumerate(self.names)}
        factor = np.exp(rng.standard_normal((3, self.count)) * self._each([one.spread for one in classes]))
        # Slower than its class by this factor, in all that it computes.
        self.slowness = factor[0]
        self.train_s = self._each([one.task_s(one.examples) + one.overhead_s for one in classes]) * factor[0]
        self.up = self._each([one.up_mbit * _MBIT_BYTES for one in classes]) * factor[1]
        self.down = self._each([one.down_mbit * _MBIT_BYTES for one in classes]) * factor[2]
        self.latency_s = self._each([one.latency_s for one in classes])
        self.jitter = self._each([one.jitter for one in classes])
        self.failure = self._each([one.failure for one in classes])
        self.examples = self._each([one.examples for one in classes])
        self._session_s = self._each([one.session_s for one in classes])
        self._away_s = self._each([one.away_s for one in classes])
        self._draws = DeviceDraws([seed, 2], self.count)
        self.reachable = rng.random(self.count) < self._each([one.available for one in classes])
        self.changes_at = np.where(self._away_s > 0, self._stretch(np.arange(self.count)), np.inf)
        self._traced = None if trace is None else [trace.changes(device) for device in range(self.count)]
        if self._traced is not None:
            self.reachable = np.array([each.reachable for each in self._traced])
            self.changes_at = np.array([each.next_change() for each in self._traced])

    def _each(self, values: Sequence[float]) -> np.ndarray:
        return np.asarray(values, dtype=np.float64)[self.class_of]

    def _stretch(self, of: np.ndarray) -> np.ndarray:
        """Draw the length of their present stretch."""
        mean_s = np.where(self.reachable[of], self._session_s[of], self._away_s[of])
        return self._draws.exponentials(of, mean_s)

    def advance(self, now: float) -> None:
        """Bring every device to the present."""
        while (due := np.flatnonzero(self.changes_at <= now)).size:
            self._toggle(due)

    def advance_one(self, device: int, now: float) -> bool:
        """Bring one device to the present. Return whether it can be reached."""
        while self.changes_at[device] <= now:
            self._toggle(np.array([device]))
        return bool(self.reachable[device])

    def _toggle(self, devices: np.ndarray) -> None:
        self.reachable[devices] = ~self.reachable[devices]
        if self._traced is None:
            self.changes_at[devices] += self._stretch(devices)
        else:
            self.changes_at[devices] = [self._traced[device].next_change() for device in devices]

    def state(self) -> dict[str, Any]:
        """Return where the devices stand, as JSON has it: draws so far, and who can be reached for how long."""
        found: dict[str, Any] = {"draws": self._draws.taken.tolist()}
        if self._traced is None and np.isfinite(self.changes_at).any():
            found |= {"reachable": self.reachable.tolist(), "changes_at": self.changes_at.tolist()}
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take devices of the same description to where `state` had them. Raises ValueError, TypeError, KeyError.

        A trace is played again as far as somebody asks.
        """
        self._draws.taken[:] = self._of_each(state["draws"], np.uint64)
        if "changes_at" in state:
            reachable, changes_at = (
                self._of_each(state["reachable"], bool),
                self._of_each(state["changes_at"], np.float64),
            )
            self.reachable, self.changes_at = reachable, changes_at

    def _of_each(self, values: Any, dtype: Any) -> np.ndarray:
        found = np.array(values, dtype)
        if found.shape != (self.count,):
            raise ValueError(f"a state of {found.size} devices, and there are {self.count}")
        return found

    def fails(self, device: int) -> float | None:
        """Draw whether a task fails on the device: after which share of its training; None: it does not."""
        draws = self._draws
        return draws.uniform(device) if draws.uniform(device) < self.failure[device] else None

    def varied(self, device: int, median: float) -> float:
        """Return one draw around the median."""
        return float(median * math.exp(self.jitter[device] * self._draws.normal(device)))


Fate = Literal["", "merged", "late", "failed", "in vain"]


@dataclass(slots=True)
class Job:
    """One task on one device: how far it is, and what it has cost.

    Costs in bytes and seconds; `fate` empty: the task continues, or its update waits for a commit.
    """

    token: str
    device: int
    phase: TaskPhase = TaskPhase.OFFERED
    entered_at: float = 0.0
    size_bytes: int = 0
    held_bytes: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
    trained_s: float = 0.0
    staleness: int = 0
    merged_at: float | None = None
    ended_at: float | None = None
    fate: Fate = ""

    @property
    def over(self) -> bool:
        """True if its device has stopped."""
        return self.ended_at is not None or self.fate in ("late", "failed")

    def enter(self, phase: TaskPhase, now: float) -> None:
        """Begin a part of the task."""
        self.phase, self.entered_at, self.held_bytes, self.size_bytes = phase, now, 0, 0

    def moved(self, held_bytes: float) -> None:
        """Note how much of the payload has been transferred."""
        self.held_bytes = round(held_bytes)
        if self.phase is TaskPhase.DOWNLOADING:
            self.down_bytes = self.held_bytes
        else:
            self.up_bytes = self.held_bytes

    def progress(self) -> Progress:
        """Return the content of a heartbeat."""
        if self.phase is TaskPhase.UPLOADING:
            return Progress(self.token, self.phase, 0.0, self.held_bytes, self.size_bytes)
        return Progress(self.token, self.phase)

    def stop(self, fate: Fate) -> None:
        """Note that the task is of no use any more."""
        self.fate = fate

    def end(self, now: float) -> None:
        """Note that its device has done with the task."""
        self.ended_at = now

    def merge(self, now: float, staleness: int) -> None:
        """Note that its update is in a version."""
        self.fate, self.merged_at, self.staleness = "merged", now, staleness
