"""What is remembered of a worker, as the database keeps it: a `fedgrpc.v1.WorkerHistory`."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from fedgrpc import claims
from fedgrpc.errors import LayoutError
from fedgrpc.rounds.history import KEPT, LinkRates, Timing, WorkerHistory
from fedgrpc.v1 import round_pb2


def history_to_bytes(history: WorkerHistory) -> bytes:
    """As the database keeps it; how often it was selected and accepted is kept beside it."""
    message = round_pb2.WorkerHistory(
        timings=[
            round_pb2.PastTiming(
                download_seconds=timing.download_s,
                local_seconds=timing.local_s,
                upload_seconds=timing.upload_s,
                cut=timing.cut,
            )
            for timing in history.timings
        ],
        selected_in=history.selected_in,
        loss=history.loss,
        example_count=history.example_count,
        endings=history.endings,
        uplink_bytes_per_second=history.uplink.samples,
        downlink_bytes_per_second=history.downlink.samples,
    )
    return message.SerializeToString()


def history_from_bytes(kept: bytes, selected: int, accepted: int) -> WorkerHistory:
    """What `history_to_bytes` has made of it, with every number in its range, whoever wrote it.

    Raises `LayoutError` where it is none.
    """
    try:
        message = round_pb2.WorkerHistory.FromString(kept)
    except DecodeError as error:
        raise LayoutError(f"no history: {error}") from error
    up, down = (
        LinkRates(tuple(map(claims.BYTES_PER_SECOND.clamped, rates)))
        for rates in (message.uplink_bytes_per_second, message.downlink_bytes_per_second)
    )
    return WorkerHistory(
        timings=tuple(map(_timing, message.timings[-KEPT:])),
        selected=selected,
        accepted=accepted,
        selected_in=claims.NUMBER.clamped(message.selected_in),
        loss=claims.SCORE.clamped(message.loss) if message.HasField("loss") else None,
        example_count=claims.EXAMPLES.clamped(message.example_count),
        endings=tuple(map(claims.LABEL.cleaned, message.endings[-KEPT:])),
        uplink=up,
        downlink=down,
    )


def _timing(message: round_pb2.PastTiming) -> Timing:
    def seconds(name: str) -> float | None:
        return claims.SECONDS.clamped(getattr(message, name)) if message.HasField(name) else None

    return Timing(seconds("download_seconds"), seconds("local_seconds"), seconds("upload_seconds"), message.cut)
