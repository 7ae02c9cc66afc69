"""The code of the guides runs: all blocks of a page, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import ROOT, environment

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["python", "extend"])
def test_the_code_of_a_guide_runs(name: str, tmp_path: Path) -> None:
    blocks = BLOCK.findall((ROOT / "docs" / "guide" / f"{name}.md").read_text())
    assert len(blocks) > 1
    script = tmp_path / "guide.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
