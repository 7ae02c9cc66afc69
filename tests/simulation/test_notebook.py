"""The notebook of the guide runs from top to bottom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import EXAMPLES, environment

pytestmark = pytest.mark.extras


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "simulation.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not any(cell.get("outputs") for cell in cells)
    path = tmp_path / "notebook.py"
    path.write_text(code)
    done = subprocess.run(
        [sys.executable, str(path)],
        env=environment({"MPLBACKEND": "Agg"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
