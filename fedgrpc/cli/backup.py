"""`fedgrpc backup` and `fedgrpc restore`: a data folder in one file, taken while its aggregator works, and back.

exit code 0     done; one line says what
          1     the disk is full or cannot be read; a backup is damaged
          2     a folder or file that cannot be used
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from fedgrpc.cli.options import Declare, SettingsCommand
from fedgrpc.storage.backup import restore_backup, write_backup
from fedgrpc.words import size

_where = Declare("Where")


def _backup(**values: Any) -> None:
    path: Path = values["file"]
    backup = write_backup(values["data_dir"], path)
    click.echo(f"{path}: {len(backup.files)} files, {size(backup.size_bytes)}; it holds keys, so keep it private")


def _restore(**values: Any) -> None:
    folder: Path = values["data_dir"]
    backup = restore_backup(values["file"], folder)
    taken = datetime.fromtimestamp(backup.created_at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    click.echo(f"{folder}: {len(backup.files)} files, {size(backup.size_bytes)}, as of {taken}")


def _command(name: str, run: Any, help: str, data_dir: Any, file_exists: bool) -> SettingsCommand:
    command = SettingsCommand(name, run, [data_dir], help)
    kind = click.Path(path_type=Path, dir_okay=False, exists=file_exists)
    command.params[:0] = [click.Argument(["file"], type=kind)]
    return command


BACKUP = _command(
    "backup",
    _backup,
    "Copy a data folder into FILE, also while its aggregator works.",
    _where(
        "--data-dir",
        "Data folder of the aggregator on this host.",
        type=click.Path(path_type=Path, exists=True, file_okay=False),
        required=True,
    ),
    file_exists=False,
)
RESTORE = _command(
    "restore",
    _restore,
    "Make a data folder of the backup FILE.",
    _where(
        "--data-dir",
        "Folder to make; it may be there, if it is empty.",
        type=click.Path(path_type=Path, file_okay=False),
        required=True,
    ),
    file_exists=True,
)
