"""Device's part in a secure sum: it shares while it trains, masks its update, and answers when it is asked.

The rule: each step is in `SecureMemory` before the aggregator hears of it. A call that is lost is made again with
the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import numpy as np
import structlog

from fedgrpc.codec.layout import Array
from fedgrpc.codec.model_digest import model_digest
from fedgrpc.errors import FedgrpcError, LayoutError, NameTaken, UpdateRefused
from fedgrpc.privacy.masks import pack_words, packed_bytes
from fedgrpc.privacy.streams import word_dtype
from fedgrpc.protocol.secure import SecureTerms, names_from_proto
from fedgrpc.rpc.retry import Backoff, Retries
from fedgrpc.v1 import privacy_pb2
from fedgrpc.worker.client import AggregatorClient
from fedgrpc.worker.held_model import HeldModel
from fedgrpc.worker.secure_memory import SecureMemory

_WAIT_S: Final = 10.0
# The aggregator holds a call until it has what belongs to it. One that does not is asked no more often.
_PAUSE_S: Final = 0.2
_AFTER_LOST_CALL: Final = Backoff(first_s=0.2, cap_s=5.0)

log = structlog.get_logger()


class SecurePart:
    """The part of this device in the sum of one task, until its update is masked."""

    def __init__(self, memory: SecureMemory, client: AggregatorClient, token: str, terms: SecureTerms) -> None:
        self._memory = memory
        self._client = client
        self._token = token
        self._terms = terms

    async def share(self) -> None:
        """Send the shares of this device's secrets, and fix the roster that comes back.

        Raises `UpdateRefused` for a sum that this device does not join, and what is final of `ExchangeParts`.
        """
        task = await asyncio.to_thread(self._memory.begin, self._token, self._terms.circle, self._terms.keys)
        shares = await asyncio.to_thread(task.sealed_shares)
        retries = Retries(_AFTER_LOST_CALL)
        while True:
            try:
                told = await self._client.exchange(self._token, "shares", shares, _WAIT_S)
            except FedgrpcError as error:
                # Training continues over a lost link. Who gives a task up is told by the heartbeats.
                if not error.retryable or isinstance(error, NameTaken):
                    raise
                await asyncio.sleep(retries.next_delay_s())
                continue
            if told.ready:
                break
            await asyncio.sleep(_PAUSE_S)
        fixed = await asyncio.to_thread(task.with_roster, told.roster, told.parts)
        await asyncio.to_thread(self._memory.fix, self._token, fixed)

    def check_model(self, model: HeldModel) -> None:
        """Raise `UpdateRefused` unless this device trains from the model that all of the sum do. Slow."""
        if model_digest(model.each()) != self._terms.common.model_sha256:
            raise UpdateRefused(
                f"the model version {model.version} that came is not the one that all devices of the sum train"
            )

    def masked(self, update: Mapping[str, Array], examples: int, rng: np.random.Generator) -> Array:
        """Return the masked vector of an update as bytes, uint8; `rng` draws its rounding. Slow.

        Raises `LayoutError` for tensors that are not those of the task, `EncodeError` for values that are not
        finite, and `UpdateRefused` once another update has the masks.
        """
        vector = self._terms.vector
        if not vector.shapes.keys() <= update.keys():
            raise LayoutError("the secure sum has tensors that this update has not")
        tensors = {name: update[name] for name in vector.shapes}
        # Before there is memory for a vector of whatever length the task names.
        vector.check(tensors)
        bits, masks = vector.sum_bits, self._memory.of(self._token).masks(vector.sum_bits)
        packed, at = np.empty(packed_bytes(vector.size, bits), np.uint8), 0
        # Words that do not fill whole bytes yet: fewer than eight.
        rest = np.empty(0, word_dtype(bits))
        for piece in vector.pieces(tensors, examples, rng):
            words = np.concatenate([rest, masks.add_to(piece)])
            whole = words.size // 8 * 8
            at = _put(packed, at, words[:whole], bits)
            rest = words[whole:]
        _put(packed, at, rest, bits)
        return packed


def _put(packed: Array, at: int, words: Array, bits: int) -> int:
    data = pack_words(words, bits)
    packed[at : at + data.size] = data
    return at + data.size


@asynccontextmanager
async def sharing(part: SecurePart | None) -> AsyncIterator[asyncio.Task[None] | None]:
    """Share in the background while the block runs; None where the task is of no secure sum."""
    if part is None:
        yield None
        return
    task = asyncio.create_task(part.share())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def answer(memory: SecureMemory, client: AggregatorClient, question: privacy_pb2.SecureQuestion) -> None:
    """Confirm the question to the neighbours, and answer it once a threshold of them were asked the same.

    Raises `UpdateRefused` for a question that would tell too much, and as `ExchangeParts`.
    """
    token, arrived = question.token, names_from_proto(question.arrived)
    known = await asyncio.to_thread(memory.of, token)
    asked = await asyncio.to_thread(known.with_question, arrived)
    await asyncio.to_thread(memory.fix, token, asked)
    proofs = await asyncio.to_thread(asked.confirmations)
    while not (told := await client.exchange(token, "proofs", proofs, _WAIT_S)).ready:  # noqa: ASYNC110 - a call waits
        await asyncio.sleep(_PAUSE_S)
    answers = await asyncio.to_thread(asked.answer, told.parts)
    await client.exchange(token, "answers", answers, _WAIT_S)
