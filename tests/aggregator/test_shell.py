"""The async shell of a run, without gRPC: what is stored before what, and what a restart finds."""

from contextlib import ExitStack, asynccontextmanager

import pytest

from fedgrpc.aggregator.assignment import TaskAssigner
from fedgrpc.aggregator.coordinator import Coordinator
from fedgrpc.aggregator.model_store import ModelStore
from fedgrpc.aggregator.recovery import Recovery
from fedgrpc.aggregator.registry import WorkerRegistry
from fedgrpc.aggregator.sessions import Sessions
from fedgrpc.aggregator.worker_calls import WorkerCalls
from fedgrpc.codec.encoding import ENCODING_NAMES
from fedgrpc.errors import IllegalTransition, RoundClosed, StorageError, UnknownTask, UsageError, WrongIdentity
from fedgrpc.metrics import Metrics
from fedgrpc.rounds.events import Abort, Progress, Rejected, TaskPhase
from fedgrpc.rounds.round import RoundPhase
from fedgrpc.runs.events import Ending, EndReason, Paused, RoundEnded, RoundOpened, RunPhase
from fedgrpc.storage.files import make_private
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.uploads import UploadJournal
from fedgrpc.v1 import device_pb2, tensor_pb2
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from tests.support.hand_driven_device import update_of
from tests.support.running_federation import settings_for
from tests.support.stored_updates import accept as store_update


class Shell:
    """A coordinator with its assigner, and workers that poll."""

    def __init__(self, coordinator, polls):
        self.coordinator = coordinator
        self.run = coordinator.machine
        self.fleet = coordinator.fleet
        self.calls = WorkerCalls(coordinator, Sessions(self.fleet, 1.0, coordinator.clock))
        self.assigner = TaskAssigner(coordinator)
        self._polls = polls

    async def workers(self, names):
        for name in names:
            compressions = [tensor_pb2.COMPRESSION_NONE, tensor_pb2.COMPRESSION_ZSTD]
            request = RegisterRequest(
                worker=name,
                role=device_pb2.WORKER_ROLE_TRAINER,
                encodings=ENCODING_NAMES,
                compressions=compressions,
            )
            await self.calls.register(request)
            self._polls.enter_context(self.fleet.polling(self.fleet.get(name)))

    def open(self):
        """Open a round; the `Select` that it asks for."""
        self.coordinator.apply(RoundOpened(self.run.next_step(0.0, self.coordinator.clock()).round))
        self.coordinator.apply(self.coordinator.workers_available())
        return self.coordinator.effects.popleft()

    def token(self, worker):
        return self.run.leases[worker]

    async def stored(self):
        return await self.coordinator.in_database(self.coordinator.store.open_round)


@asynccontextmanager
async def shell_in(folder, **changes):
    """The shell of a run that has recovered what is in the folder."""
    settings = settings_for(folder, **changes)
    make_private(settings.data_dir)
    models = ModelStore(settings.data_dir)
    journal = UploadJournal(settings.data_dir / "uploads", durable=False)
    store = RunStore(settings.data_dir / "run.sqlite")
    coordinator = Coordinator(settings, WorkerRegistry(100, 10.0), store, models, journal, Metrics())
    try:
        with ExitStack() as polls:
            shell = Shell(coordinator, polls)
            await Recovery(coordinator, shell.assigner).recover()
            yield shell
    finally:
        coordinator.close()


def failing(*_):
    raise StorageError("the disk is full")


# The coordinator.


async def test_an_event_is_applied_only_once_it_is_stored(tmp_path):
    async with shell_in(tmp_path) as shell:
        seen = []

        async def store(after):
            seen.append((after.phase, shell.run.phase))

        await shell.coordinator.apply_after(Paused("it fails"), store)
        assert seen == [(RunPhase.PAUSED, RunPhase.RUNNING)]
        assert (shell.run.phase, shell.run.paused_reason) == (RunPhase.PAUSED, "it fails")


async def test_an_event_that_cannot_be_stored_has_not_happened(tmp_path):
    async with shell_in(tmp_path) as shell:
        shell.coordinator.store.save_run = failing
        for act in (shell.coordinator.pause(), shell.coordinator.stop("by hand")):
            with pytest.raises(StorageError):
                await act
        assert (shell.run.phase, shell.run.ending.reason) == (RunPhase.RUNNING, EndReason.NONE)


