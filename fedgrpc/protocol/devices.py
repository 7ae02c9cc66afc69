"""Devices on the wire: their profiles and registrations, and the status that a worker shows its owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import Any, Final

from fedgrpc import __version__, claims
from fedgrpc.errors import UsageError
from fedgrpc.protocol.records import timings_to_proto
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.history import Timings
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.submodels.cost import DeviceLimits
from fedgrpc.v1 import aggregator_pb2, device_pb2, round_pb2, worker_pb2

_MOST_LABELS: Final = 32


@dataclass(frozen=True)
class DeviceProfile:
    """Profile of a device; zero or empty is unknown. The fields are those of the message."""

    device_class: str = ""
    cpu_model: str = ""
    cpu_cores: int = 0
    memory_bytes: int = 0
    accelerator: str = "cpu"
    accelerator_name: str = ""
    accelerator_memory_bytes: int = 0
    uplink_bits_per_second: int = 0
    downlink_bits_per_second: int = 0
    on_battery: bool = False
    software_version: str = __version__
    labels: Mapping[str, str] = field(default_factory=dict)

    def with_overrides(self, overrides: Mapping[str, Any]) -> DeviceProfile:
        """Return this profile with the operator's values in place of measured ones.

        Raises:
            UsageError: a name that is no field, or a value of the wrong type.
        """
        known = {field.name: type(getattr(self, field.name)) for field in fields(self)}
        for name, value in overrides.items():
            if name not in known:
                raise UsageError(f"a device has no {name!r}; it has {', '.join(known)}")
            if not isinstance(value, known[name]) or isinstance(value, bool) is not (known[name] is bool):
                raise UsageError(f"the device's {name} must be of type {known[name].__name__}, not {value!r}")
            if isinstance(value, int) and value < 0:
                raise UsageError(f"the device's {name} must not be negative")
        return replace(self, **overrides)


def profile_to_proto(profile: DeviceProfile) -> device_pb2.DeviceProfile:
    """Return the message of a profile."""
    return device_pb2.DeviceProfile(**vars(profile))


def bounded_registration(message: aggregator_pb2.RegisterRequest) -> aggregator_pb2.RegisterRequest:
    """Return a worker's registration with every claim in its range. The fleet checks the name."""
    bounded = aggregator_pb2.RegisterRequest()
    bounded.CopyFrom(message)
    bounded.device.CopyFrom(bounded_profile(message.device))
    del bounded.encodings[:]
    bounded.encodings.extend(map(claims.LABEL.cleaned, message.encodings))
    return bounded


def bounded_profile(message: device_pb2.DeviceProfile) -> device_pb2.DeviceProfile:
    """Return a device's profile with each number in its range and each text one printable line."""
    return device_pb2.DeviceProfile(
        device_class=claims.LABEL.cleaned(message.device_class),
        cpu_model=claims.LABEL.cleaned(message.cpu_model),
        cpu_cores=claims.CORES.clamped(message.cpu_cores),
        memory_bytes=claims.MEMORY_BYTES.clamped(message.memory_bytes),
        accelerator=claims.LABEL.cleaned(message.accelerator),
        accelerator_name=claims.LABEL.cleaned(message.accelerator_name),
        accelerator_memory_bytes=claims.MEMORY_BYTES.clamped(message.accelerator_memory_bytes),
        uplink_bits_per_second=claims.BITS_PER_SECOND.clamped(message.uplink_bits_per_second),
        downlink_bits_per_second=claims.BITS_PER_SECOND.clamped(message.downlink_bits_per_second),
        on_battery=message.on_battery,
        software_version=claims.LABEL.cleaned(message.software_version),
        labels={
            claims.LABEL.cleaned(name): claims.LABEL.cleaned(message.labels[name])
            for name in sorted(message.labels)[:_MOST_LABELS]
        },
    )


def device_from_proto(profile: device_pb2.DeviceProfile) -> DeviceLimits:
    """Return the claims of a profile that costs are predicted from."""
    return DeviceLimits(
        claims.MEMORY_BYTES.clamped(profile.memory_bytes),
        claims.BITS_PER_SECOND.clamped(profile.uplink_bits_per_second),
        claims.BITS_PER_SECOND.clamped(profile.downlink_bits_per_second),
    )


class Activity(IntEnum):
    """Present activity of the worker's loop; numbers as in `fedgrpc.v1.Activity`."""

    CONNECTING = worker_pb2.ACTIVITY_CONNECTING
    WAITING = worker_pb2.ACTIVITY_WAITING
    DOWNLOADING = worker_pb2.ACTIVITY_DOWNLOADING
    TRAINING = worker_pb2.ACTIVITY_TRAINING
    EVALUATING = worker_pb2.ACTIVITY_EVALUATING
    UPLOADING = worker_pb2.ACTIVITY_UPLOADING
    PAUSED = worker_pb2.ACTIVITY_PAUSED
    DRAINING = worker_pb2.ACTIVITY_DRAINING

    @property
    def phase(self) -> TaskPhase:
        """Phase of the task in heartbeats during this activity."""
        if self is Activity.DOWNLOADING:
            return TaskPhase.DOWNLOADING
        return TaskPhase.UPLOADING if self is Activity.UPLOADING else TaskPhase.TRAINING


@dataclass(frozen=True)
class Status:
    """Status of a worker, as `GetStatus` returns it."""

    worker: str
    aggregator: str
    activity: Activity = Activity.CONNECTING
    progress: float = 0.0
    run: str = ""
    round: int = 0
    model_version: int = 0
    device: DeviceProfile = field(default_factory=DeviceProfile)
    last_timings: Timings = field(default_factory=Timings)
    spooled_updates: int = 0
    last_error: str = ""
    task_kind: TaskKind | None = None
    notice: str = ""
    served_version: int = 0
    release: int = 0


def status_to_proto(status: Status) -> worker_pb2.Status:
    """Return the message of a worker's status."""
    return worker_pb2.Status(
        worker=status.worker,
        aggregator=status.aggregator,
        activity=status.activity.value,
        progress=status.progress,
        run=status.run,
        round=status.round,
        model_version=status.model_version,
        device=profile_to_proto(status.device),
        last_timings=timings_to_proto(status.last_timings),
        spooled_updates=status.spooled_updates,
        last_error=status.last_error,
        notice=status.notice,
        served_version=status.served_version,
        release=status.release,
        task_kind=None if status.task_kind is None else round_pb2.TaskKind.Name(status.task_kind.value),
    )
