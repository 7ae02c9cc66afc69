"""Releases with noise: the run's noise key, and the ledger that is ahead of every version.

The rule: an entry is durable before the noisy version is written. A commit that is computed again finds its entry,
draws the same noise and enters nothing. The key never leaves the data folder: with it, noise can be taken away.
"""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from fedgrpc.aggregator.commit import Noise
from fedgrpc.aggregator.protected_layouts import complaint
from fedgrpc.aggregator.run_shell import RunShell
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import StorageError, UpdateRefused, UsageError
from fedgrpc.privacy.ledger import ledger_of
from fedgrpc.privacy.streams import KEY_BYTES, derived_key
from fedgrpc.rounds.policy import TaskKind
from fedgrpc.runs.events import LedgerOpened, ReleaseEntered
from fedgrpc.runs.machine import RunMachine
from fedgrpc.runs.merge import Merge
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.storage.files import storage_errors, write_file

log = structlog.get_logger()

KEY_FILE: Final = "noise.key"


class PrivateReleases:
    """The ledger of one run in its shell. Without `--privacy` it does nothing."""

    def __init__(self, shell: RunShell, settings: AggregatorSettings) -> None:
        self._shell = shell
        self._settings = settings
        self._key = b""
        self._log = log.bind(run=settings.run_name)

    async def open(self) -> None:
        """Read the ledger and the key; a fresh run gets a key.

        Raises `UsageError` where the settings forbid to continue the ledger, and `StorageError`.
        """
        shell, settings = self._shell, self._settings
        releases = await shell.in_database(shell.store.releases)
        if not settings.privacy.on:
            if releases:
                raise UsageError(
                    f"{len(releases)} versions of this run were released with noise, and the next would not be: "
                    "start it with --privacy, or take another data folder"
                )
            return
        assert settings.clip_norm is not None
        last_steps = await shell.in_database(shell.store.last_steps)
        planned = None if settings.rounds is None else max(0, settings.rounds - await self._trained())
        ledger = ledger_of(
            settings.privacy,
            settings.clip_norm,
            settings.policy.poisson_rate,
            planned,
            releases,
            last_steps,
            settings.clip_quantile,
        )
        path = settings.data_dir / KEY_FILE
        self._key = await asyncio.to_thread(noise_key, path, bool(releases))
        shell.apply(LedgerOpened(ledger))
        self._log.info(
            "versions get noise",
            mechanism=ledger.rules.mechanism,
            noise_multiplier=round(ledger.rules.noise_multiplier, 6),
            deviation=ledger.rules.deviation,
            releases=len(releases),
            epsilon=round(ledger.epsilon(), 6),
            delta=ledger.delta,
        )

    async def _trained(self) -> int:
        version = await self._shell.in_database(self._shell.store.latest_version)
        return 0 if version is None else version.trained

    async def enter(self, round_: RoundInProgress, merge: Merge) -> Noise | None:
        """Enter the release of these updates, durably, and return its noise; None for a round without any.

        Raises `UpdateRefused` where it would cost more than the target, or the model has tensors without a bound,
        and `StorageError`.
        """
        shell, ledger = self._shell, self._shell.machine.ledger
        if ledger is None or round_.kind is not TaskKind.TRAIN:
            return None
        if unbounded := complaint(shell.machine.layout, private=True, secure=False):
            raise UpdateRefused(unbounded)
        norm = ledger.rules_of(round_.number).clip_norm
        if round_.secure is not None and not 0 < (round_.secure.vector.norm or 0.0) <= norm:
            # It began under other settings: nobody can clip its updates any more.
            raise UpdateRefused(f"the updates of this secure sum may be longer than the clip norm of {norm:g}")
        release = ledger.release_of(round_.number, round_.base_version + 1, list(merge.weights))
        noise, deviation = release.rules.noise(self._key, release.step), release.rules.deviation
        if release.step == ledger.next_step:
            release = release.adapted(sum(not round_.report(token).clipped for token in merge.weights), noise)

            async def store(after: RunMachine) -> None:
                await shell.in_database(shell.store.save_release, release)

            await shell.apply_after(ReleaseEntered(release), store)

        def draw(name: str, start: int, count: int) -> np.ndarray:
            return deviation * noise.normals(name, count, start)

        return draw

    def sampling(self, round_number: int, drawn: int) -> np.random.Generator | None:
        """Return the secret chance by which devices are sampled; None where nobody has to be kept from it."""
        if not self._key:
            return None
        # A coin that others can compute hides nobody.
        seed = derived_key(self._key, f"fedgrpc sample 1 {round_number} {drawn}".encode())
        return np.random.default_rng(int.from_bytes(seed))


def noise_key(path: Path, needed: bool) -> bytes:
    """Return the key of a run's noise, made and stored first if there is none.

    Raises `UsageError` where it is gone though it is `needed`, and `StorageError`.
    """
    with storage_errors(path):
        if path.exists():
            key = path.read_bytes()
        elif needed:
            raise UsageError(
                f"{path} is missing, and versions have been released under it: restore it from the same copy as "
                "the database, or take another data folder"
            )
        else:
            key = secrets.token_bytes(KEY_BYTES)
            write_file(path, key, private=True)
    if len(key) != KEY_BYTES:
        raise StorageError(f"{path} is damaged: a noise key has {KEY_BYTES} bytes, not {len(key)}")
    return key
