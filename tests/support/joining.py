"""Devices that join a running aggregator with its built-in authority, and clients with certificates of it."""

from contextlib import asynccontextmanager

from google.protobuf.duration_pb2 import Duration

from fedgrpc.identity.certificates import make_request
from fedgrpc.identity.folder import DeviceFolder
from fedgrpc.identity.tokens import JoinToken
from fedgrpc.rpc.address import local_address
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.v1 import identity_pb2 as pb
from fedgrpc.v1 import identity_pb2_grpc
from fedgrpc.worker.enrolment import join, joined_tls

OUTSIDE = {"address": "0.0.0.0:0"}


@asynccontextmanager
async def identity_stub(running):
    """The `Identity` service, as an operator on the aggregator's host reaches it."""
    with local_address(running.settings.data_dir / "identity") as address:
        async with open_channel(address) as channel:
            yield identity_pb2_grpc.IdentityStub(channel)


async def new_token(running, role="trainer", ttl_s=600, uses=1, **more):
    """A join token, as text."""
    request = pb.CreateTokenRequest(
        role=f"ROLE_{role.upper()}",
        ttl=Duration(nanos=int(ttl_s % 1 * 1e9), seconds=int(ttl_s)),
        uses=uses,
        **more,
    )
    async with identity_stub(running) as stub:
        return (await stub.CreateToken(request)).secret


async def joined(running, folder, name, role="trainer", **token):
    """The TLS of a device that has joined under this name; its files are in `folder`/NAME."""
    text = await new_token(running, role, **token)
    device = DeviceFolder(folder / name)
    await join(running.address, JoinToken.parse(text), name, device)
    return joined_tls(device)


async def operator(running, folder, name, role):
    """The TLS of an operator."""
    device = DeviceFolder(folder / name)
    key = device.own_key()
    async with identity_stub(running) as stub:
        request = pb.CreateOperatorRequest(
            name=name, role=f"ROLE_{role.upper()}", signing_request=make_request(key)
        )
        made = (await stub.CreateOperator(request)).credentials
    device.save(made.certificate, made.ca)
    return joined_tls(device)


def connected(running, tls: Tls):
    """A channel with a member's certificate."""
    return open_channel(running.address, tls)


async def revoke(running, name, **more):
    async with identity_stub(running) as stub:
        return (await stub.RevokeMember(pb.RevokeMemberRequest(name=name, **more))).member


def trust_of(running):
    """The aggregator's trust, whose clock tests move."""
    return running.aggregator.trust


def pass_certificate_time(running, seconds):
    """Let the aggregator's clock for certificates jump."""
    trust = trust_of(running)
    before = trust.clock
    trust.clock = lambda: before() + seconds
