"""Write docs/settings.md from the declarations of the settings; with --check, say whether it is fresh."""

import argparse
import sys
from pathlib import Path

import click

from fedgrpc.cli import COMMANDS
from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import Setting, SettingsCommand

TARGET = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
HEAD = """# Settings

Written by `tools/settings_table.py` from the declarations in `fedgrpc/cli`; `make lint` checks that it is fresh.

Each setting is a flag of its command, a variable `FEDGRPC_<COMMAND>_<SETTING>`, and a key in the command's table
of the TOML file that `--config` names. A flag wins over the variable, the variable over the file, the file over
the default. Times are written 500ms, 30s, 10m, 2h; sizes 4096, 256MB, 4GiB; rates 500kbit, 50mbit.

```toml
[aggregator]
data_dir = "/var/lib/fedgrpc"
min_workers = 5
deadline = "10m"
encoding = "int8+zstd"
target_metric = "accuracy>=0.95"

[aggregator.weight]
pi-1 = 0.4
jetson-1 = 0.6

[worker]
aggregator = "192.168.1.10:50051"
task = "fedgrpc.tasks.fashion_mnist"
data = "/data"
```
"""


def document() -> str:
    return HEAD + "".join(f"\n## fedgrpc {name}\n{_tables(name)}" for name in COMMANDS)


def _tables(name: str) -> str:
    command = load_command(name)
    assert isinstance(command, SettingsCommand)
    context = click.Context(command, info_name=name)
    headings: dict[str, list[Setting]] = {}
    for setting in command.settings():
        headings.setdefault(setting.heading, []).append(setting)
    lines: list[str] = []
    for heading, settings in headings.items():
        lines += ["", f"**{heading}**", "", "| flag | variable | default | |", "| --- | --- | --- | --- |"]
        lines += [_row(setting, context) for setting in settings]
    return "\n".join(lines) + "\n"


def _row(setting: Setting, context: click.Context) -> str:
    extra = setting.get_help_extra(context)
    default = "required" if setting.required else f"`{extra['default']}`" if extra.get("default") else ""
    flags = "/".join([*setting.opts, *setting.secondary_opts])
    what = (setting.help or "").replace("|", "\\|")
    return f"| `{flags}` | `{setting.resolve_envvar_name(context)}` | {default} | {what} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when the page is stale")
    text = document()
    if not parser.parse_args().check:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text)
    elif not TARGET.exists() or TARGET.read_text() != text:
        sys.exit("docs/settings.md is stale: run `make settings`")


if __name__ == "__main__":
    main()
