"""A run whose links flap: `python -m tests.faults.soak --flaps 1000` (`make soak`), and its short form for tests.

Each worker reaches the aggregator through a link of its own, which is cut or frozen, and mended, again and again
while rounds go on. Every update must be in the model exactly once: each worker adds a whole number of its own in
every round, so the last model is known beforehand, to the bit. In the long form aggregator and workers are
processes, and what they hold is compared: after the first fifth of the flaps, and after the last.
"""

import argparse
import asyncio
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import save_file

from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.faults.tasks import ZEROS, Adding, changes_of
from tests.support.processes import aggregator_process, running_process
from tests.support.running_federation import running_aggregator, start_worker
from tests.support.unreliable_link import UnreliableLink

_MANY_ROUNDS = 1_000_000
_STOPPED = "the soak is over"
_ACCEPTED, _COMMITTED = round_pb2.TASK_PHASE_ACCEPTED, round_pb2.ROUND_PHASE_COMMITTED
# What may be more at the end than at the start of a process that leaks nothing.
SPARE_FILES, SPARE_TASKS, _SPARE_SHARE = 12, 12, 0.10


@dataclass
class Found:
    """What flapping did.

    `lost` names rounds without all their updates; tasks and files are this process's own, early and late.
    """

    flaps: int = 0
    rounds: int = 0
    lost: list[str] = field(default_factory=list)
    tasks_before: int = 0
    tasks_after: int = 0
    files_before: int = 0
    files_after: int = 0


async def flapping(link, rng, flaps):
    """Break and mend one link that often; now and then it is frozen instead of cut."""
    for _ in range(flaps):
        await asyncio.sleep(rng.uniform(0.05, 0.5))
        frozen = rng.random() < 0.2
        (link.freeze if frozen else link.cut)()
        await asyncio.sleep(rng.uniform(0.02, 0.2))
        (link.thaw if frozen else link.mend)()


async def judged(running, names):
    """(what was lost, committed rounds) of a run that was stopped."""
    lost, committed, token = [], 0, ""
    while True:
        page = await running.stub.ListRounds(pb.ListRoundsRequest(page_token=token, page_size=500))
        for item in page.rounds:
            accepted = sorted(task.worker for task in item.tasks if task.phase == _ACCEPTED)
            committed += item.phase == _COMMITTED
            if item.reason != _STOPPED and (item.phase != _COMMITTED or accepted != names):
                lost.append(f"round {item.number}: only {accepted}, {item.reason}")
        if not (token := page.next_page_token):
            break
    version = (await running.run()).model_version
    each = sum(changes_of(len(names))) // len(names)
    weights = running.weights(version)["w"]
    if version != committed + 1 or not np.array_equal(weights, np.full_like(weights, each * committed)):
        lost.append(f"version {version} after {committed} rounds is {weights.flat[0]:g}, not {each * committed}")
    return lost, committed


async def another_round(running):
    """Until one more round is committed: whatever broke has had to mend."""
    version = (await running.run()).model_version
    await running.until(lambda run, _: run.model_version > version)


def starting_from_zeros(folder):
    save_file(ZEROS, folder / "initial.safetensors")
    return [f"w{i}" for i in range(9)]


