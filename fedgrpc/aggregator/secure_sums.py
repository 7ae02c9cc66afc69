"""Secure sums of one run in its shell: they open with their tasks, hear devices, and end as the mean of a round.

The rule: what devices are told is a function of the machine's `SecureSum`. No update of a device is decoded here,
only the sum of all.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Collection, Mapping
from math import prod
from typing import Final

import numpy as np
import structlog

from fedgrpc.aggregator import stored_sum
from fedgrpc.aggregator.encoded_models import EncodedModels
from fedgrpc.aggregator.fold import Load
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.payload_encoder import EncodedModel, Pull
from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.task_terms import TaskTerms
from fedgrpc.aggregator.update_checks import MaskedWords
from fedgrpc.codec.layout import Array, Layout
from fedgrpc.codec.model_digest import model_digest
from fedgrpc.codec.payload import PayloadReader
from fedgrpc.errors import CodecError, CorruptError, LayoutError, RoundClosed, UpdateRefused
from fedgrpc.privacy.bounded_rounding import grid_bound
from fedgrpc.privacy.masks import packed_bytes, unpack_words
from fedgrpc.privacy.neighbours import degree_of, threshold_of
from fedgrpc.privacy.one_time_keys import acceptable
from fedgrpc.privacy.secure_round import Parts, SecurePhase
from fedgrpc.privacy.secure_vector import SecureVector, bounds_after
from fedgrpc.privacy.streams import word_dtype
from fedgrpc.privacy.unmasking import SumLost
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.protocol.plans import training_plan_to_proto
from fedgrpc.protocol.secure import MASKED, common_terms, parts_from_proto, parts_to_proto
from fedgrpc.rounds.events import Selected
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.events import PartsSent
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.v1 import aggregator_pb2 as pb
from fedgrpc.v1.privacy_pb2 import SecureQuestion, UpdatePrivacy

log = structlog.get_logger()

# Key of a model file's metadata: bounds of the next secure sum, by tensor.
BOUNDS: Final = "secure_bounds"
_SESSION_BYTES: Final = 16
# Before there is a mean: this many times the value that all have in a difference as long as the clip norm.
_FIRST_MARGIN: Final = 16.0
# Words that are unpacked at a time: a multiple of eight, which take whole bytes.
_PIECE_WORDS: Final = 1 << 16
_PHASES: Final = {
    "shares": SecurePhase.SHARING,
    "proofs": SecurePhase.CONFIRMING,
    "answers": SecurePhase.ANSWERING,
}


class SecureSums:
    """The secure sums of one run. Without `--secure-aggregation` there are none."""

    def __init__(
        self,
        shell: RunShell,
        settings: AggregatorSettings,
        models: ModelStore,
        encoded: EncodedModels,
        terms: TaskTerms,
    ) -> None:
        """`encoded` has the models as devices get them, `terms` those of their tasks."""
        self._shell = shell
        self._settings = settings
        self._models = models
        self._encoded = encoded
        self._terms = terms
        # Of the last model that a sum was opened for.
        self._digest: tuple[EncodedModel, bytes] | None = None
        self._log = log.bind(run=settings.run_name)
        # What devices may be told: a sum is stored first.
        self._stored: SecureSum | None = None

    async def open(self, round_: RoundInProgress, selected: Selected) -> SecureSum | None:
        """Return the sum for the updates of these new tasks; None for a round that has none."""
        settings, machine = self._settings, self._shell.machine
        if not settings.sums_here or round_.kind is not TaskKind.TRAIN:
            return None
        told = {worker: machine.keys[worker] for _, worker in selected.tasks if worker in machine.keys}
        keys = await asyncio.to_thread(acceptable, told)
        vector = await asyncio.to_thread(self._vector, round_.base_version, machine.layout, len(keys))
        degree, colluding = settings.secure.secure_neighbours, settings.secure.secure_colluding
        threshold = threshold_of(degree_of(len(keys), degree), colluding)
        return SecureSum.opened(
            keys,
            vector,
            await self._common(round_, vector, threshold),
            np.random.default_rng(secrets.randbits(128)),
            threshold=threshold,
            least=settings.policy.quorum,
            degree=degree,
            phase_s=settings.policy.lease_s,
            now=self._shell.clock(),
        )

    async def _common(self, round_: RoundInProgress, vector: SecureVector, threshold: int) -> bytes:
        """Return what all devices of a sum are told alike. Raises as encoding the model does."""
        settings, instructions = self._settings, self._terms.instructions
        clip_norm = vector.clip_norm or instructions.clip_norm
        common = common_terms(
            vector,
            threshold,
            run_id=self._shell.machine.id,
            round=round_.number,
            model_version=round_.base_version,
            model_sha256=await self._digest_of(round_.base_version),
            plan=training_plan_to_proto(instructions.plan),
            evaluate=instructions.evaluate,
            privacy=UpdatePrivacy(clip_norm=clip_norm, without_metrics=not settings.privacy.metrics),
            learning_task=settings.learning_task,
            model=settings.model,
            options=settings.task_options,
        )
        return common.SerializeToString(deterministic=True)

    async def _digest_of(self, version: int) -> bytes:
        """Return the SHA-256 of a version as devices have it: its one payload may have lost bits."""
        (downlink,) = self._settings.negotiation().downlinks
        encoded = await self._encoded.get(Pull(version, downlink))
        if self._digest is None or self._digest[0] is not encoded:
            assert encoded.payload is not None
            reader = PayloadReader(encoded.manifest, encoded.payload.read, valid=True)
            self._digest = encoded, await asyncio.to_thread(model_digest, reader)
        return self._digest[1]

    def _vector(self, version: int, layout: Layout, count: int) -> SecureVector:
        # Those of the parent, where there is one.
        instructions = self._terms.instructions
        secure, clip_norm = self._settings.secure, instructions.clip_norm
        assert secure.secure_bits is not None
        assert clip_norm is not None
        shapes = {spec.name: spec.shape for spec in layout if spec.is_trained}
        bits, count, seed = secure.secure_bits, max(1, count), secrets.token_bytes(_SESSION_BYTES)
        if self._settings.privacy.on:
            # Bounds by the last mean would tell of it without noise.
            bound = grid_bound(clip_norm, sum(map(prod, shapes.values())), bits)
            return SecureVector(shapes, dict.fromkeys(shapes, bound), bits, 0, count, norm=clip_norm, seed=seed)
        bounds = known_bounds(self._models.open(version).about(BOUNDS), shapes, clip_norm)
        most = instructions.max_examples or 1
        coordinates = int(secure.secure_coordinates * 2**32) if secure.secure_coordinates < 1 else 0
        weights = secure.secure_weight_bits
        vector = SecureVector(shapes, bounds, bits, weights, count, most, coordinates=coordinates, seed=seed)
        return vector.drawn()

    async def store(self, round_: RoundInProgress | None = None) -> None:
        """Store the sum of the round in progress, or of `round_` before it is, and only then let devices know."""
        shell = self._shell
        round_ = shell.machine.current if round_ is None else round_
        sum_ = round_.secure
        if sum_ is None or sum_.phase is SecurePhase.ABANDONED:
            return
        await asyncio.to_thread(stored_sum.store, self._settings.data_dir, round_)
        self._stored = sum_
        state = sum_.state
        about = {"shared": len(state.roster), "asked": len(state.arrived)}
        self._log.info("secure sum", round=round_.number, phase=sum_.phase.name.lower(), **about)
        shell.news()
        for name in sum_.state.arrived:
            shell.fleet.wake(name)

    async def lost(self, number: int, kind: TaskKind, changed: Collection[str] = ()) -> str:
        """Return why an open round cannot continue: "" if it has a secure sum where the settings want one now.

        Else plain updates would be taken for masked ones, or the other way round. `changed` are the names of
        settings that are others than at the last start. Raises `StorageError`.
        """
        wanted = self._settings.sums_here and kind is TaskKind.TRAIN
        try:
            found = await asyncio.to_thread(stored_sum.recovered, self._settings.data_dir, number, (), 0.0)
        except CorruptError as error:
            return f"the secure sum of this round is lost: {error}" if kind is TaskKind.TRAIN else ""
        # Sums at leaves have been begun as the settings were.
        elsewhere = bool(self._settings.leaves) and any(name.startswith("secure.") for name in changed)
        if wanted == (found is not None) and not (elsewhere and kind is TaskKind.TRAIN):
            return ""
        return "secure_aggregation has changed, and updates of this round are of the other form"

    async def recovered(self, round_: RoundInProgress) -> SecureSum | None:
        """Return the sum of a round that a former process left open; None: it has none. Raises `StorageError`."""
        if round_.kind is not TaskKind.TRAIN:
            return None
        tasks = round_.state.tasks
        arrived = {tasks[token].worker for token in round_.state.accepted}
        policy = self._settings.policy
        due_at = self._shell.clock() + max(policy.lease_s, policy.reconnect_grace_s)
        self._stored = await asyncio.to_thread(
            stored_sum.recovered, self._settings.data_dir, round_.number, arrived, due_at
        )
        return self._stored

    def _may_tell(self, sum_: SecureSum) -> bool:
        """Return whether roster and question are stored as they are now."""
        stored = self._stored
        if stored is None or stored.state.session != sum_.state.session:
            return False
        return (stored.state.roster, stored.state.arrived) == (sum_.state.roster, sum_.state.arrived)

    def question_for(self, worker: str) -> str | None:
        """Return the token of the task that the worker is to answer for now."""
        round_ = self._shell.machine.round
        if round_ is None or round_.secure is None or not self._may_tell(round_.secure):
            return None
        return self._shell.machine.question_for(worker)

    def question(self, worker: str, token: str) -> SecureQuestion | None:
        """Return the question to the worker of a task; None: there is none."""
        machine = self._shell.machine
        if self.question_for(worker) != token or machine.current.secure is None:
            return None
        arrived = sorted(machine.current.secure.state.arrived)
        return SecureQuestion(token=token, run_id=machine.id, arrived=arrived)

    async def exchange(self, request: pb.ExchangePartsRequest) -> pb.ExchangePartsResponse:
        """Take what a device sends in a phase, and return what it is told next, as soon as that is known.

        Raises as `ExchangeParts` in aggregator.proto says.
        """
        shell, kind = self._shell, request.WhichOneof("content")
        if kind is None:
            raise LayoutError("a device sends shares, proofs or answers of a secure sum")
        await shell.check_open(request.worker, request.token)
        parts = parts_from_proto(getattr(request, kind))
        shell.apply(PartsSent(request.token, _PHASES[kind], parts))
        if kind == "answers":
            return pb.ExchangePartsResponse(ready=True)
        wait_s = min(duration_from_proto(request.wait), self._settings.poll_wait_s)
        try:
            async with asyncio.timeout(wait_s):
                return await self._told(request.worker, request.token, kind)
        except TimeoutError:
            return pb.ExchangePartsResponse(ready=False)

    async def _told(self, worker: str, token: str, kind: str) -> pb.ExchangePartsResponse:
        seen = -1
        while True:
            sum_ = self._sum_of(token)
            state = sum_.state
            if not self._may_tell(sum_):
                seen = await self._shell.changes.wait(seen)
                continue
            if kind == "shares" and state.phase is not SecurePhase.SHARING:
                if worker not in state.roster:
                    raise RoundClosed("the secure sum goes on without this device")
                return _response(state.boxes_for(worker), state.roster)
            if kind == "proofs" and state.phase is not SecurePhase.CONFIRMING:
                if worker not in state.able:
                    raise RoundClosed("the secure sum goes on without the answer of this device")
                return _response(state.proofs_for(worker))
            seen = await self._shell.changes.wait(seen)

    def _sum_of(self, token: str) -> SecureSum:
        """Return the sum of a task. Raises `RoundClosed` once it is abandoned or over."""
        round_ = self._shell.machine.round_of(token)
        if round_.secure is None or round_.state.phase.final:
            raise RoundClosed(f"the secure sum of this task is over: {round_.state.reason}")
        return round_.secure

    def expected_words(self, round_: RoundInProgress, worker: str) -> MaskedWords | None:
        """Return what a masked update of this worker holds; None where updates travel as they are.

        Raises `UpdateRefused` for a worker whose masks would not cancel.
        """
        if round_.secure is None:
            return None
        if worker not in round_.secure.state.roster:
            raise UpdateRefused("this device is not on the roster of the secure sum")
        return MaskedWords(round_.secure.vector.size, round_.secure.vector.sum_bits)


def _response(parts: Parts, roster: Collection[str] = ()) -> pb.ExchangePartsResponse:
    return pb.ExchangePartsResponse(ready=True, roster=sorted(roster), parts=parts_to_proto(parts))


def known_bounds(text: str, shapes: Mapping[str, tuple[int, ...]], clip_norm: float) -> dict[str, float]:
    """Return the bound of each tensor: as the last mean left it in a model's metadata, else by the clip norm.

    A difference as long as the clip norm whose values are all alike has values of clip_norm / sqrt(size).
    """
    size = sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    first = min(clip_norm, _FIRST_MARGIN * clip_norm / max(1, size) ** 0.5)
    known = json.loads(text) if text else {}
    return {name: min(clip_norm, float(known.get(name, first))) for name in shapes}


def bounds_text(means: Mapping[str, Array], clip_norm: float) -> str:
    """Return the bounds of the next sum as a model's metadata has them."""
    return json.dumps(bounds_after(means, clip_norm), sort_keys=True)


