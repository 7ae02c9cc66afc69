"""Write manual pages of the commands to build/man, in roff's man macros, from the declarations of the settings."""

from __future__ import annotations

import argparse
import datetime
import os
from pathlib import Path

import click

from fedgrpc import __version__
from fedgrpc.cli import COMMANDS
from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import Setting, SettingsCommand
from tools.reference.endings import exit_codes

ROOT = Path(__file__).resolve().parent.parent


def text(words: str) -> str:
    """Return words as a line of roff: no dash or quote means anything, and none begins a request."""
    line = " ".join(words.split()).replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


def page(name: str, date: str) -> str:
    command = load_command(name)
    assert isinstance(command, SettingsCommand)
    context = click.Context(command, info_name=name)
    title, usage = f"fedgrpc-{name}".replace(" ", "-"), " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH "{title.upper()}" 1 "{date}" "fedgrpc {__version__}" "fedgrpc"',
        ".SH NAME",
        f"{text(title)} \\- {text((command.help or '').split('. ')[0].rstrip('.'))}",
        ".SH SYNOPSIS",
        f".B {text(f'fedgrpc {name}')}",
        text(usage),
        ".SH DESCRIPTION",
        text(command.help or ""),
        ".SH SETTINGS",
    ]
    heading = ""
    for setting in command.settings():
        if setting.heading != heading:
            heading = setting.heading
            lines.append(f".SS {text(heading)}")
        lines += _setting(setting, context)
    lines += [
        ".SH EXIT STATUS",
        *(line for code, what in exit_codes() for line in (".TP", f".B {code}", text(what))),
    ]
    return "\n".join([*lines, ".SH SEE ALSO", ".BR fedgrpc (1)"]) + "\n"


def _setting(setting: Setting, context: click.Context) -> list[str]:
    flags = ", ".join([*setting.opts, *setting.secondary_opts])
    default = setting.get_help_extra(context).get("default")
    about = f"{setting.help or ''} Variable: {setting.resolve_envvar_name(context)}."
    return [".TP", f".B {text(flags)}", text(f"{about} Default: {default}." if default else about)]


def overview(date: str) -> str:
    lines = [
        f'.TH "FEDGRPC" 1 "{date}" "fedgrpc {__version__}" "fedgrpc"',
        ".SH NAME",
        "fedgrpc \\- federated learning for fleets of unequal edge devices, over gRPC",
        ".SH SYNOPSIS",
        ".B fedgrpc",
        "COMMAND [OPTIONS] [ARGUMENTS]",
        ".SH COMMANDS",
    ]
    for name in COMMANDS:
        command = load_command(name)
        lines += [".TP", f".BR {text(f'fedgrpc-{name}'.replace(' ', '-'))} (1)", text(command.short_help or "")]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "man" / "man1", help="folder to write to")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    # https://reproducible-builds.org/specs/source-date-epoch/
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    day = (
        datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
        if seconds
        else datetime.datetime.now(datetime.UTC)
    )
    date = f"{day:%Y-%m-%d}"
    (folder / "fedgrpc.1").write_text(overview(date))
    for name in COMMANDS:
        (folder / f"fedgrpc-{name.replace(' ', '-')}.1").write_text(page(name, date))
    print(f"{len(COMMANDS) + 1} pages in {folder}: MANPATH={folder.parent}: man fedgrpc")


if __name__ == "__main__":
    main()