async def flap(folder, flaps, workers, seed=0):
    """The short form: all in this process."""
    found, rng = Found(), random.Random(seed)
    names = starting_from_zeros(folder)[:workers]
    policy = {"min_workers": workers, "quorum": workers, "deadline_s": 300.0, "lease_s": 60.0}
    how = {"rounds": _MANY_ROUNDS, "policy": policy, "upload_recipe": "raw", "download_recipe": "raw"}
    async with running_aggregator(folder, **how) as running, AsyncExitStack() as stack:
        links = [await stack.enter_async_context(UnreliableLink(running.address)) for _ in names]
        trainers = [Adding(change, 0.02) for change in changes_of(workers)]
        crew = [
            start_worker(link.address, folder, name, trainer, stall_s=5.0)
            for name, link, trainer in zip(names, links, trainers, strict=True)
        ]
        await running.until(lambda run, _: run.model_version > 1)
        found.tasks_before, found.files_before = _held_here()
        each = -(-flaps // workers)
        await asyncio.gather(*(flapping(link, rng, each) for link in links))
        found.flaps = each * workers
        await another_round(running)
        for _ in range(20):
            found.tasks_after, found.files_after = _held_here()
            if (
                found.tasks_after <= found.tasks_before + SPARE_TASKS
                and found.files_after <= found.files_before + SPARE_FILES
            ):
                break
            # What was cut last may not have been noticed yet; what leaked stays.
            await another_round(running)
        await running.stub.StopRun(pb.StopRunRequest(reason=_STOPPED))
        assert await asyncio.wait_for(asyncio.gather(*crew), 120) == [0] * workers
        found.lost, found.rounds = await judged(running, names)
    return found


def _held_here():
    gc.collect()
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


async def soak(folder, flaps, workers, seed):
    """The long form; a dict of what was found, with a list of what must not be."""
    rng, names = random.Random(seed), starting_from_zeros(folder)[:workers]
    rules = ["--min-workers", workers, "--quorum", workers, "--deadline", "5m", "--lease", "1m"]
    how = ["--encoding", "raw", "--rounds", _MANY_ROUNDS]
    program = ("-m", "tests.faults.counted")
    begun = time.monotonic()
    async with AsyncExitStack() as stack:
        aggregator, running = await stack.enter_async_context(
            aggregator_process(folder, *rules, *how, program=program)
        )
        links = [await stack.enter_async_context(UnreliableLink(running.address)) for _ in names]
        crew = [
            await stack.enter_async_context(_worker(folder, name, link, change, program))
            for name, link, change in zip(names, links, changes_of(workers), strict=True)
        ]
        everyone = {"aggregator": aggregator, **dict(zip(names, crew, strict=True))}
        await running.until(lambda run, _: run.model_version > 1)
        each = -(-flaps // workers)
        first, rest = each // 5, each - each // 5
        await asyncio.gather(*(flapping(link, rng, first) for link in links))
        before = {name: await _held(it) for name, it in everyone.items()}
        await asyncio.gather(*(flapping(link, rng, rest) for link in links))
        await another_round(running)
        after = {name: await _held(it) for name, it in everyone.items()}
        await running.stub.StopRun(pb.StopRunRequest(reason=_STOPPED))
        codes = [await it.ended() for it in crew]
        wrong, rounds = await judged(running, names)
        wrong += [f"{name} ended with {code}" for name, code in zip(names, codes, strict=True) if code]
        wrong += [line for name, it in everyone.items() for line in _complaints(name, it)]
        wrong += [line for name in everyone for line in _leaks(name, before[name], after[name])]
        return {
            "flaps": (first + rest) * workers,
            "workers": workers,
            "seconds": round(time.monotonic() - begun),
            "rounds": rounds,
            "updates": rounds * workers,
            "dialled": sum(link.dialled for link in links),
            "refused": sum(link.refused for link in links),
            "before": before,
            "after": after,
            "wrong": wrong,
        }


def _worker(folder, name, link, change, program):
    place = ["--aggregator", link.address, "--serve-address", "none", "--name", name, "--state-dir", folder / name]
    task = ["--task", "tests.faults.tasks:Adding", "--option", f"change={change}", "--option", "seconds=0.1"]
    again = ["--reconnect-first", "50ms", "--reconnect-cap", "1s", "--stall", "5s"]
    return running_process("worker", *place, *task, *again, program=program)


async def _held(it):
    """What a process holds now."""
    seen = len(it.events)
    it.send(signal.SIGUSR1)
    counts = await it.until("counted", since=seen)
    return {**counts, "rss_mib": round(psutil.Process(it.pid).memory_info().rss / (1 << 20), 1)}


def _leaks(name, before, after):
    for what, most in (
        ("files", before["files"] + SPARE_FILES),
        ("tasks", before["tasks"] + SPARE_TASKS),
        ("threads", before["threads"] + SPARE_TASKS),
        ("rss_mib", before["rss_mib"] * (1 + _SPARE_SHARE)),
    ):
        if after[what] > most:
            yield f"{name}: {what} grew from {before[what]} to {after[what]}"


def _complaints(name, it):
    """Lines that no flap may cause: errors, tracebacks, and gRPC's word for pings that come too often."""
    for event in it.events:
        text = json.dumps(event)
        if event.get("level") == "error" or "Traceback" in text or "too_many_pings" in text:
            yield f"{name}: {text[:300]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flaps", type=int, default=1000, help="of all links together (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=3, help="each behind a link of its own (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the flaps (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write what was found to this file, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(soak(Path(folder), arguments.flaps, arguments.workers, arguments.seed))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    _show(found)
    return 1 if found["wrong"] else 0


def _show(found):
    print("{flaps} flaps of {workers} links in {seconds} s: {rounds} rounds, {updates} updates".format(**found))
    print(f"{found['dialled']} connections, {found['refused']} of them refused\n")
    print(f"{'':12}{'RSS, MiB':>16}{'files':>12}{'threads':>12}{'tasks':>12}")
    for name, before in found["before"].items():
        after = found["after"][name]
        row = [f"{before[what]:g} > {after[what]:g}" for what in ("rss_mib", "files", "threads", "tasks")]
        print(f"{name:12}{row[0]:>16}{row[1]:>12}{row[2]:>12}{row[3]:>12}")
    print("\n".join(["", *found["wrong"]]) if found["wrong"] else "\nnothing lost, nothing leaked")


if __name__ == "__main__":
    sys.exit(main())
