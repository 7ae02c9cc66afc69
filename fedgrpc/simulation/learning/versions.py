"""Versions of a simulation as a tidy table: when each was there, what it had cost, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedgrpc.simulation.learning.history import History


@dataclass(frozen=True)
class VersionRow:
    """One version. Hours are virtual, bytes and hours of training are of all that was done until then.

    `scores` are those on all held-out data; empty where it was not scored. `wasted_share` is that of the training
    whose updates no version has.
    """

    version: int
    round: int
    virtual_h: float
    round_s: float
    updates: int
    down_bytes: int
    up_bytes: int
    trained_h: float
    wasted_share: float
    loss: float | None
    scores: Mapping[str, float]

    @property
    def score(self) -> float | None:
        """Accuracy where there is one, else the first score that is no loss."""
        others = [value for name, value in sorted(self.scores.items()) if name != "loss"]
        return self.scores.get("accuracy", others[0] if others else None)

    def to_dict(self) -> dict[str, Any]:
        """Return one value by column."""
        values = asdict(self)
        scores, loss = values.pop("scores"), values.pop("loss")
        return {**values, "train_loss": loss, **{f"eval_{name}": scores[name] for name in sorted(scores)}}


def version_rows(history: History) -> list[VersionRow]:
    """Return the versions of a simulation, oldest first. Raises `StorageError`."""
    scores = history.scores()
    rows: list[VersionRow] = []
    before = 0
    for row in history.rows:
        if not row.committed or row.version == before:
            continue
        before = row.version
        rows.append(
            VersionRow(
                version=row.version,
                round=row.round,
                virtual_h=row.virtual_s / 3600,
                round_s=row.duration_s,
                updates=len(row.workers),
                down_bytes=row.down_bytes,
                up_bytes=row.up_bytes,
                trained_h=row.trained_s / 3600,
                wasted_share=row.wasted_s / row.trained_s if row.trained_s else 0.0,
                loss=row.loss,
                scores=scores.get(row.version, {}),
            )
        )
    return rows
