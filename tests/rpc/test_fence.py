"""Fencing: an aggregator serves only while its witness can be reached."""

import asyncio

import pytest

from fedgrpc.errors import LinkError
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.fence import within_reach
from tests.support.processes import free_address


async def witness_at(address):
    where = Address.parse(address)
    return await asyncio.start_server(lambda _, writer: writer.close(), where.host, where.port)


async def test_work_waits_for_the_witness_and_ends_by_itself():
    address, began = free_address(), asyncio.Event()

    async def work():
        began.set()
        return 7

    running = asyncio.create_task(within_reach(Address.parse(address), 0.6, work()))
    await asyncio.sleep(0.3)
    assert not began.is_set()
    async with await witness_at(address):
        assert await asyncio.wait_for(running, 30) == 7


async def test_work_is_cancelled_once_the_witness_is_gone():
    address, ended = free_address(), asyncio.Event()

    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with await witness_at(address):
        running = asyncio.create_task(within_reach(Address.parse(address), 0.6, work()))
        await asyncio.sleep(1.2)
        assert not running.done()
    with pytest.raises(LinkError, match="cut off"):
        await asyncio.wait_for(running, 30)
    assert ended.is_set()


async def test_what_the_work_raises_is_raised():
    async def work():
        raise ValueError("no")

    address = free_address()
    async with await witness_at(address):
        with pytest.raises(ValueError, match="no"):
            await within_reach(Address.parse(address), 5.0, work())
