"""The tutorials do what they say: files and commands run in the order of the page, and print what it shows."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.blocks import blocks_of, printed, script_of, shape

ROOT = Path(__file__).parent.parent.parent
TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = sorted(path.name for path in TUTORIALS.glob("*.md") if path.name != "index.md")
TIMEOUT_S = 400


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return str(listening.getsockname()[1])


def run_page(text: str, folder: Path) -> str:
    """Run the page in `folder` with a port of its own; return what it printed."""
    log = folder / "log"
    # The page's own address may be taken, by another test or by a fleet on this machine.
    port = free_port()
    script = script_of(text.replace("50051", port), log)
    (folder / "home").mkdir()
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}:{ROOT}",
        "OMP_NUM_THREADS": "1",
        "HOME": str(folder / "home"),
        "FEDGRPC_AGGREGATOR_ADDRESS": f"127.0.0.1:{port}",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            code = process.wait(TIMEOUT_S)
        finally:
            stop_all_of(process.pid)
    said = log.read_text()
    assert code == 0, said[-4000:]
    return said


def stop_all_of(session: int) -> None:
    """End what the page has left in the background."""
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.mark.faults
@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_runs_as_it_stands_and_prints_what_it_shows(page: str, tmp_path: Path) -> None:
    text = (TUTORIALS / page).read_text()
    said = run_page(text, tmp_path)
    shapes = {shape(line) for line in said.splitlines()}
    missing = [line for line in printed(text) if shape(line) not in shapes]
    assert missing == [], said[-4000:]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_tutorial_is_run_or_says_why_not(page: str) -> None:
    text = (TUTORIALS / page).read_text()
    script_of(text, Path("log"))
    assert any(block.kind == "sh" and block.mark != "not run" for block in blocks_of(text))


def test_a_page_waits_for_what_its_output_says_before_the_next_block() -> None:
    page = "```sh\nstart &\n```\n\n<!-- wait: serving -->\n\n```sh\nuse\n```\n"
    assert [block.kind for block in blocks_of(page)] == ["sh", "wait", "sh"]
    script = script_of(page, Path("log"))
    assert script.index("start &") < script.index("grep") < script.index("use\n")


def test_a_failing_command_of_a_page_fails_and_lines_are_compared_without_their_numbers(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run_page("```sh\nfalse\ntrue\n```\n", tmp_path)
    assert shape("round 1 committed: 3 of 3 updates in 1.27 s") == shape(
        "round 12 committed: 5 of 5 updates in 40 ms"
    )
    assert printed("```text\na 1\n...\nb\n```\n") == ["a 1", "b"]
