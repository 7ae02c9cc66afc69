"""Measurement of this device's profile, where that is cheap.

A container's limits count, not those of its host. torch is asked for the accelerator only after something else has
imported it: the import takes seconds and hundreds of megabytes on a small device.
"""

from __future__ import annotations

import math
import os
import platform
import re
import sys
from pathlib import Path

import psutil

from fedgrpc.protocol.devices import DeviceProfile


def detect(root: Path = Path("/")) -> DeviceProfile:
    """Measure this device; `root` is the folder that holds proc and sys."""
    board = system_text(root / "proc/device-tree/model").rstrip("\0")
    accelerator, name, accelerator_memory_bytes = _accelerator()
    return DeviceProfile(
        device_class=device_class_of(board),
        cpu_model=board or _cpu_model(root),
        cpu_cores=_cpu_cores(root),
        memory_bytes=usable_memory_bytes(root),
        accelerator=accelerator,
        accelerator_name=name,
        accelerator_memory_bytes=accelerator_memory_bytes,
        on_battery=_on_battery(),
    )


def device_class_of(board: str) -> str:
    """Return "raspberry-pi-4" for "Raspberry Pi 4 Model B Rev 1.4", "jetson-nano" for "NVIDIA Jetson Nano ..."."""
    name = re.sub(r"^nvidia ", "", board.strip().lower())
    name = re.split(r" (?:model|rev|developer|engineering|module|plus)\b", name)[0]
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def system_text(path: Path) -> str:
    """Return the text of a file by which the system tells of itself; "" without one."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _cpu_model(root: Path) -> str:
    for line in system_text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("model name", "hardware", "cpu model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _cgroup_folders(root: Path) -> list[Path]:
    """Return the process's cgroup and all above it: limits apply at every level."""
    top = root / "sys/fs/cgroup"
    relative = "/"
    for line in system_text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            relative = line.removeprefix("0::")
    own = top / relative.strip("/")
    return [own, *own.parents][: len(own.relative_to(top).parts) + 1] if ".." not in relative else [top]


def _cpu_cores(root: Path) -> int:
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for folder in _cgroup_folders(root):
        quota, _, period = system_text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            cores = min(cores, int(quota) / int(period))
    quota, period = (system_text(root / f"sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit():
        cores = min(cores, int(quota) / int(period))
    return max(1, math.ceil(cores))


def usual_threads(root: Path = Path("/")) -> int | None:
    """Return the threads to train with in a container of fewer cores than it sees; None: libraries know best.

    A quota of time hides no core. Libraries would start a thread for each core of the host, and all of them would
    wait for the same share of time. What the user has set (`OMP_NUM_THREADS`) stays.
    """
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = _cpu_cores(root)
    return cores if cores < seen and "OMP_NUM_THREADS" not in os.environ else None


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Return the machine's memory, or a container's limit of it."""
    limits = [system_text(folder / "memory.max") for folder in _cgroup_folders(root)]
    limits.append(system_text(root / "sys/fs/cgroup/memory/memory.limit_in_bytes"))
    return min([int(psutil.virtual_memory().total), *(int(limit) for limit in limits if limit.isdigit())])


def resident_bytes() -> int:
    """Return the memory of this process that is in use now."""
    return int(psutil.Process().memory_info().rss)


def _accelerator() -> tuple[str, str, int]:
    """Return kind, name and memory in bytes. A Jetson is a CUDA device with the machine's memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return "cpu", "", 0
    device = torch.cuda.get_device_properties(0)
    return "cuda", str(device.name), int(device.total_memory)


def _on_battery() -> bool:
    sensors = getattr(psutil, "sensors_battery", None)
    battery = sensors() if sensors is not None else None
    return battery is not None and battery.power_plugged is False
