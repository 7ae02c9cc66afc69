"""New version of a round: the updates that the round has accepted, and the files that are made of them.

The rule: nothing goes into a version that has changed on the disk since it was accepted. An error in the data of
one update names that update.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fedgrpc.aggregation.robust.aggregation import Aggregation
from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.commit import ModelCommit, Noise
from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.protected_layouts import complaint
from fedgrpc.aggregator.robust_merge import judged
from fedgrpc.aggregator.secure_sums import BOUNDS, bounds_text, unmasked_sum
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.update_checks import norm_of
from fedgrpc.algorithms.registry import algorithm_of
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import NotFinite, NotFound, StorageError, UnusableUpdate, UpdateRefused, blaming
from fedgrpc.protocol.tensors import channels_from_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.version import Version
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.secure_sum import SecureSum
from fedgrpc.runs.weighing import Weighing
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.submodels.channels import KeptChannels

_NO_SCORES: Mapping[str, float] = MappingProxyType({})


class AcceptedUpdates:
    """Reads the updates of `journal` for a commit."""

    def __init__(
        self,
        journal: UploadJournal,
        models: ModelStore,
        local_models: LocalModels,
        aggregation: Aggregation | None = None,
    ) -> None:
        """`aggregation` None is the weighted mean."""
        self._journal = journal
        self._aggregation = aggregation
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
        if round_.secure is not None:
            # Devices have clipped and weighed their updates themselves.
            weighing = replace(weighing, clip_norm=None, max_examples=None)
        if round_.kind is TaskKind.TRAIN:
            sub_models = self._sub_models(round_, tokens)
            if weighing.needs_norms:
                norms = await asyncio.to_thread(self._norms, tokens, sub_models, layout)
        merge = weighing.merge(round_, tokens, sub_models, norms)
        if round_.secure is not None:
            means, summed = await asyncio.to_thread(self._sum, round_.secure, tokens, weighing)
            return replace(merge, means=means, summed=summed)
        if round_.kind is not TaskKind.TRAIN or self._aggregation is None:
            return merge
        return await asyncio.to_thread(judged, self._aggregation, merge, self.load, layout)

    def _sum(
        self, sum_: SecureSum, tokens: Sequence[str], weighing: Weighing
    ) -> tuple[dict[str, np.ndarray], float]:
        """Return the means of a secure sum, and the examples that they weigh."""
        total, vector = unmasked_sum(sum_, tokens, self.load), sum_.vector
        if vector.norm is None:
            return vector.means(total), vector.examples(total)
        return vector.shares(total, len(tokens), weighing.cohort or len(tokens)), vector.examples(total)

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

    def check(self, round_: RoundInProgress, tokens: Iterable[str], versions: Iterable[int] = ()) -> None:
        """Check the files of a commit.

        Raises `UnusableUpdate` for an update that has changed on the disk, and `StorageError` for the base and
        other `versions`.
        """
        for token in tokens:
            with blaming(token):
                self.load(token).check()
        for version in versions:
            self._models.check(version)
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


class NewVersion:
    """Writes versions of `run` from update files, beside the old ones."""

    def __init__(
        self,
        run: RunMachine,
        settings: AggregatorSettings,
        updates: AcceptedUpdates,
        models: ModelStore,
        local_models: LocalModels,
    ) -> None:
        self._run = run
        self._settings = settings
        self._updates = updates
        self._models = models
        self._local_models = local_models
        self._optimizer = server_optimizer(settings.server_optimizer, settings.server_learning_rate)

    async def write(self, round_: RoundInProgress, merge: Merge, noise: Noise | None = None) -> Version:
        """Return the new version, durable. `noise` is as in `ModelCommit`.

        Raises `StorageError`, `UnusableUpdate` for an update that is to be left out, and `UpdateRefused` when no
        update in particular is to blame.
        """
        number = round_.base_version + 1
        # Scores of the version before. Computed again, they are equal, and so is the file.
        about = self._about(round_.number, number, merge.scores.metrics)
        if merge.means is not None and noise is None:
            assert self._settings.clip_norm is not None
            about[BOUNDS] = bounds_text(merge.means, self._settings.clip_norm)
        if round_.kind is TaskKind.INITIALIZE:
            await asyncio.to_thread(self._updates.check, round_, merge.weights)
            return await self._begin(round_, next(iter(merge.weights)), about)
        digest, norm = await asyncio.to_thread(self._commit, round_, merge, noise, about)
        before, elements = self._run.versions.last, sum(spec.size for spec in self._run.layout)
        return Version(
            number,
            round_.number,
            digest,
            self._run.trained + 1,
            norm,
            self._run.versions.norm_jump(norm, elements),
            first_model=before.first_model if before else b"",
        )

    def _commit(
        self, round_: RoundInProgress, merge: Merge, noise: Noise | None, about: Mapping[str, str]
    ) -> tuple[bytes, float]:
        """Write the files of the version; return the model's SHA-256 and its norm. Blocks. Raises as `write`."""
        self._updates.check(round_, merge.weights, merge.mixed.values())
        models, base, number = self._models, round_.base_version, round_.base_version + 1
        files = ModelCommit(
            models.open(base),
            models.open_optimizer_state(base),
            self._optimizer,
            merge,
            self._updates.load,
            models.recycled,
            about,
            algorithm_of(self._settings.plan.algorithm).optimizers(self._optimizer, merge.workers),
            noise,
            [(merge.share(token), models.open(version)) for token, version in merge.mixed.items()],
        )
        try:
            digest = files.write(models.path(number), models.optimizer_state_path(number))
        except NotFinite as error:
            raise self._updates.blamed(error, merge) from error
        return digest, models.open(number).norm()

    def _about(self, round_number: int, version: int, scores: Mapping[str, float]) -> dict[str, str]:
        # Scores have no noise: the file of a version that has some goes without.
        told = _NO_SCORES if self._settings.privacy.on else scores
        return about_version(self._settings.run_name, round_number, version, told)

    async def _begin(self, round_: RoundInProgress, token: str, about: Mapping[str, str]) -> Version:
        """Write the first model as one worker sent it."""
        update, number = self._updates.load(token), round_.base_version + 1
        if update.header.HasField("channels"):
            with blaming(token):
                told = channels_from_proto(update.header.channels)
            await asyncio.to_thread(self._local_models.learn, told, update.manifest.layout)
        with blaming(token):
            digest = await asyncio.to_thread(_write_values, self._models.path(number), update, about)
        model = self._models.open(number)
        private, secure = self._settings.privacy.on, self._settings.secure.on
        if unfit := complaint(model.layout, private=private, secure=secure):
            raise UpdateRefused(unfit)
        norm, first = await asyncio.to_thread(model.norm), await asyncio.to_thread(model.content_digest)
        return Version(number, round_.number, digest, 0, norm, first_model=first)

    async def roll_back(self, wanted: int, round_number: int) -> tuple[Version, Layout]:
        """A new version that is a copy of a kept one, or (0) holds no model; only its file is durable yet.

        The server optimizer remembers nothing of it. Raises `NotFound` and `StorageError`.
        """
        number = self._run.version + 1
        if not wanted:
            await asyncio.to_thread(self._local_models.forget)
            return Version(number, round_number, b""), ()
        known = self._run.versions.get(wanted)
        if known is None:
            raise NotFound(f"model version {wanted} is not kept")
        model = self._models.open(wanted)
        digest = await asyncio.to_thread(self._copy, model, known, number, round_number)
        version = replace(known, version=number, round=round_number, sha256=digest, rolled_back_to=wanted)
        return version, model.layout

    def _copy(self, model: ModelFile, known: Version, number: int, round_number: int) -> bytes:
        if model.sha256() != known.sha256:
            raise StorageError(f"the model {model.path} is corrupt: its SHA-256 is not the one recorded")
        # A round that was cut off may have left what its optimizer would have remembered.
        self._models.optimizer_state_path(number).unlink(missing_ok=True)
        about = self._about(round_number, number, known.scores)
        tensors = (model.tensor(index) for index in range(len(model.layout)))
        return write_model(self._models.path(number), model.layout, tensors, about)


def about_version(
    run: str, round_number: int, version: int, scores: Mapping[str, float] = _NO_SCORES
) -> dict[str, str]:
    """The metadata of a model's file. `scores` are those of the version that it began from: its own come later."""
    about = {"run": run, "round": str(round_number), "version": str(version)}
    return about | ({"base_scores": json.dumps(dict(scores), sort_keys=True)} if scores else {})


def _write_values(path: Path, update: StoredUpdate, about: Mapping[str, str]) -> bytes:
    with update.open() as reader:
        return write_model(path, update.manifest.layout, (values for _, values in reader), about)
