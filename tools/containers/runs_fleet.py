"""A fleet whose aggregator hosts many runs, in containers, and an operator at another machine of their network."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedgrpc.calls import Calls
from fedgrpc.cli.reach import reached
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.datasets.shares import load_named, write_shares
from fedgrpc.errors import LinkError
from fedgrpc.v1.round_pb2 import Round
from tools.containers.devices import JETSON_NANO, JETSON_NANO_2GB, RASPBERRY_PI_4, Device, make_fleet
from tools.containers.network import Network
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE, Container, Limits, PodmanError, flags, podman
from tools.containers.report import accepted_in

NAME: Final = "fgruns"
PAGE: Final = "127.0.0.1:8080"
FLEET: Final = ((RASPBERRY_PI_4, 4), (JETSON_NANO, 5), (JETSON_NANO_2GB, 3))
LOOK_S: Final = 0.3
_PORT: Final = 50051
_STATE: Final = "/var/lib/fedgrpc"
_TASKS: Final = Path(__file__).parent / "tasks"
_EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "bring_your_own_numpy.py"
_ALLOWED: Final = ("fedgrpc.tasks.*", "fashion_beside", "bring_your_own_numpy")

Settings = Mapping[str, str | int]
# (run, round, worker): one accepted update.
Accepted = set[tuple[str, int, str]]


class Fleet:
    """The containers, and an operator at another machine of their network."""

    def __init__(self, network: Network, folder: Path, logs: Path) -> None:
        self._began_s = time.monotonic()
        self.folder = folder
        self.context = folder / "operator.context"
        self.accepted: Accepted = set()
        leader = network.attach("aggregator")
        self.address = f"{leader.address}:{_PORT}"
        settings = {"web-address": PAGE, "lease": "10s", "log-format": "json"}
        self.aggregator = Container(
            *(f"{NAME}-aggregator", AGGREGATOR_IMAGE, Limits(256 << 20), leader.podman_network),
            *(["aggregator", "--stay", *flags(settings)], {f"{NAME}-aggregator": _STATE}, logs / "aggregator.log"),
        )
        # Twice each device's share of the cores: as a rule they do not all work at once.
        self.devices = make_fleet(2 * (os.cpu_count() or 1), FLEET)
        self.workers = {
            device.name: self._worker(device, number, network, logs)
            for number, device in enumerate(self.devices, 1)
        }

    def _worker(self, device: Device, number: int, network: Network, logs: Path) -> Container:
        settings = {
            "aggregator": self.address, "join": "/data/join.token", "name": device.name,
            "data": "/data/digits.npz",
            "device-class": device.device_class.name, "label": f"hall={'north' if number % 2 else 'south'}",
            "device": "cpu", "threads": 1, "reconnect-cap": "3s", "log-format": "json",
        }  # fmt: skip
        allowed = [
            "--allow-task=fedgrpc.tasks.*",
            "--allow-task=fashion_beside",
            "--allow-task=bring_your_own_numpy",
        ]
        mounts = {
            f"{NAME}-{device.name}": _STATE,
            f"{self.folder / device.name}": "/data:ro",
            f"{self.folder / 'tasks'}": "/tasks:ro",
        }
        link = network.attach(device.name, device.device_class.link_bits_per_second)
        arguments = ["worker", "--stay", *allowed, *flags(settings)]
        return Container(
            *(f"{NAME}-{device.name}", WORKER_IMAGE, device.limits, link.podman_network),
            *(arguments, mounts, logs / f"{device.name}.log"),
        )

    def tell(self, line: str) -> None:
        """A line with the time."""
        print(f"{time.monotonic() - self._began_s:6.1f} s  {line}", flush=True)

    def forget_former(self) -> None:
        """What a fleet that was killed has left, and what its containers said."""
        self.remove()
        for container in (self.aggregator, *self.workers.values()):
            container.log.unlink(missing_ok=True)

    def remove(self) -> None:
        """Everything gone, with its volumes."""
        for container in (self.aggregator, *self.workers.values()):
            container.remove()
            podman("volume", "rm", "--force", container.volume, check=False)

    def on_its_host(self, *words: str) -> str:
        """What a command prints in the aggregator's container."""
        said = podman("exec", self.aggregator.name, "fedgrpc", *words, "--data-dir", _STATE)
        return said or ""

    async def operate(self, *words: str) -> None:
        """Run and show a command of the operator, who is elsewhere. Raises `PodmanError` where it fails."""
        command = [sys.executable, "-m", "fedgrpc", *words, "--context", str(self.context)]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=120)
        shown = " ".join(f"'{word}'" if " " in word or ">" in word else word for word in words)
        self.tell(f"$ fedgrpc {shown.replace(f'{self.folder}/', '')}")
        for line in (done.stdout + done.stderr).splitlines():
            print(f"          {line}", flush=True)
        if done.returncode != 0:
            raise PodmanError(f"fedgrpc {words[0]}: exit code {done.returncode}")

    async def start(self) -> None:
        """Aggregator, token, operator, and twelve devices that join."""
        await asyncio.to_thread(self.aggregator.start)
        until_s = time.monotonic() + 60
        while podman("exec", self.aggregator.name, "fedgrpc", "health", check=False) is None:
            if time.monotonic() > until_s:
                raise PodmanError("the aggregator does not serve within 60 s")
            await asyncio.sleep(LOOK_S)
        token = self.on_its_host("token", "create", "--uses", str(len(self.workers))).split()[0]
        where = f"{_STATE}/operator.context"
        self.on_its_host(
            "operator", "create", "olive", "--role", "admin", "--address", self.address, "--out", where
        )
        self.context.touch(0o600)
        self.context.write_text(podman("exec", self.aggregator.name, "cat", where) or "")
        for device in self.devices:
            (self.folder / device.name / "join.token").write_text(token)
        for worker in self.workers.values():
            await asyncio.to_thread(worker.start)
        self.tell(f"1 aggregator and {len(self.workers)} devices started")

    async def client(self, call: Callable[[Calls], Awaitable[bool]]) -> bool:
        """Make calls as the operator; False where no aggregator answers."""
        way = {"context": self.context, "tls": False, "tls_ca": None, "tls_cert": None, "tls_key": None}
        try:
            async with reached(way) as client:
                return await call(client)
        except LinkError:
            return False

    async def until(self, call: Callable[[Calls], Awaitable[bool]]) -> None:
        """Wait until a call says that it is so, through an aggregator that goes and comes back."""
        while not await self.client(call):  # noqa: ASYNC110 - it asks another process
            await asyncio.sleep(LOOK_S)

    async def rounds(self, client: Calls, run: str) -> list[Round]:
        """Every round of a run; what is seen to be accepted is remembered."""
        rounds = await client.of(run).all_rounds()
        self.accepted |= {(run, *update) for update in accepted_in(rounds)}
        return rounds


def write_data(folder: Path, devices: Sequence[Device], runs: Mapping[str, Settings]) -> None:
    """Each device's own shares, the learning tasks that are not fedgrpc's, and a file for each run."""
    for dataset in ("digits", "fashion_mnist"):
        shares = write_shares(
            folder / dataset, load_named(dataset, None), parse_partition("dirichlet:0.5"), len(devices), seed=0
        )
        for device, share in zip(devices, shares, strict=True):
            (folder / device.name).mkdir(exist_ok=True)
            share.rename(folder / device.name / f"{dataset}.npz").chmod(0o644)
    shutil.copytree(_TASKS, folder / "tasks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_EXAMPLE, folder / "tasks")
    for name, settings in runs.items():
        lines = [f"{key} = {value if isinstance(value, int) else repr(value)}" for key, value in settings.items()]
        (folder / f"{name}.toml").write_text("\n".join(["[run]", *lines, ""]))
