"""What is remembered of a worker, as the database keeps it: a `fedgrpc.v1.WorkerHistory`."""

from __future__ import annotations

from fedgrpc.rounds.history import Timing, WorkerHistory
from fedgrpc.rounds.link import Rates
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
        uplink_bytes_per_second=history.uplink.told,
        downlink_bytes_per_second=history.downlink.told,
    )
    return message.SerializeToString()


def history_from_bytes(kept: bytes, selected: int, accepted: int) -> WorkerHistory:
    """What `history_to_bytes` has made of it."""
    message = round_pb2.WorkerHistory.FromString(kept)
    timings = tuple(
        Timing(
            each.download_seconds if each.HasField("download_seconds") else None,
            each.local_seconds if each.HasField("local_seconds") else None,
            each.upload_seconds if each.HasField("upload_seconds") else None,
            each.cut,
        )
        for each in message.timings
    )
    loss = message.loss if message.HasField("loss") else None
    endings = tuple(message.endings)
    up, down = (
        Rates(tuple(rates)) for rates in (message.uplink_bytes_per_second, message.downlink_bytes_per_second)
    )
    return WorkerHistory(
        timings, selected, accepted, message.selected_in, loss, message.example_count, endings, up, down
    )
