"""Secure sum of a round in progress: `fedgrpc.privacy.secure_round` with a time for each phase. Pure.

The rule: devices have `phase_s` to share, to confirm and to answer. To mask they have until their round closes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedgrpc.privacy.neighbours import neighbours
from fedgrpc.privacy.one_time_keys import PublicKeys, session_of
from fedgrpc.privacy.secure_round import Effect, Event, SecurePhase, SecureRound, step
from fedgrpc.privacy.secure_vector import SecureVector

_TIMED = (SecurePhase.SHARING, SecurePhase.CONFIRMING, SecurePhase.ANSWERING)


@dataclass(frozen=True)
class SecureSum:
    """Secure sum of one round: what devices have sent, and the vector that their integers mean.

    `common` is what all devices are told alike, as they get it. `due_at`, by the clock of the round: when the
    phase is over; None: when the round closes.
    """

    state: SecureRound
    vector: SecureVector
    common: bytes
    phase_s: float
    due_at: float | None = None

    @classmethod
    def opened(
        cls,
        keys: Mapping[str, PublicKeys],
        vector: SecureVector,
        common: bytes,
        rng: np.random.Generator,
        *,
        threshold: int,
        least: int,
        degree: int = 0,
        phase_s: float,
        now: float,
    ) -> SecureSum:
        """Return the sum of the devices with these one-time keys, before any has shared; `rng` draws the graph.

        `degree` is the number of neighbours, as `wanted` in `degree_of`.
        """
        graph = neighbours(sorted(keys), rng, degree)
        state = SecureRound(
            session_of(common),
            dict(keys),
            graph,
            {name: point for point, name in enumerate(sorted(keys), start=1)},
            dict.fromkeys(graph, threshold),
            least,
        )
        return cls(state, vector, common, phase_s, now + phase_s)

    @property
    def phase(self) -> SecurePhase:
        """Phase of the sum."""
        return self.state.phase

    def is_due(self, now: float) -> bool:
        """Return whether the time of the phase is over."""
        return self.due_at is not None and now >= self.due_at

    @property
    def asking(self) -> bool:
        """True while devices are asked about the masks in the sum."""
        return self.phase in (SecurePhase.CONFIRMING, SecurePhase.ANSWERING)

    def asks(self, worker: str) -> bool:
        """Return whether the worker is to confirm or to answer the question, and has not."""
        state = self.state
        if self.phase is SecurePhase.CONFIRMING:
            return worker in state.arrived and worker not in state.proofs
        return self.phase is SecurePhase.ANSWERING and worker in state.able and worker not in state.answers

    def step(self, event: Event, now: float) -> tuple[SecureSum, tuple[Effect, ...]]:
        """Apply one event. Raises as `secure_round.step`."""
        state, effects = step(self.state, event)
        due_at = self.due_at
        if state.phase is not self.phase:
            due_at = now + self.phase_s if state.phase in _TIMED else None
        return replace(self, state=state, due_at=due_at), effects
