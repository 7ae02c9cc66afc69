"""The new version that a round makes of the updates it has accepted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.blame import blaming, most_to_blame
from fedgrpc.aggregator.commit import Commit as CommitFiles
from fedgrpc.aggregator.commit import Formats
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.local_models import LocalModels
from fedgrpc.aggregator.scales import scales_of
from fedgrpc.aggregator.scores import scores_of
from fedgrpc.aggregator.update_checks import norm_of
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import NotFinite, NotFound, StorageError, UnusableUpdate, UpdateRefused
from fedgrpc.protocol.tensors import channels_from_proto
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.rounds.version import Version
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.runs.weights import shared
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.submodels.channels import KeptChannels

_NO_SCORES: Mapping[str, float] = MappingProxyType({})


class NewVersion:
    """Computes versions from update files, and writes them beside the old ones."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._run = coordinator.machine
        self._models = coordinator.models
        self._local_models = coordinator.local_models
        self._journal = coordinator.journal
        self._settings = coordinator.settings
        self._optimizer = server_optimizer(self._settings.server_optimizer, self._settings.server_learning_rate)

    @property
    def clips_buffers(self) -> bool:
        """Whether no update alone takes a buffer beyond what others say: a bound on norms is none on buffers."""
        return self._coordinator.instructions.clip_norm is not None or self._settings.max_update_norm is not None

    def weights(self, round_: RoundInProgress, tokens: tuple[str, ...]) -> dict[str, float]:
        """The weight of each update. Raises `UpdateRefused` when there is none at all."""
        weighing = self._coordinator.weighing
        workers = {token: task.worker for token, task in round_.state.tasks.items()}
        here = frozenset(workers.values())
        weights = {
            token: weighing.weight_of(round_.kind, workers[token], round_.report(token), here) for token in tokens
        }
        if not sum(weights.values()) > 0:
            raise UpdateRefused("the weights of all accepted updates are zero")
        counts = {token: weighing.workers(round_.report(token)) for token in tokens}
        return shared(weights, workers, counts, self._settings.policy.max_share)

    async def scales(self, round_: RoundInProgress, weights: dict[str, float]) -> dict[str, float]:
        """The factor on each update. Raises as `scales_of`, and as reading an update does."""
        norms: dict[str, float] = {}
        if self._coordinator.instructions.clip_norm is not None and round_.kind is TaskKind.TRAIN:
            norms = await asyncio.to_thread(self._norms, round_, list(weights))
        return scales_of(self._settings, self._coordinator.instructions, round_, weights, norms)

    def _norms(self, round_: RoundInProgress, tokens: Iterable[str]) -> dict[str, float]:
        sub_models, layout = sub_models_of(self._local_models, round_, tokens), self._run.layout
        norms = {}
        for token in tokens:
            with blaming(token):
                norms[token] = norm_of(self.load(token), layout, token not in sub_models, sub_models.get(token))
        return norms

    async def write(self, round_: RoundInProgress, weights: dict[str, float], scales: dict[str, float]) -> Version:
        """Return the new version, durable.

        Raises `StorageError`, `UnusableUpdate` for an update that is to be left out, and `UpdateRefused` when no
        update in particular is to blame.
        """
        await asyncio.to_thread(self.check, round_, list(weights))
        number = round_.base_version + 1
        path = self._models.path(number)
        if round_.kind is TaskKind.INITIALIZE:
            token = next(iter(weights))
            update = self.load(token)
            if update.header.HasField("channels"):
                learn = self._local_models.learn
                with blaming(token):
                    told = channels_from_proto(update.header.channels)
                await asyncio.to_thread(learn, told, update.manifest.layout)
            about = about_version(self._settings.run_name, round_.state.number, number)
            with blaming(token):
                digest = await asyncio.to_thread(_write_values, path, update, about)
        else:
            base = self._models.open(round_.base_version)
            optimizer_state = self._models.open_optimizer_state(round_.base_version)
            sub_models, merged = sub_models_of(self._local_models, round_, weights), merged_of(round_, weights)
            files = CommitFiles(
                base,
                optimizer_state,
                self._optimizer,
                list(weights.items()),
                self.load,
                self._models.recycled,
                sub_models,
                merged,
                scales,
                self._formats(round_, weights),
                self._about(round_, number, weights),
                round_.keeps,
                self.clips_buffers,
            )
            try:
                digest = await asyncio.to_thread(files.write, path, self._models.optimizer_state_path(number))
            except NotFinite as error:
                raise await asyncio.to_thread(self.blamed, error, weights, scales) from error
        model = self._models.open(number)
        norm = await asyncio.to_thread(model.norm)
        if round_.kind is TaskKind.INITIALIZE:
            first = await asyncio.to_thread(model.content_digest)
            return Version(number, round_.state.number, digest, 0, norm, first_model=first)
        before, elements = self._run.versions.last, sum(spec.size for spec in model.layout)
        return Version(
            number,
            round_.state.number,
            digest,
            self._run.trained + 1,
            norm,
            self._run.versions.norm_jump(norm, elements),
            first_model=before.first_model if before else b"",
        )

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
        about = about_version(self._settings.run_name, round_number, number, known.scores)
        tensors = (model.tensor(index) for index in range(len(model.layout)))
        return write_model(self._models.path(number), model.layout, tensors, about)

    def _about(self, round_: RoundInProgress, number: int, weights: Mapping[str, float]) -> dict[str, str]:
        """The metadata of a version, with what this round says of the one before. Computed again, it is equal."""
        scores = scores_of(round_, weights, self._coordinator.weighing, self._settings.policy.max_share)
        return about_version(self._settings.run_name, round_.state.number, number, scores.metrics)

    def _formats(self, round_: RoundInProgress, tokens: Iterable[str]) -> dict[str, Formats]:
        """Of the updates whose say falls with the noise of their formats."""
        if not self._settings.precision_weights:
            return {}
        plans = {token: round_.local_task(token).plan for token in tokens}
        return {
            token: Formats(plan, round_.report(token).steps)
            for token, plan in plans.items()
            if plan.arithmetic is not None or plan.quantization is not None
        }

    def blamed(
        self, error: NotFinite, weights: Mapping[str, float], scales: Mapping[str, float]
    ) -> UnusableUpdate | NotFinite:
        """Whose fault it is: of those who add to the tensor, the one that adds most."""
        factors = [(token, weight * scales.get(token, 1.0)) for token, weight in weights.items()]
        token = most_to_blame(error.tensor, factors, self.load)
        return error if token is None else UnusableUpdate(f"{error}; this update adds most", token=token)

    def check(self, round_: RoundInProgress, tokens: Iterable[str]) -> None:
        """Nothing goes into a version that has changed on the disk since it was accepted, or written.

        Raises `UnusableUpdate` for an update, and `StorageError` for the version itself.
        """
        for token in tokens:
            with blaming(token):
                self.load(token).check()
        if round_.kind is not TaskKind.INITIALIZE:
            self._models.check(round_.base_version)

    def load(self, token: str) -> StoredUpdate:
        """The accepted update of that token. Raises `StorageError`."""
        update = self._journal.load(token)
        if update is None:
            raise StorageError("an accepted update is gone from the data folder")
        return update


