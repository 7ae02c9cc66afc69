"""Simulations that learn: the same bytes wherever clients train, and whatever cuts them off."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedgrpc.aggregator.driver import Upkeep
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import FedgrpcError, UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.runs.round_in_progress import RoundInProgress
from fedgrpc.simulation.fleet import DeviceKind
from fedgrpc.simulation.learning.aggregator import _Store
from fedgrpc.simulation.learning.client_files import ClientFiles, HeldModels
from fedgrpc.simulation.learning.client_work import ClientWork
from fedgrpc.simulation.learning.engine import Engine, InProcess, Pending
from fedgrpc.simulation.learning.engines import running_engine
from fedgrpc.simulation.learning.experiment import Experiment, Learning
from fedgrpc.simulation.learning.history import History, RoundRow
from fedgrpc.simulation.learning.run import LearningRun
from fedgrpc.simulation.learning.task import DeviceTask
from fedgrpc.simulation.learning.versions import version_rows
from fedgrpc.simulation.learning.world import World
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.run_store import RunStore
from fedgrpc.submodels.plan import LocalModelPlan, Pruning
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.training_plan import TrainingPlan

TASK = "tests.support.simulated_task:Blobs"
QUICK = DeviceKind("pi", 8, up_mbit=1.0, down_mbit=4.0, examples_per_s=100.0)
POLICY = RoundPolicy(min_workers=4, max_participants=4, selection_window_s=0.0, deadline_s=60.0, lease_s=20.0)
STEADY = replace(QUICK, spread=0.0, jitter=0.0)
VARYING = replace(QUICK, spread=0.3, jitter=0.3)
CHURNING = replace(QUICK, available=0.7, session_s=5.0, failure=0.1, jitter=0.3, spread=0.3)
CARRIES = replace(POLICY, over_selection=2.0, late="carry")
ASKS_MORE = {"policy": replace(POLICY, over_selection=1.5)}
INT8 = {"download_recipe": "int8+zstd"}
ENTROPY = {**INT8, "upload_recipe": "entropy:c=3+zstd", "difference_recipe": "entropy:c=1+zstd"}
DIGITS = {"task": "fedgrpc.tasks.digits", "model": "mlp"}
SCAFFOLD = TrainingPlan(1.0, learning_rate=0.1, momentum=0.0, algorithm="scaffold")
PRUNED = {
    **INT8,
    "learning": DIGITS,
    "local_models": PlanTable(LocalModelPlan(0.5), {"pi": LocalModelPlan(pruning=Pruning(0.5))}),
}


def _experiment(*classes: DeviceKind, learning: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    values = {"rounds": 5, "upload_recipe": "int4+zstd", "download_recipe": "int8+zstd", "seed": 3, **changes}
    learns = {"task": TASK, "partition": "dirichlet:0.5", **(learning or {})}
    settings = AggregatorSettings(
        Path(), policy=values.pop("policy", POLICY), plan=values.pop("plan", TrainingPlan(epochs=2.0)), **values
    )
    return Experiment(classes or (QUICK,), Learning(**learns), settings)


def _play(experiment: Experiment, folder: Path, engine: str = "inline", jobs: int = 1, **more: Any) -> History:
    with running_engine(engine, experiment, jobs) as running:
        return LearningRun(experiment, folder, running, seed=1).run(**more)


def _told(history: History) -> list[tuple[int, int, str, float, tuple[str, ...]]]:
    return [(row.round, row.version, row.sha256, row.virtual_s, row.workers) for row in history.rows]


def test_it_learns_and_tells_what_that_took(tmp_path: Path) -> None:
    history = _play(_experiment(), tmp_path)
    rows = version_rows(history)
    assert [row.version for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[0].score < 0.5 < 0.8 < rows[-1].score  # type: ignore[operator]
    assert all(row.updates == 4 for row in rows[1:])
    assert all(one.virtual_h < other.virtual_h for one, other in pairwise(rows))
    assert rows[-1].up_bytes > 0 < rows[-1].down_bytes
    assert rows[-1].wasted_share == 0


def test_every_engine_and_number_of_processes_gives_the_same_bytes(tmp_path: Path) -> None:
    experiment = _experiment(CHURNING, **ASKS_MORE)
    inline = _play(experiment, tmp_path / "inline")
    assert inline.rows[-1].version == 6
    pooled = _play(experiment, tmp_path / "pool", "processes", 2)
    assert _told(pooled) == _told(inline)
    assert pooled.scores() == inline.scores()


class _Interrupted(Exception):
    pass


def _faults(*values: Any, engine: str = "inline") -> Any:
    return pytest.param(*values, engine, marks=pytest.mark.faults)


@pytest.mark.parametrize(
    ("kind", "settings", "after", "engine"),
    [
        (VARYING, INT8, 5, "inline"),
        (CHURNING, {**ASKS_MORE, **ENTROPY}, 4, "inline"),
        # In the one that scores the last version, which was then scored once more.
        (VARYING, INT8, 8, "inline"),
        _faults(STEADY, {"download_recipe": "raw"}, 0),
        _faults(VARYING, {**INT8, "choosing": SelectionPolicy("oort", learn_deadline=True)}, 4),
        _faults(replace(CHURNING, count=20), {**ASKS_MORE, **INT8, "server_optimizer": "fedadam"}, 3),
        _faults(CHURNING, {**ASKS_MORE, **INT8}, 5, engine="processes"),
        _faults(CHURNING, {**ASKS_MORE, "download_recipe": "auto", "upload_recipe": "auto"}, 4),
        _faults(CHURNING, {**ASKS_MORE, **PRUNED}, 4),
        _faults(CHURNING, {**INT8, "learning": DIGITS, "plan": SCAFFOLD}, 4),
        _faults(VARYING, {**INT8, "policy": CARRIES}, 4),
        # Rounds that lack updates are abandoned, and rest the longer the more of them there were.
        _faults(CHURNING, {"policy": replace(POLICY, quorum=4, deadline_s=6.0, lease_s=4.0)}, 7),
    ],
)
def test_a_simulation_that_was_cut_off_goes_on_as_if_it_had_not_been(
    kind: DeviceKind, settings: dict[str, Any], after: int, engine: str, tmp_path: Path
) -> None:
    experiment = _experiment(kind, **{"rounds": 7, **settings})
    whole = _play(experiment, tmp_path / "whole")

    def interrupt(row: RoundRow, part: float) -> None:
        if row.round == after:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        _play(experiment, tmp_path / "cut", engine, jobs=2, show=interrupt)
    resumed = _play(experiment, tmp_path / "cut", engine, jobs=2)
    assert [replace(row, cpu_s=0.0) for row in resumed.rows] == [replace(row, cpu_s=0.0) for row in whole.rows]
    assert resumed.scores() == whole.scores()


def _half_a_line(history: History, world: World, round_: RoundInProgress) -> RoundRow:
    with history._path.open("a") as file:
        file.write('{"round": ')
    raise _Interrupted


# Where a kill may come between two rounds, in order.
_RECORDED = (_Store, "finish_round", None)
_HALF_A_LINE = (History, "add", _half_a_line)
_NOTED = (_Store, "keep", None)
_KEPT = (World, "settle", None)
_HALF_SETTLED = (ClientFiles, "settle", None)
_SETTLED = (HeldModels, "keep_only", None)
_CLEARING = (Upkeep, "clear_away", None)
# And in a round.
_TRAINING = (InProcess, "begin", None)
_TASK_ENDED = (DeviceTask, "drop", None)


def _kill(monkeypatch: pytest.MonkeyPatch, where: Any, calls: int) -> None:
    """Stop at so many calls of a method, as a kill would: nothing is closed in order."""
    owner, name, instead = where
    whole, left = getattr(owner, name), itertools.count(calls - 1, -1)

    def call(*args: Any, **named: Any) -> Any:
        if next(left):
            return whole(*args, **named)
        monkeypatch.setattr(_Store, "close", RunStore.close)
        if instead is not None:
            instead(*args, **named)
        elif where is _RECORDED:
            whole(*args, **named)
        raise _Interrupted

    monkeypatch.setattr(owner, name, call)


PERSONAL = {**INT8, "learning": DIGITS, "local_models": PlanTable(LocalModelPlan(personal_layers=("layers.1.*",)))}


@pytest.mark.parametrize(
    ("where", "calls", "settings", "engine"),
    [
        (_RECORDED, 4, INT8, "inline"),
        (_HALF_A_LINE, 4, INT8, "inline"),
        (_NOTED, 6, INT8, "inline"),
        (_KEPT, 4, INT8, "inline"),
        (_HALF_SETTLED, 14, INT8, "inline"),
        (_SETTLED, 4, INT8, "inline"),
        (_CLEARING, 9, INT8, "inline"),
        (_TRAINING, 15, INT8, "inline"),
        (_TASK_ENDED, 3, PERSONAL, "inline"),
        *(
            _faults(where, calls, settings)
            for where, calls in ((_RECORDED, 5), (_NOTED, 5), (_HALF_SETTLED, 10), (_CLEARING, 8), (_TRAINING, 18))
            for settings in (
                # Of these, devices keep nothing that would be settled.
                *((ENTROPY, PRUNED) if where is not _HALF_SETTLED else ()),
                PERSONAL,
                {"learning": DIGITS, "plan": SCAFFOLD},
                {**INT8, "server_optimizer": "fedadam"},
                {"policy": replace(POLICY, quorum=4, deadline_s=6.0, lease_s=4.0)},
            )
        ),
    ],
)
def test_a_simulation_that_is_killed_anywhere_goes_on_as_if_it_had_not_been(
    where: Any, calls: int, settings: dict[str, Any], engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the record of a round and its line in the history, it was refused; personal layers ran ahead."""
    experiment = _experiment(CHURNING, **{"rounds": 6, **ASKS_MORE, **settings})
    whole = _play(experiment, tmp_path / "whole", engine)
    with monkeypatch.context() as patch:
        _kill(patch, where, calls)
        with pytest.raises(_Interrupted):
            _play(experiment, tmp_path / "cut", engine)
    resumed = _play(experiment, tmp_path / "cut", engine)
    assert [replace(row, cpu_s=0.0) for row in resumed.rows] == [replace(row, cpu_s=0.0) for row in whole.rows]
    assert resumed.scores() == whole.scores()


