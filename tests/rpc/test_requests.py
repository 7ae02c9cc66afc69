"""Bounds on requests, against a real server: size, compression, and how long a first message may take."""

import asyncio
import gc
import weakref

import grpc
import grpc.aio
import pytest
import structlog

from fedgrpc.errors import LayoutError, LinkError, TooLargeError
from fedgrpc.rpc import requests
from fedgrpc.rpc.channel import CLIENT_OPTIONS, MAX_STREAMS, SERVER_OPTIONS, open_channel
from fedgrpc.rpc.requests import SMALL_REQUEST_BYTES, CallRates, FirstMessages
from fedgrpc.rpc.server import Service, serve
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from tests.support.echo_service import NAME, SHAPES, call, echo_service

PATIENCE_S = 60.0


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "stream_unary"])
async def test_a_request_over_the_small_limit_is_refused_and_one_at_it_is_served(shape):
    async with serve("127.0.0.1:0", [echo_service()]) as server, open_channel(server.address) as channel:
        assert len((await call(channel, shape, b"x" * SMALL_REQUEST_BYTES))[-1]) == SMALL_REQUEST_BYTES
        with pytest.raises(TooLargeError, match="allowed are"), domain_errors():
            await call(channel, shape, b"x" * (SMALL_REQUEST_BYTES + 1))


async def test_a_call_that_says_so_takes_large_requests():
    async with serve("127.0.0.1:0", [echo_service()]) as server, open_channel(server.address) as channel:
        assert await call(channel, "stream_unary", b"x" * (1 << 20)) == [b"x" * (1 << 20)]


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_compressed_request_is_refused_before_it_inflates(shape):
    compressing = [option for option in CLIENT_OPTIONS if "compression" not in option[0]]
    async with (
        serve("127.0.0.1:0", [echo_service()]) as server,
        grpc.aio.insecure_channel(server.address, compressing, compression=grpc.Compression.Gzip) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, shape, b"x" * 10_000)
        # INTERNAL where the stream was closed under a message that the client was still writing.
        assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


def test_both_sides_refuse_compression_and_a_server_bounds_the_calls_of_one_connection():
    for options in (CLIENT_OPTIONS, SERVER_OPTIONS):
        assert dict(options)["grpc.compression_enabled_algorithms_bitset"] == 1
    assert dict(SERVER_OPTIONS)["grpc.max_concurrent_streams"] == MAX_STREAMS


class Parsing:
    async def get(self, request, context):
        return b"parsed"

    @staticmethod
    def add(servicer, server):
        read = pb.PollTaskRequest.FromString
        handlers = {"Get": grpc.unary_unary_rpc_method_handler(servicer.get, request_deserializer=read)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Parsing", handlers),))


async def test_bytes_that_are_no_message_are_refused_without_a_traceback():
    service = Service("test.Parsing", Parsing(), Parsing.add)
    async with serve("127.0.0.1:0", [service]) as server, open_channel(server.address) as channel:
        with structlog.testing.capture_logs() as logs, pytest.raises(LayoutError), domain_errors():
            await channel.unary_unary("/test.Parsing/Get")(b"\xff\xff\xff")
        assert not [line for line in logs if line["event"] == "call failed"]
        assert await channel.unary_unary("/test.Parsing/Get")(b"") == b"parsed"


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_call_whose_first_message_does_not_come_ends(shape):
    first = FirstMessages(within_s=0.6)
    async with (
        serve("127.0.0.1:0", [echo_service()], first_messages=first) as server,
        open_channel(server.address) as channel,
    ):
        # On the wire there is no difference between a call with one request and one that streams them.
        silent = channel.stream_unary(f"/{NAME}/{shape}")()
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(LinkError, match="first message"), domain_errors():
                await silent
        assert first.late_count == 0


async def test_a_call_without_any_request_is_refused():
    async with serve("127.0.0.1:0", [echo_service()]) as server, open_channel(server.address) as channel:
        empty = channel.stream_unary(f"/{NAME}/unary_unary")()
        await empty.done_writing()
        with pytest.raises(LayoutError, match="without a request"), domain_errors():
            await empty


async def until(condition):
    while not condition():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.02)


async def test_where_too_many_first_messages_are_late_the_busiest_connection_loses_its_oldest():
    first = FirstMessages(within_s=600.0, max_late=4)
    async with (
        serve("127.0.0.1:0", [echo_service()], first_messages=first) as server,
        open_channel(server.address) as greedy_channel,
        open_channel(server.address) as honest_channel,
        asyncio.timeout(PATIENCE_S),
    ):
        honest = honest_channel.stream_unary(f"/{NAME}/unary_unary")()
        await honest_channel.channel_ready()
        await until(lambda: first.late_count)
        greedy = [greedy_channel.stream_unary(f"/{NAME}/unary_unary")() for _ in range(12)]
        await until(lambda: sum(each.done() for each in greedy) == 9)
        assert {await each.code() for each in greedy if each.done()} == {grpc.StatusCode.UNAVAILABLE}
        assert first.late_count == 4
        await honest.write(b"here it is")
        assert await honest == b"here it is"
        assert await call(honest_channel, "unary_unary", b"and again") == [b"and again"]


