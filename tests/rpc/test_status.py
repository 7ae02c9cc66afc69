from pathlib import Path

import grpc
import grpc.aio
import pytest
import structlog

from fedgrpc import errors
from fedgrpc.errors import FedgrpcError, LinkError
from fedgrpc.rpc.channel import open_channel
from fedgrpc.rpc.server import serve
from fedgrpc.rpc.status import ERROR_KEY, RETRY_KEY, domain_errors, error_from, status_of
from tests.support.echo_service import SHAPES, call, echo_service

# As drawn in the docstring of fedgrpc.errors.
TABLE = {
    "LayoutError": "INVALID_ARGUMENT",
    "TooLargeError": "RESOURCE_EXHAUSTED",
    "CorruptError": "DATA_LOSS",
    "UpdateRefused": "INVALID_ARGUMENT",
    "UnknownTask": "NOT_FOUND",
    "UnknownWorker": "NOT_FOUND",
    "NotFound": "NOT_FOUND",
    "RoundClosed": "FAILED_PRECONDITION",
    "IllegalTransition": "FAILED_PRECONDITION",
    "WrongOffset": "OUT_OF_RANGE",
    "Exhausted": "RESOURCE_EXHAUSTED",
    "WrongIdentity": "PERMISSION_DENIED",
    "NotApproved": "PERMISSION_DENIED",
    "NotEnrolled": "UNAUTHENTICATED",
    "CertificateStale": "UNAUTHENTICATED",
    "TokenRefused": "UNAUTHENTICATED",
    "NameTaken": "ALREADY_EXISTS",
    "StateCopied": "ALREADY_EXISTS",
    "StorageError": "INTERNAL",
    "LinkError": "UNAVAILABLE",
}
ALL = [name for name, item in vars(errors).items() if isinstance(item, type) and issubclass(item, FedgrpcError)]


@pytest.fixture
async def channel():
    async with serve("127.0.0.1:0", [echo_service()]) as server, open_channel(server.address) as channel:
        yield channel


@pytest.mark.parametrize(("name", "code"), TABLE.items())
def test_an_error_becomes_the_status_its_class_is_listed_with(name, code):
    assert status_of(getattr(errors, name)("why")).name == code


@pytest.mark.parametrize("name", sorted({*TABLE, "UsageError", "FedgrpcError"}))
def test_the_protocol_names_every_error_that_a_caller_may_read_in_the_trailer(name):
    assert f'"{name}"' in (Path(__file__).parents[2] / "protos/fedgrpc/v1/aggregator.proto").read_text()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
async def test_the_client_raises_the_class_the_server_raised_in_every_shape_of_call(channel, name, shape):
    with pytest.raises(FedgrpcError) as caught, domain_errors():
        await call(channel, shape, f"raise:{name}:block 7 is not finite".encode())
    assert type(caught.value).__name__ == name
    assert str(caught.value) == "block 7 is not finite"


@pytest.mark.parametrize("shape", SHAPES)
async def test_calls_that_raise_nothing_pass_through(channel, shape):
    expected = [b"first", b"hello"] if shape == "unary_stream" else [b"hello"]
    assert await call(channel, shape, b"hello") == expected


@pytest.mark.parametrize("shape", SHAPES)
async def test_a_surprise_is_internal_and_tells_the_peer_nothing_and_the_log_everything(channel, shape):
    with structlog.testing.capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel, shape, b"raise:RuntimeError:secret path /home/alice")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()
    [line] = [line for line in logs if line["event"] == "call failed"]
    assert "secret" in str(line["exc_info"])
    assert line["method"].endswith(shape)


async def test_a_message_of_many_lines_and_megabytes_arrives_as_one_bounded_line(channel):
    with pytest.raises(FedgrpcError) as caught, domain_errors():
        await call(channel, "unary_unary", b"raise:LayoutError:one\ntwo " + b"x" * 50_000)
    assert str(caught.value).startswith("one two xxx")
    assert len(str(caught.value)) == 1024


async def test_nobody_listening_is_a_link_error():
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(LinkError, match="UNAVAILABLE"), domain_errors():
            await call(channel, "unary_unary", b"hello")


async def test_a_call_that_takes_too_long_is_a_link_error(channel):
    with pytest.raises(LinkError, match="DEADLINE_EXCEEDED"), domain_errors():
        await channel.unary_unary("/fedgrpc.test.Echo/never")(b"hello", timeout=0.05)


async def test_a_call_on_a_closed_channel_is_a_link_error(channel):
    await channel.close()
    with pytest.raises(LinkError), domain_errors():
        await call(channel, "unary_unary", b"hello")


async def test_a_server_without_the_method_is_a_link_error_as_from_an_ingress_without_a_backend(channel):
    with pytest.raises(LinkError, match="UNIMPLEMENTED"), domain_errors():
        await channel.unary_unary("/fedgrpc.v1.Aggregator/PollTask")(b"")


async def test_a_message_over_the_bound_is_too_large(channel):
    with pytest.raises(errors.TooLargeError), domain_errors():
        await call(channel, "unary_unary", b"x" * 9_000_000)


def _failure(code, *trailing):
    metadata = grpc.aio.Metadata(*trailing)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), metadata, details="detail")


def test_a_peer_that_does_not_name_the_class_is_understood_by_its_code():
    assert type(error_from(_failure(grpc.StatusCode.DATA_LOSS))) is errors.CorruptError
    assert type(error_from(_failure(grpc.StatusCode.NOT_FOUND))) is errors.NotFound
    assert type(error_from(_failure(grpc.StatusCode.INTERNAL))) is LinkError


def test_a_class_name_that_is_none_of_ours_is_never_looked_up_elsewhere():
    error = error_from(_failure(grpc.StatusCode.INTERNAL, (ERROR_KEY, "SystemExit")))
    assert type(error) is FedgrpcError


@pytest.mark.parametrize(
    ("told", "retry_after_s"),
    [("0", 0.0), ("1500", 1.5), ("9" * 10, 3600.0), ("9" * 5000, None), ("-1", None), ("soon", None), ("", None)],
)
def test_when_to_come_back_is_what_the_peer_says_within_reason(told, retry_after_s):
    failure = _failure(grpc.StatusCode.RESOURCE_EXHAUSTED, (ERROR_KEY, "Exhausted"), (RETRY_KEY, told))
    error = error_from(failure)
    assert isinstance(error, errors.Exhausted)
    assert error.retry_after_s == retry_after_s
