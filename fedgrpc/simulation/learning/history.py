"""The history of a simulation: one line for each round, and where its devices stood after it.

The rule: a line is written once the tasks of its round are over, and only then does the database keep the round.
So nothing that happens is left out between the line and the next round, but for tasks that are carried over. A
line whose round is not in the database is dropped, also half a line. Scores come with the version that they are
of, perhaps after its line: they are read from the aggregator's own records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from fedgrpc.errors import UnknownWorker, UsageError
from fedgrpc.rounds.events import TaskPhase
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.simulation.learning.world import Tally, World
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore


@dataclass(frozen=True)
class RoundRow:
    """One round. Times in virtual seconds since the start; bytes, seconds and tasks are of all rounds so far.

    `sha256` is of the file of the version, `workers` are those whose updates it has. `cpu_s` are real seconds.
    """

    round: int
    kind: str
    committed: bool
    version: int
    sha256: str
    virtual_s: float
    duration_s: float
    workers: tuple[str, ...]
    loss: float | None
    down_bytes: int
    up_bytes: int
    trained_s: float
    wasted_s: float
    cpu_s: float
    tasks: int
    accepted: int


class History:
    """The rounds of a simulation in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        """Read what a former process has written.

        Raises `UsageError` for a file that is none, or that lacks a round, and `StorageError`.
        """
        self._path = path
        self.rows: list[RoundRow] = []
        # Where everybody stood after the last of them.
        self._state: dict[str, Any] = {}
        # Of the lines that count; the next one goes there.
        self._size_bytes = 0
        ended = self._recorded()
        if path.exists() and ended is not None:
            self._read(ended)
        if ended != (self.rows[-1].round if self.rows else None):
            raise UsageError(
                f"{path} cannot be resumed: it does not have round {ended}, the last one that the aggregator "
                "has recorded; begin again in another folder"
            )

    def _read(self, ended: int) -> None:
        """Read the lines up to that of round `ended`. One more may follow: of a round that is played again."""
        try:
            for line in self._path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    return
                values = json.loads(line)
                self._state = values.pop("state")
                self.rows.append(RoundRow(**{**values, "workers": tuple(values["workers"])}))
                self._size_bytes += len(line)
                if values["round"] == ended:
                    return
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"{self._path} is no history of a simulation: {error}") from error

    def _recorded(self) -> int | None:
        """Return the last round that the aggregator has recorded; None where there is none."""
        # To write: what a kill has left half made, of a table or of a transaction, is put right first.
        with self._store(read_only=False) as store:
            last = None if store is None else store.round()
        return None if last is None else last.number

    @contextmanager
    def _store(self, *, read_only: bool = True) -> Iterator[RunStore | None]:
        """Open the aggregator's records; None where there are none. Raises `StorageError`."""
        database = self._path.parent / "run" / DATABASE
        if not database.exists():
            yield None
            return
        store = RunStore(database, read_only=read_only)
        try:
            yield store
        finally:
            store.close()

    @property
    def virtual_s(self) -> float:
        """Virtual time at the end of the last round, seconds."""
        return self.rows[-1].virtual_s if self.rows else 0.0

    @property
    def abandoned(self) -> int:
        """Number of the last rounds in a row that were abandoned."""
        return len(list(takewhile(lambda row: not row.committed, reversed(self.rows))))

    def restore(self, world: World) -> None:
        """Take a new world to where the last round has left the former one. Raises `UsageError`."""
        world.restore_files(self.rows[-1].round if self.rows else None)
        if not self.rows:
            return
        if (seed := self._state.get("seed")) != world.seed:
            raise UsageError(
                f"{self._path} was begun with seed {seed}, not {world.seed}: resume with that seed, "
                "or name another folder with --out"
            )
        try:
            world.restore(self._state)
        except (ValueError, TypeError, KeyError, UnknownWorker) as error:
            raise UsageError(f"{self._path} is of other devices: {error}") from error
        last = self.rows[-1]
        world.tally = Tally(**{name: getattr(last, name) for name in asdict(world.tally)})

    def add(self, world: World, round_: RoundInProgress) -> RoundRow:
        """Note a round that has ended. Raises OSError."""
        state, run, now = round_.state, world.aggregator.run, world.clock()
        committed = state.phase is RoundPhase.COMMITTED
        last = run.versions.last
        accepted = [task.worker for task in state.tasks.values() if task.phase is TaskPhase.ACCEPTED]
        row = RoundRow(
            round=round_.number,
            kind=round_.kind.name.lower(),
            committed=committed,
            version=run.version,
            sha256="" if last is None else last.sha256.hex(),
            virtual_s=now,
            duration_s=now - state.opened_at,
            workers=tuple(accepted) if committed else (),
            loss=_loss(round_.training_metrics) if round_.kind is TaskKind.TRAIN else None,
            **asdict(world.tally),
        )
        self.rows.append(row)
        line = json.dumps({**asdict(row), "state": world.state()}).encode() + b"\n"
        with self._path.open("ab") as file:
            file.truncate(self._size_bytes)
            file.write(line)
        self._size_bytes += len(line)
        return row

    def scores(self) -> dict[int, dict[str, float]]:
        """Return the scores of each version on all held-out data, from the aggregator's records.

        Raises `StorageError`.
        """
        with self._store() as store:
            if store is None:
                return {}
            records, _ = store.rounds(1 << 62, 1 << 31)
        return {each.committed_version: dict(each.evaluator_metrics) for each in records if each.evaluator_metrics}


def _loss(metrics: Mapping[str, float]) -> float | None:
    return metrics.get("train_loss", metrics.get("loss"))
