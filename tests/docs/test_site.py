"""The check of the built site finds what a browser would ask another host for, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.check_site import faults


@pytest.mark.parametrize(
    ("loads", "fault"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn.example/x.js"),
        ('<link rel="preconnect" href="//fonts.example">', "loads //fonts.example"),
        ('<img src="images/gone.png">', "needs images/gone.png"),
    ],
)
def test_a_page_that_asks_another_host_or_lacks_a_file_is_a_fault(tmp_path: Path, loads: str, fault: str) -> None:
    (tmp_path / "index.html").write_text(f"<html><head>{loads}</head></html>")
    (found,) = faults(tmp_path)
    assert fault in found


def test_a_style_sheet_that_asks_another_host_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "x.css").write_text("body { background: url('https://cdn.example/x.png') }")
    assert list(faults(tmp_path)) == ["x.css loads https://cdn.example/x.png"]


def test_links_for_people_may_lead_anywhere(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"")
    (tmp_path / "index.html").write_text('<a href="https://example.org">there</a><img src="there.png?v=1">')
    assert list(faults(tmp_path)) == []
