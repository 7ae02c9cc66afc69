"""Members and join tokens in SQLite, in the data folder and beside all runs: nothing of a device belongs to a run.

The rule: a change is here before anybody is told. Everything blocks; one caller at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedgrpc.identity.certificates import load_certificate, pem_of
from fedgrpc.identity.members import Member, MemberState
from fedgrpc.identity.roles import Role
from fedgrpc.identity.tokens import TokenRecord
from fedgrpc.storage.database import Database, database_errors

DATABASE: Final = "identity.sqlite"
_VERSION: Final = 2
_SCHEMA: Final = """
CREATE TABLE members (
    name TEXT PRIMARY KEY, role TEXT NOT NULL, key_sha256 BLOB NOT NULL, state INTEGER NOT NULL,
    joined_at REAL NOT NULL, expires_at REAL NOT NULL, why TEXT NOT NULL, tags TEXT NOT NULL,
    token TEXT NOT NULL, authority TEXT NOT NULL) STRICT;
CREATE TABLE tokens (
    id TEXT PRIMARY KEY, anchor BLOB NOT NULL, role TEXT NOT NULL, expires_at REAL NOT NULL,
    uses_left INTEGER NOT NULL, names TEXT NOT NULL, tags TEXT NOT NULL, needs_approval INTEGER NOT NULL,
    authority TEXT NOT NULL) STRICT;
"""


class IdentityStore(Database):
    """Records of members and tokens. Every method may raise `StorageError`."""

    def __init__(self, path: Path) -> None:
        """Open the database at `path`. Raises `UsageError` for one of another version of the schema."""
        super().__init__(path, schema=_SCHEMA, version=_VERSION)

    def members(self) -> list[Member]:
        """Read every member, in the order of joining."""
        columns = "name, role, key_sha256, state, joined_at, expires_at, why, tags, token, authority"
        rows = self._all(f"SELECT {columns} FROM members ORDER BY joined_at, name")
        with database_errors(self.path):
            return [
                Member(name, Role(role), key, MemberState(state), joined, expires, why, tuple(tags.split()), *last)
                for name, role, key, state, joined, expires, why, tags, *last in rows
            ]

    def tokens(self) -> list[TokenRecord]:
        """Read every token, those that expire first in front."""
        columns = "id, anchor, role, expires_at, uses_left, names, tags, needs_approval, authority"
        rows = self._all(f"SELECT {columns} FROM tokens ORDER BY expires_at, id")
        with database_errors(self.path):
            return [
                TokenRecord(
                    *(token_id, load_certificate(anchor), Role(role), expires_at, uses_left, names),
                    *(tuple(tags.split()), bool(needs_approval), authority),
                )
                for token_id, anchor, role, expires_at, uses_left, names, tags, needs_approval, authority in rows
            ]

    def save(self, member: Member | None = None, token: TokenRecord | None = None, former_name: str = "") -> None:
        """Store a member, in place of the one of its former name, and a token; all or nothing."""
        with self._transaction():
            if former_name:
                self._db.execute("DELETE FROM members WHERE name = ?", (former_name,))
            if member is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(member.name, member.role.value, member.key_sha256, member.state.value),
                        *(member.joined_at, member.expires_at, member.why, " ".join(member.tags), member.token),
                        member.authority,
                    ),
                )
            if token is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        *(token.id, pem_of(token.anchor), token.role.value, token.expires_at, token.uses_left),
                        *(token.names, " ".join(token.tags), int(token.needs_approval), token.authority),
                    ),
                )

    def forget_member(self, name: str) -> None:
        """Remove a member."""
        with self._transaction():
            self._db.execute("DELETE FROM members WHERE name = ?", (name,))

    def forget_tokens(self, *ids: str) -> None:
        """Remove tokens."""
        with self._transaction():
            self._db.executemany("DELETE FROM tokens WHERE id = ?", [(each,) for each in ids])
