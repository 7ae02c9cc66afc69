"""Measurement of how this device is now: power, network, temperature, load, and the time of its clock.

    power         /sys/class/power_supply: a mains adapter, or a battery and whether it is charged
    network       the interface of the default route (/proc/net/route), and its kind (/sys/class/net)
    temperature   the hottest of /sys/class/thermal
    load          /proc/stat and /proc/self/stat: what others than this process took since the last look

The rule: what the system does not tell is left out. Each file is read anew, and none is needed. Polls in quick
succession share a measurement.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from fedgrpc.protocol.devices import DeviceProfile, profile_to_proto
from fedgrpc.protocol.facts import lasting_facts, passing_facts
from fedgrpc.runs.eligibility import MINUTES_OF_DAY, eligible, parse
from fedgrpc.v1 import device_pb2
from fedgrpc.worker.device import system_text

# Rounds of a small model take less, and to measure costs as much as a poll.
_FRESH_S: Final = 1.0
# A shorter time says little of the load.
_LEAST_S: Final = 1.0
_JIFFIES_S: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


@dataclass(frozen=True)
class _Times:
    """Processor time until `at_s`, in seconds: of all processors, of which idle, and of this process."""

    at_s: float
    total_s: float
    idle_s: float
    own_s: float


class Conditions:
    """Conditions of this device; `root` is the folder that holds proc and sys."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._before: _Times | None = None
        self._load: float | None = None

    def now(self) -> device_pb2.DeviceConditions:
        """Measure. Takes a few milliseconds."""
        found = device_pb2.DeviceConditions(network=self._network())
        _power(self._root / "sys/class/power_supply", found)
        if (temperature := self._temperature()) is not None:
            found.temperature_celsius = temperature
        if (load := self._measured_load()) is not None:
            found.load = load
        clock = datetime.now().astimezone()
        found.local_minute = 60 * clock.hour + clock.minute
        return found

    def _network(self) -> device_pb2.NetworkKind:
        """Return the kind of the interface that traffic takes."""
        for line in system_text(self._root / "proc/net/route").splitlines()[1:]:
            interface, destination, *_ = [*line.split(), "", ""]
            if destination == "00000000":
                return self._kind_of(interface)
        return device_pb2.NETWORK_KIND_UNSPECIFIED

    def _kind_of(self, interface: str) -> device_pb2.NetworkKind:
        folder = self._root / "sys/class/net" / interface
        if "/" in interface or not folder.exists():
            return device_pb2.NETWORK_KIND_UNSPECIFIED
        if (folder / "wireless").exists() or (folder / "phy80211").exists():
            return device_pb2.NETWORK_KIND_WIFI
        lines = system_text(folder / "uevent").splitlines()
        kind = next((line for line in lines if line.startswith("DEVTYPE=")), "")
        if kind == "DEVTYPE=wwan" or interface.startswith(("wwan", "ppp", "rmnet")):
            return device_pb2.NETWORK_KIND_CELLULAR
        # 1 is Ethernet (include/uapi/linux/if_arp.h), also of the pair of a container.
        is_ethernet = system_text(folder / "type") == "1"
        return device_pb2.NETWORK_KIND_ETHERNET if is_ethernet else device_pb2.NETWORK_KIND_UNSPECIFIED

    def _temperature(self) -> float | None:
        texts = [system_text(path) for path in (self._root / "sys/class/thermal").glob("thermal_zone*/temp")]
        found = [int(text) / 1000 for text in texts if text.lstrip("-").isdigit()]
        return max(found, default=None)

    def _measured_load(self) -> float | None:
        """Return the share of the processors that others took since the last look that was long enough ago."""
        times = self._times()
        if times is None:
            return None
        before = self._before
        if before is None:
            self._before = times
        elif times.at_s - before.at_s >= _LEAST_S and times.total_s > before.total_s:
            busy_s = (times.total_s - before.total_s) - (times.idle_s - before.idle_s)
            others_s = busy_s - (times.own_s - before.own_s)
            self._load = min(1.0, max(0.0, others_s / (times.total_s - before.total_s)))
            self._before = times
        return self._load

    def _times(self) -> _Times | None:
        fields = system_text(self._root / "proc/stat").partition("\n")[0].split()
        # The name of the command may have blanks, and stands in parentheses.
        own = system_text(self._root / "proc/self/stat").rpartition(")")[2].split()
        try:
            ticks = [int(field) for field in fields[1:9]]
            total_s, idle_s = sum(ticks) / _JIFFIES_S, (ticks[3] + ticks[4]) / _JIFFIES_S
            return _Times(time.monotonic(), total_s, idle_s, (int(own[11]) + int(own[12])) / _JIFFIES_S)
        except (ValueError, IndexError):
            return None


class OwnersConditions:
    """Conditions under which the device's owner lets it take tasks: `only_when` is an eligibility expression."""

    def __init__(self, name: str, only_when: str = "", root: Path = Path("/")) -> None:
        """Raises `UsageError` for an expression that cannot be read."""
        self._name = name
        self._only_when = parse(only_when)
        self._conditions = Conditions(root)
        self._measured: tuple[float, device_pb2.DeviceConditions] | None = None

    async def look(self, device: DeviceProfile) -> tuple[device_pb2.DeviceConditions, bool]:
        """Return how the device is now, and whether it takes tasks."""
        now = time.monotonic()
        if self._measured is None or now - self._measured[0] >= _FRESH_S:
            self._measured = now, await asyncio.to_thread(self._conditions.now)
        found = self._measured[1]
        minute = int(time.time() // 60) % MINUTES_OF_DAY
        facts = lasting_facts(self._name, profile_to_proto(device)) | passing_facts(found, minute)
        return found, eligible(self._only_when, facts)


def _power(folder: Path, found: device_pb2.DeviceConditions) -> None:
    """Fill in power, where the system knows of any supply."""
    batteries, charging, plugged = [], [], []
    for supply in folder.glob("*"):
        kind = system_text(supply / "type")
        if kind == "Battery" and system_text(supply / "scope") != "Device":
            charging.append(system_text(supply / "status") in ("Charging", "Full", "Not charging"))
            if (capacity := system_text(supply / "capacity")).isdigit():
                batteries.append(int(capacity) / 100)
        elif kind in ("Mains", "USB"):
            plugged.append(system_text(supply / "online") == "1")
    if batteries:
        found.battery = min(1.0, max(batteries))
    if plugged or charging:
        found.on_mains = any(plugged) or (bool(charging) and all(charging))
    elif folder.exists():
        # A board without any supply that its system knows of hangs on the mains.
        found.on_mains = True
