"""Secure sums as messages: one-time keys, what a device needs for its part, the question, and the parts it sends.

The rule: every name, count and size from a peer is bounded here. What the values mean is checked by
`fedgrpc.privacy`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from google.protobuf.message import DecodeError

from fedgrpc.codec.layout import MAX_NAME_CHARS
from fedgrpc.errors import LayoutError, UpdateRefused, UsageError
from fedgrpc.privacy.one_time_keys import KeySignature, PublicKeys, session_of
from fedgrpc.privacy.secure_policy import SecurePolicy
from fedgrpc.privacy.secure_sum import LEAST_NEIGHBOURS, Circle
from fedgrpc.privacy.secure_vector import SecureVector
from fedgrpc.protocol.tasks import Registration
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.v1 import aggregator_pb2, privacy_pb2, round_pb2

# The one tensor of a masked update: bytes of `pack_words`.
MASKED: Final = "masked"
# A device's neighbours, and all devices of a sum.
_MOST_NEIGHBOURS: Final = 1024
_MOST_DEVICES: Final = 1 << 20
_MOST_TENSORS: Final = 1 << 16
_MOST_ELEMENTS: Final = 1 << 36
_MOST_PART_BYTES: Final = 256
_MOST_NAME_CHARS: Final = 64
_MOST_SESSION_BYTES: Final = 64
# A signature of a key of 8192 bits.
MAX_SIGNATURE_BYTES: Final = 1024
_MOST_CERTIFICATES: Final = 4
_MOST_CHAIN_BYTES: Final = 8 << 10


@dataclass(frozen=True)
class SecureTerms:
    """A device's part in a secure sum: the circle of its neighbours, its own keys, and the vector it adds to.

    `common` is what all devices of the sum are told alike.
    """

    circle: Circle
    keys: PublicKeys
    vector: SecureVector
    common: privacy_pb2.CommonTerms


def keys_to_proto(keys: PublicKeys) -> privacy_pb2.OneTimeKeys:
    """Return the message of a device's public keys."""
    message = privacy_pb2.OneTimeKeys(masking=keys.masking, sealing=keys.sealing, seed_check=keys.seed_check)
    if (signed := keys.signature) is not None:
        message.signature.signed_at, message.signature.value = signed.signed_at, signed.value
        message.signature.chain.extend(signed.chain)
    return message


def keys_from_proto(message: privacy_pb2.OneTimeKeys) -> PublicKeys:
    """Return the public keys.

    Raises `UpdateRefused` for keys of another size, and `LayoutError` for a signature or a chain that is too long.
    """
    told, signature = message.signature, None
    if message.HasField("signature"):
        if len(told.value) > MAX_SIGNATURE_BYTES or not is_short(told.chain):
            raise LayoutError("one-time keys have a signature or certificates that are too long")
        signature = KeySignature(told.signed_at, told.value, tuple(told.chain))
    return PublicKeys(message.masking, message.sealing, message.seed_check, signature)


def is_short(chain: Sequence[bytes]) -> bool:
    """Return whether a chain of certificates, each in DER, may travel with one-time keys."""
    return len(chain) <= _MOST_CERTIFICATES and sum(map(len, chain)) <= _MOST_CHAIN_BYTES


def common_terms(vector: SecureVector, threshold: int, **told: Any) -> privacy_pb2.CommonTerms:
    """Return what all devices of a sum are told alike; `told` are the fields beside those of the vector.

    The vector's seed is what names the session.
    """
    return privacy_pb2.CommonTerms(
        threshold=threshold,
        bits=vector.bits,
        weight_bits=vector.weight_bits,
        count=vector.count,
        most_examples=vector.most_examples if vector.weight_bits else 0,
        norm=vector.norm or 0.0,
        session=vector.seed,
        coordinates=vector.coordinates,
        tensors=[
            privacy_pb2.SecureTensor(name=name, shape=shape, bound=vector.bounds[name])
            for name, shape in vector.shapes.items()
        ],
        **told,
    )


def common_terms_from_bytes(data: bytes) -> privacy_pb2.CommonTerms:
    """Return what all devices of a sum are told alike. Raises `LayoutError` for bytes that are none of it."""
    try:
        return privacy_pb2.CommonTerms.FromString(data)
    except DecodeError as error:
        raise LayoutError(f"the terms of the secure sum cannot be read: {error}") from None


def secure_task_to_proto(sum_: SecureSum, worker: str) -> privacy_pb2.SecureTask:
    """Return what `worker` needs to take part in the sum."""
    state = sum_.state
    return privacy_pb2.SecureTask(
        common=sum_.common,
        keys=keys_to_proto(state.keys[worker]),
        point=state.points[worker],
        neighbours=[
            privacy_pb2.SecureNeighbour(
                worker=name, point=state.points[name], keys=keys_to_proto(state.keys[name])
            )
            for name in state.graph[worker]
        ],
    )


