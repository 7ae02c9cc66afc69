"""What survives the kill of a simulated aggregator. Each method is one atomic, durable write."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from fedgrpc.privacy.ledger import PrivateRelease
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.round import Round, follow
from tests.simulator.messages import UpdateId


@dataclass(frozen=True)
class Row:
    """A task as it is stored."""

    token: str
    round: int
    worker: str
    phase: TaskPhase
    reason: str = ""
    staleness: int = 0


@dataclass(frozen=True)
class OpenRound:
    """A round in progress; `deadline_at` is wall time, seconds."""

    number: int
    aim: int
    deadline_at: float
    granted_s: float = 0.0


@dataclass(frozen=True)
class Upload:
    """The file of one update; `sealed` once it is verified and durable."""

    update: UpdateId
    total: int
    held: int = 0
    sealed: bool = False


@dataclass(frozen=True)
class Version:
    """A committed model version, and the updates that are in it."""

    version: int
    round: int
    tokens: tuple[str, ...]
    updates: tuple[UpdateId, ...]


@dataclass
class Disk:
    """One data folder."""

    last_number: int = 0
    open: OpenRound | None = None
    rows: dict[str, Row] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    versions: list[Version] = field(default_factory=list)
    releases: list[PrivateRelease] = field(default_factory=list)

    @property
    def version(self) -> int:
        return self.versions[-1].version if self.versions else 1

    def rows_of(self, number: int) -> list[Row]:
        """Tasks of a round, by slot."""
        return [row for row in self.rows.values() if row.round == number]

    def save_open(self, round_: Round, wall_deadline_at: float) -> None:
        """Open a round with its tasks, or add tasks to it; carried ones that were lost since are gone."""
        for row in self.rows_of(round_.number):
            if row.token not in round_.tasks:
                del self.rows[row.token]
        self.open = OpenRound(round_.number, round_.aim, wall_deadline_at, round_.granted_s)
        self._save_rows(round_)

    def append(self, token: str, update: UpdateId, total: int) -> int:
        """Keep one more chunk; returns how many are held."""
        upload = self.uploads.get(token) or Upload(update, total)
        self.uploads[token] = replace(upload, held=upload.held + 1)
        return upload.held + 1

    def seal(self, token: str) -> None:
        """From now on the update is accepted, whatever happens to the process."""
        self.uploads[token] = replace(self.uploads[token], sealed=True)

    def discard(self, tokens: Iterable[str]) -> None:
        """Remove the files of these updates."""
        for token in tokens:
            self.uploads.pop(token, None)

    def keep_only(self, tokens: Collection[str]) -> None:
        """Remove the files of all others."""
        self.discard([token for token in self.uploads if token not in tokens])

    def finish(self, round_: Round, version: Version | None) -> None:
        """Close a round, with the version it wrote, all or nothing; carried tasks are then the next round's."""
        self._save_rows(round_)
        after, _ = follow(round_, round_.number + 1, round_.policy, round_.opened_at)
        for token in after.tasks:
            del self.rows[token]
        self._save_rows(after)
        self.open = None
        self.last_number = max(self.last_number, round_.number)
        if version is not None:
            self.versions.append(version)

    def enter(self, release: PrivateRelease) -> None:
        """Keep one more entry of the ledger."""
        self.releases.append(release)

    def _save_rows(self, round_: Round) -> None:
        for token, task in round_.tasks.items():
            self.rows[token] = Row(token, round_.number, task.worker, task.phase, task.reason, task.staleness)
