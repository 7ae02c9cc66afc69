"""Sweeps: which points there are, what is played again, and what their plots show."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedgrpc.cli.experiment import parse_experiment
from fedgrpc.cli.sweep import COMMAND, curves_of, tidy_rows
from fedgrpc.errors import UsageError
from fedgrpc.simulation.learning.plots import Curve, band_of, pareto_front, plot_curves
from fedgrpc.simulation.learning.sweep import play_points, points_of
from fedgrpc.simulation.learning.versions import VersionRow

BASE: dict[str, Any] = {
    "learning": {"task": "tests.support.simulated_task:Blobs", "partition": "iid"},
    "aggregator": {"rounds": 2, "min_workers": 3},
    "devices": [{"name": "pi", "count": 3, "examples_per_s": 100.0, "up_mbit": 8.0, "down_mbit": 8.0}],
}
GRID = {"aggregator": {"encoding": ["raw", "int8+zstd"], "epochs": [1, 2, 3]}}


def _points(**document: Any):
    return points_of({"experiment": "x.toml", "grid": GRID, **document}, BASE, parse_experiment)


def test_a_grid_has_every_combination_with_every_seed() -> None:
    points = _points(seeds=[1, 2])
    assert len(points) == 12
    assert len({point.folder for point in points}) == 12
    settings = [point.experiment.settings for point in points]
    assert {(each.upload_recipe, each.plan.epochs, each.seed) for each in settings} == {
        (recipe, epochs, seed) for recipe in ("raw", "int8+zstd") for epochs in (1.0, 2.0, 3.0) for seed in (1, 2)
    }
    assert points[0].label == "encoding=raw, epochs=1"
    assert {point.experiment.learning.seed for point in points} == {1, 2}


def test_a_choice_changes_several_settings_at_once() -> None:
    rules = {"all": {"aggregator": {"deadline": "1h"}}, "short": {"aggregator": {"deadline": "5m", "quorum": 2}}}
    points = _points(grid={"aggregator": {"epochs": [1, 2]}}, choices={"rule": rules}, hours=3)
    assert [point.label for point in points] == [
        f"epochs={epochs}, rule={rule}" for epochs in (1, 2) for rule in ("all", "short")
    ]
    policies = [point.experiment.settings.policy for point in points[:2]]
    assert [(each.deadline_s, each.quorum) for each in policies] == [(3600.0, 1), (300.0, 2)]
    assert {point.hours for point in points} == {3}


@pytest.mark.faults
def test_points_of_a_sweep_end_after_its_hours(tmp_path: Path) -> None:
    grid = {"aggregator": {"rounds": [1000]}}
    results = play_points(_points(grid=grid, hours=0.02), tmp_path, 1)
    (rows,) = results.values()
    assert 2 <= len(rows) < 1000
    assert rows[-1].virtual_h <= 0.02


def test_a_random_search_draws_some_points_and_the_same_ones_again() -> None:
    some = _points(search="random", samples=3, seed=5)
    assert len(some) == 3
    assert [point.choices for point in some] == [
        point.choices for point in _points(search="random", samples=3, seed=5)
    ]


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ({"grid": {"aggregator": {"epochs": 3}}}, "list"),
        ({"grid": {"aggregator": {"epocs": [3]}}}, "epochs"),
        ({"seeds": []}, "seeds"),
        ({"samples": 3}, "random"),
        ({"grids": {}}, "grids"),
        ({"hours": 0}, "hours"),
        ({"choices": {"rule": {}}}, "rule"),
        ({"choices": {"rule": {"short": {"aggregator": 3}}}}, "rule"),
        ({"choices": {"rule": {"short": {"aggregator": {"epochs": 3}}}}}, "two axes"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_played(document: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        _points(**document)


@pytest.mark.faults
def test_points_are_played_in_processes_and_those_that_are_done_are_not_played_again(tmp_path: Path) -> None:
    points = _points(seeds=[1], grid={"aggregator": {"epochs": [1, 2]}})
    shown: list[int] = []
    results = play_points(points, tmp_path, 2, shown.append)
    assert shown == [0, 1, 2]
    rows = tidy_rows(points, results)
    assert len(rows) == 6
    assert {row["aggregator.epochs"] for row in rows} == {1, 2}
    assert all("eval_accuracy" in row for row in rows)
    assert play_points(points, tmp_path, 2, shown.append) == results
    assert shown[3:] == [2]
    assert len(curves_of(points, results)) == 2


def _point(**changes: Any):
    (point,) = _points(**{"seeds": [1], "grid": {"aggregator": {"epochs": [1]}}, **changes})
    return point


def test_a_point_that_is_done_is_never_played_again_and_one_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Numbers of points move when a grid grows: results of other settings passed for those of the new ones."""
    done = play_points([_point()], tmp_path, 1)
    shutil.rmtree(tmp_path / "points" / _point().folder / "run")
    assert play_points([_point()], tmp_path, 1) == done
    assert not (tmp_path / "points" / _point().folder / "run").exists()
    other = _point(grid={"aggregator": {"epochs": [2]}})
    assert other.folder == _point().folder
    with pytest.raises(UsageError, match=r"begun with aggregator\.epochs = 1, and the grid asks for 2"):
        play_points([other], tmp_path, 1)


