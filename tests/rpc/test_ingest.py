"""Calls through ingest processes are as calls to the server itself. Real processes, killed for real."""

import ast
import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedgrpc.errors import LinkError, NotEnrolled, RoundClosed, TooLargeError, UsageError, WrongIdentity
from fedgrpc.identity.roles import Identity, Role
from fedgrpc.rpc.admission import Admission, caller
from fedgrpc.rpc.channel import CLIENT_OPTIONS, Tls, open_channel
from fedgrpc.rpc.identity import Session, peer_of
from fedgrpc.rpc.ingest import Ingest
from fedgrpc.rpc.requests import SMALL_REQUEST_BYTES
from fedgrpc.rpc.server import Service, serve
from fedgrpc.rpc.status import domain_errors
from tests.support.certificates import make_authority, make_certificate
from tests.support.echo_service import NAME, SHAPES, call, echo_service
from tests.support.hand_driven_device import PATIENCE_S

HEALTH = "/grpc.health.v1.Health/Check"


def processes(count):
    return Ingest(count, "tests.support.echo_ingest", {})


@asynccontextmanager
async def serving(*services, count=1, **how):
    async with serve("127.0.0.1:0", [echo_service(), *services], ingest=processes(count), **how) as server:
        yield server


async def until_answered(address):
    """Call until an answer comes, each time over a connection of its own."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with open_channel(address) as channel:
                with suppress(LinkError), domain_errors():
                    return await call(channel, "unary_unary", b"hello")
            await asyncio.sleep(0.05)


class Told:
    """Tells what a servicer sees of its caller, or waits until the caller hangs up."""

    def __init__(self):
        self.waits, self.cancelled = asyncio.Event(), asyncio.Event()

    async def shown(self, request, context):
        return repr((context.auth_context().get("x509_pem_cert"), dict(context.invocation_metadata()))).encode()

    async def work(self, request, context):
        told = []
        result = await context.do(request, told.append)
        return result + str(told).encode()

    async def refuse(self, request, context):
        def hear(number):
            raise RoundClosed("enough")

        return await context.do(request, hear)

    async def who(self, request, context):
        return f"{peer_of(context)} {Session.of(context)} {caller()}".encode()

    async def wait(self, request, context):
        self.waits.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    @property
    def service(self):
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(getattr(self, name))
            for name in ("refuse", "shown", "who", "wait", "work")
        }
        handler = grpc.method_handlers_generic_handler("test.Told", handlers)
        return Service("test.Told", self, lambda told, server: server.add_generic_rpc_handlers((handler,)))


async def test_calls_of_every_shape_have_their_answers_and_their_errors():
    async with serving(count=2) as server, open_channel(server.address) as channel:
        for shape in SHAPES:
            expected = [b"first", b"hello"] if shape == "unary_stream" else [b"hello"]
            assert await call(channel, shape, b"hello") == expected
            with pytest.raises(RoundClosed, match="it is over"), domain_errors():
                await call(channel, shape, b"raise:RoundClosed:it is over")
        large = os.urandom(3 << 20)
        assert await channel.stream_unary(f"/{NAME}/stream_unary")(iter([b"a" * (1 << 20)] * 3)) == b"a" * (
            3 << 20
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/{NAME}/no_such")(large[:10])
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_and_reflection_are_those_of_the_server():
    async with serving() as server, open_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=NAME))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await server.health.set(NAME, True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="no.such"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        about = reflection_pb2.ServerReflectionRequest(list_services="")
        replies = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([about]))
        names = {
            each.name for reply in [r async for r in replies] for each in reply.list_services_response.service
        }
        assert NAME in names


async def test_a_servicer_sees_its_caller_and_hears_when_that_one_hangs_up():
    told = Told()
    async with serving(told.service) as server, open_channel(server.address) as channel:
        who = await channel.unary_unary("/test.Told/who")(b"", metadata=Session("folder", "process").metadata)
        peer, session, _ = who.decode().split(" ", 2)
        assert peer.startswith("127.0.0.1:")
        assert session == "folder.process"
        waiting = channel.unary_unary("/test.Told/wait")(b"")
        async with asyncio.timeout(PATIENCE_S):
            await told.waits.wait()
            waiting.cancel()
            await told.cancelled.wait()


async def test_work_that_a_process_does_for_a_servicer_has_its_messages_its_progress_its_result_and_its_errors():
    async with serving(Told().service) as server, open_channel(server.address) as channel:
        stream = channel.stream_stream("/test.Told/work")()
        for message in (b"did", b"1", b"2"):
            await stream.write(message)
        await stream.done_writing()
        assert [answer async for answer in stream] == [b"1", b"2", b"did2[1, 2]"]
        with pytest.raises(RoundClosed, match="no work today"), domain_errors():
            await channel.unary_unary("/test.Told/work")(b"fail")


async def test_a_servicer_that_wants_no_more_of_a_work_ends_it_and_no_other_call():
    async with serving(Told().service) as server, open_channel(server.address) as channel:
        beside = channel.stream_stream("/test.Told/work")()
        await beside.write(b"did")
        # The message that the process sends when it is told to stop may still be on its way, or may not.
        for _ in range(20):
            stream = channel.stream_stream("/test.Told/refuse")()
            for message in (b"did", b"1"):
                await stream.write(message)
            with pytest.raises(RoundClosed, match="enough"), domain_errors():
                await asyncio.wait_for(_read_to_its_end(stream), PATIENCE_S)
        await beside.done_writing()
        assert [answer async for answer in beside] == [b"did0[]"]


async def test_what_goes_wrong_while_they_serve_is_not_taken_for_a_failed_start():
    with pytest.raises(TimeoutError, match="my own"):
        async with serving():
            raise TimeoutError("my own")


async def _read_to_its_end(stream):
    async for _ in stream:
        pass


@pytest.mark.parametrize("path", [f"{HEALTH}/more", f"/x{HEALTH}"])
async def test_a_path_that_has_more_than_service_and_method_is_no_method(path):
    async with serving() as server, open_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(path)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_process_that_is_killed_is_started_again_and_its_calls_end():
    told = Told()
    async with serving(told.service) as server, open_channel(server.address) as channel:
        waiting = channel.unary_unary("/test.Told/wait")(b"")
        async with asyncio.timeout(PATIENCE_S):
            await told.waits.wait()
            os.kill(server.ingest.pids[0], signal.SIGKILL)
            with pytest.raises(LinkError), domain_errors():
                await waiting
            await told.cancelled.wait()
        assert await until_answered(server.address) == [b"hello"]
        assert server.ingest.restarts == 1


async def test_a_process_that_hangs_is_killed_and_started_again(monkeypatch):
    monkeypatch.setattr("fedgrpc.rpc.ingest._ALIVE_EVERY_S", 0.5)
    told = Told()
    async with serving(told.service) as server, open_channel(server.address) as channel:
        waiting = channel.unary_unary("/test.Told/wait")(b"")
        async with asyncio.timeout(PATIENCE_S):
            await told.waits.wait()
            # One that is only slow to call tells that it lives.
            await asyncio.sleep(4)
            assert server.ingest.restarts == 0
            os.kill(server.ingest.pids[0], signal.SIGSTOP)
            with pytest.raises(LinkError), domain_errors():
                await waiting
            await told.cancelled.wait()
        assert await until_answered(server.address) == [b"hello"]
        assert server.ingest.restarts == 1


async def test_while_one_process_is_down_the_others_take_its_callers():
    async with serving(count=2) as server:
        # It stays down for longer than the other one needs for an answer, for it cannot start again.
        server.ingest._ingest = Ingest(2, "no.such.module", {})
        os.kill(server.ingest.pids[0], signal.SIGKILL)
        for _ in range(8):
            assert await until_answered(server.address) == [b"hello"]
        assert server.ingest.serving_count == 1


async def test_a_process_that_the_system_refuses_to_start_is_started_once_it_can_be(monkeypatch):
    async with serving() as server:
        with monkeypatch.context() as context:
            context.setattr(sys, "executable", "/no/such/program")
            os.kill(server.ingest.pids[0], signal.SIGKILL)
            async with asyncio.timeout(PATIENCE_S):
                while server.ingest.restarts < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        assert await until_answered(server.address) == [b"hello"]


async def test_sigterm_to_an_ingest_process_ends_nothing():
    async with serving() as server, open_channel(server.address) as channel:
        os.kill(server.ingest.pids[0], signal.SIGTERM)
        assert await call(channel, "unary_unary", b"hello") == [b"hello"]
        assert server.ingest.restarts == 0


async def test_a_call_in_flight_may_end_while_the_server_drains_and_no_process_stays():
    server = serving(grace_s=60)
    running = await server.__aenter__()
    pids = list(running.ingest.pids.values())
    async with open_channel(running.address) as channel:
        stream = channel.stream_stream(f"/{NAME}/stream_stream")()
        await stream.write(b"one")
        assert await stream.read() == b"one"
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        await asyncio.sleep(0.2)
        await stream.write(b"two")
        assert await stream.read() == b"two"
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        await leaving
    assert not any(map(_runs, pids))


async def test_ingest_processes_die_with_the_process_that_started_them():
    program = (
        "import asyncio\n"
        "from tests.rpc.test_ingest import serving\n"
        "async def main():\n"
        "    async with serving(count=2) as server:\n"
        "        print(*server.ingest.pids.values(), flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(PATIENCE_S):
        pids = [int(each) for each in (await parent.stdout.readline()).split()]
        assert len(pids) == 2
        parent.kill()
        await parent.wait()
        for pid in pids:
            while _runs(pid):  # noqa: ASYNC110
                await asyncio.sleep(0.02)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_port_in_use_and_a_unix_socket_are_usage_errors(tmp_path):
    async with serving() as server:
        with pytest.raises(UsageError, match="port is in use"):
            async with serve(server.address, [echo_service()], ingest=processes(1)):
                pass
        with pytest.raises(UsageError, match="port is in use"):
            async with serve(server.address, [echo_service()]):
                pass
    with pytest.raises(UsageError, match="HOST:PORT"):
        async with serve(f"unix:{tmp_path}/socket", [echo_service()], ingest=processes(1)):
            pass


async def test_identity_comes_from_the_certificate_and_its_refusal_reaches_the_caller(pki):
    seen = []

    def identify(certificate, renewing):
        seen.append(certificate)
        if len(seen) > 1:
            raise NotEnrolled("revoked meanwhile")
        return Identity("pi-7", Role.OPERATOR)

    told, ca = Told(), pki / "ca.pem"
    tls, shown = Tls(ca, pki / "server.pem", pki / "server.key"), Tls(ca, pki / "client.pem", pki / "client.key")
    async with serving(told.service, tls=tls, admission=Admission(identify)) as server:
        async with open_channel(server.address, shown) as channel:
            with pytest.raises(WrongIdentity, match="operator 'pi-7'"), domain_errors():
                await channel.unary_unary("/test.Told/who")(b"")
            with pytest.raises(NotEnrolled, match="revoked meanwhile"), domain_errors():
                await channel.unary_unary("/test.Told/who")(b"")
        for stranger in (Tls(ca), None):
            async with open_channel(server.address, stranger) as channel:
                with pytest.raises(LinkError), domain_errors():
                    await channel.unary_unary("/test.Told/who")(b"")
    assert seen[0] == (pki / "client.pem").read_bytes()


async def test_no_metadata_makes_a_caller_another(pki):
    tls, shown = [Tls(pki / "ca.pem", pki / f"{name}.pem", pki / f"{name}.key") for name in ("server", "client")]
    forged = (("x509_pem_cert", "forged"), ("certificate-bin", b"forged"), ("peer", "unix:"))
    async with serving(Told().service, tls=tls) as server, open_channel(server.address, shown) as channel:
        told = await channel.unary_unary("/test.Told/shown")(b"", metadata=forged)
    certificates, _ = ast.literal_eval(told.decode())
    assert certificates == [(pki / "client.pem").read_bytes()]


async def test_a_compressed_request_is_refused_before_it_inflates():
    compressing = [option for option in CLIENT_OPTIONS if "compression" not in option[0]]
    async with (
        serving() as server,
        grpc.aio.insecure_channel(server.address, compressing, compression=grpc.Compression.Gzip) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "unary_unary", b"x" * 10_000)
        assert caught.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL)


async def test_requests_have_the_bounds_that_they_have_without_ingest_processes():
    options = [("grpc.max_receive_message_length", 2 << 20)]
    async with serving(options=options) as server, open_channel(server.address) as channel:
        with pytest.raises(TooLargeError, match="allowed are"), domain_errors():
            await call(channel, "unary_unary", b"x" * (SMALL_REQUEST_BYTES + 1))
        assert await call(channel, "stream_unary", b"x" * (1 << 20)) == [b"x" * (1 << 20)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, "stream_unary", b"x" * (3 << 20))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_certificates_that_change_are_those_of_the_next_connection(pki, tmp_path):
    ca, other = pki / "ca.pem", tmp_path / "other"
    tls = Tls(certificate=pki / "server.pem", key=pki / "server.key")
    make_authority(other)
    make_certificate(other, "server")
    async with serving(tls=tls) as server:
        async with open_channel(server.address, Tls(ca)) as channel:
            assert await call(channel, "unary_unary", b"hello") == [b"hello"]
        for name in ("server.key", "server.pem"):
            (other / name).replace(pki / name)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with open_channel(server.address, Tls(other / "ca.pem")) as channel:
                    with suppress(LinkError), domain_errors():
                        assert await call(channel, "unary_unary", b"hello") == [b"hello"]
                        break
                await asyncio.sleep(0.1)
