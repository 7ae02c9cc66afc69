import asyncio

import grpc
import grpc.aio
import pytest

from fedgrpc.errors import LinkError, RoundClosed
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.client_stream import ClientStream
from fedgrpc.rpc.server import Service, serve
from fedgrpc.rpc.status import domain_errors


class Sink:
    """Reads `patience` messages, then answers as it was told to, whatever the client still has to say."""

    def __init__(self, patience, error=None):
        self.patience, self.error = patience, error

    async def push(self, requests, context):
        count = 0
        async for _ in requests:
            count += 1
            if count == self.patience:
                break
        if self.error is not None:
            raise self.error
        return b"done"

    @staticmethod
    def add(servicer, server):
        handlers = {"Push": grpc.stream_unary_rpc_method_handler(servicer.push)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Sink", handlers),))


async def push(channel, messages, size=1000):
    stream = ClientStream(channel.stream_unary("/test.Sink/Push")())
    sent = 0
    with domain_errors():
        while sent < messages and await stream.write(b"x" * size):
            sent += 1
        await stream.finish()
    return sent


@pytest.mark.parametrize("messages", [1, 2, 5, 20, 100])
async def test_an_answer_in_the_middle_of_the_stream_is_the_servers_own_every_time(messages):
    sink = Service("test.Sink", Sink(1, RoundClosed("the deadline has passed")), Sink.add)
    async with serve("127.0.0.1:0", [sink]) as server, open_channel(server.address) as channel:
        for _ in range(100):
            with pytest.raises(RoundClosed, match="the deadline has passed"):
                await push(channel, messages)


async def test_a_large_message_in_flight_does_not_hide_the_answer_either():
    sink = Service("test.Sink", Sink(1, RoundClosed("closed")), Sink.add, frozenset({"/test.Sink/Push"}))
    async with serve("127.0.0.1:0", [sink]) as server, open_channel(server.address) as channel:
        for _ in range(10):
            with pytest.raises(RoundClosed):
                await push(channel, 50, size=1 << 20)


async def test_a_status_that_comes_before_the_first_message_is_read_as_the_servers_own():
    async def refuse(requests, context):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "not you")

    server = grpc.aio.server()
    handlers = {"Follow": grpc.stream_stream_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Refusing", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        for turn in range(200):
            stream = ClientStream(channel.stream_stream("/test.Refusing/Follow")())
            # The first write may come before the status, after it, or between its arrival and its delivery.
            await asyncio.sleep(turn % 4 * 1e-3)
            await stream.write(b"x")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream.read()
            assert caught.value.details() == "not you"
    await server.stop(None)


async def test_an_early_ok_is_a_success():
    sink = Service("test.Sink", Sink(1), Sink.add)
    async with serve("127.0.0.1:0", [sink]) as server, open_channel(server.address) as channel:
        for _ in range(100):
            await push(channel, 20)


async def test_a_whole_stream_is_read():
    sink = Service("test.Sink", Sink(10**9), Sink.add)
    async with serve("127.0.0.1:0", [sink]) as server, open_channel(server.address) as channel:
        assert await push(channel, 200) == 200


async def test_a_server_that_goes_away_is_a_link_error():
    sink = Service("test.Sink", Sink(10**9), Sink.add)
    serving = serve("127.0.0.1:0", [sink], grace_s=0)
    async with open_channel((await serving.__aenter__()).address) as channel:
        stream = ClientStream(channel.stream_unary("/test.Sink/Push")())
        assert await stream.write(b"x")
        await serving.__aexit__(None, None, None)
        while await stream.write(b"x"):
            pass
        with pytest.raises(LinkError), domain_errors():
            await stream.finish()