def test_points_are_scored_at_equal_virtual_hours_and_go_on_to_later_ones(tmp_path: Path) -> None:
    def played(hours: float) -> list[VersionRow]:
        (rows,) = play_points([_point(grid={"aggregator": {"rounds": [1000]}}, hours=hours)], tmp_path, 1).values()
        return rows

    early = played(0.01)
    assert early[-1].virtual_h <= 0.01
    assert played(0.01) == early
    later = played(0.02)
    assert 0.01 < later[-1].virtual_h <= 0.02
    assert later[: len(early) - 1] == early[:-1]
    with pytest.raises(UsageError, match=r"has 0\.02 virtual hours"):
        played(0.01)


@pytest.mark.extras
def test_the_table_for_programs_has_what_the_one_for_people_has(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "x.toml").write_text(
        '[learning]\ntask = "tests.support.simulated_task:Blobs"\npartition = "iid"\nevaluate_every = 2\n'
        "[aggregator]\nrounds = 2\nmin_workers = 3\n"
        '[[devices]]\nname = "pi"\ncount = 3\nexamples_per_s = 100.0\nup_mbit = 8.0\ndown_mbit = 8.0\n'
    )
    (tmp_path / "grid.toml").write_text(
        'experiment = "x.toml"\n[grid.aggregator]\nepochs = [1.5, 2.5]\nlearn_deadline = [true, false]\n'
        '[choices.rule.all.aggregator]\ndeadline = "1h"\n'
    )
    COMMAND.main(
        [str(tmp_path / "grid.toml"), "--out", str(tmp_path / "out"), "--jobs", "1"], standalone_mode=False
    )
    with (tmp_path / "out/sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    rows = parquet.read_table(tmp_path / "out/sweep.parquet").to_pylist()
    assert list(rows[0]) == list(lines[0])
    assert [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows] == lines
    assert {(row["aggregator.epochs"], row["aggregator.learn_deadline"]) for row in rows} == {
        (epochs, learned) for epochs in (1.5, 2.5) for learned in (True, False)
    }


def _row(version: int, megabytes: float, score: float | None) -> VersionRow:
    scores = {} if score is None else {"accuracy": score}
    return VersionRow(version, version, megabytes, 1.0, 1, 0, int(megabytes * 1e6), 1.0, 0.0, None, scores)


def test_every_column_of_a_version_is_there_once() -> None:
    """The loss of training was there twice, as `loss` and `train_loss`."""
    columns = replace(_row(1, 1.0, 0.5), loss=0.25).to_dict()
    assert columns["train_loss"] == 0.25
    assert [name for name in columns if "loss" in name] == ["train_loss"]


def test_a_band_is_the_mean_and_its_interval_where_all_runs_have_scores() -> None:
    runs = [[_row(1, 0.0, 0.1), _row(2, 2.0, 0.5)], [_row(1, 1.0, 0.3), _row(2, 3.0, 0.7)]]
    band = band_of(runs, lambda row: row.virtual_h)
    assert band is not None
    assert (band.x[0], band.x[-1]) == (1.0, 2.0)
    assert band.mean == pytest.approx(np.linspace(0.3, 0.5, band.x.size))
    # Student's t of one degree of freedom on two scores that are equally far apart all along: there, both are 0.3.
    assert band.reach == pytest.approx(np.zeros(band.x.size), abs=1e-9)
    assert band_of([[_row(1, 1.0, None)]], lambda row: row.virtual_h) is None


def test_no_other_point_beats_one_of_the_front_in_both() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (2.0, 0.9), (3.0, 0.9), (0.5, 0.1)]
    assert pareto_front(points) == [4, 0, 2]


def test_curves_with_and_without_scores_become_a_picture(tmp_path: Path) -> None:
    runs = ([_row(n, n, n / 10) for n in range(5)], [_row(n, n + 0.5, n / 11) for n in range(5)])
    plot_curves([Curve("one", runs), Curve("none", ([_row(1, 1.0, None)],))], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="must end in"):
        plot_curves([Curve("one", runs)], tmp_path / "p.txt")
