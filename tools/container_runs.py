"""Three runs on one fleet of twelve real containers, operated from a page: `make fleet-runs` (root, podman).

Digits, Fashion-MNIST and a task in NumPy are submitted to one aggregator with TLS; devices join by token. On the
way the aggregator is killed and created again, a device is revoked, and a release is rolled back by its canaries.
With chromium and playwright (make test-extras) the page is open throughout, and pictures of it are taken.

exit code 0     all held, or skipped, with the reason in one line
          1     something did not hold, or went wrong
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from fedgrpc.calls import Calls
from fedgrpc.errors import FedgrpcError
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import models_pb2
from tools.containers.breakage import aggregator_killed, resumed_with_updates
from tools.containers.network import Network, NetworkError
from tools.containers.page import Picture, no_pictures, pictures, why_no_browser
from tools.containers.podman import AGGREGATOR_IMAGE, WORKER_IMAGE, Container, PodmanError, why_not
from tools.containers.report import accepted_in, committed_versions
from tools.containers.runs_fleet import LOOK_S, NAME, PAGE, Accepted, Fleet, Settings, write_data

REVOKED: Final = "jetson-nano-3"
# Its rounds are long enough to be seen half done.
KILLED_IN: Final = "fashion"
_COMMON: Final = {
    **{"min-workers": 3, "max-participants": 4, "quorum": 2},
    **{"deadline": "90s", "selection-window": "2s", "reconnect-grace": "15s"},
}
_WATCH_HZ: Final = 20.0
RUNS: Final[dict[str, Settings]] = {
    "digits": {"task": "fedgrpc.tasks.digits", "rounds": 40, "epochs": 5, "keep-versions": 50, **_COMMON},
    "fashion": {"task": "fashion_beside:FashionBeside", "rounds": 6, "epochs": 2, **_COMMON},
    "numpy": {
        **{"task": "bring_your_own_numpy:SoftmaxRegression", "rounds": 40},
        **{"requires": 'label.hall == "north"', **_COMMON},
    },
}


async def _versions(client: Calls) -> dict[str, pb.RunSummary]:
    return {run.name: run for run in await client.runs()}


async def play(fleet: Fleet, picture: Picture) -> list[str]:
    """The whole story; what does not hold, each in a line."""

    async def joined(client: Calls) -> bool:
        members = await client.identities.members()
        return {member.name for member in members} >= fleet.workers.keys()

    async def all_at(client: Calls, versions: int) -> bool:
        for run in RUNS:
            await fleet.rounds(client, run)
        runs = await _versions(client)
        return all(runs[name].model_version >= min(versions, int(str(RUNS[name]["rounds"]))) for name in RUNS)

    await picture("before", "/runs")
    await fleet.until(joined)
    fleet.tell("all devices have joined, by token, over TLS")
    for name in RUNS:
        await fleet.operate("run", "submit", str(fleet.folder / f"{name}.toml"))
    await fleet.until(lambda client: all_at(client, 2))
    await fleet.operate("run", "list")
    await picture("during-runs", "/runs")
    resumed = await _kill(fleet)
    await picture("after-the-kill", "/runs/digits")
    await fleet.operate("device", "revoke", REVOKED, "--why", "stolen")
    revoked_in: dict[str, int] = {}

    async def note(client: Calls) -> bool:
        revoked_in.update({run.name: run.current_round for run in await client.runs()})
        return True

    await fleet.until(note)
    await picture("revoked", f"/fleet/{REVOKED}")
    served = await _releases(fleet, picture)
    await fleet.until(lambda client: _ended(fleet, client))
    await fleet.operate("run", "list")
    await picture("after-runs", "/runs")
    await picture("as-it-was-left-open", "-")
    wrong = [] if resumed else ["the aggregator's new container did not resume a round with updates"]
    return [*wrong, *served, *await _count_up(fleet, revoked_in)]


async def _kill(fleet: Fleet) -> bool:
    breakage = aggregator_killed(fleet.aggregator, 1, fleet.tell)

    async def follow(client: Calls) -> bool:
        async for news in client.of(KILLED_IN).watch(_WATCH_HZ):
            fleet.accepted |= {(KILLED_IN, *update) for update in accepted_in([news.round])}
            breakage.follow(news.round)
            if breakage.mended.is_set():
                return True
        return False

    try:
        async with asyncio.timeout(240):
            await fleet.until(follow)
    except TimeoutError:
        return False
    for event in resumed_with_updates(fleet.aggregator.events())[-1:]:
        fleet.tell(f"{event.get('run', '')} went on in round {event['round']} with {event['accepted']} updates")
    return True


async def _releases(fleet: Fleet, picture: Picture) -> list[str]:
    """One release that is good, and one that canaries take back; what their applications were given."""
    # A release takes its canaries from the devices that have worked for the run.
    worked = {worker for run, _, worker in fleet.accepted if run == "digits"}
    said = {name: fleet.folder / f"{name}.served" for name in sorted(worked - {REVOKED})[:2]}
    applications = [_application(name, path) for name, path in said.items()]
    canary = ("--canary", ",".join(said))
    try:
        await fleet.operate("release", "start", "digits@2", *canary, "--after", "4s")
        await fleet.until(lambda client: _phase(client, 1, models_pb2.RELEASE_PHASE_DONE))
        bad = ("--watch", "accuracy>=0.999", "--after", "10m")
        await fleet.operate("release", "start", "digits@latest", *canary, *bad)
        await picture("canary", "/runs/digits")
        await fleet.until(lambda client: _phase(client, 2, models_pb2.RELEASE_PHASE_ROLLED_BACK))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(60):
                while not all(_given(path)[-1:] == _BACK for path in said.values()):  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_S)
    finally:
        for application in applications:
            application.kill()
            application.wait()
    await fleet.operate("release", "list", "digits")
    wrong = []
    for name, path in said.items():
        given = _given(path)
        fleet.tell(f"the application on {name} was given {', '.join(given)}")
        if given[-1:] != _BACK or "(release 2)" not in " ".join(given):
            wrong.append(f"{name} has not served the release, or is not back at the version before")
    return wrong


_BACK: Final = ["version 2 (release 1)"]


def _application(device: str, said: Path) -> subprocess.Popen[bytes]:
    """An application on a device that has its model from the worker beside it; it tells of each version."""
    command = ["nsenter", f"--net=/run/netns/{NAME}-{device}", sys.executable, "-m", "fedgrpc", "model", "follow"]
    command += ["--worker", "127.0.0.1:50052", "--run", "digits", "--to", f"{said}.safetensors"]
    with said.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)


def _given(said: Path) -> list[str]:
    """What releases gave to an application, in order."""
    lines = [line.partition(": ")[2] for line in said.read_text().splitlines()]
    return [line for line in lines if "(release " in line]


async def _phase(client: Calls, number: int, phase: int) -> bool:
    release = await client.models.release("digits", number)
    return release.phase == phase


async def _ended(fleet: Fleet, client: Calls) -> bool:
    for run in RUNS:
        await fleet.rounds(client, run)
    return all(run.phase == pb.RUN_PHASE_FINISHED for run in await client.runs())


async def _count_up(fleet: Fleet, revoked_in: dict[str, int]) -> list[str]:
    wrong: list[str] = []
    held: Accepted = set()

    async def count(client: Calls) -> bool:
        for run in RUNS:
            rounds = await fleet.rounds(client, run)
            held.update((run, *update) for update in accepted_in(rounds))
            versions = committed_versions(rounds)
            if versions != list(range(1, len(versions) + 1)):
                wrong.append(f"the versions of {run} are not in a row: {versions}")
            later = [record for record in rounds if record.number > revoked_in[run]]
            served = [record.number for record in later for task in record.tasks if task.worker == REVOKED]
            fleet.tell(f"{run}: {len(later)} rounds after the revocation, {REVOKED} in {len(served)} of them")
            if served:
                wrong.append(f"{REVOKED} has served {run} in rounds {served} after it was revoked")
        return True

    await fleet.until(count)
    told = {update for worker in fleet.workers.values() for update in _acknowledged(worker)}
    fleet.tell(f"{len(told)} updates acknowledged to devices, {len(told & held)} of them held")
    if lost := sorted((told | fleet.accepted) - held):
        wrong.append(f"accepted and lost: {lost}")
    for container in (fleet.aggregator, *fleet.workers.values()):
        container.measure()
        if container.out_of_memory:
            wrong.append(f"{container.name} ran out of memory")
    fleet.tell(f"memory of the aggregator at most {fleet.aggregator.peak_memory_bytes >> 20} MiB")
    return wrong


def _acknowledged(worker: Container) -> Accepted:
    told = [event for event in worker.events() if event["event"] == "update acknowledged"]
    return {(str(event["run"]), int(event["round"]), str(event["worker"])) for event in told}


async def _run(asked: argparse.Namespace, network: Network, folder: Path, looked_at: bool) -> int:
    fleet = Fleet(network, folder, asked.logs or folder / "logs")
    write_data(folder, fleet.devices, RUNS)
    fleet.forget_former()
    try:
        await fleet.start()
        async with asyncio.timeout(asked.timeout), contextlib.AsyncExitStack() as stack:
            picture: Picture = no_pictures
            if looked_at:
                shots = asked.pictures or folder / "pictures"
                browser = pictures(f"{NAME}-aggregator", f"http://{PAGE}", shots)
                picture = await stack.enter_async_context(browser)
            wrong = await play(fleet, picture)
    except TimeoutError:
        wrong = [f"not done within {asked.timeout:.0f} s"]
    finally:
        fleet.remove()
    for line in wrong:
        print(f"fleet-runs: {line}", file=sys.stderr)
    if not wrong:
        fleet.tell("all held")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make fleet-runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds")
    parser.add_argument("--logs", type=Path, help="keep what the containers say, there")
    parser.add_argument("--pictures", type=Path, help="keep the pictures of the page, there")
    asked = parser.parse_args()
    reason = why_not(AGGREGATOR_IMAGE, WORKER_IMAGE)
    if reason is not None:
        print(f"fleet-runs: skipped: {reason}")
        return 0
    with tempfile.TemporaryDirectory(prefix="fedgrpc-runs-") as temporary:
        folder = Path(temporary)
        (asked.logs or folder / "logs").mkdir(parents=True, exist_ok=True)
        try:
            no_browser = why_no_browser()
            if no_browser is not None:
                print(f"fleet-runs: nobody looks at the page: {no_browser}")
            with Network(NAME) as network:
                network.enter()
                return asyncio.run(_run(asked, network, folder, no_browser is None))
        except NetworkError as error:
            print(f"fleet-runs: skipped: no network of its own: {error}")
            return 0
        except (PodmanError, FedgrpcError) as error:
            print(f"fleet-runs: {error}", file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
