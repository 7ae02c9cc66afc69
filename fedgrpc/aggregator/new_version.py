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
from fedgrpc.aggregator.norms import content_digest, model_norm, norm_of
from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.aggregator.scales import scales_of
from fedgrpc.aggregator.scores import scores_of
from fedgrpc.aggregator.weights import shared
from fedgrpc.codec.layout import Layout
from fedgrpc.errors import NotFinite, NotFound, StorageError, UnusableUpdate, UpdateRefused
from fedgrpc.rounds.version import Version
from fedgrpc.storage.model_file import ModelFile, write_model
from fedgrpc.storage.update_file import StoredUpdate
from fedgrpc.submodels.channels import KeptChannels
from fedgrpc.v1.round_pb2 import TASK_KIND_INITIALIZE, TASK_KIND_TRAIN

_NO_SCORES: Mapping[str, float] = MappingProxyType({})


class NewVersion:
    """Computes versions from update files, and writes them beside the old ones."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._it = coordinator
        self._settings = coordinator.settings
        self._optimizer = server_optimizer(self._settings.server_optimizer, self._settings.server_learning_rate)

    @property
    def clips_buffers(self) -> bool:
        """Whether no update alone takes a buffer beyond what others say: a bound on norms is none on buffers."""
        return self._it.instructions.clip_norm is not None or self._settings.max_update_norm is not None

    def weights(self, current: CurrentRound, tokens: tuple[str, ...]) -> dict[str, float]:
        """The weight of each update. Raises `UpdateRefused` when there is none at all."""
        reports, weighing = current.reports, self._it.weighing
        workers = {token: task.worker for token, task in current.state.tasks.items()}
        here = frozenset(workers.values())
        weights = {
            token: weighing.weight_of(current.kind, workers[token], reports[token], here) for token in tokens
        }
        if not sum(weights.values()) > 0:
            raise UpdateRefused("the weights of all accepted updates are zero")
        counts = {token: weighing.workers(reports[token]) for token in tokens}
        return shared(weights, workers, counts, self._settings.policy.max_share)

    async def scales(self, current: CurrentRound, weights: dict[str, float]) -> dict[str, float]:
        """The factor on each update. Raises as `scales_of`, and as reading an update does."""
        it = self._it
        norms: dict[str, float] = {}
        if it.instructions.clip_norm is not None and current.kind == TASK_KIND_TRAIN:
            norms = await asyncio.to_thread(self._norms, current, list(weights))
        return scales_of(self._settings, it.instructions, current, weights, norms)

    def _norms(self, current: CurrentRound, tokens: Iterable[str]) -> dict[str, float]:
        sub_models, layout = sub_models_of(self._it, current, tokens), self._it.run.layout
        norms = {}
        for token in tokens:
            with blaming(token):
                norms[token] = norm_of(self.load(token), layout, token not in sub_models, sub_models.get(token))
        return norms

    async def write(self, current: CurrentRound, weights: dict[str, float]) -> Version | None:
        """The new version, durable; None where no version is made here.

        Raises `StorageError`, `UnusableUpdate` for an update that is to be left out, and `UpdateRefused` when no
        update in particular is to blame.
        """
        it = self._it
        await asyncio.to_thread(self.check, current, list(weights))
        number = current.base_version + 1
        path = it.models.path(number)
        if current.kind == TASK_KIND_INITIALIZE:
            token = next(iter(weights))
            update = self.load(token)
            if update.header.HasField("channels"):
                learn = it.local_models.learn
                with blaming(token):
                    await asyncio.to_thread(learn, update.header.channels, update.manifest.layout)
            about = about_version(self._settings.run_name, current.state.number, number)
            with blaming(token):
                digest = await asyncio.to_thread(_write_values, path, update, about)
        else:
            base = it.models.open(current.base_version)
            optimizer_state = it.models.open_optimizer_state(current.base_version)
            sub_models, merged = sub_models_of(it, current, weights), merged_of(current, weights)
            for token in weights:
                await self.learn_channels(token)
            files = CommitFiles(
                base,
                optimizer_state,
                self._optimizer,
                list(weights.items()),
                self.load,
                it.models.recycled,
                sub_models,
                merged,
                current.scales,
                self._formats(current, weights),
                self._about(current, number, weights),
                current.keeps,
                self.clips_buffers,
            )
            try:
                digest = await asyncio.to_thread(files.write, path, it.models.optimizer_state_path(number))
            except NotFinite as error:
                raise await asyncio.to_thread(self.blamed, error, weights, current.scales) from error
        model = it.models.open(number)
        norm = await asyncio.to_thread(model_norm, model)
        if current.kind == TASK_KIND_INITIALIZE:
            first = await asyncio.to_thread(content_digest, model)
            return Version(number, current.state.number, digest, 0, norm, first_model=first)
        before, elements = it.versions.last, sum(spec.size for spec in model.layout)
        return Version(
            number,
            current.state.number,
            digest,
            it.run.trained + 1,
            norm,
            it.versions.norm_jump(norm, elements),
            first_model=before.first_model if before else b"",
        )

    async def roll_back(self, wanted: int, round_number: int) -> tuple[Version, Layout]:
        """A new version that is a copy of a kept one, or (0) holds no model; only its file is durable yet.

        The server optimizer remembers nothing of it. Raises `NotFound` and `StorageError`.
        """
        it = self._it
        number = it.run.version + 1
        if not wanted:
            await asyncio.to_thread(it.local_models.forget)
            return Version(number, round_number, b""), ()
        known = it.versions.get(wanted)
        if known is None:
            raise NotFound(f"model version {wanted} is not kept")
        model = it.models.open(wanted)
        digest = await asyncio.to_thread(self._copy, model, known, number, round_number)
        version = replace(known, version=number, round=round_number, sha256=digest, rolled_back_to=wanted)
        return version, model.layout

    def _copy(self, model: ModelFile, known: Version, number: int, round_number: int) -> bytes:
        it = self._it
        if model.sha256() != known.sha256:
            raise StorageError(f"the model {model.path} is corrupt: its SHA-256 is not the one recorded")
        # A round that was cut off may have left what its optimizer would have remembered.
        it.models.optimizer_state_path(number).unlink(missing_ok=True)
        about = about_version(it.settings.run_name, round_number, number, known.scores)
        tensors = (model.tensor(index) for index in range(len(model.layout)))
        return write_model(it.models.path(number), model.layout, tensors, about)

    def _about(self, current: CurrentRound, number: int, weights: Mapping[str, float]) -> dict[str, str]:
        """The metadata of a version, with what this round says of the one before. Computed again, it is equal."""
        scores = scores_of(current, weights, self._it.weighing, self._settings.policy.max_share)
        return about_version(self._settings.run_name, current.state.number, number, scores.metrics)

    def _formats(self, current: CurrentRound, tokens: Iterable[str]) -> dict[str, Formats]:
        """Of the updates whose say falls with the noise of their formats."""
        if not self._settings.precision_weights:
            return {}
        plans = {token: current.local_task(token).plan for token in tokens}
        return {
            token: Formats(plan, current.reports[token].steps)
            for token, plan in plans.items()
            if plan.arithmetic is not None or plan.quantization is not None
        }

    async def learn_channels(self, token: str) -> None:
        """Keep the channels that the update of that token tells, if they are wanted."""
        it = self._it
        if it.local_models.wants_channels and (header := self.load(token).header).HasField("channels"):
            with blaming(token):
                await asyncio.to_thread(it.local_models.learn, header.channels, it.run.layout)

    def blamed(
        self, error: NotFinite, weights: Mapping[str, float], scales: Mapping[str, float]
    ) -> UnusableUpdate | NotFinite:
        """Whose fault it is: of those who add to the tensor, the one that adds most."""
        factors = [(token, weight * scales.get(token, 1.0)) for token, weight in weights.items()]
        token = most_to_blame(error.tensor, factors, self.load)
        return error if token is None else UnusableUpdate(f"{error}; this update adds most", token=token)

    def check(self, current: CurrentRound, tokens: Iterable[str]) -> None:
        """Nothing goes into a version that has changed on the disk since it was accepted, or written.

        Raises `UnusableUpdate` for an update, and `StorageError` for the version itself.
        """
        for token in tokens:
            with blaming(token):
                self.load(token).check()
        if current.kind != TASK_KIND_INITIALIZE:
            self._it.models.check(current.base_version)

    def load(self, token: str) -> StoredUpdate:
        """The accepted update of that token. Raises `StorageError`."""
        update = self._it.journal.load(token)
        if update is None:
            raise StorageError("an accepted update is gone from the data folder")
        return update


def sub_models_of(it: Coordinator, current: CurrentRound, tokens: Iterable[str]) -> dict[str, KeptChannels | None]:
    """Return the channels of the updates of sub-models, by token. Raises as `LocalModels.kept_channels`."""
    local_tasks = {token: current.local_task(token) for token in tokens}
    return {
        token: it.local_models.kept_channels(local.sub_model, current.version_of(token))
        for token, local in local_tasks.items()
        if not local.plain
    }


def merged_of(current: CurrentRound, tokens: Iterable[str]) -> dict[str, float]:
    """What the updates that are means themselves say that they weigh."""
    reports = {token: current.reports[token] for token in tokens}
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
