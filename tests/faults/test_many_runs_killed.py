"""Promise 4 for many runs: "No accepted update is lost." A real aggregator with two submitted runs and two workers
is killed in the middle of both, and started again on what it left behind.
"""

import asyncio
import json
import signal
from contextlib import ExitStack, aclosing

import pytest

from fedgrpc.calls import connect
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.round_pb2 import TASK_PHASE_ACCEPTED
from tests.faults.test_aggregator_killed import Kept
from tests.support.command_line import NUMPY_TASK, running_command, until_line, worker_arguments
from tests.support.hand_driven_device import PATIENCE_S
from tests.support.many_runs import QUICK, until
from tests.support.processes import free_address

pytestmark = pytest.mark.faults

ROUNDS = 30
RUNS = ("a", "b")
WORKERS = ("pi-1", "pi-2")
# So many looks in a row: an update that was on the way when its worker stopped has come by then.
LOOKS = 8


async def test_two_runs_outlive_a_killed_aggregator_and_lose_no_accepted_update(tmp_path):
    address, data = free_address(), tmp_path / "data"
    serve = ("aggregator", "--address", address, "--data-dir", str(data))
    logs = {name: tmp_path / f"{name}.log" for name in WORKERS}
    with ExitStack() as stack:
        with running_command(*serve, log=tmp_path / "first.log") as first:
            until_line(tmp_path / "first.log", "serving", first)
            async with connect(address) as client:
                for name in RUNS:
                    await client.submit(name, {**QUICK, "task": NUMPY_TASK, "rounds": str(ROUNDS)})
                _, slow = (
                    stack.enter_context(running_command(*worker_arguments(tmp_path, address, name), log=log))
                    for name, log in logs.items()
                )
                await until_both_are_in_the_middle(client)
                # From now on a round has an update of one worker, and waits for the other.
                slow.send_signal(signal.SIGSTOP)
                await until_half_done(client)
            first.kill()
            first.wait()
        slow.send_signal(signal.SIGCONT)
        acknowledged = set().union(*(acknowledged_by(log, name) for name, log in logs.items()))
        before = {name: Kept.in_folder(data / "runs" / name, tmp_path / f"{name}-killed") for name in RUNS}
        assert all(0 < len(kept.committed) < ROUNDS for kept in before.values())
        assert sum(len(kept.accepted) for kept in before.values()) == 1
        with running_command(*serve, log=tmp_path / "second.log") as second:
            until_line(tmp_path / "second.log", "serving", second)
            async with connect(address) as client:
                runs = await until(
                    client, lambda runs: all(run.phase == pb.RUN_PHASE_FINISHED for run in runs.values())
                )
                rounds = {name: await client.of(name).all_rounds() for name in RUNS}
    assert {name: run.model_version for name, run in runs.items()} == dict.fromkeys(RUNS, ROUNDS + 1)
    # What was accepted was not asked for again: the next process counts it.
    resumed = {event["run"]: event["accepted"] for event in events(tmp_path / "second.log", "round resumed")}
    assert {name: resumed.get(name, 0) for name in RUNS} == {name: len(before[name].accepted) for name in RUNS}
    assert acknowledged
    assert acknowledged <= {
        (name, record.number, task.worker)
        for name in RUNS
        for record in rounds[name]
        for task in record.tasks
        if task.phase == TASK_PHASE_ACCEPTED
    }


async def until_both_are_in_the_middle(client):
    """Let each run come to its third round and wait there for the other, so that neither ends before."""
    waiting = set()
    async with asyncio.timeout(PATIENCE_S):
        while len(waiting) < len(RUNS):
            for run in await client.runs():
                if run.current_round >= 3 and run.name not in waiting:
                    await client.of(run.name).pause()
                    waiting.add(run.name)
            await asyncio.sleep(0.05)
    for name in RUNS:
        await client.of(name).resume()


async def until_half_done(client):
    """Wait until a round of a run has an accepted update and waits for another, and that lasts."""
    seen = []
    async with asyncio.timeout(PATIENCE_S):
        while len(seen) < LOOKS:
            now = [(name, round_.number) for name in RUNS if half_done(round_ := await round_of(client.of(name)))]
            seen = [*seen, now] if now and now == (seen or [now])[-1] else []
            await asyncio.sleep(0.1)


async def round_of(client):
    """The round in progress of a run."""
    async with aclosing(client.watch()) as watched:
        return (await anext(watched)).round


def half_done(round_):
    return 0 < sum(task.phase == TASK_PHASE_ACCEPTED for task in round_.tasks) < len(round_.tasks)


def events(log, name):
    """Lines of a log with this event; the last one may be half."""
    lines = (json.loads(line) for line in log.read_text().splitlines() if line[:1] == "{" and line.endswith("}"))
    return [line for line in lines if line["event"] == name]


def acknowledged_by(log, worker):
    """Updates that the aggregator has acknowledged to a worker: run, round, worker."""
    return {(each["run"], each["round"], worker) for each in events(log, "update acknowledged")}
