"""The devices that the demo's workers pretend to be. Round figures, to show unequal devices; not measurements."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final

GIB: Final = 1 << 30


@dataclass(frozen=True)
class DeviceClass:
    """What such a device tells of itself, and how much slower than this machine its worker is made.

    `slowdown` stretches every batch; `link_bits_per_second` paces what it downloads and uploads.
    """

    name: str
    cpu_cores: int
    memory_bytes: int
    slowdown: float
    link_bits_per_second: int


@dataclass(frozen=True)
class Device:
    """One device of the fleet."""

    name: str
    device_class: DeviceClass


_RASPBERRY_PI_4: Final = DeviceClass("raspberry-pi-4", 4, 1 * GIB, slowdown=12, link_bits_per_second=20_000_000)
_JETSON_NANO: Final = DeviceClass("jetson-nano", 4, 4 * GIB, slowdown=6, link_bits_per_second=50_000_000)
_JETSON_NANO_2GB: Final = DeviceClass("jetson-nano-2gb", 4, 2 * GIB, slowdown=8, link_bits_per_second=5_000_000)

_FLEET: Final = (_JETSON_NANO_2GB, _RASPBERRY_PI_4, _JETSON_NANO, _RASPBERRY_PI_4, _JETSON_NANO)


def make_fleet(count: int) -> list[Device]:
    """`count` devices; five are two Raspberry Pi 4, two Jetson Nano and a Jetson Nano 2GB. The first is the
    weakest: it is the one that misses a deadline.
    """
    numbers: Counter[str] = Counter()
    devices = []
    for device_class in islice(cycle(_FLEET), count):
        numbers[device_class.name] += 1
        devices.append(Device(f"{device_class.name}-{numbers[device_class.name]}", device_class))
    return devices
