"""tools/reproduce_zhang2021.py draws the paper's figures from what it measured."""

import json
import sys
from pathlib import Path

import pytest

from tools import reproduce_zhang2021 as paper


def test_a_single_run_draws_the_figures_of_its_parts_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "SAMPLES", (40, 1000))
    arguments = ["--out", str(tmp_path), "--runs", "1", "--epochs", "2", "--part", "samples"]
    monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
    paper._main()
    assert {path.name for path in tmp_path.glob("*.png")} == {"figure2.png", "figure3.png"}
    rows = json.loads((tmp_path / "results.json").read_text())["samples"]["rows"]
    assert len(rows["float32/40"]["accuracy_by_epoch"]["middle"]) == 2


def test_float64_takes_twice_the_memory_of_float32_but_for_the_labels() -> None:
    wide, narrow = (paper.peak_bytes(paper.PAPER_FORMATS[name], 1000, 2) for name in ("float64", "float32"))
    labels = 8 * 1000
    assert [peak - labels for peak in wide] == [2 * (peak - labels) for peak in narrow]


def test_the_first_epoch_of_the_threshold_counts() -> None:
    assert paper.Run((1.0, 1.0, 1.0), (0.5, paper.REACHED, 0.99)).epochs_to_reach == 2
    assert paper.Run((1.0,), (0.5,)).epochs_to_reach is None
