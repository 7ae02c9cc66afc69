"""Shells complete commands, those of groups, and flags; manual pages name every command and setting."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedgrpc.cli import COMMANDS
from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import SettingsCommand
from tools.man_pages import overview, page


def asked(**variables: str) -> str:
    environment = {**os.environ, **variables}
    command = [str(Path(sys.executable).parent / "fedgrpc")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize(
    ("words", "completed"),
    [("fedgrpc wor", "worker"), ("fedgrpc run sub", "submit"), ("fedgrpc worker --partit", "--partition")],
)
def test_bash_completes_commands_and_flags(words: str, completed: str) -> None:
    cursor = str(len(words.split()) - 1)
    said = asked(_FEDGRPC_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=cursor)
    assert f"plain,{completed}" in said.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_calls_back(shell: str) -> None:
    assert f"_FEDGRPC_COMPLETE={shell}_complete" in asked(_FEDGRPC_COMPLETE=f"{shell}_source")


def test_manual_pages_have_every_command_and_all_its_flags() -> None:
    index = overview("2026-11-30")
    for name in COMMANDS:
        assert f"fedgrpc-{name}".replace(" ", "-").replace("-", "\\-") in index
    command = load_command("worker")
    assert isinstance(command, SettingsCommand)
    text = page("worker", "2026-11-30").replace("\\-", "-")
    assert [flag for setting in command.settings() for flag in setting.opts if flag not in text] == []
