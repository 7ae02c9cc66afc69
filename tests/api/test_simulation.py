"""Simulations from a program: the rows are those of the command."""

from __future__ import annotations

import csv

import pytest

from fedgrpc import simulate, sweep
from fedgrpc.errors import UsageError

EXPERIMENT = {
    "learning": {"task": "tests.support.simulated_task"},
    "aggregator": {"rounds": 2, "min_workers": 2, "encoding": "raw"},
    "devices": [{"name": "pi", "count": 2, "examples_per_s": 100.0, "up_mbit": 20.0, "down_mbit": 20.0}],
}


async def test_a_simulation_returns_its_versions_also_beside_an_event_loop(tmp_path):
    rows = simulate(EXPERIMENT, tmp_path / "out", seed=3)
    assert [row.version for row in rows] == [1, 2, 3]
    with (tmp_path / "out" / "versions.csv").open() as file:
        assert [int(row["version"]) for row in csv.DictReader(file)] == [1, 2, 3]
    assert simulate(EXPERIMENT, seed=3) == rows
    with pytest.raises(UsageError, match="holds a simulation"):
        simulate(EXPERIMENT, tmp_path / "out")


def test_a_simulation_resumes_with_the_settings_it_was_begun_with(tmp_path):
    """A folder that was begun in raw went on in another encoding without a word."""

    def changed(**settings):
        aggregator = {**EXPERIMENT["aggregator"], **settings}
        return simulate({**EXPERIMENT, "aggregator": aggregator}, tmp_path / "out", resume=True)

    simulate(EXPERIMENT, tmp_path / "out", hours=0.5 / 3600)
    with pytest.raises(UsageError, match=r"begun with aggregator\.encoding = 'raw'.* asks for 'int8\+zstd'"):
        changed(encoding="int8+zstd")
    with pytest.raises(UsageError, match=r"begun with aggregator\.min_workers = 2"):
        changed(**{"min-workers": 1})
    # When it ends, and what is told of it, may change.
    more = changed(rounds=3, track=[f"jsonl:{tmp_path / 'told.jsonl'}"], patience=10)
    assert [row.version for row in more] == [1, 2, 3, 4]


def test_a_sweep_returns_a_row_for_each_version_of_each_point(tmp_path):
    grid = {"seeds": [0], "experiment": "", "grid": {"aggregator": {"rounds": [1, 2]}}}
    rows = sweep(grid, tmp_path / "out", jobs=1, experiment=EXPERIMENT)
    assert [(row["aggregator.rounds"], row["version"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert rows.to_dicts() == [dict(row) for row in rows]


def test_an_experiment_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="rounds"):
        simulate({**EXPERIMENT, "aggregator": {"round": 3}})
