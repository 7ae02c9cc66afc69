"""Flower's deployment: a SuperLink, SuperNodes, and the app in `flower_app`, which `flwr run` hands in."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.bench.peers.rounds import Result, measured, run_logged
from tools.bench.peers.watch import Group

_APP = Path(__file__).parent / "flower_app"
_WORKLOAD = Path(__file__).parents[1] / "transport/workload.py"
_START_S = 60.0


def run(python: Path, width: int, clients: int, rounds: int, folder: Path) -> Result:
    """`rounds` rounds, the first of which does not count."""
    app, marks = folder / "app", folder / "marks.txt"
    shutil.copytree(_APP, app)
    shutil.copy(_WORKLOAD, app / "noise")
    port = 8100
    (folder / "home").mkdir()
    (folder / "home/config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(folder / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    config = f'width={width} rounds={rounds} clients={clients} marks="{marks}"'

    def play() -> None:
        with _federation(clients, port, folder, environment):
            command = ["flwr", "run", str(app), "here", "--run-config", config, "--stream"]
            run_logged(command, folder, environment)

    server = Group(lambda command: "flower-superlink" in command)
    return measured(play, marks, server, Group(lambda command: "flower-supernode" in command), clients)


@contextmanager
def _federation(clients: int, port: int, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """The long-lived processes, until the end of the context."""
    link = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(port)]
    node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
    nodes = [[*node, "--port", str(port + 1 + n), "--node-config", f"number={n}"] for n in range(clients)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate([link, *nodes]):
            with (folder / f"{number}.log").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
                    )
                )
            _until_open(port)
        for number in range(clients):
            _until_open(port + 1 + number)
        yield
    finally:
        for process in reversed(running):
            process.terminate()
        for process in running:
            process.wait(60)
            # What it started looks only now and then whether it is still there.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _until_open(port: int) -> None:
    give_up = time.monotonic() + _START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.1)
