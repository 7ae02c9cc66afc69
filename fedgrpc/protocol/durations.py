"""Durations on the wire and in seconds."""

from __future__ import annotations

from google.protobuf import duration_pb2

from fedgrpc import claims


def duration_to_proto(seconds: float) -> duration_pb2.Duration:
    """Seconds, rounded to the nanosecond."""
    nanos = round(seconds * 1e9)
    sign = -1 if nanos < 0 else 1
    whole, rest = divmod(abs(nanos), 1_000_000_000)
    return duration_pb2.Duration(seconds=sign * whole, nanos=sign * rest)


def duration_from_proto(message: duration_pb2.Duration) -> float:
    """Seconds, at most 30 years; times before zero count as zero, as they are all waits or time left."""
    return claims.SECONDS.clamped(message.seconds + message.nanos * 1e-9)
