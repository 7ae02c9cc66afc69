"""Join tokens that an aggregator keeps: bounded in number, and in memory as they are in the store.

The rule: stored first, then known. A dead token stays for a month, so that its bearer is told why it is refused.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from fedgrpc.errors import Exhausted, NotFound, TokenRefused
from fedgrpc.identity.store import IdentityStore
from fedgrpc.identity.tokens import TokenRecord

# A server names all of its trust anchors in each handshake, where they have to fit into 64 KiB.
MAX_TOKENS: Final = 200
_KEEP_DEAD_S: Final = 30 * 86_400.0


class JoinTokens:
    """Join tokens of one fleet."""

    def __init__(self, store: IdentityStore, authorities: Collection[str]) -> None:
        """Read the tokens of these authorities, of all where there is none. Raises `StorageError`."""
        self._store = store
        # A kill between the end of an authority and the end of its tokens leaves some. They are not read.
        known = (each for each in store.tokens() if not authorities or each.authority in authorities)
        self._tokens = {token.id: token for token in known}

    def all(self) -> list[TokenRecord]:
        """Return every token."""
        return list(self._tokens.values())

    def shown(self, token_id: str) -> TokenRecord:
        """Return the token that a device shows. Raises `TokenRefused` where it was deleted."""
        if token_id not in self._tokens:
            raise TokenRefused(f"join token {token_id[:20]!r} was deleted; ask for a new one")
        return self._tokens[token_id]

    def add(self, record: TokenRecord, now: float) -> None:
        """Store a new token, in the place of dead ones if need be. Raises `Exhausted` and `StorageError`."""
        self._make_room(now)
        self._store.save(token=record)
        self.note(record)

    def note(self, record: TokenRecord) -> None:
        """Know a record that the store has."""
        self._tokens[record.id] = record

    def _make_room(self, now: float) -> None:
        dead = [each for each in self._tokens.values() if not each.is_live(now)]
        old = [each.id for each in dead if now >= each.expires_at + _KEEP_DEAD_S]
        if len(self._tokens) - len(old) >= MAX_TOKENS:
            if not dead:
                raise Exhausted(f"there are {MAX_TOKENS} join tokens; delete one with `fedgrpc token delete`")
            old += [min(dead, key=lambda each: each.expires_at).id]
        if old:
            self._store.forget_tokens(*old)
            for token_id in old:
                self._tokens.pop(token_id, None)

    def delete(self, token_id: str) -> TokenRecord:
        """Remove a token. Raises `NotFound` and `StorageError`."""
        if token_id not in self._tokens:
            raise NotFound(f"there is no join token {token_id[:20]!r}")
        self._store.forget_tokens(token_id)
        return self._tokens.pop(token_id)

    def end_with(self, authority: str) -> list[str]:
        """Let the tokens of an authority that is trusted no more admit nobody. Return their ids, still stored."""
        ended = [each.id for each in self._tokens.values() if each.authority == authority]
        for token_id in ended:
            del self._tokens[token_id]
        return ended
