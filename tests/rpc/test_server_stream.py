"""A call whose message is still on its way ends with its status all the same."""

import asyncio
from contextlib import suppress

import grpc
import pytest

from fedgrpc.errors import RoundClosed
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.server import Service, serve
from fedgrpc.rpc.server_stream import send
from fedgrpc.rpc.status import domain_errors
from tests.support.hand_driven_device import PATIENCE_S


async def give_up(requests, context):
    """Stop waiting for a message that the caller's connection has not taken, and end the call."""
    sending = asyncio.create_task(send(context, bytes(1 << 20)))
    await asyncio.sleep(0)
    sending.cancel()
    with suppress(asyncio.CancelledError):
        await sending
    raise RoundClosed("enough")


def _add(servicer, server):
    handlers = {"give_up": grpc.stream_stream_rpc_method_handler(servicer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Stream", handlers),))


async def test_a_call_ends_with_its_status_behind_a_message_that_nobody_waits_for():
    service = Service("test.Stream", give_up, _add)
    async with serve("127.0.0.1:0", [service]) as server, open_channel(server.address) as channel:
        for _ in range(20):
            call = channel.stream_stream("/test.Stream/give_up")(iter([b"begin"]))
            with pytest.raises(RoundClosed, match="enough"), domain_errors():
                await asyncio.wait_for(_read(call), PATIENCE_S)


async def _read(call):
    async for _ in call:
        pass
