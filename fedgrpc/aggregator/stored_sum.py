"""Secure sum of the open round in the data folder, so that a restarted aggregator goes on with it.

    secure_sum    the round, its devices with their keys and places; later roster, shares and question too

The rule: roster and question are here before a device is told. Proofs and answers are not: devices send the same
ones again.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from fedgrpc.privacy.one_time_keys import PublicKeys, session_of
from fedgrpc.privacy.secure_round import SecurePhase, SecureRound
from fedgrpc.protocol.secure import common_terms_from_bytes, keys_from_proto, keys_to_proto, vector_of
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.storage.sealed_file import read_sealed, write_sealed
from fedgrpc.v1.privacy_pb2 import OneTimeKeys

FILE: Final = "secure_sum"


def store(folder: Path, round_: RoundInProgress) -> None:
    """Store the secure sum of a round, durably. Raises `StorageError`."""
    assert round_.secure is not None
    write_sealed(folder / FILE, {"round": round_.number, **_described(round_.secure)})


def recovered(folder: Path, number: int, arrived: Collection[str], due_at: float) -> SecureSum | None:
    """Return the sum of round `number`; None where no process has stored it.

    `arrived` are the workers whose updates are in the folder. The phase that it was in ends at `due_at`. Raises
    `CorruptError` for a damaged file, and `StorageError`.
    """
    told = read_sealed(folder / FILE)
    return None if told is None or told["round"] != number else _sum_of(told, frozenset(arrived), due_at)


def _described(sum_: SecureSum) -> dict[str, Any]:
    state = sum_.state
    asked = state.phase not in (SecurePhase.SHARING, SecurePhase.MASKING)
    return {
        "common": sum_.common.hex(),
        "least": state.least,
        "phase_s": sum_.phase_s,
        "devices": {
            name: {
                # As devices get them: with the signatures.
                "keys": keys_to_proto(keys).SerializeToString().hex(),
                "neighbours": list(state.graph[name]),
                "point": state.points[name],
            }
            for name, keys in state.keys.items()
        },
        "roster": sorted(state.roster),
        # Of no use before there is a roster: those who have shared share again.
        "boxes": {name: {to: box.hex() for to, box in state.boxes[name].items()} for name in sorted(state.roster)},
        "arrived": sorted(state.arrived) if asked else None,
    }


def _keys_of(text: str) -> PublicKeys:
    return keys_from_proto(OneTimeKeys.FromString(bytes.fromhex(text)))


def _sum_of(told: dict[str, Any], uploaded: frozenset[str], due_at: float | None) -> SecureSum:
    devices, data = told["devices"], bytes.fromhex(told["common"])
    common = common_terms_from_bytes(data)
    roster = frozenset(told["roster"])
    asked = None if told["arrived"] is None else frozenset(told["arrived"])
    phase = SecurePhase.SHARING if not roster else SecurePhase.MASKING if asked is None else SecurePhase.CONFIRMING
    state = SecureRound(
        session_of(data),
        {name: _keys_of(each["keys"]) for name, each in devices.items()},
        {name: tuple(each["neighbours"]) for name, each in devices.items()},
        {name: each["point"] for name, each in devices.items()},
        dict.fromkeys(devices, common.threshold),
        told["least"],
        phase,
        {name: {to: bytes.fromhex(box) for to, box in boxes.items()} for name, boxes in told["boxes"].items()},
        roster,
        uploaded & roster,
        asked or frozenset(),
    )
    due_at = None if phase is SecurePhase.MASKING else due_at
    return SecureSum(state, vector_of(common).drawn(), data, told["phase_s"], due_at)
