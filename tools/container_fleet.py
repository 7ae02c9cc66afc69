"""A fleet of real containers with the limits of real devices, on one machine: `make fleet` (root, Linux, podman).

Three Raspberry Pi 4, five Jetson Nano, two Jetson Nano 2GB and an aggregator in 256 MB, each in a namespace
of its own with a shaped link, train one model. Each device trains a local model of its own
(tools/containers/fleet_plans.toml), or all the same with --same-model. On the way a device is killed and created
again, a link is down for a minute, and the aggregator is killed and created again. At the end it is counted:
nothing accepted is lost, and each device has trained its own local model within its memory.

exit code 0     all held, or skipped, with the reason in one line
          1     something did not hold, or went wrong
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedgrpc.calls import Calls, connect
from fedgrpc.errors import FedgrpcError, LinkError
from fedgrpc.rpc.channel import open_channel
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import aggregator_pb2_grpc
from fedgrpc.v1.round_pb2 import Round
from fedgrpc.words import round_line
from tools.containers.breakage import aggregator_killed, device_killed, link_down, resumed_with_updates
from tools.containers.devices import AGGREGATOR, Device, make_fleet
from tools.containers.network import Link, Network, NetworkError
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE, Container, PodmanError, flags, podman, why_not
from tools.containers.report import (
    Accepted,
    accepted_in,
    acknowledged_by,
    committed_versions,
    device_line,
    markdown,
    plans_trained,
)

NAME: Final = "fgfleet"
PORT: Final = 50051
PLANS: Final = Path(__file__).parent / "containers" / "fleet_plans.toml"
PLANS_INSIDE: Final = "/etc/fleet_plans.toml"
FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
KILLED, UNPLUGGED = "jetson-nano-2", "raspberry-pi-4-2"
_WATCH_HZ: Final = 20.0
_MEASURE_S: Final = 3.0


@dataclass(frozen=True)
class Task:
    """What is learned, how, and how well it must be. `mount` is a folder of data on this machine."""

    reference: str
    data: str
    mount: Path | None
    partition: str
    epochs: str
    deadline: str
    accuracy: float


TASKS: Final = {
    "digits": Task(
        "fedgrpc.tasks.digits", "/usr/share/fedgrpc/digits.npz", None, "dirichlet:0.5", "3", "30s", 0.94
    ),
    # Within a point of NIID-Bench's cell (arXiv 2102.02079), as the table in the README.
    "fashion_mnist": Task("fedgrpc.tasks.fashion_mnist", "/data", FASHION_MNIST, "iid", "2", "2m", 0.88),
}


@dataclass
class Seen:
    """What has been watched so far. `accepted`: every update that was seen to be accepted, ever."""

    accepted: Accepted = field(default_factory=set)
    accuracy: float = 0.0
    told: int = -1


class Fleet:
    """The containers and their links, from start to the last count."""

    def __init__(self, asked: argparse.Namespace, network: Network, folder: Path) -> None:
        self._asked = asked
        self._task = TASKS[asked.task]
        self._network = network
        self._began_s = time.monotonic()
        self._seen = Seen()
        self._devices = make_fleet(os.cpu_count() or 1)
        self._plans = PlanTable() if asked.same_model else PlanTable.from_toml(PLANS.read_text(encoding="utf-8"))
        leader = network.attach("aggregator")
        self._address = f"{leader.address}:{PORT}"
        plans = {f"{PLANS}": f"{PLANS_INSIDE}:ro"}
        self._aggregator = self._container(
            "aggregator", AGGREGATOR_IMAGE, leader, folder, self._leading(), more=plans
        )
        self._links = {d.name: network.attach(d.name, d.device_class.link_bits_per_second) for d in self._devices}
        self._workers = {
            device.name: self._worker(device, number, folder) for number, device in enumerate(self._devices, 1)
        }
        self._breakages = [
            link_down(network, self._links[UNPLUGGED], UNPLUGGED, 2, asked.link_down, self.tell),
            device_killed(self._workers[KILLED], KILLED, 4, self.tell),
            aggregator_killed(self._aggregator, 6, self.tell),
        ]

    def tell(self, line: str) -> None:
        """A line with the time."""
        print(f"{time.monotonic() - self._began_s:6.1f} s  {line}", flush=True)

    def _leading(self) -> list[str]:
        task, asked = self._task, self._asked
        settings = {
            "task": task.reference, "epochs": task.epochs, "rounds": asked.rounds, "seed": asked.seed,
            "min-workers": len(self._devices) - 2, "selection-window": "3s", "quorum": 3, "lease": "10s",
            "deadline": asked.deadline or task.deadline, "log-format": "json",
        }  # fmt: skip
        if not asked.same_model:
            settings["local-models"] = PLANS_INSIDE
        # The network of these containers is reached by nobody else.
        return ["aggregator", "--stay", "--insecure", *flags(settings)]

    def _worker(self, device: Device, number: int, folder: Path) -> Container:
        link, kind, task = self._links[device.name], device.device_class, self._task
        settings = {
            "aggregator": self._address, "name": device.name, "profile": "cpu_cores=4",
            "device-class": kind.name if self._asked.same_model else device.name,
            "data": task.data, "partition": self._asked.partition or task.partition,
            "part": f"{number}/{len(self._devices)}",
            "seed": self._asked.seed, "device": "cpu", "threads": 1, "reconnect-cap": "3s",
            "log-format": "json",
        }  # fmt: skip
        if not link.shaped:
            settings["link"] = str(kind.link_bits_per_second)
        more = {} if task.mount is None else {f"{task.mount}": f"{task.data}:ro"}
        arguments = ["worker", *flags(settings)]
        return self._container(device.name, WORKER_IMAGE, link, folder, arguments, device, more)

    def _container(
        self,
        name: str,
        image: str,
        link: Link,
        folder: Path,
        arguments: Sequence[str],
        device: Device | None = None,
        more: dict[str, str] | None = None,
    ) -> Container:
        full, limits = f"{NAME}-{name}", device.limits if device else AGGREGATOR
        mounts = {full: "/var/lib/fedgrpc", **(more or {})}
        return Container(full, image, limits, link.podman_network, arguments, mounts, folder / f"{name}.log")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything started; everything gone afterwards, with its volumes."""
        every = [self._aggregator, *self._workers.values()]
        await asyncio.to_thread(self._forget, every)
        try:
            for container in every:
                await asyncio.to_thread(container.start)
            kind = "by the kernel" if all(link.shaped for link in self._links.values()) else "by the workers"
            self.tell(f"1 aggregator and {len(self._workers)} devices started; links shaped {kind}")
            yield
        finally:
            await asyncio.to_thread(self._forget, every)

    def _forget(self, containers: Sequence[Container]) -> None:
        for container in containers:
            container.remove()
            podman("volume", "rm", "--force", container.volume, check=False)

    async def train(self) -> None:
        """Until the model is good enough and what was broken takes part again; then the run is stopped.

        Raises:
            TimeoutError: it takes too long.
        """
        async with asyncio.timeout(self._asked.timeout), asyncio.TaskGroup() as group:
            measuring = group.create_task(self._measure())
            await self._follow()
            measuring.cancel()

    async def _follow(self) -> None:
        """Watch the run, through an aggregator that goes and comes back."""
        while True:
            try:
                async with connect(self._address) as aggregator:
                    async for news in aggregator.watch(_WATCH_HZ):
                        await self._note(aggregator, news)
                        if await self._is_enough(aggregator, news):
                            return
            except LinkError:
                await asyncio.sleep(0.1)

    async def _note(self, aggregator: Calls, news: pb.WatchRoundsResponse) -> None:
        seen = self._seen
        seen.accepted |= accepted_in([news.round])
        for breakage in self._breakages:
            breakage.follow(news.round)
        # A round's scores come with the updates of the next one.
        scored = news.round.number - 2
        if scored > seen.told:
            for record in await aggregator.latest_rounds(news.round.number - seen.told):
                if seen.told < record.number <= scored:
                    seen.told = record.number
                    seen.accuracy = record.metrics.get("accuracy", seen.accuracy)
                    self.tell(round_line(record))

    async def _is_enough(self, aggregator: Calls, news: pb.WatchRoundsResponse) -> bool:
        if news.run.phase in (pb.RUN_PHASE_FINISHED, pb.RUN_PHASE_STOPPED):
            return True
        if self._seen.accuracy < self._task.accuracy or not all(b.mended.is_set() for b in self._breakages):
            return False
        if not self._is_back(await aggregator.all_rounds()):
            return False
        async with open_channel(self._address) as channel:
            await aggregator_pb2_grpc.AggregatorStub(channel).StopRun(pb.StopRunRequest(reason="all seen"))  # type: ignore[no-untyped-call]
        return True

    def _is_back(self, rounds: Sequence[Round]) -> bool:
        """Whether both devices have delivered in a round after the one in which they were broken."""
        unplugged, killed, _ = self._breakages
        accepted = accepted_in(rounds)
        return all(
            breakage.broken_in
            and any(worker == name and number > breakage.broken_in for number, worker in accepted)
            for name, breakage in ((UNPLUGGED, unplugged), (KILLED, killed))
        )

    async def _measure(self) -> None:
        while True:
            for container in (self._aggregator, *self._workers.values()):
                await asyncio.to_thread(container.measure)
            await asyncio.sleep(_MEASURE_S)

    async def count_up(self) -> list[str]:
        """Print the table; what does not hold, each in a line."""
        async with connect(self._address) as aggregator:
            rounds = await aggregator.all_rounds()
        every = {"aggregator": self._aggregator, **self._workers}
        for container in every.values():
            await asyncio.to_thread(container.measure)
        print("\n" + markdown([device_line(name, container, rounds) for name, container in every.items()]) + "\n")
        told: Accepted = set()
        for container in self._workers.values():
            told |= await asyncio.to_thread(acknowledged_by, container)
        wrong = self._wrong(rounds, told)
        resumed = resumed_with_updates(self._aggregator.events())
        held = len(told & accepted_in(rounds))
        print(
            f"accuracy {self._seen.accuracy:.4f}; {len(told)} updates acknowledged to devices, {held} of them held"
        )
        for event in resumed:
            print(f"after a kill, round {event['round']} went on with {event['accepted']} accepted updates")
        return wrong if resumed else [*wrong, "the aggregator's new container did not resume the round"]

    def _wrong(self, rounds: Sequence[Round], told: Accepted) -> list[str]:
        held, wrong = accepted_in(rounds), []
        if lost := sorted((self._seen.accepted | told) - held):
            wrong.append(f"accepted and lost: {lost}")
        for device in self._devices:
            wanted = self._plans.plan_of(device.name)
            if other := [plan for plan in plans_trained(rounds, device.name) if plan != wanted]:
                wrong.append(f"{device.name} has trained {other[0].to_line()}, and not {wanted.to_line()}")
        committed = committed_versions(rounds)
        if committed != list(range(committed[0], committed[0] + len(committed))):
            wrong.append(f"the versions are not in a row: {committed}")
        if self._seen.accuracy < self._task.accuracy:
            wrong.append(f"accuracy {self._seen.accuracy:.3f}, wanted {self._task.accuracy}")
        for breakage, what in zip(self._breakages, ("link", "device", "aggregator"), strict=True):
            if not breakage.mended.is_set():
                wrong.append(f"the {what} was never broken and mended: more --rounds")
        if not self._is_back(rounds):
            wrong.append("a device that was broken did not come back")
        for container in (self._aggregator, *self._workers.values()):
            if container.out_of_memory:
                wrong.append(f"{container.name} ran out of memory")
        return wrong


