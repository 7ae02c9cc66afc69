"""`fedgrpc run`: the runs of an aggregator that hosts many. Each is a line of `list`, and has a name.

    fedgrpc run submit run.toml         start a run with the settings in the file's table [run]
    fedgrpc run set NAME deadline=5m    change settings from the next round on

exit code 0     done; one line shows the state of the run
          1     there is no such run, it does not allow this now, or no aggregator answers
          2     a setting that the aggregator refuses, and why
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc import toml
from fedgrpc.calls import Calls
from fedgrpc.cli.operator import steering
from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.cli.reach import client_command
from fedgrpc.cli.values import plain_texts, read_file
from fedgrpc.errors import UsageError
from fedgrpc.v1.aggregator_pb2 import RunPhase, RunSummary
from fedgrpc.words import run_line

TABLE: Final = "run"
# Settings whose files the aggregator reads, on its host.
_PATHS: Final = ("initial_model", "local_models")
_what = Declare("The run")
_NAME: Final = click.Argument(["run_name"], metavar="NAME")
_CHANGES: Final = click.Argument(["changes"], nargs=-1, metavar="[SETTING=VALUE]...")
_SOME_CHANGES: Final = click.Argument(["changes"], nargs=-1, required=True, metavar="SETTING=VALUE...")

Texts = dict[str, list[str]]


def submitted(path: Path) -> tuple[str, Texts]:
    """Return the name and the settings of a run from its file. Raises `UsageError`, which names the file."""
    return read_file(path, lambda text: _submitted(toml.parse(text), path))


def _submitted(content: Mapping[str, Any], path: Path) -> tuple[str, Texts]:
    table = content.get(TABLE)
    if not isinstance(table, dict):
        raise UsageError(f"the settings of a run are in a table [{TABLE}]")
    texts = {key.replace("-", "_"): plain_texts(f"[{TABLE}] {key}", value) for key, value in table.items()}
    (name,) = texts.pop("name", [path.stem])
    return name, _with_whole_paths(texts, path.parent)


def _with_whole_paths(texts: Texts, folder: Path) -> Texts:
    """Paths are as from the folder of the file: the aggregator works elsewhere."""
    whole: Texts = {key: [str((folder / path).resolve()) for path in texts[key]] for key in _PATHS if key in texts}
    return {**texts, **whole}


def changes_of(items: Sequence[str]) -> Texts:
    """Return settings given as NAME=VALUE; one given more than once has all its values. Raises `UsageError`."""
    texts: Texts = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise UsageError(f"{item!r} must look like SETTING=VALUE, as in deadline=5m")
        texts.setdefault(name.strip().removeprefix("--").replace("-", "_"), []).append(value)
    return _with_whole_paths(texts, Path())


async def _submit(client: Calls, values: dict[str, Any]) -> None:
    name, texts = submitted(values["file"])
    click.echo(run_line(await client.submit(values["name"] or name, {**texts, **changes_of(values["changes"])})))


async def _list(client: Calls, values: dict[str, Any]) -> None:
    print_runs(await client.runs())


def print_runs(runs: Sequence[RunSummary]) -> None:
    """Print a line for each run."""
    if not runs:
        click.echo("no runs; `fedgrpc run submit` starts one")
        return
    rows = [("RUN", "PHASE", "ROUND", "VERSION", "WORKERS", "PRIORITY", "TASK"), *map(row_of, runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def row_of(run: RunSummary) -> tuple[str, ...]:
    """Return the cells of a run in `fedgrpc run list`."""
    phase = RunPhase.Name(run.phase).removeprefix("RUN_PHASE_").lower()
    # The last version is scored in a round of its own, which the total does not count.
    number = min(run.current_round, run.total_rounds or run.current_round)
    rounds = f"{number}/{run.total_rounds}" if run.total_rounds else str(number)
    waiting = f", wants {run.wanted_workers}" if run.wanted_workers else ""
    workers = f"{run.busy_workers} of {run.eligible_workers}{waiting}"
    return (run.name, phase, rounds, str(run.model_version), workers, str(run.priority), run.learning_task or "-")


async def _show(client: Calls, values: dict[str, Any]) -> None:
    # The aggregator's settings take a while to import, and only this command shows them.
    from fedgrpc.cli.aggregator_settings import SETTINGS

    run = await client.of(values["run_name"]).run()
    keys = {setting.name: setting.key for setting in SETTINGS}
    shown = {keys.get(name.rpartition(".")[2], name): text for name, text in run.settings.items()}
    click.echo(run_line(run))
    for key, text in sorted(shown.items()):
        click.echo(f"{key:<28} {text}")


async def _set(client: Calls, values: dict[str, Any]) -> None:
    changed = await client.of(values["run_name"]).change(changes_of(values["changes"]))
    for name, text in sorted(changed.items()):
        click.echo(f"{name}: {text}")
    if not changed:
        click.echo("nothing changes")


async def _clone(client: Calls, values: dict[str, Any]) -> None:
    changes = changes_of(values["changes"])
    click.echo(run_line(await client.of(values["run_name"]).clone(values["new_name"], changes, values["version"])))


async def _remove(client: Calls, values: dict[str, Any]) -> None:
    await client.of(values["run_name"]).remove()
    click.echo(f"run {values['run_name']} is removed")


def _command(name: str, call: Any, help: str, *settings: Any, arguments: Sequence[Any] = ()) -> SettingsCommand:
    return client_command(f"run {name}", call, help, *settings, arguments=arguments)


SUBMIT = _command(
    "submit",
    _submit,
    "Start a run with the settings in the table [run] of a FILE; SETTING=VALUE wins over the file.",
    _what("--name", "Name of the run; without: `name` in the file, else the file's name.", type=str, default=None),
    arguments=[click.Argument(["file"], type=click.Path(path_type=Path, exists=True, dir_okay=False)), _CHANGES],
)
LIST = _command("list", _list, "Show every run: where it stands, its workers, and how many it waits for.")
SHOW = _command("show", _show, "Show a run and all of its settings.", arguments=[_NAME])
PAUSE, RESUME, STOP, ROLLBACK = steering("run ", _NAME).values()
SET = _command("set", _set, "Change settings of a run from its next round on.", arguments=[_NAME, _SOME_CHANGES])
CLONE = _command(
    "clone",
    _clone,
    "Start a run called NEW_NAME with the settings of another, some of them changed.",
    _what(
        "--version",
        "Begin with this version of the other run; 0: without a model.",
        type=click.IntRange(0, (1 << 63) - 1),
        default=0,
    ),
    arguments=[_NAME, click.Argument(["new_name"], metavar="NEW_NAME"), _CHANGES],
)
REMOVE = _command(
    "remove", _remove, "Remove a run that has ended, with its models and records.", arguments=[_NAME]
)
