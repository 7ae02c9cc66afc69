"""The new version that a round makes of the updates it has accepted."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fedgrpc.aggregation.server_optimizer import server_optimizer
from fedgrpc.aggregator.commit import Commit as CommitFiles
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.model_file import write_model
from fedgrpc.aggregator.report import CurrentRound
from fedgrpc.aggregator.run_store import Version
from fedgrpc.aggregator.uploads import StoredUpdate
from fedgrpc.errors import StorageError, UpdateRefused
from fedgrpc.v1.round_pb2 import TASK_KIND_INITIALIZE, TASK_KIND_TRAIN


class NewVersion:
    """Computes versions from update files, and writes them beside the old ones."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._it = coordinator
        self._settings = coordinator.settings
        self._optimizer = server_optimizer(self._settings.server_optimizer, self._settings.server_learning_rate)

    def weights(self, current: CurrentRound, tokens: tuple[str, ...]) -> dict[str, float]:
        """p_m where the operator has set any (1 for workers not named), else the count of examples."""
        chosen = self._settings.worker_weights if current.kind == TASK_KIND_TRAIN else {}
        weights = {}
        for token in tokens:
            count = float(current.reports[token].example_count)
            weights[token] = chosen.get(current.state.tasks[token].worker, 1.0) if chosen else count
        if not sum(weights.values()) > 0:
            raise UpdateRefused("the weights of all accepted updates are zero")
        return weights

    async def write(self, current: CurrentRound, weights: dict[str, float]) -> Version:
        it = self._it
        number = current.base_version + 1
        path = it.models.path(number)
        if current.kind == TASK_KIND_INITIALIZE:
            token = next(iter(weights))
            update = self._load(token)
            if update.header.HasField("channels"):
                learn = it.local_models.learn
                await asyncio.to_thread(learn, update.header.channels, update.manifest.layout)
            digest = await asyncio.to_thread(_write_values, path, update)
        else:
            base = it.models.open(current.base_version)
            memory = it.models.open_memory(current.base_version)
            parts = {}
            for token in weights:
                local = current.local_task(current.state.tasks[token].worker)
                if not local.plain:
                    parts[token] = it.local_models.selection(local.sub_model, current.base_version)
                await self._learn_channels(token)
            updates = list(weights.items())
            files = CommitFiles(base, memory, self._optimizer, updates, self._load, it.models.spares, parts)
            digest = await asyncio.to_thread(files.write, path, it.models.memory_path(number))
        return Version(number, current.state.number, digest)

    async def _learn_channels(self, token: str) -> None:
        it = self._it
        if it.local_models.wants_channels and (header := self._load(token).header).HasField("channels"):
            await asyncio.to_thread(it.local_models.learn, header.channels, it.run.layout)

    def _load(self, token: str) -> StoredUpdate:
        update = self._it.journal.load(token)
        if update is None:
            raise StorageError("an accepted update is gone from the data folder")
        return update


def _write_values(path: Path, update: StoredUpdate) -> bytes:
    with update.open() as reader:
        return write_model(path, update.manifest.layout, (values for _, values in reader))
