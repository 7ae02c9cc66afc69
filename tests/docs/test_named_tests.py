"""Tests that documents name as their proof are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "protos").rglob("*.md")]
# Names in capitals stand for any. A file; or a test of it, or of the file that was named last.
NAMED = re.compile(r"\b(tests/[a-z_\d/]+\.py)\b|::(test_\w+)")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_document_names_is_there(path: Path) -> None:
    missing, source = [], ""
    for match in NAMED.finditer(path.read_text()):
        file, test = match.groups()
        if file is not None:
            found = ROOT / file
            source = found.read_text() if found.exists() else ""
            missing += [] if source else [file]
        elif not re.search(rf"\bdef {test}\b", source):
            missing.append(test)
    assert not missing
