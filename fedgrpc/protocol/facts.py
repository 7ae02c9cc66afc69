"""Facts of a device for `fedgrpc.runs.eligibility`: of its profile, which stays, and of its passing conditions.

The rule: what a message does not say is no fact. Every number is a claim, and bounded before it counts.
"""

from __future__ import annotations

import math
from typing import Final

from fedgrpc.runs.eligibility import LABEL, LOCAL_MINUTE, MINUTES_OF_DAY, UTC_MINUTE, Fact
from fedgrpc.v1 import device_pb2

# Less than that of the processor's time is taken by others: as good as unused.
_IDLE_LOAD: Final = 0.25
_KELVIN: Final = 273.15
_HOTTEST: Final = 1000.0
_NETWORKS: Final = {
    device_pb2.NETWORK_KIND_ETHERNET: "ethernet",
    device_pb2.NETWORK_KIND_WIFI: "wifi",
    device_pb2.NETWORK_KIND_CELLULAR: "cellular",
}


def lasting_facts(name: str, device: device_pb2.DeviceProfile) -> dict[str, Fact]:
    """Return the facts of a profile, as `bounded_profile` returns it. Zero and empty are unknown."""
    known: dict[str, Fact] = {
        "name": name,
        "device_class": device.device_class,
        "cpu_model": device.cpu_model,
        "cpu_cores": float(device.cpu_cores),
        "memory": float(device.memory_bytes),
        "accelerator": device.accelerator,
        "accelerator_name": device.accelerator_name,
        "accelerator_memory": float(device.accelerator_memory_bytes),
        "uplink": float(device.uplink_bits_per_second),
        "downlink": float(device.downlink_bits_per_second),
        "software_version": device.software_version,
    }
    facts = {fact: value for fact, value in known.items() if value}
    return facts | {f"{LABEL}{label}": value for label, value in device.labels.items()}


def bounded_conditions(message: device_pb2.DeviceConditions) -> device_pb2.DeviceConditions:
    """Return the conditions with each number in its range; what is not finite, or has no meaning, is left out."""
    bounded = device_pb2.DeviceConditions()
    if message.HasField("on_mains"):
        bounded.on_mains = message.on_mains
    for share in ("battery", "load"):
        if message.HasField(share) and math.isfinite(value := getattr(message, share)):
            setattr(bounded, share, min(1.0, max(0.0, value)))
    if message.network in _NETWORKS:
        bounded.network = message.network
    if message.HasField("temperature_celsius") and math.isfinite(message.temperature_celsius):
        bounded.temperature_celsius = min(_HOTTEST, max(-_KELVIN, message.temperature_celsius))
    if message.HasField("local_minute") and message.local_minute < MINUTES_OF_DAY:
        bounded.local_minute = message.local_minute
    return bounded


def passing_facts(conditions: device_pb2.DeviceConditions, utc_minute: int) -> dict[str, Fact]:
    """Return the facts of conditions, as `bounded_conditions` returns them, at this minute of the day."""
    facts: dict[str, Fact] = {UTC_MINUTE: float(utc_minute)}
    if conditions.HasField("on_mains"):
        facts["on_mains"] = conditions.on_mains
    if conditions.HasField("battery"):
        facts["battery"] = conditions.battery
    if conditions.network in _NETWORKS:
        facts["network"] = _NETWORKS[conditions.network]
        facts["unmetered"] = conditions.network != device_pb2.NETWORK_KIND_CELLULAR
    if conditions.HasField("temperature_celsius"):
        facts["temperature"] = conditions.temperature_celsius
    if conditions.HasField("load"):
        facts["load"] = conditions.load
        facts["idle"] = conditions.load < _IDLE_LOAD
    if conditions.HasField("local_minute"):
        facts[LOCAL_MINUTE] = float(conditions.local_minute)
    return facts