class _Watched:
    """An engine that counts what an evaluator has scored."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.facts, self.close = engine.facts, engine.close
        self.scored = 0

    def begin(self, work: ClientWork) -> Pending:
        """See `Engine.begin`."""
        self.scored += work.client is None
        return self._engine.begin(work)


def test_a_simulation_whose_hours_are_over_scores_nothing_once_more_when_it_is_resumed(tmp_path: Path) -> None:
    experiment = _experiment()
    hours = 12 / 3600
    before = _play(experiment, tmp_path, hours=hours)
    with running_engine("inline", experiment, 1) as running:
        engine = _Watched(running)
        after = LearningRun(experiment, tmp_path, engine, seed=1).run(hours=hours)
    assert after.scores() == before.scores()
    assert not engine.scored


def test_hours_that_end_in_the_pause_after_an_abandoned_round_change_nothing(tmp_path: Path) -> None:
    """Such a simulation did not resume: its last round was recorded, and its line was not written."""
    policy = replace(POLICY, quorum=4, deadline_s=6.0, lease_s=4.0)
    experiment = _experiment(CHURNING, rounds=5, policy=policy)
    whole = _play(experiment, tmp_path / "whole")
    abandoned = next(row for row in whole.rows if not row.committed)
    # The line is written at the end of the pause.
    some = _play(experiment, tmp_path / "cut", hours=(abandoned.virtual_s - 0.1) / 3600)
    assert some.rows[-1].round == abandoned.round - 1
    resumed = _play(experiment, tmp_path / "cut")
    assert [replace(row, cpu_s=0.0) for row in resumed.rows] == [replace(row, cpu_s=0.0) for row in whole.rows]
    assert resumed.scores() == whole.scores()


def test_half_of_the_channels_take_less_time_to_train(tmp_path: Path) -> None:
    """A plan that only cuts a sub-model took as long as the whole model."""

    def trained_s(plan: LocalModelPlan) -> float:
        devices = replace(STEADY, count=4, examples_per_s=50.0)
        more = {"learning": DIGITS, "rounds": 1, "local_models": PlanTable(plan)}
        return _play(_experiment(devices, **more), tmp_path / str(plan.width)).rows[-1].trained_s

    assert trained_s(LocalModelPlan(0.5)) < trained_s(LocalModelPlan())


def test_fedasync_learns_on_devices_of_unequal_speed(tmp_path: Path) -> None:
    slow = replace(QUICK, name="slow", count=2, examples_per_s=10.0)
    policy = replace(POLICY, late="carry", buffer_size=1, max_participants=None)
    settings = {"policy": policy, "plan": TrainingPlan(2.0, algorithm="fedasync:alpha=0.6,s=hinge,a=10,b=4")}
    rows = version_rows(_play(_experiment(replace(QUICK, count=4), slow, rounds=40, **settings), tmp_path))
    assert rows[-1].version == 41
    assert all(row.updates == 1 for row in rows[1:])
    assert rows[-1].score > 0.8  # type: ignore[operator]


def test_virtual_hours_end_it_and_it_goes_on_from_there(tmp_path: Path) -> None:
    experiment = _experiment()
    some = _play(experiment, tmp_path, hours=12 / 3600)
    assert 1 < some.rows[-1].version < 6
    assert _play(experiment, tmp_path).rows[-1].version == 6


def test_devices_that_miss_the_deadline_waste_their_training(tmp_path: Path) -> None:
    slow = replace(QUICK, name="slow", count=4, examples_per_s=1.0)
    policy = replace(POLICY, min_workers=8, max_participants=8, quorum=4, deadline_s=30.0)
    history = _play(_experiment(replace(QUICK, count=4), slow, policy=policy), tmp_path)
    trained = [row for row in history.rows if row.kind == "train"]
    assert all(row.committed for row in trained)
    assert all(all(name.startswith("pi-") for name in row.workers) for row in trained)
    assert trained[0].duration_s == pytest.approx(30.0, abs=1.0)
    assert version_rows(history)[-1].wasted_share > 0.5


def test_training_for_a_round_that_was_abandoned_is_wasted(tmp_path: Path) -> None:
    """Updates that were accepted in time counted as training that a version has."""
    slow = replace(STEADY, name="slow", count=3, examples_per_s=1.0)
    policy = replace(POLICY, min_workers=6, max_participants=6, quorum=6, deadline_s=10.0, lease_s=5.0)
    with pytest.raises(FedgrpcError, match="paused"):
        _play(_experiment(replace(STEADY, count=3), slow, policy=policy), tmp_path)
    last = History(tmp_path / "history.jsonl").rows[-1]
    assert not last.committed
    assert last.accepted > 1
    assert last.wasted_s == pytest.approx(last.trained_s, rel=1e-6)


def test_a_simulation_resumes_with_its_own_seed_alone(tmp_path: Path) -> None:
    experiment = _experiment()
    _play(experiment, tmp_path, hours=12 / 3600)
    with running_engine("inline", experiment, 1) as running, pytest.raises(UsageError, match="seed 1, not 2"):
        LearningRun(experiment, tmp_path, running, seed=2).run()


@pytest.mark.parametrize("left", [0, 50])
def test_a_history_that_lacks_a_round_which_the_database_has_is_refused(left: int, tmp_path: Path) -> None:
    """It was resumed with other rounds, or ended with an error of a file."""
    experiment = _experiment()
    _play(experiment, tmp_path, hours=12 / 3600)
    history = tmp_path / "history.jsonl"
    lines = history.read_text().splitlines(keepends=True)
    history.write_text("".join(lines[:-1]) + lines[-1][:left])
    with pytest.raises(UsageError, match="does not have round"):
        _play(experiment, tmp_path)
    history.write_text("".join(lines))
    assert _play(experiment, tmp_path).rows[-1].version == 6


def test_with_a_reserve_for_the_upload_slow_devices_train_less_and_come_in_time(tmp_path: Path) -> None:
    slow = replace(QUICK, name="slow", count=4, examples_per_s=4.0, scored_per_s=100.0)
    policy = replace(POLICY, min_workers=4, deadline_s=30.0)
    plan = TrainingPlan(epochs=2.0, batch_size=8, upload_reserve_s=5.0)
    history = _play(_experiment(slow, policy=policy, plan=plan), tmp_path)
    trained = [row for row in history.rows if row.kind == "train"]
    assert all(len(row.workers) == 4 for row in trained)
    assert all(20.0 < row.duration_s < 30.0 for row in trained)


def test_a_run_that_has_paused_itself_ends_the_simulation_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(FedgrpcError, match="no camera"):
        _play(_experiment(learning={"options": {"fails": "true"}}), tmp_path)
    kept = History(tmp_path / "history.jsonl").rows
    assert kept[0].committed
    assert not any(row.committed for row in kept[1:])


@pytest.mark.parametrize("engine", ["inline", pytest.param("processes", marks=pytest.mark.faults)])
def test_a_learning_task_that_is_not_there_is_said_in_one_line(engine: str, tmp_path: Path) -> None:
    experiment = replace(_experiment(), learning=Learning("tests.support.no_such_task"))
    with pytest.raises(UsageError, match="no module"):
        _play(experiment, tmp_path, engine)


def test_every_client_keeps_its_residual_on_the_disk(tmp_path: Path) -> None:
    history = _play(_experiment(), tmp_path)
    took_part = {name for row in history.rows if row.kind == "train" for name in row.workers}
    kept = {path.parent.name for path in (tmp_path / "devices" / "clients").glob("*/residual")}
    assert kept == took_part
    assert not list((tmp_path / "devices" / "clients").glob("*/next.*"))


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_a_simulation_killed_while_its_database_was_made_begins_anew(tmp_path: Path, journal: str) -> None:
    half, run = tmp_path / "half.sqlite", tmp_path / "run"
    run.mkdir()
    database = sqlite3.connect(half, isolation_level=None)
    database.execute(f"PRAGMA journal_mode={journal}")
    if journal == "DELETE":
        # Pages of a transaction that has not ended are in the file, and how to undo them is beside it.
        database.execute("PRAGMA cache_size=1")
        database.execute("BEGIN")
        database.execute("CREATE TABLE t (x)")
        database.executemany("INSERT INTO t VALUES (?)", [(bytes(4000),)] * 50)
    for suffix in ("", "-journal", "-wal", "-shm"):
        if (found := half.with_name(half.name + suffix)).exists():
            shutil.copy(found, run / f"{DATABASE}{suffix}")
    database.close()
    assert History(tmp_path / "history.jsonl").rows == []
