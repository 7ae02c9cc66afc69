"""How pip inside an image's build finds packages where pip on this machine finds them, as flags of `podman build`.

`python -m tools.containers.pip_here FOLDER` writes pip.conf there, from every place that pip reads, and prints the
mounts of it and of the folders that it names, one word a line.
"""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

# What a build inside of a container has no use for.
_LEFT_OUT = {"cache-dir", "user", "require-virtualenv", "target", "prefix"}


def settings(listed: str) -> dict[str, str]:
    """By name, from what `pip config list` prints; variables of the environment come first, as in pip."""
    found: dict[str, str] = {}
    for line in listed.splitlines():
        place, _, value = line.partition("=")
        section, _, name = place.rpartition(".")
        known = section in ("global", "install", ":env:") and name not in _LEFT_OUT
        if known and (section == ":env:" or f":env:.{name}=" not in listed):
            found[name] = str(ast.literal_eval(value))
    return found


def folders(found: dict[str, str]) -> list[str]:
    """Local folders that the settings name: wheels, certificates, indexes as files with what lies beside them."""
    words = " ".join(found.values()).split()
    paths = [re.sub(r"^file://|/simple/?$", "", word) for word in words]
    return sorted({path for path in paths if path.startswith("/") and Path(path).exists()})


def main(folder: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    )
    found = settings(listed.stdout)
    config = configparser.RawConfigParser()
    config["global"] = found
    path = folder / "pip.conf"
    with path.open("w") as file:
        config.write(file)
    for source, target in [(str(path), "/etc/pip.conf"), *((each, each) for each in folders(found))]:
        print(f"--volume={source}:{target}:ro")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
