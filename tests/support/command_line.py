"""The command `fedgrpc` as its users run it: a process, with its own environment and folder."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from fedgrpc.cli.main import run
from fedgrpc.logging import configure

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NUMPY_TASK = "bring_your_own_numpy"


@dataclass(frozen=True)
class EndedCommand:
    """What an ended command has left."""

    code: int
    out: str
    error: str


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's, without settings of fedgrpc, to run this very source tree with the examples to import."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("FEDGRPC_")}
    return own | {"PYTHONPATH": f"{ROOT}:{EXAMPLES}", "OMP_NUM_THREADS": "1", "COLUMNS": "100"} | dict(more or {})


def fedgrpc(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 300
) -> EndedCommand:
    """Run the command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "fedgrpc", *arguments],
        capture_output=True,
        text=True,
        env=environment(env),
        cwd=cwd,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )
    return EndedCommand(done.returncode, done.stdout, done.stderr)


def fedgrpc_here(*arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> EndedCommand:
    """Run a command that ends at once, such as a wrong one, in this process: another costs a second of CPU."""
    out, error = io.StringIO(), io.StringIO()
    try:
        with (
            mock.patch.dict(os.environ, environment(env), clear=True),
            mock.patch.object(sys, "path", [*sys.path, str(EXAMPLES)]),
            chdir(cwd or Path.cwd()),
            redirect_stdout(out),
            redirect_stderr(error),
        ):
            code = run(arguments)
    finally:
        configure(level="warning", log_format="console", stream=sys.__stderr__)
    return EndedCommand(code, out.getvalue(), error.getvalue())


@contextmanager
def running_command(*arguments: str, log: Path, cwd: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The command while the block lasts; its output goes to `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedgrpc", *arguments],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment(),
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


@contextmanager
def aggregator_command(folder: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An aggregator on a free port, and its address."""
    fifo = folder / "port"
    os.mkfifo(fifo)
    settings = ["--address", "127.0.0.1:0", "--data-dir", str(folder / "data"), "--port-file", str(fifo)]
    log = folder / "aggregator.log"
    with running_command("aggregator", *settings, *arguments, log=log) as process:
        yield process, f"127.0.0.1:{_read_port(fifo, process, log)}"


def _read_port(fifo: Path, process: subprocess.Popen[bytes], log: Path) -> int:
    """Opening the pipe waits for the aggregator; should it have died, nobody would come."""
    reader = subprocess.Popen(["head", "-n1", str(fifo)], stdout=subprocess.PIPE, text=True)
    try:
        text, _ = reader.communicate(timeout=300)
        return int(text)
    except subprocess.TimeoutExpired:
        reader.kill()
        reader.wait()
        raise AssertionError(f"no port; exit code {process.poll()}: {log.read_text()}") from None


def worker_arguments(folder: Path, address: str, name: str, *more: str) -> list[str]:
    """A worker with its own state folder and no service of its own."""
    place = [
        "--aggregator",
        address,
        "--name",
        name,
        "--state-dir",
        str(folder / name),
        "--allow-task",
        NUMPY_TASK,
    ]
    return ["worker", *place, "--serve-address", "none", *more]


def until_line(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Until a line of `log` has `text`: `tail` wakes as the file grows, and ends with the process."""
    tail = subprocess.Popen(
        ["tail", "-n", "+1", "-F", f"--pid={process.pid}", str(log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert tail.stdout is not None
        assert any(text in line for line in tail.stdout), log.read_text()
    finally:
        tail.kill()
        tail.wait()
