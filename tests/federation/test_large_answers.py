"""What is larger than a message comes in pages, and operators see all of it: thousands of tasks and workers."""

import asyncio

from fedgrpc.calls import connect
from fedgrpc.rpc.channel import MAX_MESSAGE_BYTES
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1 import round_pb2
from tests.support.command_line import fedgrpc
from tests.support.hand_driven_device import refused
from tests.support.running_federation import running_aggregator

COMMITTED = round_pb2.ROUND_PHASE_COMMITTED
ACCEPTED, LATE = round_pb2.TASK_PHASE_ACCEPTED, round_pb2.TASK_PHASE_LATE
TASKS = 12_000


def large_round(number=101):
    """A round whose record is larger than a message may be: each task has said a lot."""
    tasks = [
        round_pb2.TaskRecord(
            worker=f"w{index:05}",
            phase=LATE if index % 10 == 0 else ACCEPTED,
            reason="slow training: " + "x" * 600 if index % 10 == 0 else "",
            chosen="y" * 800,
            download_bytes=2,
        )
        for index in range(TASKS)
    ]
    record = round_pb2.Round(number=number, phase=COMMITTED, committed_version=2, tasks=tasks)
    assert record.ByteSize() > MAX_MESSAGE_BYTES
    return record


async def keep(running, *records):
    coordinator = running.aggregator.coordinator
    for record in records:
        await coordinator.in_database(coordinator.store.finish_round, record, [], {}, None)


async def pages(running, **request):
    answers = [await running.stub.GetRound(pb.GetRoundRequest(**request))]
    while token := answers[-1].next_page_token:
        answers.append(await running.stub.GetRound(pb.GetRoundRequest(page_token=token, page_size=5000)))
    return answers


async def test_the_tasks_of_a_large_round_come_in_pages(tmp_path):
    async with running_aggregator(tmp_path) as running:
        await keep(running, large_round())
        answers = await pages(running, number=101)
        assert len(answers) > 1
        assert [task.worker for answer in answers for task in answer.round.tasks] == [
            f"w{index:05}" for index in range(TASKS)
        ]
        for answer in answers:
            left_out = TASKS - len(answer.round.tasks)
            assert (answer.round.phase, answer.round.tasks_left_out) == (COMMITTED, left_out)
            accepted = sum(task.phase == ACCEPTED for task in answer.round.tasks)
            assert accepted + answer.round.accepted_left_out == TASKS * 9 // 10


async def test_a_page_may_be_smaller_than_what_fits(tmp_path):
    async with running_aggregator(tmp_path) as running:
        await keep(running, large_round())
        answer = await running.stub.GetRound(pb.GetRoundRequest(number=101, page_size=7))
        assert (len(answer.round.tasks), answer.next_page_token) == (7, "101.7")
        for token in ("1", "x.7", "1.2.3", "-1.0"):
            with refused("INVALID_ARGUMENT", "the page token is not one that GetRound gave"):
                await running.stub.GetRound(pb.GetRoundRequest(page_token=token))


async def test_rounds_that_are_listed_leave_out_the_tasks_that_do_not_fit(tmp_path):
    async with running_aggregator(tmp_path) as running:
        await keep(running, large_round(101), large_round(102))
        (record,) = (await running.stub.ListRounds(pb.ListRoundsRequest())).rounds
        assert (record.number, record.tasks_left_out + len(record.tasks)) == (102, TASKS)
        async with connect(running.address) as it:
            rounds = await it.latest_rounds(5)
        assert [(record.number, len(record.tasks), record.tasks_left_out) for record in rounds] == [
            (101, TASKS, 0),
            (102, TASKS, 0),
        ]


async def test_status_shows_a_large_round_in_a_line(tmp_path):
    async with running_aggregator(tmp_path) as running:
        await keep(running, large_round())
        ended = await asyncio.to_thread(fedgrpc, "status", "--aggregator", running.address)
        assert ended.code == 0, ended.error
        assert f"{TASKS * 9 // 10}/{TASKS}" in ended.out


async def test_workers_are_listed_in_pages(tmp_path):
    async with running_aggregator(tmp_path) as running:
        names = [f"w{index}" for index in range(7)]
        for name in names:
            await running.device(name)
        seen, token = [], ""
        while True:
            answer = await running.stub.ListWorkers(pb.ListWorkersRequest(page_size=3, page_token=token))
            seen.append([record.worker for record in answer.workers])
            token = answer.next_page_token
            if not token:
                break
        assert seen == [names[:3], names[3:6], names[6:]]
        assert len((await running.stub.ListWorkers(pb.ListWorkersRequest())).workers) == 7
        with refused("INVALID_ARGUMENT", "the page token is not one that ListWorkers gave"):
            await running.stub.ListWorkers(pb.ListWorkersRequest(page_token="w3"))