def secure_terms_from_proto(
    message: privacy_pb2.SecureTask, worker: str, colluding: int = 0, least: int = LEAST_NEIGHBOURS + 1
) -> SecureTerms:
    """Return the part of this device, `worker`, in a secure sum; `colluding` and `least` are as in `Circle`.

    Raises `LayoutError` for absurd numbers, and `UpdateRefused` for a circle that this device does not join.
    """
    if len(message.neighbours) > _MOST_NEIGHBOURS:
        raise LayoutError("the task has too many neighbours for a secure sum")
    common = common_terms_from_bytes(message.common)
    vector = vector_of(common)
    neighbours = {each.worker: keys_from_proto(each.keys) for each in message.neighbours}
    if len(neighbours) < len(message.neighbours):
        raise LayoutError("the task names a neighbour twice")
    points = {each.worker: each.point for each in message.neighbours} | {worker: message.point}
    session = session_of(message.common)
    circle = Circle(session, worker, neighbours, points, common.threshold, colluding, least)
    return SecureTerms(circle, keys_from_proto(message.keys), vector, common)


def check_common(common: privacy_pb2.CommonTerms, task: aggregator_pb2.Task, built_from: Registration) -> None:
    """Raise `UpdateRefused` where a task is another one than all devices of its sum are told.

    `built_from`: what the device's learning task was built from.
    """
    told = {
        "run": (task.run_id or task.run, common.run_id),
        "round": (task.round, common.round),
        "model version": (task.model_version, common.model_version),
        "training plan": (task.plan, common.plan),
        "evaluation": (task.evaluate, common.evaluate),
        "privacy": (task.privacy, common.privacy),
        "learning task": (built_from.learning_task, common.learning_task),
        "model": (built_from.model, common.model),
        "options": (built_from.options, dict(common.options)),
    }
    for name, (here, everywhere) in told.items():
        if here != everywhere:
            raise UpdateRefused(
                f"the {name} of this device's task is not what all devices of the secure sum are told; where the "
                "run's settings have changed, restart the worker"
            )
    if common.plan.HasField("upload_reserve"):
        raise UpdateRefused("training for a secure sum does not end by the clock, which each device is told alone")


def vector_of(message: privacy_pb2.CommonTerms) -> SecureVector:
    """Return the vector that all devices add to. Raises `LayoutError` for absurd numbers."""
    if len(message.tensors) > _MOST_TENSORS:
        raise LayoutError("the task has too many tensors for a secure sum")
    if not 1 <= len(message.session) <= _MOST_SESSION_BYTES or not 1 <= message.count <= _MOST_DEVICES:
        raise LayoutError("the task names no secure sum: its session or its count cannot be")
    shapes = {each.name: tuple(each.shape) for each in message.tensors}
    if len(shapes) < len(message.tensors) or any(len(name) > MAX_NAME_CHARS for name in shapes):
        raise LayoutError("the tensors of a secure sum have names of their own")
    if sum(map(prod, shapes.values())) > _MOST_ELEMENTS:
        raise LayoutError("the vector of this secure sum is too long")
    bounds = {each.name: each.bound for each in message.tensors}
    try:
        return SecureVector(
            shapes,
            bounds,
            message.bits,
            message.weight_bits,
            message.count,
            message.most_examples or 1,
            message.norm or None,
            message.coordinates,
            message.session,
        )
    except UsageError as error:
        raise LayoutError(f"the task asks for a secure sum that cannot be: {error}") from None


def secure_groups_to_proto(policy: SecurePolicy) -> round_pb2.SecureGroups:
    """Return what leaves are told of the sums of their own workers' updates."""
    return round_pb2.SecureGroups(
        bits=policy.secure_bits or 0, weight_bits=policy.secure_weight_bits, colluding=policy.secure_colluding
    )


def groups_complaint(leaf: round_pb2.LeafInstructions, own: SecurePolicy) -> str:
    """Say why a leaf with the secure sums of `own` cannot do as it is told; "": it can."""
    told = leaf.secure
    if not leaf.HasField("secure"):
        return "this leaf has --secure-aggregation, and its parent has not: give it to both" if own.on else ""
    if not own.on:
        return f"updates of this run are masked: give this leaf --secure-aggregation {told.bits}"
    if (own.secure_bits, own.secure_weight_bits) != (told.bits, told.weight_bits):
        return (
            f"the parent has --secure-aggregation {told.bits} and --secure-weight-bits {told.weight_bits}, this "
            f"leaf {own.secure_bits} and {own.secure_weight_bits}: give it the parent's"
        )
    if own.secure_colluding < told.colluding:
        return f"the parent has --secure-colluding {told.colluding}, this leaf no more than {own.secure_colluding}"
    return ""


def parts_to_proto(parts: Mapping[str, bytes]) -> privacy_pb2.SecureParts:
    """Return the message of what a device sends to its neighbours."""
    return privacy_pb2.SecureParts(parts=parts)


def parts_from_proto(message: privacy_pb2.SecureParts) -> dict[str, bytes]:
    """Return parts by name. Raises `LayoutError` for more or longer ones than any phase has."""
    if len(message.parts) > _MOST_NEIGHBOURS or any(
        len(part) > _MOST_PART_BYTES for part in message.parts.values()
    ):
        raise LayoutError("these are no parts of a secure sum: they are too many or too long")
    return dict(message.parts)


def names_from_proto(names: Iterable[str]) -> frozenset[str]:
    """Return the devices of a roster or a question. Raises `LayoutError` for absurd ones."""
    found = frozenset(names)
    if len(found) > _MOST_DEVICES or any(not 0 < len(name) <= _MOST_NAME_CHARS for name in found):
        raise LayoutError("these are no names of devices")
    return found
