"""Calls that one process makes for somebody else: the page on the aggregator's host, for the person who looks.

The rule: such a call counts for less than the caller's own, never for more. Only callers over the operators'
socket may name another, since they may do everything anyway. From then on the call is that person's: their role
decides whether it is made, their revocation ends it, and the audit log has their name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

CERTIFICATE_KEY: Final = "fedgrpc-behalf-bin"
PEER_KEY: Final = "fedgrpc-behalf-peer"
_MAX_PEER_CHARS: Final = 100


@dataclass(frozen=True)
class Behalf:
    """The person for whom a call is made: their certificate, PEM, and from where they called."""

    certificate: bytes
    peer: str

    @property
    def metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata that names them."""
        return (CERTIFICATE_KEY, self.certificate), (PEER_KEY, self.peer[:_MAX_PEER_CHARS])

    @classmethod
    def of(cls, context: Any) -> Behalf | None:
        """Return for whom a call over a unix socket is made; None: for the caller itself."""
        if not str(context.peer()).startswith("unix:"):
            return None
        found = dict(context.invocation_metadata() or ())
        certificate = found.get(CERTIFICATE_KEY)
        if certificate is None:
            return None
        return cls(bytes(certificate), str(found.get(PEER_KEY, ""))[:_MAX_PEER_CHARS])


class BehalfChannel:
    """Channel whose calls are made for somebody else."""

    def __init__(self, channel: Any, behalf: Behalf) -> None:
        self._channel = channel
        self._behalf = behalf

    def unary_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """Make such calls as any channel does, for somebody else."""
        return partial(self._channel.unary_unary(*arguments, **options), metadata=self._behalf.metadata)

    def unary_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """Make such calls as any channel does, for somebody else."""
        return partial(self._channel.unary_stream(*arguments, **options), metadata=self._behalf.metadata)

    def stream_unary(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """Make such calls as any channel does, for somebody else."""
        return partial(self._channel.stream_unary(*arguments, **options), metadata=self._behalf.metadata)

    def stream_stream(self, *arguments: Any, **options: Any) -> Callable[..., Any]:
        """Make such calls as any channel does, for somebody else."""
        return partial(self._channel.stream_stream(*arguments, **options), metadata=self._behalf.metadata)
