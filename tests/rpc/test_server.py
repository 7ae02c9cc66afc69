import asyncio
import os
import socket

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedgrpc.errors import LinkError, NotEnrolled, UsageError
from fedgrpc.rpc.address import Address
from fedgrpc.rpc.admission import Admission
from fedgrpc.rpc.channel import CLIENT_OPTIONS, SERVER_OPTIONS, Tls, open_channel
from fedgrpc.rpc.requests import CallRates, FirstMessages
from fedgrpc.rpc.server import Service, aggregator_service, serve
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2_grpc
from tests.support.certificates import make_authority
from tests.support.echo_service import NAME, call, echo_service
from tests.support.hand_driven_device import PATIENCE_S

Serving = health_pb2.HealthCheckResponse


async def check(address, name=""):
    async with open_channel(address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
        return Serving.ServingStatus.Name(reply.status)


async def test_health_is_not_serving_until_the_service_says_that_it_is_ready():
    async with serve("127.0.0.1:0", [echo_service()]) as server:
        assert await check(server.address, NAME) == "NOT_SERVING"
        assert await check(server.address) == "NOT_SERVING"
        await server.health.set(NAME, True)
        assert await check(server.address, NAME) == "SERVING"
        assert await check(server.address) == "SERVING"
        await server.health.set(NAME, False)
        assert await check(server.address) == "NOT_SERVING"


async def test_health_of_a_service_that_is_not_there_is_refused():
    async with serve("127.0.0.1:0", [echo_service()]) as server:
        with pytest.raises(KeyError):
            await server.health.set("no.such.Service", True)


async def test_reflection_lists_the_services():
    async with serve("127.0.0.1:0", [echo_service()]) as server, open_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = [reply async for reply in stub.ServerReflectionInfo(iter([request]))]
    names = {service.name for service in replies[0].list_services_response.service}
    assert names == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def test_a_server_waits_apart_for_the_calls_of_few_methods_since_each_call_goes_through_all_waits():
    service = aggregator_service(aggregator_pb2_grpc.AggregatorServicer())
    before = len(asyncio.all_tasks())
    async with serve("127.0.0.1:0", [service]) as server, open_channel(server.address) as channel:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert len(asyncio.all_tasks()) - before < 16


async def test_a_port_in_use_is_a_usage_error_of_one_line():
    async with serve("127.0.0.1:0", [echo_service()]) as server:
        with pytest.raises(UsageError, match="port is in use") as caught:
            async with serve(server.address, [echo_service()]):
                pass
    assert "\n" not in str(caught.value)
    assert server.address in str(caught.value)


@pytest.mark.parametrize(
    "address", ["", "50051", "localhost", "localhost:x", "http://localhost:1", "1.2.3.4:99999", ":"]
)
async def test_a_malformed_address_is_a_usage_error(address):
    with pytest.raises(UsageError, match="HOST:PORT"):
        Address.parse(address)
    with pytest.raises(UsageError, match="HOST:PORT"):
        async with serve(address, [echo_service()]):
            pass


async def test_an_address_of_another_machine_is_a_usage_error():
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:0"):
        async with serve("192.0.2.1:0", [echo_service()]):
            pass


class Slow:
    def __init__(self):
        self.started = asyncio.Event()
        self.release = asyncio.Event()

    async def wait(self, request, context):
        self.started.set()
        await self.release.wait()
        return b"finished"

    @staticmethod
    def add(servicer, server):
        handlers = {"Wait": grpc.unary_unary_rpc_method_handler(servicer.wait)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Slow", handlers),))


@pytest.mark.parametrize("finishes", [True, False])
async def test_a_call_in_flight_at_shutdown_may_finish_within_the_grace_and_no_longer(finishes):
    slow = Slow()
    server = serve("127.0.0.1:0", [Service("test.Slow", slow, Slow.add)], grace_s=60 if finishes else 0.2)
    async with open_channel((running := await server.__aenter__()).address) as channel:
        reply = channel.unary_unary("/test.Slow/Wait")(b"")
        await slow.started.wait()
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        if finishes:
            await asyncio.sleep(0.1)
            slow.release.set()
            assert await reply == b"finished"
        else:
            with pytest.raises(LinkError), domain_errors():
                await reply
        await leaving
    assert running.port > 0


async def test_health_says_not_serving_while_the_server_drains():
    slow = Slow()
    server = serve("127.0.0.1:0", [Service("test.Slow", slow, Slow.add)], grace_s=60)
    running = await server.__aenter__()
    await running.health.set_all(True)
    async with open_channel(running.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == Serving.SERVING
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        assert (await watch.read()).status == Serving.NOT_SERVING
        watch.cancel()
        await leaving


def test_the_client_never_pings_more_often_than_the_server_allows():
    client, server = dict(CLIENT_OPTIONS), dict(SERVER_OPTIONS)
    assert client["grpc.keepalive_time_ms"] >= 2 * server["grpc.http2.min_ping_interval_without_data_ms"]
    assert client["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1


async def test_refusals_are_paced_as_all_calls_are(pki):
    ca, shown = pki / "ca.pem", (pki / "server.pem", pki / "server.key")

    def nobody(certificate, renewing):
        raise NotEnrolled("nobody")

    first = FirstMessages(rates=CallRates(per_second=1e-6, burst=2, delay_s=60.0))
    server = serve(
        "127.0.0.1:0", [echo_service()], tls=Tls(ca, *shown), admission=Admission(nobody), first_messages=first
    )
    async with server as running, open_channel(running.address, Tls(ca, *shown)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        codes = []
        for timeout_s in (PATIENCE_S, PATIENCE_S, 1.0):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            codes.append(caught.value.code())
    code = grpc.StatusCode
    assert codes == [code.UNAUTHENTICATED, code.UNAUTHENTICATED, code.DEADLINE_EXCEEDED]


async def test_with_mutual_tls_a_client_without_a_certificate_is_turned_away(pki):
    ca = pki / "ca.pem"
    server_tls = Tls(ca, pki / "server.pem", pki / "server.key")
    async with serve("127.0.0.1:0", [echo_service()], tls=server_tls) as server:
        async with open_channel(server.address, Tls(ca, pki / "client.pem", pki / "client.key")) as channel:
            assert await call(channel, "unary_unary", b"hello") == [b"hello"]
        for tls in (Tls(ca), None):
            async with open_channel(server.address, tls) as channel:
                with pytest.raises(LinkError), domain_errors():
                    await call(channel, "unary_unary", b"hello")


async def test_a_server_that_another_authority_signed_is_not_trusted(pki, tmp_path):
    make_authority(tmp_path / "other")
    server_tls = Tls(certificate=pki / "server.pem", key=pki / "server.key")
    async with (
        serve("127.0.0.1:0", [echo_service()], tls=server_tls) as server,
        open_channel(server.address, Tls(tmp_path / "other" / "ca.pem")) as channel,
    ):
        with pytest.raises(LinkError), domain_errors():
            await call(channel, "unary_unary", b"hello")


def test_unusable_tls_files_are_named_in_a_usage_error(tmp_path):
    (tmp_path / "bad.pem").write_text("not a certificate")
    with pytest.raises(UsageError, match=r"bad\.pem"):
        open_channel("127.0.0.1:1", Tls(ca=tmp_path / "bad.pem"))
    with pytest.raises(UsageError, match=r"missing\.pem"):
        open_channel("127.0.0.1:1", Tls(ca=tmp_path / "missing.pem"))
    with pytest.raises(UsageError, match="go together"):
        open_channel("127.0.0.1:1", Tls(certificate=tmp_path / "bad.pem"))
    with pytest.raises(UsageError, match="certificate and its key"):
        Tls(ca=tmp_path / "bad.pem").material()


async def test_a_unix_socket_in_use_is_refused_and_the_first_server_goes_on(tmp_path):
    address = f"unix:{tmp_path}/s.sock"
    async with serve(address, [echo_service()]) as server:
        assert (server.address, server.port) == (address, 0)
        with pytest.raises(UsageError, match="in use"):
            async with serve(address, [echo_service()]):
                pass
        assert await check(server.address) == "NOT_SERVING"


async def test_a_unix_socket_is_for_its_owner_alone_whatever_the_umask(tmp_path):
    former = os.umask(0)
    try:
        async with serve(f"unix:{tmp_path}/s.sock", [echo_service()]):
            assert (tmp_path / "s.sock").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(former)


async def test_a_unix_socket_is_nobody_else_s_from_its_first_moment(tmp_path, monkeypatch):
    first, chmod = [], os.chmod

    def seen(path, mode):
        first.append(os.stat(path).st_mode & 0o077)
        chmod(path, mode)

    monkeypatch.setattr(os, "chmod", seen)
    umask = os.umask(0)
    try:
        async with serve(f"unix:{tmp_path}/s.sock", [echo_service()]):
            assert first == [0]
    finally:
        os.umask(umask)


async def test_a_unix_socket_that_a_killed_server_left_is_replaced(tmp_path):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s.sock"))
    async with serve(f"unix:{tmp_path}/s.sock", [echo_service()]) as server:
        assert await check(server.address) == "NOT_SERVING"


async def test_a_file_or_a_missing_folder_in_the_place_of_a_unix_socket_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, reason in (("file", "no socket"), ("missing/s.sock", "no folder")):
        with pytest.raises(UsageError, match=reason):
            async with serve(f"unix:{tmp_path / path}", [echo_service()]):
                pass
    assert (tmp_path / "file").read_text() == "mine"
