"""Folders of runs in the data folder of a process that hosts many, and the file with a run's settings.

DATA/                   the run that the process was started with, if it was
DATA/runs/NAME/         a run that was submitted, with its settings in run.toml
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fedgrpc.errors import UsageError
from fedgrpc.storage.database import DATABASE
from fedgrpc.storage.files import storage_errors, write_file
from fedgrpc.storage.run_store import RunStore

RUNS: Final = "runs"
SETTINGS_FILE: Final = "run.toml"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
# A change of these would be of another run.
_FIXED: Final = frozenset({"initial_model", "learning_task", "model", "run_name", "data_dir", "seed"})

# Settings of a run as text, by their keys in a settings file.
Texts = Mapping[str, Sequence[str]]


def holds_run(folder: Path) -> bool:
    """Return whether the data folder has a run that a process was started with. Raises as `RunStore`."""
    if not (folder / DATABASE).exists():
        return False
    store = RunStore(folder / DATABASE, read_only=True)
    try:
        return store.run() is not None
    finally:
        store.close()


def check_name(name: str) -> None:
    """Raise `UsageError` for what is no name of a run, and so of no folder."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"a run's name is 1 to 64 of letters, digits, '.', '_' and '-', beginning with no sign, "
            f"not {name[:80]!r}"
        )


def check_changeable(changed: Mapping[str, str]) -> None:
    """Raise `UsageError` for settings that cannot change while the run goes on."""
    if wrong := sorted(_FIXED.intersection(changed)):
        raise UsageError(f"{', '.join(wrong)} of a run cannot change: `fedgrpc run clone` starts another with it")


def write_texts(path: Path, texts: Texts) -> None:
    """Write settings as a table of a settings file. Raises `StorageError`."""
    lines = [
        f"{name} = {_toml(list(values) if len(values) != 1 else values[0])}" for name, values in texts.items()
    ]
    with storage_errors(path):
        write_file(path, ("[run]\n" + "\n".join(lines) + "\n").encode())


def _toml(value: str | list[str]) -> str:
    # A JSON text is a TOML text, but for DEL, and for characters outside of the BMP where JSON escapes them.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