def sub_models_of(
    local_models: LocalModels, round_: RoundInProgress, tokens: Iterable[str]
) -> dict[str, KeptChannels | None]:
    """Return the channels of the updates of sub-models, by token. Raises as `LocalModels.kept_channels`."""
    local_tasks = {token: round_.local_task(token) for token in tokens}
    return {
        token: local_models.kept_channels(local.sub_model, round_.version_of(token))
        for token, local in local_tasks.items()
        if not local.plain
    }


def merged_of(round_: RoundInProgress, tokens: Iterable[str]) -> dict[str, float]:
    """What the updates that are means themselves say that they weigh."""
    reports = {token: round_.report(token) for token in tokens}
    return {token: report.weight for token, report in reports.items() if report.merged_updates}


def about_version(
    run: str, round_number: int, version: int, scores: Mapping[str, float] = _NO_SCORES
) -> dict[str, str]:
    """The metadata of a model's file. `scores` are those of the version that it began from: its own come later."""
    about = {"run": run, "round": str(round_number), "version": str(version)}
    return about | ({"base_scores": json.dumps(dict(scores), sort_keys=True)} if scores else {})


def _write_values(path: Path, update: StoredUpdate, about: Mapping[str, str]) -> bytes:
    with update.open() as reader:
        return write_model(path, update.manifest.layout, (values for _, values in reader), about)
