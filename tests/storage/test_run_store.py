"""What an aggregator remembers is what it wrote, whatever happened in between."""

import sqlite3
from contextlib import closing

import pytest

from fedgrpc.errors import StorageError, UsageError
from fedgrpc.rounds.events import LossCause, TaskPhase
from fedgrpc.rounds.history import Timing, WorkerHistory
from fedgrpc.rounds.version import Version
from fedgrpc.runs.events import EndReason, RunPhase
from fedgrpc.storage.database import SCHEMA_VERSION
from fedgrpc.storage.run_store import RunStore
from fedgrpc.storage.task_rows import RunRow, TaskRow
from fedgrpc.v1.aggregator_pb2 import RegisterRequest
from fedgrpc.v1.round_pb2 import ROUND_PHASE_COMMITTED, ROUND_PHASE_REPORTING, Round

RUNNING = RunRow("id", "name", RunPhase.RUNNING, EndReason.NONE, "", 12.5)
FINISHED = RunRow("id", "name", RunPhase.FINISHED, EndReason.TARGET_MET, "done", 12.5)


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path / "run.sqlite")
    yield store
    store.close()


def reopened(tmp_path, store):
    """As after kill -9: the file as it is now, in another process's hands."""
    return RunStore(tmp_path / "run.sqlite")


def rows(number, *phases):
    return [
        TaskRow(f"token-{number}-{slot}", number, slot, f"w{slot}", phase, "") for slot, phase in enumerate(phases)
    ]


def committed(number, version):
    return Round(number=number, phase=ROUND_PHASE_COMMITTED, base_version=version - 1, committed_version=version)


def test_a_fresh_folder_holds_nothing(store):
    assert (store.run(), store.latest_version(), store.open_round(), store.round()) == (None, None, None, None)
    assert (list(store.workers()), store.rounds(1 << 62, 10), store.task("x")) == ([], ([], False), None)


def test_the_run_and_its_workers_are_remembered(tmp_path, store):
    store.save_run(RUNNING)
    store.save_run(FINISHED)
    for cores in (1, 4):
        store.save_worker(RegisterRequest(worker="w0", device={"cpu_cores": cores}))
    again = reopened(tmp_path, store)
    assert again.run() == FINISHED
    ((registration, history),) = again.workers()
    assert (registration.worker, registration.device.cpu_cores, history) == ("w0", 4, WorkerHistory())
    again.close()


def test_a_worker_that_is_forgotten_is_forgotten_for_good(tmp_path, store):
    for name in ("w0", "w1"):
        store.save_worker(RegisterRequest(worker=name), f"session of {name}")
    store.save_open_round(Round(number=1), 1, 0.0, rows(1, TaskPhase.OFFERED), {"w0": WorkerHistory().chosen(1)})
    store.forget_workers(["w0", "nobody"])
    again = reopened(tmp_path, store)
    assert [registration.worker for registration, *_ in again.workers()] == ["w1"]
    again.save_worker(RegisterRequest(worker="w0"))
    assert [history for _, history, *_ in again.workers()] == [WorkerHistory(), WorkerHistory()]
    again.close()


def test_what_a_worker_was_like_is_remembered(tmp_path, store):
    for name in ("w0", "w1"):
        store.save_worker(RegisterRequest(worker=name))
    chosen = {name: WorkerHistory().chosen(1) for name in ("w0", "w1")}
    store.save_open_round(Round(number=1), 1, 0.0, rows(1, TaskPhase.OFFERED), chosen)
    timings = (Timing(1.0, 0.0, 2.5), Timing(1.5, 3.0, None, cut=True), Timing())
    known = WorkerHistory(timings, 1, 1, 1, loss=0.0, example_count=9, endings=(LossCause.NONE, LossCause.NO_SHOW))
    store.finish_round(committed(1, 1), rows(1, TaskPhase.ACCEPTED), {"w0": known}, None)
    again = reopened(tmp_path, store)
    assert {registration.worker: history for registration, history in again.workers()} == {
        "w0": known,
        "w1": WorkerHistory(selected=1, selected_in=1),
    }
    again.close()


