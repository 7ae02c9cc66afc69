"""The devices of the fleet test: what each container is limited to, and what it says of itself.

A device has slow cores: each class gets a share of this machine in proportion to its speed, as a quota over
all of its four. Speeds and links are round figures, to have unequal devices; they are no measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tools.containers.podman import Limits

_MIB: Final = 1 << 20
# Of this machine's cores; the rest is the aggregator's.
_SHARED_OUT: Final = 0.9
# However many cores this machine has: no device is faster than half of one.
_MOST_CORES: Final = 0.5


@dataclass(frozen=True)
class DeviceClass:
    """`speed` is relative to the other classes; the link is as fast in both directions."""

    name: str
    speed: float
    memory_bytes: int
    link_bits_per_second: int


@dataclass(frozen=True)
class Device:
    """One container of the fleet."""

    name: str
    device_class: DeviceClass
    limits: Limits


RASPBERRY_PI_4: Final = DeviceClass("raspberry-pi-4", 1.0, 1024 * _MIB, 20_000_000)
JETSON_NANO: Final = DeviceClass("jetson-nano", 2.0, 4096 * _MIB, 50_000_000)
JETSON_NANO_2GB: Final = DeviceClass("jetson-nano-2gb", 1.5, 2048 * _MIB, 5_000_000)
FLEET: Final = ((RASPBERRY_PI_4, 3), (JETSON_NANO, 5), (JETSON_NANO_2GB, 2))
AGGREGATOR: Final = Limits(256 * _MIB)


def make_fleet(cores: int, fleet: Sequence[tuple[DeviceClass, int]] = FLEET) -> list[Device]:
    """Every device, with its share of `cores`."""
    total_speed = sum(kind.speed * count for kind, count in fleet)
    devices = []
    for kind, count in fleet:
        share = min(cores * _SHARED_OUT * kind.speed / total_speed, _MOST_CORES * kind.speed / JETSON_NANO.speed)
        limits = Limits(kind.memory_bytes, share)
        devices += [Device(f"{kind.name}-{number}", kind, limits) for number in range(1, count + 1)]
    return devices
