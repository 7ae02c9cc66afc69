"""podman's containers, one by one: started with a device's limits, looked at, killed, removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

AGGREGATOR_IMAGE: Final = "localhost/fedgrpc-aggregator:dev"
WORKER_IMAGE: Final = "localhost/fedgrpc-worker:dev"
_CGROUPS: Final = Path("/sys/fs/cgroup")


class PodmanError(Exception):
    """podman says no; the message is its own."""


def why_not(*images: str) -> str | None:
    """Why containers cannot be run here; None: they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("podman", "ip", "tc"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    if podman("info", check=False) is None:
        return "podman does not run here"
    missing = [image for image in images if podman("image", "exists", image, check=False) is None]
    return f"there is no image {missing[0]}: make images" if missing else None


def podman(*arguments: str, check: bool = True, timeout_s: float = 300) -> str | None:
    """What podman prints; None where it fails and `check` is off. Raises `PodmanError` where it is on."""
    done = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        if check:
            raise PodmanError(f"podman {' '.join(arguments[:3])}: {done.stderr.strip()}")
        return None
    return done.stdout


@dataclass(frozen=True)
class Limits:
    """What a container gets: memory in bytes, and how many of this machine's cores."""

    memory_bytes: int
    cores: float | None = None


@dataclass
class Container:
    """One container that can be killed and created again, with the same volume and address.

    `peak_memory_bytes` is the largest resident memory of its first process over all its lives.
    """

    name: str
    image: str
    limits: Limits
    network: str
    arguments: Sequence[str]
    mounts: Mapping[str, str]
    log: Path
    peak_memory_bytes: int = 0
    out_of_memory: bool = False
    lives: int = 0
    pid: int = 0

    def start(self) -> None:
        """Create and start it. Raises `PodmanError`."""
        flags = ["--name", self.name, "--network", self.network, "--read-only", "--cap-drop", "all"]
        flags += ["--memory", str(self.limits.memory_bytes), "--memory-swap", str(self.limits.memory_bytes)]
        if self.limits.cores is not None:
            flags += ["--cpus", f"{self.limits.cores:.3f}"]
        for source, target in self.mounts.items():
            flags += ["--volume", f"{source}:{target}"]
        podman("run", "--detach", *flags, self.image, *self.arguments)
        self.lives += 1
        state = self.state()
        self.pid = 0 if state is None else int(state["Pid"])

    @property
    def volume(self) -> str:
        """Where its state lives."""
        return self.name

    def state(self) -> Mapping[str, Any] | None:
        """`State` of podman inspect; None where the container is not there."""
        text = podman("inspect", "--type", "container", self.name, check=False)
        return None if text is None else json.loads(text)[0]["State"]

    def measure(self) -> None:
        """Take the peak so far into `peak_memory_bytes`; called now and then, and before a kill."""
        state = self.state()
        if state is None:
            return
        self.out_of_memory |= bool(state["OOMKilled"])
        try:
            status = Path(f"/proc/{state['Pid']}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("VmHWM:") and state["Running"]:
                self.peak_memory_bytes = max(self.peak_memory_bytes, int(line.split()[1]) * 1024)

    def kill(self) -> None:
        """SIGKILL at once, and remove it; its volume stays."""
        os.kill(self.pid, signal.SIGKILL)
        podman("wait", self.name, check=False)
        self.remove()

    def remove(self) -> None:
        """Keep what it has said, then forget the container. Not there: nothing to do."""
        text = subprocess.run(["podman", "logs", self.name], capture_output=True, text=True, timeout=60)
        if text.returncode == 0:
            with self.log.open("a") as file:
                file.write(text.stdout + text.stderr)
        podman("rm", "--force", "--time", "0", self.name, check=False)

    def events(self) -> list[dict[str, Any]]:
        """Every JSON line of all its lives so far, the present one's included."""
        kept = self.log.read_text() if self.log.exists() else ""
        present = subprocess.run(["podman", "logs", self.name], capture_output=True, text=True, timeout=60)
        lines = [*kept.splitlines(), *(present.stdout + present.stderr).splitlines()]
        return [json.loads(line) for line in lines if line.startswith("{")]


def flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as a command line has them."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]
