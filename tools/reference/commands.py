"""The commands: usage, arguments and what each does. Their settings are in docs/settings.md."""

from __future__ import annotations

import click

from fedgrpc.cli import COMMANDS, GROUPS
from fedgrpc.cli.main import load_command

HEAD = """# Commands

`fedgrpc COMMAND --help` shows the same, with the settings. A setting is a flag, a variable and a key of a file:
[settings](../settings.md). [Exit codes](errors.md#exit-codes) are those of all commands.

`make man` writes a manual page for each command to `build/man`.

## Completion

The shell completes commands and flags. Put one line into the start file of the shell:

| shell | file | line |
| --- | --- | --- |
| bash | `~/.bashrc` | `eval "$(_FEDGRPC_COMPLETE=bash_source fedgrpc)"` |
| zsh | `~/.zshrc` | `eval "$(_FEDGRPC_COMPLETE=zsh_source fedgrpc)"` |
| fish | `~/.config/fish/config.fish` | `_FEDGRPC_COMPLETE=fish_source fedgrpc \\| source` |

"""


def page() -> str:
    return HEAD + _index() + "".join(_section(name) for name in COMMANDS)


def _index() -> str:
    rows = [f"| [`{name}`](#{_anchor(name)}) | {_short(load_command(name))} |" for name in COMMANDS]
    return "## All commands\n\n| command | |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def _section(name: str) -> str:
    command = load_command(name)
    context = click.Context(command, info_name=f"fedgrpc {name}")
    usage = " ".join([f"fedgrpc {name}", *command.collect_usage_pieces(context)])
    group = f"{GROUPS[name.split()[0]]} " if name.split()[0] in GROUPS and name.split()[1:] else ""
    about = " ".join((command.help or "").split())
    lines = [f"\n## fedgrpc {name}", "", "```", usage, "```", "", about, ""]
    if group:
        lines += [f"*Group `{name.split()[0]}`:* {group.strip()}", ""]
    lines += [f"[Settings of `{name}`](../settings.md#{_anchor(name)})"]
    return "\n".join(lines) + "\n"


def _short(command: click.Command) -> str:
    return " ".join((command.short_help or command.help or "").split()).replace("|", "\\|")


def _anchor(name: str) -> str:
    return f"fedgrpc-{name}".replace(" ", "-")
