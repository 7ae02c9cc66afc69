"""The new version that a round makes of the updates it has accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedgrpc.aggregation.channels import Selection
from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.blame import blaming, most_to_blame
from fedgrpc.aggregator.commit import Commit as CommitFiles
from fedgrpc.aggregator.commit import Formats
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.model_file import write_model
from fedgrpc.aggregator.norms import norm_of
from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.aggregator.run_store import Version
from fedgrpc.aggregator.scales import scales_of
from fedgrpc.aggregator.uploads import StoredUpdate
from fedgrpc.aggregator.weights import shared
from fedgrpc.errors import NotFinite, StorageError, UnusableUpdate, UpdateRefused
from fedgrpc.v1.round_pb2 import TASK_KIND_INITIALIZE, TASK_KIND_TRAIN


class NewVersion:
    """Computes versions from update files, and writes them beside the old ones."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._it = coordinator
        self._settings = coordinator.settings
        self._optimizer = server_optimizer(self._settings.server_optimizer, self._settings.server_learning_rate)

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
        if it.orders.clip_norm is not None and current.kind == TASK_KIND_TRAIN:
            norms = await asyncio.to_thread(self._norms, current, list(weights))
        return scales_of(self._settings, it.orders, current, weights, norms)

    def _norms(self, current: CurrentRound, tokens: Iterable[str]) -> dict[str, float]:
        parts, layout = parts_of(self._it, current, tokens), self._it.run.layout
        norms = {}
        for token in tokens:
            with blaming(token):
                norms[token] = norm_of(self.load(token), layout, token not in parts, parts.get(token))
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
            with blaming(token):
                digest = await asyncio.to_thread(_write_values, path, update)
        else:
            base = it.models.open(current.base_version)
            memory = it.models.open_memory(current.base_version)
            parts, merged = parts_of(it, current, weights), merged_of(current, weights)
            for token in weights:
                await self.learn_channels(token)
            files = CommitFiles(
                base,
                memory,
                self._optimizer,
                list(weights.items()),
                self.load,
                it.models.spares,
                parts,
                merged,
                current.scales,
                self._formats(current, weights),
            )
            try:
                digest = await asyncio.to_thread(files.write, path, it.models.memory_path(number))
            except NotFinite as error:
                raise await asyncio.to_thread(self.blamed, error, weights, current.scales) from error
        return Version(number, current.state.number, digest)

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
        if current.base_version:
            self._it.models.check(current.base_version)

    def load(self, token: str) -> StoredUpdate:
        """The accepted update of that token. Raises `StorageError`."""
        update = self._it.journal.load(token)
        if update is None:
            raise StorageError("an accepted update is gone from the data folder")
        return update


def parts_of(it: Coordinator, current: CurrentRound, tokens: Iterable[str]) -> dict[str, Selection | None]:
    """The slices of the updates that are of a part of the model. Raises as `LocalModels.selection`."""
    local_tasks = {token: current.local_task(token) for token in tokens}
    return {
        token: it.local_models.selection(local.sub_model, current.version_of(token))
        for token, local in local_tasks.items()
        if not local.plain
    }


def merged_of(current: CurrentRound, tokens: Iterable[str]) -> dict[str, float]:
    """What the updates that are means themselves say that they weigh."""
    reports = {token: current.reports[token] for token in tokens}
    return {token: report.weight for token, report in reports.items() if report.merged_updates}


def _write_values(path: Path, update: StoredUpdate) -> bytes:
    with update.open() as reader:
        return write_model(path, update.manifest.layout, (values for _, values in reader))
