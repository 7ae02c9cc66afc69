"""Device's memory of one secure sum: what it has fixed, and cannot say otherwise again.

The rule: a device fixes four things in turn, each once: circle, roster, masked update, question. It stores a value
here durably before it sends what follows from it. Whatever it is asked, and whenever it died, a device so shares
under one circle, uses its masks on one update, and answers for one secret of each neighbour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from fedgrpc.errors import UpdateRefused
from fedgrpc.privacy.masks import Masks
from fedgrpc.privacy.one_time_keys import PublicKeys, Secrets
from fedgrpc.privacy.secure_sum import Circle, Participant

# Keys that a device keeps ready: one a round.
MAX_KEYS: Final = 64


@dataclass(frozen=True)
class KeyRing:
    """One-time secrets that a device has deposited the public keys of, and not used."""

    unused: tuple[Secrets, ...] = ()

    def filled(self, count: int, draw: Callable[[int], bytes]) -> KeyRing:
        """Return the ring with at least `count` keys (at most 64); `draw(n)` returns n random bytes."""
        missing = min(count, MAX_KEYS) - len(self.unused)
        return KeyRing((*self.unused, *(Secrets(draw(32)) for _ in range(missing))))

    def take(self, public: PublicKeys) -> tuple[KeyRing, Secrets]:
        """Return the ring without the key of `public`, and its secrets: the ring is stored before they are used.

        Raises UpdateRefused for a key that is not here, since it was used or is another device's.
        """
        for secrets in self.unused:
            if secrets.public == public:
                return KeyRing(tuple(other for other in self.unused if other is not secrets)), secrets
        raise UpdateRefused("the task names a one-time key that this device has used or never had")


@dataclass(frozen=True)
class SecureTask:
    """One secure sum on a device, as far as it has come. Methods that return a `SecureTask` fix one thing more.

    `sealed` are the neighbours' shares for this device; `masked_digest` is of the update that its masks were used
    on.
    """

    circle: Circle
    secrets: Secrets
    roster: frozenset[str] | None = None
    sealed: Mapping[str, bytes] = field(default_factory=lambda: MappingProxyType({}))
    masked_digest: bytes = b""
    arrived: frozenset[str] | None = None

    def with_fixed(self, stored: SecureTask) -> SecureTask:
        """Return this task with all that is fixed in `stored`, the same sum as it is on the disk.

        Raises UpdateRefused where the two have fixed different things.
        """
        if (stored.circle.digest, stored.secrets) != (self.circle.digest, self.secrets):
            raise UpdateRefused("this round has another circle by now: a device takes one")
        for kind, fixed, told in (
            ("roster", stored.roster, self.roster),
            ("masked update", stored.masked_digest, self.masked_digest),
            ("question", stored.arrived, self.arrived),
        ):
            if fixed and told:
                self._same(kind, fixed, told)
        return replace(
            self,
            roster=stored.roster or self.roster,
            sealed=stored.sealed if stored.roster else self.sealed,
            masked_digest=stored.masked_digest or self.masked_digest,
            arrived=stored.arrived or self.arrived,
        )

    def sealed_shares(self) -> dict[str, bytes]:
        """Return the shares for each neighbour: the same ones each time."""
        return Participant(self.circle, self.secrets).sealed_shares()

    def with_roster(self, roster: AbstractSet[str], sealed: Mapping[str, bytes]) -> SecureTask:
        """Fix who has shared.

        Raises UpdateRefused for another roster than before, one of too few neighbours, and where too few of them
        were told the same task.
        """
        if self.roster is not None:
            self._same("roster", self.roster, roster)
            return self
        within = self.circle.within(roster)
        shares = {name: box for name, box in sealed.items() if name in within.neighbours}
        Participant(within, self.secrets).check_shares(shares)
        return replace(self, roster=frozenset(roster), sealed=MappingProxyType(shares))

    def masks(self, bits: int) -> Masks:
        """Return the masks, or raise UpdateRefused once an update is stored: a second one would tell both."""
        if self.masked_digest:
            raise UpdateRefused("the masks of this round are used: the update that has them is the only one")
        return self._participant.masks(bits)

    def with_masked(self, digest: bytes) -> SecureTask:
        """Fix the masked update, which has been stored. Raises UpdateRefused for another than before."""
        if self.masked_digest:
            self._same("masked update", self.masked_digest, digest)
        if self.roster is None:
            raise UpdateRefused("the roster of this round is not known yet")
        return replace(self, masked_digest=digest)

    def with_question(self, arrived: AbstractSet[str]) -> SecureTask:
        """Fix which updates count. Raises UpdateRefused for another question, or one not to be answered."""
        if self.arrived is not None:
            self._same("question", self.arrived, arrived)
            return self
        if not self.masked_digest:
            raise UpdateRefused("this device has sent no update in the round that it is asked about")
        asked = replace(self, arrived=frozenset(arrived))
        asked.confirmations()
        return asked

    def confirmations(self) -> dict[str, bytes]:
        """Return the proofs for the neighbours that this device was asked the question it has fixed."""
        return self._participant.confirmations(self.arrived or frozenset())

    def answer(self, confirmed: Mapping[str, bytes]) -> dict[str, bytes]:
        """Return the answer to the question that is fixed (see `Participant.answer`)."""
        return self._participant.answer(self.arrived or frozenset(), confirmed, self.sealed)

    @property
    def _participant(self) -> Participant:
        if self.roster is None:
            raise UpdateRefused("the roster of this round is not known yet")
        return Participant(self.circle.within(self.roster), self.secrets)

    def _same(self, kind: str, fixed: object, told: object) -> None:
        if fixed != told:
            raise UpdateRefused(f"this round has another {kind} by now: a device takes one")