def unmasked_sum(sum_: SecureSum, updates: Collection[str], load: Load) -> Array:
    """Return the sum of these masked updates, by token, without their masks: integers modulo 2^bits.

    Raises `UpdateRefused` where it cannot be had, and as reading updates does. Memory: one sum and one update.
    """
    state, bits = sum_.state, sum_.vector.sum_bits
    if len(updates) != len(state.arrived):
        # As where a restart found one that its settings refuse: the masks of the others would stay.
        raise UpdateRefused(f"the secure sum is lost: of its {len(state.arrived)} updates {len(updates)} are here")
    total = np.zeros(sum_.vector.size, word_dtype(bits))
    for token in updates:
        _add_masked(total, load, token, bits)
    try:
        masks = state.unmasking.masks(state.arrived, state.answers, bits)
    except SumLost as error:
        raise UpdateRefused(f"the secure sum is lost: {error}") from error
    for start in range(0, total.size, _PIECE_WORDS):
        piece = slice(start, start + _PIECE_WORDS)
        total[piece] = masks.add_to(total[piece])
    return total


def _add_masked(total: Array, load: Load, token: str, bits: int) -> None:
    update = load(token)
    try:
        update.check()
        with update.open() as reader:
            packed = reader.tensor(MASKED)
        for start in range(0, total.size, _PIECE_WORDS):
            piece = total[start : start + _PIECE_WORDS]
            first = start * bits // 8
            piece += unpack_words(packed[first : first + packed_bytes(piece.size, bits)], piece.size, bits)
    except CodecError as error:
        # The masks of all others count on it.
        raise UpdateRefused(f"a masked update cannot be read, and the sum is lost with it: {error}") from error
