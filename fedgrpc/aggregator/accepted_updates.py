"""The accepted updates of a round, as their files have them.

The rule: nothing goes into a version that has changed on the disk since it was accepted. An error in the data of
one update names that update.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.update_checks import norm_of
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import NotFinite, StorageError, UnusableUpdate, blaming
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.merge import Merge, Weighing
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.submodels.channels import KeptChannels


class AcceptedUpdates:
    """Reads the updates of `journal` for a commit."""

    def __init__(self, journal: UploadJournal, models: ModelStore, local_models: LocalModels) -> None:
        self._journal = journal
        self._models = models
        self._local_models = local_models

    def load(self, token: str) -> StoredUpdate:
        """Return the accepted update of that token. Raises `StorageError`."""
        update = self._journal.load(token)
        if update is None:
            raise StorageError("an accepted update is gone from the data folder")
        return update

    async def merge(
        self, round_: RoundInProgress, tokens: Sequence[str], weighing: Weighing, layout: Layout
    ) -> Merge:
        """Return what a commit of these updates averages. Raises as `Weighing.merge`, and as reading them does."""
        sub_models: Mapping[str, KeptChannels | None] = {}
        norms: Mapping[str, float] = {}
        if round_.kind is TaskKind.TRAIN:
            sub_models = self._sub_models(round_, tokens)
            if weighing.clip_norm is not None:
                norms = await asyncio.to_thread(self._norms, tokens, sub_models, layout)
        return weighing.merge(round_, tokens, sub_models, norms)

    def _sub_models(self, round_: RoundInProgress, tokens: Iterable[str]) -> dict[str, KeptChannels | None]:
        """Return the channels of partial updates, by token. Raises as `LocalModels.kept_channels`."""
        local_tasks = {token: round_.local_task(token) for token in tokens}
        return {
            token: self._local_models.kept_channels(local.sub_model, round_.version_of(token))
            for token, local in local_tasks.items()
            if not local.plain
        }

    def _norms(
        self, tokens: Iterable[str], sub_models: Mapping[str, KeptChannels | None], layout: Layout
    ) -> dict[str, float]:
        norms = {}
        for token in tokens:
            with blaming(token):
                norms[token] = norm_of(self.load(token), layout, token not in sub_models, sub_models.get(token))
        return norms

    def check(self, round_: RoundInProgress, tokens: Iterable[str]) -> None:
        """Check the files of a commit.

        Raises `UnusableUpdate` for an update that has changed on the disk, and `StorageError` for the base.
        """
        for token in tokens:
            with blaming(token):
                self.load(token).check()
        if round_.kind is not TaskKind.INITIALIZE:
            self._models.check(round_.base_version)

    def blamed(self, error: NotFinite, merge: Merge) -> UnusableUpdate | NotFinite:
        """Return whose fault it is that a tensor is not finite: of those who add to it, the one that adds most.

        One tensor is read at a time. Without anybody to blame, returns the error itself.
        """
        most = {
            token: factor * _largest(self.load(token), error.tensor) for token, factor in merge.factors.items()
        }
        token = max(most, key=lambda each: most[each], default=None)
        if token is None or not most[token] > 0:
            return error
        return UnusableUpdate(f"{error}; this update adds most", token=token)


def _largest(update: StoredUpdate, tensor: str) -> float:
    with update.open() as reader:
        if tensor not in reader.names:
            return 0.0
        values = reader.tensor(tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.nan_to_num(np.abs(values.astype(np.float64)), nan=np.inf).max(initial=0.0))
