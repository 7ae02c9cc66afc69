"""The link between an ingest process and the run's process: frames over a socket that only these two hold.

    ingest process                        run's process
    BEGUN method, peer, metadata    ->
                                    <-    READ              asks for the next message of the call
    MESSAGE or LAST                 ->
                                    <-    WRITE message
    WRITTEN                         ->
                                    <-    DO work           with all further messages of the call
    PROGRESS                        ->
                                    <-    STOP_DOING
    DONE result, FAILED error       ->
                                    <-    END status
    HUNG_UP                         ->                      at any time: the caller has gone

    SERVING                         ->                      of the process: it accepts connections
                                    <-    START, STOP       of the process
    ALIVE                           ->                      of the process, now and then
    ASK_TLS                         ->
                                    <-    TLS               what has changed since the last one, or nothing

A frame is the size of its body (4 bytes), its kind (1), the number of its call (4; 0: of the process), all
little-endian, and its body. A call has one message on its way in each direction, so the link holds no more than
gRPC would.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final

MAX_PROCESSES: Final = 64
_HEAD: Final = struct.Struct("<IBI")
_SIZE: Final = struct.Struct("<I")
# Larger bodies go to the socket as they are. Smaller ones are joined first: a system call costs as much.
_JOINED_BYTES: Final = 64 << 10
OF_PROCESS: Final = 0


class Kind(IntEnum):
    """Meaning of a frame."""

    BEGUN = 1
    MESSAGE = 2
    LAST = 3
    WRITTEN = 4
    HUNG_UP = 5
    SERVING = 6
    PROGRESS = 7
    DONE = 8
    FAILED = 9
    ASK_TLS = 10
    ALIVE = 11
    READ = 16
    WRITE = 17
    END = 18
    START = 19
    TLS = 20
    STOP = 21
    DO = 22
    STOP_DOING = 23


_KINDS: Final = {int(kind): kind for kind in Kind}

# Gets kind, number of the call, and body of each frame.
OnFrame = Callable[[Kind, int, bytes], None]


def joined(fields: Iterable[bytes | str]) -> bytes:
    """Return fields as one body, each behind its size."""
    parts: list[bytes] = []
    for field in fields:
        data = field.encode() if isinstance(field, str) else field
        parts += (_SIZE.pack(len(data)), data)
    return b"".join(parts)


def fields_of(body: bytes) -> list[bytes]:
    """Return the fields of a body that `joined` made."""
    fields, at = [], 0
    while at < len(body):
        (size,) = _SIZE.unpack_from(body, at)
        at += _SIZE.size
        fields.append(body[at : at + size])
        at += size
    return fields


class Link(asyncio.Protocol):
    """One end of the link. Lives on one event loop; frames of one turn of the loop are sent together."""

    def __init__(self, on_frame: OnFrame, on_lost: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        # Received and not yet a whole frame.
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._wanted_bytes = _HEAD.size

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._transport = None
        self._on_lost()

    @property
    def is_lost(self) -> bool:
        """True once the other process has gone."""
        return self._transport is None

    def send(self, kind: Kind, call: int, body: bytes = b"") -> None:
        """Send a frame. Does nothing once the link is lost."""
        if self._transport is None:
            return
        if not self._out:
            asyncio.get_running_loop().call_soon(self._flush)
        self._out += (_HEAD.pack(len(body), kind, call), body)

    def close(self) -> None:
        """Close the link, once all is sent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is None:
            return
        small: list[bytes] = []
        for part in out:
            small.append(part)
            if len(part) > _JOINED_BYTES:
                small.pop()
                self._transport.write(b"".join(small))
                self._transport.write(part)
                small.clear()
        if small:
            self._transport.write(b"".join(small))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._held_bytes += len(data)
        if self._pieces:
            self._pieces.append(data)
            if self._held_bytes < self._wanted_bytes:
                return
            data, self._pieces = b"".join(self._pieces), []
        at, end = 0, len(data)
        while end - at >= _HEAD.size:
            size, kind, call = _HEAD.unpack_from(data, at)
            body_at = at + _HEAD.size
            if end - body_at < size:
                self._wanted_bytes = _HEAD.size + size
                break
            at = body_at + size
            self._on_frame(_KINDS[kind], call, data[body_at:at])
        else:
            self._wanted_bytes = _HEAD.size
        self._held_bytes = end - at
        self._pieces = [data[at:]] if at < end else []
