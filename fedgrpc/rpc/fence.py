"""Fencing of an aggregator whose volume may move to another node: it serves only while a witness can be reached.

The folder's lock holds between processes of one machine, and not between nodes. A node that is cut off from its
cluster keeps its processes, and storage that is replicated may let both sides write for a while. So whoever is cut
off has to end before the cluster starts another aggregator elsewhere.

The rule: nothing is served before the witness was reached, nor `after_s` seconds after it was reached last. The
cluster waits for longer than that, and the drain time, before it starts another (k8s/overlays/replicated).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

import structlog

from fedgrpc.errors import LinkError
from fedgrpc.rpc.address import Address

_LOOKS: Final = 6
_LONGEST_S: Final = 10.0

log = structlog.get_logger()
T = TypeVar("T")


async def within_reach(witness: Address, after_s: float, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` once the witness can be reached, and cancel it when it could not be for `after_s` seconds.

    Raises `LinkError` then, and what `work` raises.
    """
    interval_s = min(_LONGEST_S, after_s / _LOOKS)
    try:
        waits = False
        while not await _reached(witness, interval_s):
            if not waits:
                log.warning("waiting for the witness", witness=str(witness))
            waits = True
            await asyncio.sleep(interval_s)
    except BaseException:
        # Cancelled, too: Python warns of a coroutine that nobody has awaited or closed.
        work.close()
        raise
    working = asyncio.create_task(work)
    losing = asyncio.create_task(_lost(witness, after_s, interval_s))
    try:
        await asyncio.wait([working, losing], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        log.error("the witness cannot be reached; ending", witness=str(witness), for_s=after_s)
    finally:
        for task in (working, losing):
            task.cancel()
        await asyncio.gather(working, losing, return_exceptions=True)
    raise LinkError(f"{witness} could not be reached for {after_s:g} s: this node may be cut off from its cluster")


async def _lost(witness: Address, after_s: float, interval_s: float) -> None:
    """Return when the witness was not reached for `after_s` seconds."""
    reached_at = time.monotonic()
    while time.monotonic() - reached_at < after_s:
        await asyncio.sleep(interval_s)
        # The time before the attempt counts: a slow answer says nothing of the time after it.
        begun_at = time.monotonic()
        if await _reached(witness, interval_s):
            reached_at = begun_at


async def _reached(witness: Address, timeout_s: float) -> bool:
    """Return whether somebody listens there, by a TCP connection that is closed at once."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(witness.host, witness.port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
