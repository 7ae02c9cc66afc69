"""One process at a time speaks for a worker."""

import asyncio

import pytest

from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.errors import NameTaken, StateCopied, UsageError
from fedgrpc.rpc.identity import Session
from fedgrpc.v1.aggregator_pb2 import RegisterRequest

LEASE_S = 10.0
HEARTBEAT_S = 0.2
FIRST, AGAIN, OTHER = Session("card-1", "p1"), Session("card-1", "p2"), Session("card-2", "p3")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Desk:
    """A fleet with its sessions, and a clock that the test moves."""

    def __init__(self):
        self.clock = Clock()
        self.fleet = WorkerRegistry(3, LEASE_S)
        self.sessions = Sessions(self.fleet, HEARTBEAT_S, self.clock)

    async def register(self, session, name="pi"):
        await self.sessions.claim(name, session, "10.0.0.1:1")
        worker = self.fleet.register(RegisterRequest(worker=name), self.clock())
        return self.sessions.take(worker, session, "10.0.0.1:1")


@pytest.fixture
def desk():
    return Desk()


async def test_a_second_device_is_refused_as_long_as_the_first_is_alive(desk):
    await desk.register(FIRST)
    desk.clock.now += LEASE_S - 0.1
    with pytest.raises(NameTaken, match="--name"):
        await desk.register(OTHER)
    desk.sessions.check("pi", FIRST)
    with pytest.raises(NameTaken):
        desk.sessions.check("pi", OTHER)


async def test_a_name_is_free_once_its_device_has_left_or_been_silent_for_a_lease(desk):
    await desk.register(FIRST)
    desk.clock.now += LEASE_S + 0.1
    assert await desk.register(OTHER)
    with pytest.raises(NameTaken):
        desk.sessions.check("pi", FIRST)
    desk.fleet.get("pi").left = True
    assert await desk.register(FIRST)


async def test_a_device_that_polls_keeps_its_name_however_long_the_poll_takes(desk):
    await desk.register(FIRST)
    with desk.fleet.polling(desk.fleet.get("pi")):
        desk.clock.now += 10 * LEASE_S
        with pytest.raises(NameTaken):
            await desk.register(OTHER)


async def test_a_restarted_process_takes_over_when_the_former_one_is_silent(desk):
    await desk.register(FIRST)
    assert not await desk.register(AGAIN)
    desk.sessions.check("pi", AGAIN)
    with pytest.raises(StateCopied):
        desk.sessions.check("pi", FIRST)


async def test_a_process_whose_poll_broke_off_is_not_waited_for(desk):
    await desk.register(FIRST)
    desk.fleet.get("pi").holder.hung_up = True
    async with asyncio.timeout(HEARTBEAT_S / 2):
        await desk.register(AGAIN)


async def test_a_copied_folder_is_noticed_when_the_former_process_answers(desk):
    await desk.register(FIRST)
    claiming = asyncio.create_task(desk.register(AGAIN))
    await asyncio.sleep(0)
    desk.sessions.check("pi", FIRST)
    with pytest.raises(StateCopied, match="copied"):
        await claiming
    desk.sessions.check("pi", FIRST)


async def test_a_name_stays_its_devices_own_for_a_lease_after_a_restart_of_the_aggregator(desk):
    desk.fleet.restore(RegisterRequest(worker="pi"), desk.clock(), FIRST)
    with pytest.raises(NameTaken):
        await desk.register(OTHER)
    await desk.register(AGAIN)
    desk.clock.now += LEASE_S + 0.1
    await desk.register(OTHER)


async def test_processes_that_name_no_session_are_one_and_never_a_named_one(desk):
    await desk.register(Session())
    await desk.register(Session())
    desk.sessions.check("pi", Session())
    with pytest.raises(NameTaken):
        desk.sessions.check("pi", FIRST)


@pytest.mark.parametrize("text", ["a", "a.", ".b", "a.b.c", "a b.c", "a" * 65 + ".b", "a.b\n"])
def test_a_malformed_session_is_refused(text):
    with pytest.raises(UsageError):
        Session.parse(text)


def test_a_session_reads_what_it_writes():
    assert Session.parse(str(FIRST)) == FIRST
    assert Session.parse(str(Session())) == Session()
    assert Session.begin("f") != Session.begin("f")
