"""Every run of one process: which there are, how one is found, and how they come, change and go.

    DATA/                   the run that the process was started with, if it was, and the fleet's registrations
    DATA/runs/NAME/         a run that was submitted: as above, with
        run.toml            its settings, as they were given

The rule: a run exists once its settings are on the disk. After a kill at any moment the next process opens what is
there. Calls find their run here, once.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import structlog

from fedgrpc.aggregator.changed_settings import changes, compared_text
from fedgrpc.aggregator.driver import Rounds
from fedgrpc.aggregator.hosted_run import Common, HostedRun
from fedgrpc.aggregator.own_rounds import OwnRounds
from fedgrpc.aggregator.registering import Registering
from fedgrpc.aggregator.registry import Worker, WorkerRegistry
from fedgrpc.aggregator.run_files import RUNS, SETTINGS_FILE, Texts, check_changeable, check_name, write_texts
from fedgrpc.aggregator.run_fleet import FleetSharing
from fedgrpc.aggregator.run_models import Record
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.aggregator.tokens import run_id_of
from fedgrpc.aio import Changes
from fedgrpc.errors import Exhausted, FedgrpcError, IllegalTransition, NotFound, UsageError
from fedgrpc.metrics import ProcessMetrics
from fedgrpc.rpc.identity import Session
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.files import make_private, remove_folder, storage_errors
from fedgrpc.storage.run_store import RunStore

MOST_RUNS: Final = 200
# Runs that an error lists.
_NAMED: Final = 10
_INITIAL: Final = "initial.safetensors"

# Makes settings of (name, folder, texts). Raises `UsageError`.
ReadSettings = Callable[[str, Path, Texts], AggregatorSettings]
ReadTexts = Callable[[Path], dict[str, list[str]]]

log = structlog.get_logger()


class RunDirectory:
    """The runs of one process. Lives on one event loop."""

    def __init__(
        self,
        settings: AggregatorSettings,
        fleet: WorkerRegistry,
        sessions: Sessions,
        clock: Callable[[], float],
        record: Record,
        metrics: ProcessMetrics,
        *,
        own_rounds: Rounds = OwnRounds,
        has_own: bool = True,
        read_settings: ReadSettings | None = None,
        read_texts: ReadTexts | None = None,
    ) -> None:
        """`settings` are those of the process, and with `has_own` of its own run.

        `read_settings` makes the settings of a submitted run, `read_texts` reads its file; without, none can be.
        """
        self._settings = settings
        self._folder = settings.data_dir
        self._metrics = metrics
        self._own_rounds = own_rounds
        self._has_own = has_own
        self._read_settings = read_settings
        self._read_texts = read_texts
        self._runs: dict[str, HostedRun] = {}
        self._changing = asyncio.Lock()
        self._registrations: RunStore | None = None
        self.registering: Registering | None = None
        # When devices are to serve other versions, and when a run came, ended or went.
        self.changes = Changes()
        self.stopping = False
        sharing = FleetSharing(fleet, lambda: [run.fleet for run in self], clock)
        self.common = Common(fleet, sessions, sharing, clock, record, self.changes.notify)

    def __iter__(self) -> Iterator[HostedRun]:
        return iter(tuple(self._runs.values()))

    def __len__(self) -> int:
        return len(self._runs)

    # Finding a run.

    @property
    def own(self) -> HostedRun | None:
        """The run that the process was started with."""
        return next((run for run in self._runs.values() if run.is_own), None)

    @property
    def bound(self) -> HostedRun | None:
        """The run of workers that serve one run alone: the own one, else the oldest that has not ended."""
        if (own := self.own) is not None:
            return own
        return next((run for run in self._runs.values() if not run.coordinator.machine.ended), None)

    def find(self, name: str) -> HostedRun:
        """Return the run of that name; "": the own one, else the only one. Raises `NotFound`, `UsageError`."""
        if name:
            if name not in self._runs:
                raise NotFound(f"there is no run {name[:80]!r} here; `fedgrpc run list` shows all")
            return self._runs[name]
        if (own := self.own) is not None:
            return own
        if not self._runs:
            raise NotFound("there is no run here; `fedgrpc run submit` starts one")
        if len(self._runs) > 1:
            names = ", ".join(islice(self._runs, _NAMED))
            more = ", ..." if len(self._runs) > _NAMED else ""
            raise UsageError(f"there are {len(self._runs)} runs here, name one of them: {names}{more}")
        return next(iter(self._runs.values()))

    def of_id(self, run_id: str) -> HostedRun | None:
        """Return the run of that id, if it is here."""
        return next((run for run in self._runs.values() if run.id == run_id), None)

    def of_token(self, token: str) -> HostedRun:
        """Return the run of a task. Raises `NotFound` where there is no run."""
        known = self.of_id(run_id_of(token)) or self.own
        return known if known is not None else self.find("")

    def serving(self, worker: Worker) -> list[HostedRun]:
        """Return the runs whose tasks the worker may take, or holds one of."""
        return [
            run
            for run in self._runs.values()
            if worker.name in run.coordinator.machine.leases or run.fleet.may_serve(worker)
        ]

    @property
    def ended(self) -> bool:
        """True if every run has ended, and no other is waited for."""
        return self.own is not None and all(run.coordinator.machine.ended for run in self._runs.values())

    # Opening and closing.

    async def open(self) -> None:
        """Open all runs, and take up what a former process left. Raises `UsageError` and `StorageError`."""
        own = self._opened(self._settings, is_own=True) if self._has_own else None
        if own is not None:
            store, in_database = own.coordinator.store, own.coordinator.in_database
        else:
            self._registrations = store = RunStore(self._folder / DATABASE)
            in_database = asyncio.to_thread  # type: ignore[assignment]
            await self._restore_fleet(store)
        common = self.common
        self.registering = Registering(
            common.fleet,
            common.sessions,
            store,
            in_database,
            common.clock,
            lambda: [run.coordinator for run in self],
        )
        if own is not None:
            await self._recovered(own)
        for folder in (self._folder / RUNS).glob("*"):
            await self._open_submitted(folder)
        self._runs = dict(sorted(self._runs.items(), key=lambda item: item[1].coordinator.machine.started_at))

    async def _restore_fleet(self, store: RunStore) -> None:
        sessions = store.sessions()
        for registration, _ in store.workers():
            session = Session.parse(sessions.get(registration.worker, ""))
            self.common.fleet.restore(registration, self.common.clock(), session)

    def _opened(self, settings: AggregatorSettings, is_own: bool = False) -> HostedRun:
        metrics = self._metrics.of(settings.run_name)
        rounds = self._own_rounds if is_own else OwnRounds
        run = HostedRun(settings, self.common, metrics, rounds, is_own)
        run.fleet.binds = lambda: self.bound is run
        return run

    async def _recovered(self, run: HostedRun) -> HostedRun:
        """Take a run up, which from then on calls find. Raises as `HostedRun.recover`; the run is then closed."""
        try:
            await run.recover(self.registering)
        except BaseException:
            # Cancelled, too: nobody else closes a run that is not listed.
            await run.close()
            raise
        self._runs[run.name] = run
        return run

    async def _open_submitted(self, folder: Path) -> None:
        """Open a run of a former process. One that cannot be opened keeps no other from it."""
        if self._read_settings is None or self._read_texts is None:
            return
        if not (folder / SETTINGS_FILE).exists():
            # It was being made, or removed: nobody was told that it exists.
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            return
        try:
            if folder.name in self._runs:
                raise UsageError(
                    "the aggregator was started with a run of this name: give that another --run-name"
                )
            settings = self._read_settings(folder.name, folder, self._read_texts(folder / SETTINGS_FILE))
            await self._recovered(self._opened(settings))
        except FedgrpcError as error:
            log.error("run not opened", run=folder.name, reason=str(error))

    def start(self) -> None:
        """Play the rounds of every run."""
        for run in self:
            run.start()

    async def close(self) -> None:
        """Close all runs."""
        self.stopping = True
        for run in self:
            await run.close()
        if self._registrations is not None:
            self._registrations.close()

    def release_calls(self) -> None:
        """The process is about to end: open polls and watches return."""
        self.stopping = True
        for run in self:
            run.coordinator.release_calls()
        self.common.fleet.wake_all()
        self.changes.notify()

    def put_out(self, name: str, why: str, drop_updates: bool) -> None:
        """Do without a worker that may call no more, in every run. See `Coordinator.put_out`.

        Raises the first error once all runs know: a disk that fails one of them keeps no other from it.
        """
        errors = []
        for run in self:
            try:
                run.coordinator.put_out(name, why, drop_updates)
                run.models.device_gone(name)
            except FedgrpcError as error:
                errors.append(error)
            run.fleet.ready.discard(name)
            run.fleet.refusals.pop(name, None)
        if errors:
            raise errors[0]

    # What operators do.

    async def submit(self, name: str, texts: Texts) -> HostedRun:
        """Start a run. Raises `UsageError`, `Exhausted`, `IllegalTransition` and `StorageError`."""
        async with self._changing:
            return await self._make(name, texts)

    async def clone(self, name: str, new_name: str, texts: Texts, version: int) -> HostedRun:
        """Start a run with the settings of another, some of them changed, and from one of its versions; 0: none.

        Raises `NotFound`, and as `submit`.
        """
        async with self._changing:
            source = self.find(name)
            merged = {**self._texts_of(source), **texts}
            model: Path | None = None
            if version:
                model = source.coordinator.models.path(version)
                if not await asyncio.to_thread(model.exists):
                    raise NotFound(f"version {version} of {source.name} is not kept; see `fedgrpc model list`")
            return await self._make(new_name, merged, model)

    def _texts_of(self, run: HostedRun) -> dict[str, list[str]]:
        if self._read_texts is None:
            raise IllegalTransition("this aggregator has a parent, whose runs it serves")
        if run.is_own:
            raise UsageError(
                f"the settings of {run.name} are flags of the aggregator's start: end the aggregator and start it "
                "with others to change them (rounds and models stay), or submit a file with them as another run"
            )
        return self._read_texts(run.settings.data_dir / SETTINGS_FILE)

    async def _make(self, name: str, texts: Texts, model: Path | None = None) -> HostedRun:
        if self._read_settings is None:
            raise IllegalTransition("this aggregator has a parent, whose runs it serves")
        check_name(name)
        if name in self._runs or (self._folder / RUNS / name).exists():
            raise UsageError(f"there is a run {name!r} already: choose another name, or remove that one")
        if len(self._runs) >= MOST_RUNS:
            raise Exhausted(f"this aggregator hosts {MOST_RUNS} runs already; `fedgrpc run remove` makes room")
        folder = self._folder / RUNS / name
        # Refused before anything is made.
        self._read_settings(name, folder, texts)
        with storage_errors(folder):
            make_private(self._folder / RUNS)
            make_private(folder)
        try:
            if model is not None:
                with storage_errors(folder):
                    await asyncio.to_thread(shutil.copyfile, model, folder / _INITIAL)
                texts = {**texts, "initial_model": [str(folder / _INITIAL)]}
            settings = self._read_settings(name, folder, texts)
            run = await self._recovered(self._opened(settings))
            # From here on the run exists.
            await asyncio.to_thread(write_texts, folder / SETTINGS_FILE, texts)
        except BaseException:
            # Cancelled, too: the next start must not find half a run.
            if (failed := self._runs.pop(name, None)) is not None:
                await failed.close()
            self._metrics.drop(name)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        run.start()
        self._look_again()
        log.info("run submitted", run=name)
        return run

    async def change(self, name: str, texts: Texts) -> tuple[HostedRun, dict[str, str]]:
        """Change settings of a run from its next round on; what has changed, as OLD -> NEW.

        Raises `NotFound`, `IllegalTransition` for a run that has ended or that somebody else changes, `UsageError`
        for a setting that may not change, and `StorageError`.
        """
        run = self.find(name)
        # Refused before a round is waited for, which other changes of runs do not wait for.
        if not self._changed(run, texts)[1]:
            return run, {}
        async with run.between_rounds(), self._changing:
            if self._runs.get(run.name) is not run:
                raise IllegalTransition(
                    f"somebody else has changed or removed the run {run.name}; look, and try again"
                )
            settings, changed = self._changed(run, texts)
            return await self._restarted(run, settings, texts), changed

    def _changed(self, run: HostedRun, texts: Texts) -> tuple[AggregatorSettings, dict[str, str]]:
        """Return the settings of a run with `texts`, and what differs. Raises as `change`."""
        if run.coordinator.machine.ended:
            raise IllegalTransition(f"the run has ended: {run.coordinator.machine.ending.text}")
        merged = {**self._texts_of(run), **texts}
        assert self._read_settings is not None
        settings = self._read_settings(run.name, run.settings.data_dir, merged)
        changed = changes(compared_text(run.settings), compared_text(settings))
        check_changeable(changed)
        return settings, changed

    async def _restarted(self, run: HostedRun, settings: AggregatorSettings, texts: Texts) -> HostedRun:
        """Close a run and open it with other settings, or else with those that it had. Raises as `_reopened`."""
        file, before = run.settings.data_dir / SETTINGS_FILE, self._texts_of(run)
        await asyncio.to_thread(write_texts, file, {**before, **texts})
        await run.close()
        try:
            again = await self._reopened(settings)
        except BaseException:
            # As it was, also for the next process.
            await asyncio.to_thread(write_texts, file, before)
            await self._reopened(run.settings)
            self._look_again()
            raise
        self._look_again()
        log.info("run changed", run=run.name)
        return again

    async def _reopened(self, settings: AggregatorSettings) -> HostedRun:
        """Open and start a run again that was closed. Raises as `HostedRun.recover`."""
        run = await self._recovered(self._opened(settings))
        run.start()
        return run

    async def remove(self, name: str) -> None:
        """Remove a run that has ended, for good. Raises `NotFound` and `IllegalTransition`."""
        async with self._changing:
            run = self.find(name)
            if run.is_own:
                raise IllegalTransition(f"{run.name} is the run that the aggregator was started with")
            if not run.coordinator.machine.ended:
                raise IllegalTransition(f"the run {run.name} has not ended: stop it first")
            folder = run.settings.data_dir
            del self._runs[run.name]
            self._metrics.drop(run.name)
            await run.close()
            with storage_errors(folder):
                # First: without it, what is left after a kill is no run.
                (folder / SETTINGS_FILE).unlink()
                await asyncio.to_thread(remove_folder, folder)
            self._look_again()
            log.info("run removed", run=run.name)

    def _look_again(self) -> None:
        """Let every poll and every driver look: the runs are others now."""
        self.common.fleet.wake_all()
        for run in self:
            run.coordinator.news()
        self.changes.notify()
