"""Flags of other frameworks' tutorials are answered with the flag to use here."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import AGGREGATOR_FLAGS, WORKER_FLAGS
from tests.support.command_line import fedgrpc
from tools.count_lines import code_lines

DOCUMENT = Path(__file__).parents[2] / "docs" / "coming_from.md"
EXAMPLES = DOCUMENT.parents[1] / "examples"


def _flags(name: str) -> set[str]:
    return {flag for param in load_command(name).params for flag in (*param.opts, *param.secondary_opts)}


@pytest.mark.parametrize(("command", "table"), [("aggregator", AGGREGATOR_FLAGS), ("worker", WORKER_FLAGS)])
def test_every_answer_is_a_flag_of_the_command_and_no_question_is(command: str, table: dict[str, str]) -> None:
    known = _flags(command)
    assert set(table.values()) <= known
    assert not known & table.keys()


@pytest.mark.parametrize("table", [AGGREGATOR_FLAGS, WORKER_FLAGS])
def test_the_document_has_every_flag_as_its_tutorial_writes_it(table: dict[str, str]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for former, right in table.items():
        written = {former, "--" + former.removeprefix("--").replace("-", "_")}
        rows = [line for line in text.splitlines() if any(f"`{flag}" in line for flag in written)]
        assert any(f"`{right}" in row for row in rows), former


def test_the_table_of_lines_has_those_of_our_examples() -> None:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if "](../examples/" in line]
    assert len(rows) >= 7
    for row in rows:
        ours = row.split("|")[3]
        name = re.search(r"examples/(\w+\.py)", ours)
        assert name is not None
        assert int(ours.split()[0]) == code_lines((EXAMPLES / name[1]).read_text(encoding="utf-8")), name[1]


def test_blank_lines_comments_and_docstrings_are_no_code() -> None:
    assert (
        code_lines(
            '"""One.\n\nTwo."""\n# three\n\nx = (\n    1,  # four\n)\ndef f():\n    """Five."""\n    return x\n'
        )
        == 5
    )


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["worker", "--server_address=a:1"], "--aggregator"),
        (["worker", "--aggregator", "a:1", "--cid", "1"], "--name"),
        (["worker", "--aggregator", "a:1", "--rounds", "3"], "fedgrpc aggregator --rounds"),
        (["worker", "--aggregator", "a:1", "--lr", "0.1"], "fedgrpc aggregator --learning-rate"),
        (["aggregator", "--server_address", "0.0.0.0:8080"], "--address"),
        (["aggregator", "--min_num_clients=1"], "--min-workers"),
        (["aggregator", "--min_sample_size=1"], "--min-sample-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_an_unknown_flag_of_a_tutorial_is_answered_with_the_right_one(arguments: list[str], answer: str) -> None:
    ended = fedgrpc(*arguments)
    assert ended.code == 2
    assert answer in ended.error
    assert "--serve-address" not in ended.error
    assert ended.error.count("\n") == 1


def test_a_flag_that_no_tutorial_has_is_answered_as_click_does() -> None:
    with pytest.raises(click.NoSuchOption, match="--frobnicate"):
        load_command("worker").main(["--frobnicate"], "worker", standalone_mode=False)