async def test_an_event_that_is_not_allowed_is_not_stored(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.coordinator.stop("by hand")
        shell.coordinator.store.save_run = failing
        with pytest.raises(IllegalTransition, match="by hand"):
            await shell.coordinator.pause()


async def test_who_receives_uploads_hears_of_each_closed_task(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        closed = {}
        shell.coordinator.on_task_closed(closed.__setitem__)
        await shell.assigner.select(shell.open())
        a, b = shell.token("a"), shell.token("b")
        shell.coordinator.apply(Rejected(a, "not finite"))
        assert list(closed) == [a]
        await shell.calls.give_back("b", b, "out of memory")
        assert "out of memory" in closed[b]


async def test_a_task_is_known_after_its_round_from_what_was_stored(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        await shell.assigner.select(shell.open())
        token = shell.token("a")
        shell.coordinator.apply(Abort("enough"))
        shell.coordinator.apply(RoundEnded(0.0))
        with pytest.raises(RoundClosed):
            await shell.coordinator.check_open("a", token)
        with pytest.raises(WrongIdentity):
            await shell.coordinator.check_open("b", token)
        with pytest.raises(UnknownTask):
            await shell.coordinator.check_open("a", "unknown")


# Handing out tasks.


async def test_a_task_is_stored_before_its_worker_hears_of_it(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        select, leases = shell.open(), []
        save = shell.coordinator.store.save_open_round

        def saving(*about):
            leases.append(dict(shell.run.leases))
            save(*about)

        shell.coordinator.store.save_open_round = saving
        await shell.assigner.select(select)
        assert leases == [{}]
        assert set(shell.run.leases) == {"a", "b"}
        assert {task.token for task in (await shell.stored()).tasks} == set(shell.run.leases.values())
        context = shell.run.current.context(shell.token("a"))
        assert (str(context.agreed.downlink.whole), str(context.agreed.upload)) == ("raw", "raw")
        assert context.download_bytes > 0


async def test_tasks_that_cannot_be_stored_are_offered_to_nobody(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        select = shell.open()
        shell.coordinator.store.save_open_round = failing
        with pytest.raises(StorageError):
            await shell.assigner.select(select)
        assert (shell.run.leases, shell.run.current.state.phase) == ({}, RoundPhase.SELECTING)


async def test_a_round_that_has_ended_meanwhile_gives_out_no_task(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        select, get = shell.open(), shell.coordinator.encoded_models.get

        async def slowly(*about):
            await shell.coordinator.stop("by hand")
            return await get(*about)

        shell.coordinator.encoded_models.get = slowly
        await shell.assigner.select(select)
        assert (shell.run.leases, await shell.stored()) == ({}, None)


async def test_what_a_worker_says_of_itself_stops_its_own_task_alone(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        select, task_of = shell.open(), shell.coordinator.local_models.task_of

        def choosy(worker, *about):
            if worker.name == "a":
                raise ValueError("a memory of minus one byte")
            return task_of(worker, *about)

        shell.coordinator.local_models.task_of = choosy
        await shell.assigner.select(select)
        phases = {task.worker: task.phase for task in shell.run.current.state.tasks.values()}
        assert phases == {"a": TaskPhase.REJECTED, "b": TaskPhase.OFFERED}
        assert list(shell.run.leases) == ["b"]


async def test_a_worker_that_has_left_while_its_task_was_stored_keeps_none(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        select, save = shell.open(), shell.coordinator.store.save_open_round

        def leaving(*about):
            shell.fleet.get("a").left = True
            save(*about)

        shell.coordinator.store.save_open_round = leaving
        await shell.assigner.select(select)
        assert list(shell.run.leases) == ["b"]


# What a restart finds.


async def test_a_restart_goes_on_in_the_open_round_with_who_holds_which_task(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        await shell.assigner.select(shell.open())
        leases, run_id, version = dict(shell.run.leases), shell.run.id, shell.run.version
        shell.coordinator.apply(Progress(leases["b"], TaskPhase.TRAINING))
        store_update(shell.coordinator.journal, leases["a"], update_of())
    async with shell_in(tmp_path) as shell:
        assert (shell.run.id, shell.run.version) == (run_id, version)
        state = shell.run.current.state
        assert (state.phase, state.accepted) == (RoundPhase.REPORTING, (leases["a"],))
        assert shell.run.leases == {"b": leases["b"]}
        assert shell.run.current.report(leases["a"]).example_count == 5
        context = shell.run.current.context(leases["b"])
        assert (str(context.agreed.upload), context.download_bytes > 0) == ("raw", True)


async def test_a_run_that_was_ended_stays_so_and_one_with_more_rounds_goes_on(tmp_path):
    done = Ending(EndReason.ROUNDS_DONE, "all 1 rounds are done")
    async with shell_in(tmp_path) as shell:
        await shell.coordinator.end(RunPhase.FINISHED, done)
    async with shell_in(tmp_path) as shell:
        # It has made no version yet, so that a round is to come.
        assert (shell.run.phase, shell.run.ending) == (RunPhase.RUNNING, Ending())
        await shell.coordinator.stop("by hand")
    async with shell_in(tmp_path) as shell:
        assert (shell.run.phase, shell.run.ending) == (RunPhase.STOPPED, Ending(EndReason.STOPPED, "by hand"))


async def test_a_paused_run_is_paused_after_a_restart_and_says_why(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.coordinator.pause_itself("3 rounds failed")
    async with shell_in(tmp_path) as shell:
        assert (shell.run.phase, shell.run.paused_reason) == (RunPhase.PAUSED, "3 rounds failed")


async def test_a_folder_of_another_run_is_refused(tmp_path):
    async with shell_in(tmp_path):
        pass
    with pytest.raises(UsageError, match="holds the run"):
        async with shell_in(tmp_path, run_name="another"):
            pass


async def test_an_accepted_update_that_is_gone_stops_the_start(tmp_path):
    async with shell_in(tmp_path) as shell:
        await shell.workers("ab")
        await shell.assigner.select(shell.open())
        token = shell.token("a")
        row = (await shell.stored()).tasks[0]
        assert row.token in shell.run.leases.values()
        shell.coordinator.store._db.execute(
            "UPDATE tasks SET phase = ? WHERE token = ?", (TaskPhase.ACCEPTED.value, token)
        )
    with pytest.raises(StorageError, match="is gone from the data folder"):
        async with shell_in(tmp_path):
            pass
