"""Pictures: labels cover nothing, and what is published is drawn from the tables of its pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.text import Annotation

from fedgrpc.errors import UsageError
from fedgrpc.plots import check_plot, label_points, new_figure, save, styles
from tools.pictures import DOCS, draw_encodings, number, rows_of


def labels_of(panel: Any) -> list[Any]:
    return [each for each in panel.texts if isinstance(each, Annotation) and each.get_text()]


def overlapping(panel: Any) -> list[tuple[str, str]]:
    panel.figure.canvas.draw()
    boxes = [(each.get_text(), Annotation.get_window_extent(each)) for each in labels_of(panel)]
    pairs = [(one, other) for i, one in enumerate(boxes) for other in boxes[i + 1 :]]
    return [(one[0], other[0]) for one, other in pairs if one[1].overlaps(other[1])]


@pytest.mark.parametrize("seed", range(5))
def test_names_of_crowded_points_cover_neither_each_other_nor_the_edge(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = {f"encoding {i}": (float(x), float(y)) for i, (x, y) in enumerate(rng.normal(0, 0.02, (20, 2)))}
    _, (panel,) = new_figure(1, 10, 7)
    panel.set(xlim=(-0.2, 0.2), ylim=(-0.2, 0.2))
    for point in points.values():
        panel.plot(*point, "o")
    label_points(panel, points)
    assert {each.get_text() for each in labels_of(panel)} == set(points)
    assert overlapping(panel) == []
    room = panel.get_window_extent()
    assert all(
        room.x0 <= box.x0 and box.x1 <= room.x1 for box in map(Annotation.get_window_extent, labels_of(panel))
    )


def test_without_placing_the_same_names_do_cover_each_other() -> None:
    _, (panel,) = new_figure(1, 10, 7)
    panel.set(xlim=(-1, 1), ylim=(-1, 1))
    for name in ("one name", "another"):
        panel.annotate(name, (0.0, 0.0))
    assert overlapping(panel) == [("one name", "another")]


def test_the_published_encodings_are_all_named_and_readable(tmp_path: Path) -> None:
    rows = rows_of(DOCS / "transport.md", "encoding (up / down)")
    points = [
        (
            row["encoding (up / down)"],
            number(row["up MB/round (fewer)"]),
            number(row["both (fewer)"]),
            number(row["accuracy"]),
        )
        for row in rows
    ]
    figure = draw_encodings(points, tmp_path / "encodings.png")
    assert (tmp_path / "encodings.png").stat().st_size > 10_000
    assert [overlapping(panel) for panel in figure.axes] == [[], []]
    # float32 is in both panels.
    assert sum(len(labels_of(panel)) for panel in figure.axes) == len(rows) + 1


def test_series_differ_by_colour_and_marker() -> None:
    looks = [look for look, _ in zip(styles(), range(77), strict=False)]
    assert len(set(looks)) == 77


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.doc", "x"])
def test_a_picture_that_cannot_be_written_is_refused_before_it_is_drawn(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the plot"):
        check_plot(tmp_path / name)


def test_a_picture_is_written_in_the_format_of_its_name(tmp_path: Path) -> None:
    figure, _ = new_figure(2, 6, 3)
    save(figure, tmp_path / "x.svg")
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()
