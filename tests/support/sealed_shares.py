"""Shares that the neighbours of one device seal to it, for tests of that device alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedgrpc.privacy.one_time_keys import PublicKeys, Secrets
from fedgrpc.privacy.secure_sum import Circle, Participant


def sealed_to(
    circle: Circle, keys: PublicKeys, secrets: Mapping[str, Secrets], session: bytes | None = None
) -> dict[str, bytes]:
    """Return what the neighbours of `circle` seal to its device, which has `keys`, in `session` or in its own."""
    everybody = {**circle.neighbours, circle.name: keys}

    def sealed(name: str) -> bytes:
        around = {other: each for other, each in everybody.items() if other != name}
        own = replace(circle, name=name, neighbours=around, session=session or circle.session)
        return Participant(own, secrets[name]).sealed_shares()[circle.name]

    return {name: sealed(name) for name in circle.neighbours}
