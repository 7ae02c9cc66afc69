"""Calls of a worker about releases: what it is to serve, and what became of that.

A released version itself comes by `ModelPulls.pull`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import grpc.aio

from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import models_pb2, models_pb2_grpc
from fedgrpc.worker.caller import CALL_S, WAIT_MARGIN_S, Caller, one_line


class ReleaseCalls:
    """Calls of one worker to the `Models` service. `use` gives them a channel, first of all."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def use(self, channel: grpc.aio.Channel) -> None:
        """Make further calls over this channel."""
        self._models: Any = models_pb2_grpc.ModelsStub(channel)  # type: ignore[no-untyped-call]

    async def follow_releases(
        self, served: Collection[models_pb2.ServedVersion], wait_s: float
    ) -> list[models_pb2.ServedVersion]:
        """Wait up to `wait_s` for something else to serve than `served`; return what to serve."""
        request = models_pb2.FollowReleasesRequest(
            worker=self._caller.worker, served=served, wait=duration_to_proto(wait_s)
        )
        with domain_errors():
            reply = await self._models.FollowReleases(
                request, metadata=self._caller.metadata, timeout=wait_s + WAIT_MARGIN_S
            )
        return list(reply.wanted)

    async def report_release(self, run_id: str, release: int, scores: Mapping[str, float], failure: str) -> None:
        """Tell the scores of a released version, or in one line why this device cannot use it."""
        request = models_pb2.ReportReleaseRequest(
            worker=self._caller.worker,
            run_id=run_id,
            release=release,
            scores=scores,
            failure=one_line(failure),
        )
        with domain_errors():
            await self._models.ReportRelease(request, metadata=self._caller.metadata, timeout=CALL_S)
