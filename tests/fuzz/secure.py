"""Secure sums: what devices tell an aggregator, what it tells devices, and what both have on their disks.

Besides what holds for all targets: whatever a device is told, it answers for one secret of a neighbour at most.
Whatever shares an aggregator gets, it takes the right masks from a sum, or none.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

import numpy as np

from fedgrpc.aggregator import stored_sum
from fedgrpc.errors import FedgrpcError
from fedgrpc.identity.certificates import Authority, key_pem, make_key, pem_of
from fedgrpc.identity.roles import Role
from fedgrpc.identity.signed_keys import KeyCheck, KeySigner
from fedgrpc.privacy import secure_round
from fedgrpc.privacy.masks import packed_bytes, unpack_words
from fedgrpc.privacy.one_time_keys import PublicKeys, Secrets, acceptable
from fedgrpc.privacy.secure_round import SecureRound, Shared, TimeUp
from fedgrpc.privacy.secure_task import SecureTask
from fedgrpc.privacy.secure_vector import SecureVector
from fedgrpc.protocol import secure
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.storage.sealed_file import write_sealed
from fedgrpc.v1 import aggregator_pb2, privacy_pb2
from fedgrpc.worker.secure_memory import SecureMemory
from tests.fuzz.mutate import invented, made, mutated, spoiled
from tests.fuzz.registry import target

_NOW: Final = 1_800_000_000.0
_NAMES: Final = ("a", "b", "c", "d")
_BITS: Final = 12
_UPDATE: Final = {"w": np.linspace(-1, 1, 10), "b": np.zeros(3)}
_VECTOR: Final = SecureVector({"w": (10,), "b": (3,)}, {"w": 1.0, "b": 0.1}, 8, 0, 4, seed=b"session")
_SECRETS: Final = {name: Secrets(name.encode() * 32) for name in _NAMES}
_KEYS: Final = {name: secrets.public for name, secrets in _SECRETS.items()}


@cache
def _opened() -> SecureSum:
    common = secure.common_terms(_VECTOR, 2, run_id="r", model_sha256=bytes(32))
    return SecureSum.opened(
        *(_KEYS, _VECTOR, common.SerializeToString(), np.random.default_rng(1)),
        **{"threshold": common.threshold, "least": 3, "phase_s": 9.0, "now": 0.0},
    )


@cache
def _asked() -> tuple[SecureRound, dict[str, SecureTask]]:
    """A round in which `d` was lost after it had shared, once its devices have confirmed; and their tasks."""
    state = _opened().state
    tasks = {name: SecureTask(_terms(name).circle, _SECRETS[name]) for name in _NAMES}
    for name, task in tasks.items():
        state, _ = secure_round.step(state, Shared(name, task.sealed_shares()))
    tasks = {
        name: task.with_roster(state.roster, state.boxes_for(name)).with_masked(b"digest")
        for name, task in tasks.items()
    }
    for name in _NAMES[:3]:
        state, _ = secure_round.step(state, secure_round.Arrived(name))
    state, _ = secure_round.step(state, TimeUp(state.phase))
    tasks = {name: tasks[name].with_question(state.arrived) for name in _NAMES[:3]}
    for name, task in tasks.items():
        state, _ = secure_round.step(state, secure_round.Confirmed(name, task.confirmations()))
    return state, tasks


def _message(name: str) -> privacy_pb2.SecureTask:
    return secure.secure_task_to_proto(_opened(), name)


def _terms(name: str) -> secure.SecureTerms:
    return secure.secure_terms_from_proto(_message(name), name)


@cache
def _certified() -> tuple[KeyCheck, privacy_pb2.OneTimeKeys]:
    authority, key = Authority.make("ours"), make_key()
    issued = authority.issue_member(key.public_key(), Role.TRAINER, "a", _NOW + 1000)
    with tempfile.TemporaryDirectory() as place:
        certificate, key_file = Path(place) / "a.pem", Path(place) / "a.key"
        certificate.write_bytes(pem_of(issued))
        key_file.write_bytes(key_pem(key))
        signed = KeySigner(certificate, key_file).signed("run", "a", _KEYS["a"], _NOW)
    return KeyCheck([authority.certificate]), secure.keys_to_proto(signed)


@target(share=10)
def one_time_keys(rnd: Random, folder: Path) -> None:
    """Keys that a device deposits: an aggregator, and each neighbour, checks them with their certificates."""
    check, good = _certified()
    message = spoiled(good, rnd)
    if message.signature.chain and rnd.random() < 0.5:
        message.signature.chain[0] = mutated(message.signature.chain[0], rnd)
    keys = secure.keys_from_proto(message)
    taken = acceptable({**_KEYS, "a": keys})
    assert taken.keys() >= {"b", "c", "d"} - {name for name in _KEYS if _shares_a_key(_KEYS[name], keys)}
    check.check("run", "a", keys, _NOW)
    assert keys == _KEYS["a"], "other keys than the device's are taken with its signature"


def _shares_a_key(one: PublicKeys, other: PublicKeys) -> bool:
    return bool({one.masking, one.sealing, one.seed_check} & {other.masking, other.sealing, other.seed_check})


@target(share=10)
def secure_tasks(rnd: Random, folder: Path) -> None:
    """A device takes part in whatever an aggregator asks for, as far as that goes."""
    message = spoiled(_message("a"), rnd) if rnd.random() < 0.8 else invented(privacy_pb2.SecureTask, rnd)
    if rnd.random() < 0.5:
        common = secure.common_terms_from_bytes(message.common)
        message.common = spoiled(common, rnd).SerializeToString()
    terms = secure.secure_terms_from_proto(message, "a", rnd.choice((0, 0, 1)))
    task = SecureTask(terms.circle, _SECRETS["a"])
    assert task.sealed_shares().keys() == terms.circle.neighbours.keys()
    told = _response()
    if rnd.random() < 0.7:
        told = spoiled(told, rnd)
    task = task.with_roster(secure.names_from_proto(told.roster), secure.parts_from_proto(told.parts))
    assert message.common == _message("a").common, "a device masks an update of another task than its neighbours"
    masks = task.masks(terms.vector.sum_bits)
    for piece in terms.vector.pieces(_UPDATE, 7, np.random.default_rng(1)):
        masks.add_to(piece)


@cache
def _response() -> aggregator_pb2.ExchangePartsResponse:
    state = _asked()[0]
    parts = secure.parts_to_proto(state.boxes_for("a"))
    return aggregator_pb2.ExchangePartsResponse(ready=True, roster=sorted(state.roster), parts=parts)


@target(share=10)
def secure_answers(rnd: Random, folder: Path) -> None:
    """A device is told a roster, asked questions, and given proofs, twice and in other ways: one secret each."""
    state, tasks = _asked()
    first = tasks["a"]
    before = replace(first, arrived=None)
    proofs = state.proofs_for("a")
    answered: dict[str, set[bytes]] = {}
    for _ in range(3):
        question = privacy_pb2.SecureQuestion(arrived=rnd.choice((("a", "b", "c"), _NAMES, ("a", "b", "d"))))
        told = privacy_pb2.SecureParts(parts=proofs)
        if rnd.random() < 0.7:
            told = spoiled(told, rnd)
        if rnd.random() < 0.3:
            question = spoiled(question, rnd)
        try:
            before = before.with_question(secure.names_from_proto(question.arrived))
            shares = before.answer(secure.parts_from_proto(told))
        except FedgrpcError:
            continue
        for name, share in shares.items():
            answered.setdefault(name, set()).add(share)
    assert all(len(shares) == 1 for shares in answered.values()), "two secrets of a neighbour are told"


@target(share=10)
def secure_shares(rnd: Random, folder: Path) -> None:
    """Devices answer with anything: the masks that are taken away are the right ones, or none."""
    state, tasks = _asked()
    answers = {name: dict(task.answer(state.proofs_for(name))) for name, task in tasks.items()}
    for _ in range(rnd.choice((1, 1, 2, 4))):
        liar, about = rnd.choice(_NAMES[:3]), rnd.choice(_NAMES)
        good = answers[liar].get(about, bytes(33))
        answers[liar][about] = mutated(good, rnd) if rnd.random() < 0.7 else rnd.randbytes(33)
    read = {
        name: secure.parts_from_proto(secure.parts_to_proto(made(parts, rnd))) for name, parts in answers.items()
    }
    for name, parts in read.items():
        try:
            state, _ = secure_round.step(state, secure_round.Answered(name, parts))
        except FedgrpcError:
            # It is as if it had not answered.
            continue
    values = {name: np.arange(20, dtype=np.uint64) * place for place, name in enumerate(_NAMES[:3])}
    total = sum(tasks[name]._participant.masked(each, _BITS) for name, each in values.items())
    masks = state.unmasking.masks(state.arrived, state.answers, _BITS)
    expected = sum(values.values()) % (1 << _BITS)
    assert np.array_equal(masks.add_to(np.asarray(total) % (1 << _BITS)), expected)


@target(share=5)
def masked_words(rnd: Random, folder: Path) -> None:
    bits, count = rnd.choice((1, 7, 12, 33, 56)), rnd.choice((1, 7, 8, 9, 1000))
    data = rnd.randbytes(packed_bytes(count, bits))
    words = unpack_words(np.frombuffer(mutated(data, rnd), np.uint8), count, bits)
    assert words.size == count
    assert int(words.max()) < 1 << bits


def _damaged(path: Path, rnd: Random) -> bool:
    """Damage a file; False if it is as it was."""
    good = path.read_bytes()
    path.write_bytes(mutated(good, rnd))
    return path.read_bytes() != good


@target(share=5)
def secure_memories(rnd: Random, folder: Path) -> None:
    """A device's own file of a sum: damaged, it answers nothing."""
    memory, place = SecureMemory(folder / "memory"), folder / "memory"
    # What a former input has damaged stays so: it is never written over.
    shutil.rmtree(place, ignore_errors=True)
    memory.fix("token", _asked()[1]["a"])
    damaged = _damaged(next(path for path in place.iterdir() if path.name != "key"), rnd)
    memory.of("token")
    assert not damaged


@target(share=5)
def stored_sums(rnd: Random, folder: Path) -> None:
    """The aggregator's file of the sum of its open round."""
    path = folder / stored_sum.FILE
    write_sealed(path, {"round": 7, **stored_sum._described(replace(_opened(), state=_asked()[0]))})
    damaged = _damaged(path, rnd)
    stored_sum.recovered(folder, 7, _NAMES[:3], 9.0)
    assert not damaged
