"""Check what `make dist` has built: its files, and that it installs and trains in an empty environment.

    python -m tools.check_distribution dist                    # the wheel, into an environment of its own
    python -m tools.check_distribution dist --extra torch      # and once more with fedgrpc[torch]
    python -m tools.check_distribution dist --python python3.13

Prints one line for each thing that holds, and ends with exit code 1 at the first that does not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "constraints.txt"
# What an sdist has at its top, next to PKG-INFO: enough to build the wheel again, and to write a worker elsewhere.
SDIST = {"fedgrpc", "protos", "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", ".gitignore", "PKG-INFO"}
# What each installation trains: without torch a trainer of NumPy alone, with it an example.
NUMPY_TASK = '''
import numpy as np

from fedgrpc.trainer import EvalResult, TrainResult


class Line:
    """Learn the mean of eight numbers."""

    def initial_weights(self):
        return {"mean": np.zeros(1, np.float32)}

    def train(self, weights, job):
        return TrainResult({"mean": weights["mean"] + 0.1 * (3.5 - weights["mean"])}, 8, 1, {"loss": 1.0})

    def evaluate(self, weights):
        return EvalResult(8, {"loss": float(abs(3.5 - weights["mean"][0]))})
'''
TORCH_TASK = ROOT / "examples" / "bring_your_own_torch.py"


def fail(why: str) -> None:
    sys.exit(f"error: {why}")


def package_files() -> set[str]:
    """Return the files of the package in the repository, as git knows them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "fedgrpc"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).exists()}


def check_wheel(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        about = HeaderParser().parsestr(archive.read(f"fedgrpc-{version}.dist-info/METADATA").decode())
    code = {name for name in names if name.startswith("fedgrpc/")}
    if wrong := sorted(code ^ package_files()):
        fail(f"the wheel and the repository differ in {', '.join(wrong[:5])}")
    if "fedgrpc/py.typed" not in code:
        fail("the wheel has no fedgrpc/py.typed")
    for field in ("License-Expression", "Requires-Python", "Keywords", "Description-Content-Type"):
        if not about[field]:
            fail(f"the metadata have no {field}")
    for field in ("Project-URL", "Classifier"):
        if not about.get_all(field):
            fail(f"the metadata have no {field}")
    print(f"{wheel.name}: {len(code)} files, those of the repository; metadata are complete")


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    if wrong := sorted(tops ^ SDIST):
        fail(f"the sdist should differ in: {', '.join(wrong)}")
    print(f"{sdist.name}: {', '.join(sorted(tops))}")


def try_wheel(wheel: Path, version: str, python: str, extra: str) -> None:
    """Install the wheel into an empty environment; import, ask for the version, and train an example in it."""
    with tempfile.TemporaryDirectory(prefix="fedgrpc-dist-") as folder:
        here = Path(folder)
        run([python, "-m", "venv", "venv"], here)
        inside = str(here / "venv/bin/python")
        what = f"{wheel}[{extra}]" if extra else str(wheel)
        run([inside, "-m", "pip", "install", "--quiet", "--constraint", str(PINS), what], here)
        run([inside, "-m", "pip", "check"], here)
        # -I: neither this checkout nor the user's own packages are seen.
        code = "import fedgrpc, importlib.util as i; print(fedgrpc.__version__, i.find_spec('torch') is not None)"
        expect(run([inside, "-I", "-c", code], here).split(), [version, str(extra == "torch")])
        expect(run(["venv/bin/fedgrpc", "--version"], here).split()[-1:], [version])
        for command in ("aggregator", "worker", "status", "simulate"):
            run(["venv/bin/fedgrpc", command, "--help"], here)
        (here / "learning.py").write_text(TORCH_TASK.read_text() if extra else NUMPY_TASK)
        run(["venv/bin/fedgrpc", "check", "--task", "learning"], here)
        release = run([inside, "-c", "import platform; print(platform.python_version())"], here).strip()
    print(f"fedgrpc{f'[{extra}]' if extra else ''}: installs, starts and trains on Python {release}")


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder))
    if done.returncode != 0:
        fail(f"{' '.join(command[:5])} ended with {done.returncode}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return {**kept, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def expect(found: list[str], wanted: list[str]) -> None:
    if found != wanted:
        fail(f"{found} where {wanted} should be")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with one wheel and one sdist")
    parser.add_argument("--extra", choices=["torch"], action="append", default=[], help="install this extra, too")
    parser.add_argument("--python", action="append", help="Python to install with; repeat for each")
    arguments = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    wheel, sdist = (
        arguments.folder.resolve() / f"fedgrpc-{version}{end}" for end in ("-py3-none-any.whl", ".tar.gz")
    )
    for each in (wheel, sdist):
        if not each.exists():
            fail(f"{each} is missing: make dist")
    check_wheel(wheel, version)
    check_sdist(sdist)
    for python in arguments.python or [sys.executable]:
        for extra in ["", *arguments.extra]:
            try_wheel(wheel, version, python, extra)


if __name__ == "__main__":
    main()
