"""Sources of availability traces: a generator, and importers of published ones.

    diurnal           devices of sites in different time zones, mostly there at night
    from_fedscale     the trace of FedScale (arXiv 2105.11367): a pickle of
                      {client: {"active": [...], "inactive": [...], "finish_time": ...}}, seconds
    from_flash        the trace of FLASH (arXiv 2006.06983): JSON of {id: {"messages": "TIME\\tEVENT\\n..."}}

The rule: a published file is not trusted. A pickle may name no class or function at all: what it says is numbers,
texts and containers, or it is refused.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

from fedgrpc.errors import UsageError
from fedgrpc.simulation.traces import Stretch, Trace, trace_of

_DAY_S: Final = 86_400.0
# What damaged files and made-up ones raise: sizes beyond memory, numbers beyond floats, lists in lists.
_UNREADABLE: Final = (
    *(pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError),
    *(OverflowError, MemoryError, RecursionError),
)
_TIME: Final = "%Y-%m-%d %H:%M:%S"
# What an event of FLASH says of a phone.
_SCREEN_OFF: Final = {"screen_off": True, "screen_lock": True, "screen_on": False, "screen_unlock": False}
_CHARGING: Final = {"battery_charged_on": True, "battery_charged_off": False}
_WIFI: Final = {"wifi": True, **dict.fromkeys(("Unknown", "unknown", "2G", "3G", "4G", "5G", "phone_off"), False)}


@dataclass(frozen=True)
class Site:
    """Devices of one place: how many, and by how many hours their day begins later than that of others."""

    devices: int
    offset_h: float = 0.0


def diurnal(
    sites: Sequence[Site],
    days: int,
    seed: int,
    night: tuple[float, float] = (22.0, 7.0),
    night_share: float = 0.9,
    day_share: float = 0.15,
    outages_per_day: float = 0.0,
) -> Trace:
    """Return the trace of devices that charge at night, as phones do, over so many days.

    A device can be reached in `night_share` of the nights, from an hour or so around the first hour of `night` to
    one around the second, and for a stretch within `day_share` of the days. An outage takes all devices of a site
    for about an hour. Raises `UsageError`.
    """
    if days < 1 or not sites or any(site.devices < 1 for site in sites):
        raise UsageError("a trace needs a day or more, and a site or more, each with devices")
    if not (0 <= night_share <= 1 and 0 <= day_share <= 1 and outages_per_day >= 0):
        raise UsageError("shares of nights and days are from 0 to 1, and outages 0 or more")
    rng, period_s = np.random.default_rng(seed), days * _DAY_S
    found: dict[str, list[Stretch]] = {}
    for number, site in enumerate(sites, 1):
        outages = [(at, at + 3600.0) for at in rng.uniform(0, period_s, rng.poisson(outages_per_day * days))]
        for device in range(site.devices):
            stretches: list[Stretch] = []
            # The night before the first day may reach into it.
            for day in range(-1, days):
                begin_s = (day * 24 + site.offset_h) * 3600.0
                if rng.random() < night_share:
                    length_h = (night[1] - night[0]) % 24
                    from_s = begin_s + (night[0] + rng.normal()) * 3600.0
                    stretches.append((from_s, from_s + max(0.5, length_h + rng.normal()) * 3600.0))
                if rng.random() < day_share:
                    from_s = begin_s + rng.uniform(9, 19) * 3600.0
                    stretches.append((from_s, from_s + rng.exponential(2.0) * 3600.0))
            found[f"site-{number}-{device}"] = list(_without(_wrapped(stretches, period_s), outages))
    return trace_of(found, period_s)


def _wrapped(stretches: Sequence[Stretch], period_s: float) -> Iterator[Stretch]:
    """Move what lies outside of the period to its other end: a trace is repeated."""
    for from_s, to_s in stretches:
        length_s, start_s = min(to_s - from_s, period_s), from_s % period_s
        if start_s + length_s <= period_s:
            yield start_s, start_s + length_s
        else:
            yield start_s, period_s
            yield 0.0, start_s + length_s - period_s


def _without(stretches: Iterator[Stretch], outages: Sequence[Stretch]) -> Iterator[Stretch]:
    """Cut outages out of stretches."""
    left = list(stretches)
    for out_from_s, out_to_s in outages:
        left = [
            piece
            for from_s, to_s in left
            for piece in ((from_s, min(to_s, out_from_s)), (max(from_s, out_to_s), to_s))
            if piece[0] < piece[1]
        ]
    return iter(left)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and containers."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse every class and function."""
        raise UsageError(f"the trace names {module}.{name}: a trace has numbers only, and may run no code")


def from_fedscale(data: bytes) -> Trace:
    """Read FedScale's client_behave_trace, of clients with the most usual period. Raises `UsageError`."""
    try:
        clients = _PlainUnpickler(io.BytesIO(data)).load()
        by_period: dict[float, dict[str, list[Stretch]]] = {}
        for client, about in clients.items():
            period_s = float(about["finish_time"])
            pairs = zip(about["active"], about["inactive"], strict=False)
            stretches = [(float(start), min(float(stop), period_s)) for start, stop in pairs]
            by_period.setdefault(period_s, {})[str(client)] = [each for each in stretches if each[0] < each[1]]
    except UsageError:
        raise
    except _UNREADABLE as error:
        raise UsageError(f"this is no trace of FedScale: {error}") from error
    if not by_period:
        raise UsageError("this trace of FedScale has no clients")
    period_s = max(by_period, key=lambda each: len(by_period[each]))
    return trace_of(by_period[period_s], period_s)


def from_flash(text: str) -> Trace:
    """Read FLASH's user_behavior: a phone can be reached while it charges, has Wi-Fi, and its screen is off or
    locked.

    The period is whole days from the first midnight (UTC) to the last event of all. Raises `UsageError`.
    """
    try:
        devices = json.loads(text)
        events = {str(name): sorted(_events(about["messages"])) for name, about in devices.items()}
    except _UNREADABLE as error:
        raise UsageError(f"this is no trace of FLASH: {error}") from error
    times = [time for each in events.values() for time, _ in each]
    if not times:
        raise UsageError("this trace of FLASH has no events")
    begin_s = math.floor(min(times) / _DAY_S) * _DAY_S
    period_s = max(1, math.ceil((max(times) - begin_s) / _DAY_S)) * _DAY_S
    return trace_of({name: list(_ready(each, begin_s, period_s)) for name, each in events.items()}, period_s)


def _events(messages: str) -> Iterator[tuple[float, str]]:
    for line in messages.splitlines():
        time, _, event = line.strip().partition("\t")
        if event:
            yield datetime.strptime(time.strip(), _TIME).replace(tzinfo=UTC).timestamp(), event.strip()


def _ready(events: Sequence[tuple[float, str]], begin_s: float, period_s: float) -> Iterator[Stretch]:
    """Yield when all three conditions hold; each is False until an event says otherwise."""
    state = {"screen": False, "charging": False, "wifi": False}
    kinds: Mapping[str, Mapping[str, bool]] = {"screen": _SCREEN_OFF, "charging": _CHARGING, "wifi": _WIFI}
    since: float | None = None
    for time, event in events:
        for name, known in kinds.items():
            state[name] = known.get(event, state[name])
        if all(state.values()) and since is None:
            since = time - begin_s
        elif not all(state.values()) and since is not None:
            if time - begin_s > since:
                yield since, time - begin_s
            since = None
    if since is not None and since < period_s:
        yield since, period_s