class Endless:
    def __init__(self):
        self.ended = asyncio.Event()

    async def pull(self, request, context):
        try:
            while True:
                await context.write(b"x" * 50_000)
        finally:
            self.ended.set()

    @staticmethod
    def add(servicer, server):
        handlers = {"Pull": grpc.unary_stream_rpc_method_handler(servicer.pull)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Endless", handlers),))


@pytest.mark.faults
@pytest.mark.parametrize("how", ["cancelled", "refused", "closed"])
async def test_a_stream_that_its_reader_breaks_off_leaves_no_traceback(how, caplog):
    endless = Endless()
    options = [("grpc.max_receive_message_length", 1000)] if how == "refused" else []
    async with (
        serve("127.0.0.1:0", [Service("test.Endless", endless, Endless.add)]) as server,
        grpc.aio.insecure_channel(server.address, options) as channel,
        asyncio.timeout(PATIENCE_S),
    ):
        with structlog.testing.capture_logs() as logs:
            reading = channel.unary_stream("/test.Endless/Pull")(b"")
            if how == "refused":
                with pytest.raises(grpc.aio.AioRpcError):
                    await reading.read()
            else:
                assert await reading.read()
                reading.cancel() if how == "cancelled" else await channel.close()
            await endless.ended.wait()
            await asyncio.sleep(0.2)
        assert not [line for line in logs if line["log_level"] != "debug"]
        # gRPC's own poller logs a harmless error where another event loop of the process took its event.
        records = [each for each in caplog.records if "PollerCompletionQueue" not in each.getMessage()]
        assert not [record for record in records if record.levelname in ("WARNING", "ERROR")]


def test_a_connection_has_so_many_calls_at_once_and_then_so_many_a_second():
    rates = CallRates(per_second=8.0, burst=3.0, delay_s=0.5)
    assert [rates.wait_s("a", 100.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]
    assert rates.wait_s("b", 100.0) == 0.0
    assert [rates.wait_s("a", 100.125), rates.wait_s("a", 100.125)] == [0.0, 0.5]
    assert [rates.wait_s("a", 200.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_of_the_rates_of_many_connections_the_oldest_are_forgotten(monkeypatch):
    monkeypatch.setattr(requests, "_KNOWN_PEERS", 3)
    rates = CallRates(per_second=1.0, burst=1.0)
    for peer in "abca":
        rates.wait_s(peer, 100.0)
    rates.wait_s("d", 100.0)
    assert [bool(rates.wait_s(peer, 100.0)) for peer in "acd"] == [True, True, True]
    assert rates.wait_s("b", 100.0) == 0.0


async def test_a_connection_that_calls_without_end_leaves_time_for_others():
    first = FirstMessages(rates=CallRates(per_second=5.0, burst=20.0, delay_s=600.0))
    async with (
        serve("127.0.0.1:0", [echo_service()], first_messages=first) as server,
        open_channel(server.address) as greedy_channel,
        open_channel(server.address) as honest_channel,
        asyncio.timeout(PATIENCE_S),
    ):
        flood = [asyncio.create_task(call(greedy_channel, "unary_unary", b"x")) for _ in range(90)]
        await until(lambda: sum(task.done() for task in flood) >= 20)
        assert await call(honest_channel, "unary_unary", b"hello") == [b"hello"]
        assert sum(task.done() for task in flood) < 90
        for task in flood:
            task.cancel()


async def test_messages_of_one_open_call_are_paced_as_calls_are_but_for_large_ones():
    first = FirstMessages(rates=CallRates(per_second=0.01, burst=5.0, delay_s=600.0))
    async with (
        serve("127.0.0.1:0", [echo_service()], first_messages=first) as server,
        open_channel(server.address) as large_channel,
        open_channel(server.address) as greedy_channel,
        asyncio.timeout(PATIENCE_S),
    ):
        large = large_channel.stream_unary(f"/{NAME}/stream_unary")(iter([b"x"] * 20))
        assert await large == b"x" * 20
        greedy = greedy_channel.stream_stream(f"/{NAME}/stream_stream")()
        for _ in range(5):
            await greedy.write(b"y")
            assert await greedy.read() == b"y"
        await greedy.write(b"y")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await greedy.read()
        greedy.cancel()


class Refusing:
    """Refuses each request, and notes what becomes of what it held."""

    class Held:
        pass

    def __init__(self):
        self.held = []

    async def get(self, request, context):
        held = self.Held()
        self.held.append(weakref.ref(held))
        raise LayoutError(f"no {held} is wanted")

    @staticmethod
    def add(servicer, server):
        handlers = {"Get": grpc.unary_unary_rpc_method_handler(servicer.get)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Refusing", handlers),))


async def test_what_a_refused_call_held_is_let_go_before_the_next_collection_of_garbage():
    refusing = Refusing()
    service = Service("test.Refusing", refusing, Refusing.add)
    async with serve("127.0.0.1:0", [service]) as server, open_channel(server.address) as channel:
        gc.disable()
        try:
            for _ in range(5):
                with pytest.raises(LayoutError), domain_errors():
                    await channel.unary_unary("/test.Refusing/Get")(b"")
            await asyncio.sleep(0.1)
            assert [held() for held in refusing.held] == [None] * 5
        finally:
            gc.enable()
