"""The fleet as the page shows it: search, order and pages of up to tens of thousands of workers. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlencode

from fedgrpc.claims import Text
from fedgrpc.protocol.plans import local_model_plan_from_proto
from fedgrpc.v1.aggregator_pb2 import Run, WorkerRecord, WorkerState
from fedgrpc.v1.device_pb2 import NetworkKind, WorkerRole
from fedgrpc.v1.round_pb2 import TaskPhase
from fedgrpc.words import rate, size

PAGE_ROWS: Final = 50
_SEARCH: Final = Text(100)
_MAX_PAGE: Final = 1_000_000
# A waiting poll counts as being seen; without one, silence of this length is shown.
_SILENT_S: Final = 5.0
_ACCEPTED: Final = "accepted"
STATES: Final = ("busy", "idle", "silent", "away", "revoked")
ROLES: Final[Mapping[int, str]] = {
    WorkerRole.WORKER_ROLE_EVALUATOR: "evaluator",
    WorkerRole.WORKER_ROLE_AGGREGATOR: "leaf",
}
_NETWORKS: Final[Mapping[int, str]] = {
    NetworkKind.NETWORK_KIND_ETHERNET: "ethernet",
    NetworkKind.NETWORK_KIND_WIFI: "Wi-Fi",
    NetworkKind.NETWORK_KIND_CELLULAR: "cellular",
}


@dataclass(frozen=True)
class FleetQuery:
    """Wanted part of the fleet: words to find, a state or "trouble", an order, and a page from 1 on."""

    text: str = ""
    show: str = ""
    order: str = "name"
    page: int = 1

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> FleetQuery:
        """Return the query of a URL's parameters. What cannot be meant counts as not given."""
        show, order, page = (parameters.get(name, "") for name in ("show", "order", "page"))
        known = page.isascii() and page.isdigit() and len(page) <= len(str(_MAX_PAGE))
        return cls(
            text=_SEARCH.cleaned(parameters.get("text", "")),
            show=show if show in (*STATES, "trouble") else "",
            order=order if order in ORDERS else "name",
            page=max(1, int(page)) if known else 1,
        )

    def url(self, **changes: Any) -> str:
        """Return the URL of this query with some fields changed."""
        changed = replace(self, **changes)
        usual = FleetQuery()
        given = {name: value for name, value in vars(changed).items() if value != getattr(usual, name)}
        return f"/fleet?{urlencode(given)}" if given else "/fleet"


@dataclass(frozen=True)
class FleetPage:
    """One page of the workers that a query has found. `counts` are of the whole fleet, by state."""

    query: FleetQuery
    workers: Sequence[WorkerRecord]
    found: int
    fleet: int
    counts: Mapping[str, int]

    @property
    def pages(self) -> int:
        """Number of pages; one at least."""
        return max(1, math.ceil(self.found / PAGE_ROWS))

    @property
    def first(self) -> int:
        """Place of the first row among those found, from 1 on; 0: nothing was found."""
        return (self.query.page - 1) * PAGE_ROWS + 1 if self.found else 0


def fleet_page(fleet: Sequence[WorkerRecord], query: FleetQuery) -> FleetPage:
    """Return the page of a query. `fleet` is in the order of names. A page behind the last is the last."""
    words = query.text.lower().split()
    found = [worker for worker in fleet if _shown(worker, query.show) and _has(worker, words)]
    if query.order != "name":
        found.sort(key=ORDERS[query.order])
    query = replace(query, page=min(query.page, max(1, math.ceil(len(found) / PAGE_ROWS))))
    start = (query.page - 1) * PAGE_ROWS
    counts = dict.fromkeys((*STATES, "trouble"), 0)
    for worker in fleet:
        counts[state_of(worker)] += 1
        counts["trouble"] += bool(failures(worker))
    return FleetPage(query, found[start : start + PAGE_ROWS], len(found), len(fleet), counts)


def _shown(worker: WorkerRecord, show: str) -> bool:
    if show == "trouble":
        return bool(failures(worker))
    return not show or state_of(worker) == show


def _has(worker: WorkerRecord, words: Iterable[str]) -> bool:
    device = worker.device
    texts = (worker.worker, device.device_class, device.cpu_model, device.accelerator_name, role_of(worker))
    text = " ".join((*texts, *(f"{name}={value}" for name, value in device.labels.items()))).lower()
    return all(word in text for word in words)


def seen_ago_s(worker: WorkerRecord) -> float:
    """Return for how long nothing was heard of a worker, seconds."""
    return worker.last_seen_ago.ToTimedelta().total_seconds()


