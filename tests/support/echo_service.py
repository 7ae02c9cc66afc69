"""A tiny real service in all four shapes, built from generic handlers, that does what the request says."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from fedgrpc import errors
from fedgrpc.rpc.server import Service

NAME = "fedgrpc.test.Echo"
SHAPES = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def act(request: bytes) -> bytes:
    """`raise:Class:message` raises that error (of fedgrpc or of Python); anything else is echoed."""
    verb, _, rest = request.decode().partition(":")
    if verb == "raise":
        name, _, message = rest.partition(":")
        raise (getattr(errors, name, None) or getattr(__builtins__, name, None) or RuntimeError)(message)
    return request


class Echo:
    async def never(self, request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return request

    async def unary_unary(self, request: bytes, context: Any) -> bytes:
        return act(request)

    async def unary_stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b"first"
        yield act(request)

    async def stream_unary(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        return b"".join([act(request) async for request in requests])

    async def stream_stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield act(request)


def add(servicer: Echo, server: grpc.aio.Server) -> None:
    handlers = {shape: getattr(grpc, f"{shape}_rpc_method_handler")(getattr(servicer, shape)) for shape in SHAPES}
    handlers["never"] = grpc.unary_unary_rpc_method_handler(servicer.never)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))


def echo_service() -> Service:
    return Service(NAME, Echo(), add, frozenset({f"/{NAME}/stream_unary"}))


async def _once(request: bytes) -> AsyncIterator[bytes]:
    yield request


async def call(channel: grpc.aio.Channel, shape: str, request: bytes) -> list[bytes]:
    """All responses to one request, whatever the shape."""
    method = getattr(channel, shape)(f"/{NAME}/{shape}")
    reply = method(_once(request) if shape.startswith("stream") else request)
    if shape.endswith("stream"):
        return [response async for response in reply]
    return [await reply]