def test_a_task_comes_back_with_all_that_is_known_of_it(tmp_path, store):
    row = TaskRow("t", 1, 0, "w0", TaskPhase.TRAINING, "why", 3, "by lot", b"local", LossCause.SLOW_TRAINING)
    store.save_open_round(Round(number=1), 1, 0.0, [row], {})
    assert reopened(tmp_path, store).open_round().tasks == (row,)


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_of_another_version_is_refused_in_one_line_and_stays_as_it_is(tmp_path, version, read_only):
    path = tmp_path / "run.sqlite"
    with closing(sqlite3.connect(path)) as other:
        other.executescript(f"CREATE TABLE tasks (token TEXT); PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(UsageError, match=rf"another version .*schema {version}\b") as refused:
        RunStore(path, read_only=read_only)
    assert "\n" not in str(refused.value)
    assert (path.read_bytes(), [found.name for found in tmp_path.iterdir()]) == (before, ["run.sqlite"])


def test_a_database_whose_making_was_cut_off_is_made_by_the_next_start(tmp_path):
    """Before its first transaction there is a file without tables."""
    (tmp_path / "run.sqlite").touch()
    RunStore(tmp_path / "run.sqlite").close()
    store = RunStore(tmp_path / "run.sqlite", read_only=True)
    assert store.run() is None
    store.close()


def test_an_open_round_comes_back_with_its_tasks_by_slot(tmp_path, store):
    record = Round(number=3, phase=ROUND_PHASE_REPORTING, base_version=2)
    store.save_open_round(record, 2, 99.0, rows(3, TaskPhase.OFFERED, TaskPhase.OFFERED), {})
    more = rows(3, TaskPhase.ACCEPTED, TaskPhase.EXPIRED, TaskPhase.OFFERED)
    store.save_open_round(record, 2, 98.0, more, {})
    found = reopened(tmp_path, store).open_round()
    assert (found.record, found.aim, found.deadline_at, list(found.tasks)) == (record, 2, 98.0, more)
    assert store.task("token-3-1") == more[1]


def test_a_round_is_closed_with_its_version_or_not_at_all(tmp_path, store):
    store.save_open_round(Round(number=1), 1, 0.0, rows(1, TaskPhase.OFFERED), {})
    store._db.execute("CREATE TRIGGER full BEFORE INSERT ON versions BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(StorageError, match="disk full"):
        store.finish_round(committed(1, 2), rows(1, TaskPhase.ACCEPTED), {}, Version(2, 1, b"x"))
    again = reopened(tmp_path, store)
    assert again.open_round().tasks[0].phase is TaskPhase.OFFERED
    assert (again.round(), again.latest_version()) == (None, None)
    again._db.execute("DROP TRIGGER full")
    again.finish_round(committed(1, 2), rows(1, TaskPhase.ACCEPTED), {}, Version(2, 1, b"x"))
    assert (again.open_round(), again.latest_version()) == (None, Version(2, 1, b"x"))
    assert again.round(1) == again.round() == committed(1, 2)
    again.close()


def test_rounds_come_newest_first_below_a_number(store):
    for number in range(1, 8):
        store.finish_round(committed(number, number + 1), [], {}, Version(number + 1, number, b"x"))
    store.save_open_round(Round(number=8), 1, 0.0, [], {})

    def page(*arguments):
        records, more = store.rounds(*arguments)
        return [item.number for item in records], more

    assert page(1 << 62, 3) == ([7, 6, 5], True)
    assert page(5, 4) == ([4, 3, 2, 1], False)
    assert page(1, 3) == ([], False)
    size_bytes = committed(7, 8).ByteSize()
    assert page(1 << 62, 100, 2 * size_bytes) == ([7, 6], True)
    assert page(1 << 62, 100, 1) == ([7], True)
    assert page(2, 100, 1) == ([1], False)


def test_scores_of_a_version_go_to_the_round_that_wrote_it_and_add_up(store):
    store.save_version(Version(1, 0, b"x"))
    store.finish_round(committed(4, 2), [], {}, Version(2, 4, b"x"))
    store.finish_round(committed(5, 3), [], {}, Version(3, 5, b"x"))
    assert store.add_scores(1, {"loss": 1.0}, {}) is None
    store.add_scores(2, {"loss": 0.5}, {})
    store.add_scores(2, {}, {"accuracy": 0.9})
    store.add_scores(2, {"loss": 0.25, "accuracy": 0.8}, {})
    found = store.round(4)
    assert (dict(found.metrics), dict(found.evaluator_metrics)) == (
        {"loss": 0.25, "accuracy": 0.8},
        {"accuracy": 0.9},
    )
    assert not store.round(5).metrics


def test_scores_are_in_the_version_and_in_the_record_of_its_round_or_in_neither(tmp_path, store):
    store.finish_round(committed(4, 2), [], {}, Version(2, 4, b"x"))
    with closing(sqlite3.connect(tmp_path / "run.sqlite")) as other:
        other.execute("CREATE TRIGGER full BEFORE UPDATE ON rounds BEGIN SELECT RAISE(ABORT, 'disk full'); END")
    with pytest.raises(StorageError, match="disk full"):
        store.add_scores(2, {"loss": 0.5}, {})
    assert (dict(store.latest_version().metrics), dict(store.round(4).metrics)) == ({}, {})


def test_tasks_of_rounds_long_past_are_forgotten_and_their_records_kept(store):
    for number in range(1, 12):
        store.finish_round(committed(number, number + 1), rows(number, TaskPhase.ACCEPTED), {}, None)
    assert store.task("token-3-0") is None
    assert store.task("token-4-0").phase is TaskPhase.ACCEPTED
    assert store.round(1) == committed(1, 2)


def test_a_locked_or_foreign_database_is_a_storage_error(tmp_path, store):
    store._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "run.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="database is locked"):
        store.save_version(Version(1, 0, b"x"))
    other.close()
    store.save_version(Version(1, 0, b"x"))
    (tmp_path / "other.sqlite").write_bytes(b"something else entirely" * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        RunStore(tmp_path / "other.sqlite")


def test_records_of_rounds_long_past_are_forgotten_but_that_of_the_newest_version(tmp_path):
    store = RunStore(tmp_path / "run.sqlite", keep_rounds=20)
    store.finish_round(committed(1, 2), [], {}, Version(2, 1, b"x"))
    for number in range(2, 60):
        store.finish_round(Round(number=number), [], {}, None)
    records, more = store.rounds(1 << 62, 100)
    assert [record.number for record in records] == [*range(59, 39, -1), 1]
    assert not more
    assert store.add_scores(2, {"accuracy": 0.5}, {}).metrics == {"accuracy": 0.5}
    store.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE workers SET registration = x'ff'",
        "UPDATE histories SET history = x'ff'",
        "UPDATE rounds SET record = x'ff'",
        "UPDATE tasks SET phase = 99",
        "UPDATE tasks SET token = '../../elsewhere'",
        "UPDATE run SET phase = 99",
        "UPDATE versions SET record = x'ff'",
    ],
)
def test_a_row_that_makes_no_sense_is_one_line_that_names_the_database(store, damage):
    store.save_run(RUNNING)
    store.save_worker(RegisterRequest(worker="w0"))
    store.save_open_round(Round(number=1), 1, 0.0, rows(1, TaskPhase.OFFERED), {"w0": WorkerHistory().chosen(1)})
    store.save_version(Version(1, 0, b"x"))
    store._db.execute(damage)
    with pytest.raises(StorageError, match=r"run\.sqlite is damaged") as caught:
        (store.run(), list(store.workers()), store.open_round(), store.latest_version())
    assert "\n" not in str(caught.value)


def test_names_of_scores_make_room_for_newer_ones(store):
    store.save_run(RUNNING)
    store.finish_round(committed(1, 2), [], {}, Version(2, 1, b"x"))
    for number in range(3):
        record = store.add_scores(2, {}, {f"score-{number}-{name:02}": 0.5 for name in range(40)})
    assert len(record.evaluator_metrics) == 64
    assert sum(name.startswith("score-2") for name in record.evaluator_metrics) == 40
