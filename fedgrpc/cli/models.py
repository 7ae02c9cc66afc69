"""`fedgrpc model`: the versions of a run's model: list, get, tag, diff, follow.

A version is RUN@best, RUN@final (of a run that has ended), RUN@17 or RUN@TAG. RUN alone is its latest version, and
@best the best one of the only run.

exit code 0     done
          1     no such run or version; the certificate is not an operator's
          2     a name, a file or a setting that cannot be used
          4     no aggregator answers
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.claims import printable
from fedgrpc.cli.as_json import json_text, plain
from fedgrpc.cli.model_versions import VersionSource, fetched, version_source
from fedgrpc.cli.options import AS_JSON, Declare, Setting, SettingsCommand
from fedgrpc.cli.reach import calling_command, reach_settings
from fedgrpc.cli.view import print_rows, time_text
from fedgrpc.runs.keeping import Reference, checked_tag
from fedgrpc.storage.model_diff import TensorDifference, differences
from fedgrpc.storage.model_file import ModelFile
from fedgrpc.v1 import models_pb2 as pb
from fedgrpc.words import scores, size

_what = Declare("What")
_DATA_DIR = "Data folder of an aggregator on this host; where none runs, the folder itself is read."
_TO: Final = _what(
    "--to",
    "Safetensors file to write; one that is there is replaced.",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
)

Call = Callable[[VersionSource, dict[str, Any]], Awaitable[None]]


def model_command(
    name: str, call: Call, help: str, *settings: Setting, arguments: Sequence[click.Argument] = ()
) -> SettingsCommand:
    """Return a command that makes `call` with the versions of an aggregator or of a data folder."""
    reach = reach_settings(_DATA_DIR)
    return calling_command(name, version_source, call, help, *settings, *reach, arguments=arguments)


def argument(name: str, required: bool = True, default: str | None = None) -> click.Argument:
    """Return an argument of a command: a run, a version or a name."""
    return click.Argument([name], required=required, **({} if default is None else {"default": default}))


async def _list(source: VersionSource, values: dict[str, Any]) -> None:
    listed = await source.versions(values["run"])
    if values["as_json"]:
        click.echo(json_text(plain(listed)))
        return
    rows = [_row(record) for record in listed.versions]
    columns = ("version", "rounds", "scores", "size", "names", "written", "SHA-256")
    print_rows(columns, rows, f"run {listed.run} has no version yet")


def _row(record: pb.VersionRecord) -> tuple[str, ...]:
    version = record.version
    names = [*(["best"] if record.best else []), *(["latest"] if record.latest else []), *record.tags]
    if record.release:
        names.append(f"release {record.release}")
    return (
        str(version.version),
        str(version.trained_rounds),
        scores({**version.metrics, **version.evaluator_metrics}),
        size(record.size_bytes),
        ", ".join(names),
        time_text(record.written_at),
        version.sha256.hex()[:12],
    )


async def _get(source: VersionSource, values: dict[str, Any]) -> None:
    found = await source.version(Reference.parse(values["version"]))
    path: Path = values["to"]
    await source.fetch(found, path)
    click.echo(printable(f"{path}: {named(found)}, {size(found.version.size_bytes)}"))


def named(found: pb.GetVersionResponse) -> str:
    """Return the run and number of a version, and its scores."""
    version = found.version.version
    told = scores({**version.metrics, **version.evaluator_metrics})
    return f"{found.run}@{version.version}" + (f" ({told})" if told else "")


async def _tag(source: VersionSource, values: dict[str, Any]) -> None:
    reference, tag = Reference.parse(values["version"]), values["tag"]
    if values["remove"]:
        await source.remove_tag(reference.run, tag)
        click.echo(f"the tag {tag} is gone; its version is kept while it is one of the last, or the best")
        return
    await source.tag(reference, checked_tag(tag))
    found = await source.version(Reference(reference.run, tag))
    click.echo(f"{named(found)} is {found.run}@{tag} now, and kept")


async def _diff(source: VersionSource, values: dict[str, Any]) -> None:
    with fetched() as folder:
        before, shown_before = await _file_of(source, values["before"], folder / "before.safetensors")
        after, shown_after = await _file_of(source, values["after"], folder / "after.safetensors")
        found = await asyncio.to_thread(lambda: list(differences(ModelFile.open(before), ModelFile.open(after))))
    if values["as_json"]:
        click.echo(json_text([vars(each) for each in found]))
        return
    click.echo(printable(f"{shown_before} -> {shown_after}"))
    rows = [_difference_row(each) for each in found]
    print_rows(("tensor", "shape", "norm", "change", "relative", "largest change"), rows, "no tensors")


async def _file_of(source: VersionSource, text: str, path: Path) -> tuple[Path, str]:
    """Return the file that `text` names, or that of the version that it names, and how it is shown."""
    if await asyncio.to_thread(os.path.isfile, text):
        return Path(text), text
    found = await source.version(Reference.parse(text))
    await source.fetch(found, path)
    return path, named(found)


def _difference_row(each: TensorDifference) -> tuple[str, ...]:
    shape = "x".join(map(str, each.shape)) or "scalar"
    if each.note:
        return each.name, shape, "", each.note, "", ""
    relative = f"{each.change / each.norm:.2%}" if each.norm else ""
    return each.name, shape, f"{each.norm:.4g}", f"{each.change:.4g}", relative, f"{each.largest:.4g}"


MODEL_LIST = model_command(
    "model list",
    _list,
    "Show the versions of RUN that are kept; without RUN, those of the only run.",
    AS_JSON,
    arguments=[argument("run", required=False, default="")],
)
MODEL_GET = model_command(
    "model get",
    _get,
    "Write a VERSION (RUN@best, RUN@17, RUN@TAG) to a file, with run, version, scores and digest in it.",
    _TO,
    arguments=[argument("version")],
)
MODEL_TAG = model_command(
    "model tag",
    _tag,
    "Give a VERSION the name TAG, by which it is kept.",
    _what("--remove", "Take the tag away; VERSION only names the run.", is_flag=True, default=False),
    arguments=[argument("version"), argument("tag")],
)
MODEL_DIFF = model_command(
    "model diff",
    _diff,
    "Show what changed in each tensor from BEFORE to AFTER: versions, or safetensors files.",
    AS_JSON,
    arguments=[argument("before"), argument("after")],
)