async def _run(asked: argparse.Namespace, network: Network, folder: Path) -> int:
    fleet = Fleet(asked, network, folder)
    async with fleet.running():
        try:
            await fleet.train()
        except* TimeoutError:
            print(f"fleet: not done within {asked.timeout:.0f} s", file=sys.stderr)
        wrong = await fleet.count_up()
    for line in wrong:
        print(f"fleet: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _unavailable(asked: argparse.Namespace) -> str | None:
    if sys.platform != "linux":
        return "it needs Linux"
    mount = TASKS[asked.task].mount
    if mount is not None and not mount.is_dir():
        return f"there is no {mount}: apt-get install dataset-fashion-mnist"
    return why_not(AGGREGATOR_IMAGE, WORKER_IMAGE)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(TASKS), default="digits")
    parser.add_argument("--same-model", action="store_true", help="all devices train the whole model")
    parser.add_argument("--partition", help="instead of the task's")
    parser.add_argument("--rounds", type=int, default=100_000, help="at most")
    parser.add_argument("--deadline", help="of a round, instead of the task's")
    parser.add_argument("--link-down", type=float, default=60.0, help="for so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1500.0, help="seconds")
    parser.add_argument("--logs", type=Path, help="keep what the containers say, there")
    asked = parser.parse_args()
    reason = _unavailable(asked)
    if reason is not None:
        print(f"fleet: skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="fedgrpc-fleet-") as temporary:
        folder = asked.logs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with Network(NAME) as network:
                network.enter()
                return asyncio.run(_run(asked, network, folder))
        except NetworkError as error:
            print(f"fleet: skipped: no network of its own: {error}")
            return 0
        except (PodmanError, FedgrpcError) as error:
            print(f"fleet: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
