"""An operator's view of a running aggregator: the calls that `status`, `watch` and `demo` make."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from fedgrpc.cli.options import Declare, Setting
from fedgrpc.errors import LinkError
from fedgrpc.rpc.channel import Tls, open_channel
from fedgrpc.rpc.status import domain_errors
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.aggregator_pb2_grpc import AggregatorStub
from fedgrpc.v1.round_pb2 import Round

AGGREGATOR_SETTING: Setting = Declare("Where")(
    "--aggregator", "The aggregator to ask.", default="127.0.0.1:50051", metavar="HOST:PORT"
)
_TIMEOUT_S = 10.0
_PAGE = 1000


class Operator:
    """Calls an aggregator. Every method raises `LinkError` when it cannot be reached."""

    def __init__(self, channel: Any, address: str) -> None:
        stub: Any = AggregatorStub
        self._stub = stub(channel)
        self._address = address

    async def run(self) -> pb.Run:
        """The run."""
        with self._reaching():
            answer: pb.GetRunResponse = await self._stub.GetRun(pb.GetRunRequest(), timeout=_TIMEOUT_S)
        return answer.run

    async def workers(self) -> list[pb.WorkerRecord]:
        """Every worker that has registered, by name."""
        with self._reaching():
            answer = await self._stub.ListWorkers(pb.ListWorkersRequest(), timeout=_TIMEOUT_S)
        return sorted(answer.workers, key=lambda record: record.worker)

    async def latest_rounds(self, count: int) -> list[Round]:
        """At most `count` rounds, oldest first."""
        request = pb.ListRoundsRequest(page_size=count)
        with self._reaching():
            answer = await self._stub.ListRounds(request, timeout=_TIMEOUT_S)
        return sorted(answer.rounds, key=lambda record: record.number)

    async def all_rounds(self) -> list[Round]:
        """Every round, oldest first."""
        return [record async for record in self.rounds_back()][::-1]

    async def rounds_back(self) -> AsyncIterator[Round]:
        """Every round, newest first."""
        token = ""
        while True:
            request = pb.ListRoundsRequest(page_size=_PAGE, page_token=token)
            with self._reaching():
                answer = await self._stub.ListRounds(request, timeout=_TIMEOUT_S)
            for record in answer.rounds:
                yield record
            token = answer.next_page_token
            if not token:
                return

    async def watch(self, max_rate_hz: float = 0.0) -> AsyncIterator[pb.WatchRoundsResponse]:
        """The run and its current round each time they change, until the run ends."""
        with self._reaching():
            async for news in self._stub.WatchRounds(pb.WatchRoundsRequest(max_rate_hz=max_rate_hz)):
                yield news

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            with domain_errors():
                yield
        except LinkError as error:
            raise LinkError(f"cannot reach an aggregator at {self._address}; is it running? ({error})") from error


@asynccontextmanager
async def operator(address: str, tls: Tls | None = None) -> AsyncIterator[Operator]:
    """Dial an aggregator for as long as the block lasts."""
    async with open_channel(address, tls) as channel:
        yield Operator(channel, address)