def state_of(worker: WorkerRecord) -> str:
    """Return `busy`, `idle`, `silent` (it should poll, and does not), `away` or `revoked`."""
    if worker.state == WorkerState.WORKER_STATE_REVOKED:
        return "revoked"
    if worker.state == WorkerState.WORKER_STATE_BUSY:
        return "busy"
    if worker.state == WorkerState.WORKER_STATE_IDLE:
        return "silent" if seen_ago_s(worker) >= _SILENT_S else "idle"
    return "away"


def task_of(worker: WorkerRecord) -> str:
    """Return what a busy worker does, as in `training 40%`."""
    if worker.state != WorkerState.WORKER_STATE_BUSY or not worker.task_phase:
        return ""
    phase = TaskPhase.Name(worker.task_phase).removeprefix("TASK_PHASE_").lower()
    return f"{phase} {worker.progress:.0%}"


def role_of(worker: WorkerRecord) -> str:
    """Return `trainer`, `evaluator` or `leaf`."""
    return ROLES.get(worker.role, "trainer")


def failures(worker: WorkerRecord) -> dict[str, int]:
    """Return how its last tasks were lost, and how many so, the most frequent first."""
    lost = {name: count for name, count in worker.endings.items() if name != _ACCEPTED}
    return dict(sorted(lost.items(), key=lambda item: (-item[1], item[0])))


def power_of(worker: WorkerRecord) -> str:
    """Return `mains`, `battery 80%`, ...; empty: not known."""
    now = worker.conditions
    charge = f" {now.battery:.0%}" if now.HasField("battery") else ""
    if now.HasField("on_mains"):
        return f"mains{charge}" if now.on_mains else f"battery{charge}"
    return f"battery{charge}" if charge or worker.device.on_battery else ""


def link_of(worker: WorkerRecord) -> str:
    """Return `Wi-Fi, 8 Mbit/s up, 20 Mbit/s down`, as far as it is known."""
    up, down = worker.uplink_bytes_per_second, worker.downlink_bytes_per_second
    parts = [_NETWORKS.get(worker.conditions.network, "")]
    parts += [
        f"{rate(bytes_per_second)} {way}"
        for bytes_per_second, way in ((up, "up"), (down, "down"))
        if bytes_per_second
    ]
    return ", ".join(filter(None, parts))


def conditions_of(worker: WorkerRecord) -> str:
    """Return temperature and load as the device reports them."""
    now, parts = worker.conditions, []
    if now.HasField("temperature_celsius"):
        parts.append(f"{now.temperature_celsius:.0f} °C")
    if now.HasField("load"):
        parts.append(f"load {now.load:.0%}")
    return ", ".join(parts)


def hardware_of(worker: WorkerRecord) -> str:
    """Return processor, cores, memory and accelerator."""
    device = worker.device
    parts = [device.cpu_model, f"{device.cpu_cores} cores" if device.cpu_cores else ""]
    parts.append(f"{size(device.memory_bytes)} memory" if device.memory_bytes else "")
    if device.accelerator not in ("", "cpu"):
        memory = f" {size(device.accelerator_memory_bytes)}" if device.accelerator_memory_bytes else ""
        parts.append((device.accelerator_name or device.accelerator) + memory)
    return ", ".join(filter(None, parts))


def plan_of(worker: WorkerRecord, run: Run) -> str:
    """Return the local-model plan of a worker's class in a run; empty: the model as it is."""
    plans = run.local_models
    name = worker.device.device_class
    if name in plans.classes:
        return local_model_plan_from_proto(plans.classes[name]).to_line()
    if plans.automatic:
        return "by its memory and speed"
    return local_model_plan_from_proto(plans.default).to_line() if plans.HasField("default") else ""


def _share(worker: WorkerRecord) -> float:
    return worker.rounds_accepted / worker.rounds_selected if worker.rounds_selected else 1.0


# Orders besides that of names, each by what an operator looks for first.
ORDERS: Final[Mapping[str, Callable[[WorkerRecord], Any]]] = {
    "name": lambda worker: worker.worker,
    "state": lambda worker: STATES.index(state_of(worker)),
    "class": lambda worker: worker.device.device_class,
    "seen": lambda worker: -seen_ago_s(worker),
    "link": lambda worker: worker.uplink_bytes_per_second or math.inf,
    "accepted": _share,
    "failures": lambda worker: -sum(failures(worker).values()),
}
