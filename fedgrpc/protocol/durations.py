"""Durations on the wire and in seconds."""

from __future__ import annotations

from google.protobuf import duration_pb2

from fedgrpc import claims


def duration_to_proto(seconds: float) -> duration_pb2.Duration:
    """Return a duration, rounded to the nanosecond and cut at 30 years."""
    nanos = round(min(seconds, claims.SECONDS.most) * 1e9)
    sign = -1 if nanos < 0 else 1
    whole, rest = divmod(abs(nanos), 1_000_000_000)
    return duration_pb2.Duration(seconds=sign * whole, nanos=sign * rest)


def duration_from_proto(message: duration_pb2.Duration) -> float:
    """Return seconds, at most 30 years. Below zero is zero, since all durations are waits or time left."""
    return claims.SECONDS.clamped(message.seconds + message.nanos * 1e-9)
