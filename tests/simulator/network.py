"""Links between workers and the aggregator: messages are delayed, lost, doubled, overtaken, or cut off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fedgrpc.errors import FedgrpcError, LinkError
from fedgrpc.simulation.loop import Future, Process, Timeout, VirtualLoop
from tests.simulator.faults import Faults
from tests.simulator.messages import Request

Serve = Callable[[Request, Callable[[Any], None]], None]


class Network:
    """Carries requests to `serve`, which answers by a call, and the answers back. An error is an answer too."""

    def __init__(self, loop: VirtualLoop, faults: Faults, rng: np.random.Generator, serve: Serve) -> None:
        self.faults = faults
        self.cut_off: set[str] = set()
        self._loop = loop
        self._rng = rng
        self._serve = serve

    def call(self, request: Request, timeout_s: float) -> Process[Any]:
        """The answer. Raises what the aggregator raised, and `LinkError` when no answer came in time."""
        reply = Future()

        def answer(value: Any) -> None:
            self._send(request.worker, lambda: reply.set(value))

        self._send(request.worker, lambda: self._serve(request, answer))
        try:
            value = yield from self._loop.wait(reply, timeout_s)
        except Timeout:
            raise LinkError("no answer") from None
        if isinstance(value, FedgrpcError):
            raise value
        return value

    def _send(self, worker: str, deliver: Callable[[], None]) -> None:
        rng, faults = self._rng, self.faults

        def arrive() -> None:
            if worker not in self.cut_off:
                deliver()

        for _ in range(2 if rng.random() < faults.duplicate else 1):
            if rng.random() >= faults.loss:
                self._loop.call_at(self._loop.now + rng.exponential(faults.delay_s), arrive)
