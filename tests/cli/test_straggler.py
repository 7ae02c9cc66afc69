"""The demo's straggler, on a real process: stopped while it has a task, and let go when the round has ended."""

from __future__ import annotations

import asyncio

import psutil

from fedgrpc.cli.demo.federation import Straggler
from fedgrpc.cli.demo.processes import Processes
from fedgrpc.v1 import round_pb2

ACCEPTED, OFFERED = round_pb2.TASK_PHASE_ACCEPTED, round_pb2.TASK_PHASE_OFFERED
REPORTING, COMMITTED = round_pb2.ROUND_PHASE_REPORTING, round_pb2.ROUND_PHASE_COMMITTED


def _round(number, task_phase, phase=REPORTING, kind=round_pb2.TASK_KIND_TRAIN):
    task = round_pb2.TaskRecord(worker="pi", phase=task_phase)
    return round_pb2.Round(number=number, kind=kind, phase=phase, tasks=[task])


async def _told(tmp_path, records, round_number=2):
    """What is told of records, after each of which the process is to be stopped or not."""
    told = []
    async with Processes(tmp_path) as processes:
        started = await processes.start("pi", ["-c", "import time; time.sleep(600)"])
        straggler = Straggler("pi", round_number, processes, told.append)
        for record, is_stopped in records:
            straggler.follow(record)
            async with asyncio.timeout(120):
                while (psutil.Process(started.pid).status() == psutil.STATUS_STOPPED) != is_stopped:  # noqa: ASYNC110 - a process wakes nobody
                    await asyncio.sleep(0.01)
    return told


async def test_it_is_stopped_once_it_has_its_task_and_goes_on_when_the_round_has_ended(tmp_path):
    ended = _round(2, OFFERED, COMMITTED)
    records = [
        (_round(1, OFFERED), False),
        (_round(2, OFFERED), True),
        (ended, False),
        (_round(3, OFFERED), False),
    ]
    assert await _told(tmp_path, records) == ["pi hangs: stopped until round 2 has ended without it"]


async def test_it_goes_on_though_the_end_of_its_round_was_not_seen(tmp_path):
    assert len(await _told(tmp_path, [(_round(2, OFFERED), True), (_round(3, OFFERED), False)])) == 1


async def test_one_that_had_sent_its_update_before_the_stop_is_stopped_in_the_next_round(tmp_path):
    first = [(_round(2, OFFERED), True), (_round(2, ACCEPTED), False), (_round(2, ACCEPTED, COMMITTED), False)]
    assert len(await _told(tmp_path, [*first, (_round(3, OFFERED), True)])) == 2


async def test_a_round_that_only_scores_is_left_alone_and_so_is_every_round_without_a_number(tmp_path):
    assert await _told(tmp_path, [(_round(5, OFFERED, kind=round_pb2.TASK_KIND_EVALUATE), False)]) == []
    assert await _told(tmp_path, [(_round(5, OFFERED), False)], round_number=0) == []
