"""Releases outlive an aggregator that is killed: one goes through, and one is taken back."""

import json
import signal
import socket
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.command_line import NUMPY_TASK, fedgrpc, running_command, until_line, worker_arguments

pytestmark = pytest.mark.faults
PATIENCE_S = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def aggregator(folder: Path, address: str, number: int):
    settings = ["--address", address, "--data-dir", str(folder / "data"), "--task", NUMPY_TASK, "--stay"]
    rounds = ["--rounds", "3", "--min-workers", "3", "--keep-versions", "9"]
    log = folder / f"aggregator-{number}.log"
    with running_command("aggregator", *settings, *rounds, log=log) as process:
        until_line(log, "serving", process)
        yield process, log


def shown(address: str) -> dict:
    done = fedgrpc("release", "show", "--json", "--aggregator", address)
    return json.loads(done.out) if done.code == 0 else {}


def until_phase(address: str, number: int, phase: str) -> dict:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        found = shown(address)
        if found.get("number") == number and found.get("phase") == phase:
            return found
    raise AssertionError(f"release {number} is not {phase}: {shown(address)}")


def until_followed(serving: str, file: Path, told: str) -> None:
    """Follow the model of the device that serves there, until it is that one: the next poll tells it."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        followed = fedgrpc("model", "follow", "--once", "--to", str(file), "--worker", serving)
        assert followed.code == 0, followed
        if told in followed.out:
            return
    raise AssertionError(f"{serving} does not follow {told}: {followed}")


def test_releases_go_through_and_back_over_kills_of_the_aggregator(tmp_path):
    address, where = f"127.0.0.1:{free_port()}", {}
    with ExitStack() as stack:
        first, log = stack.enter_context(aggregator(tmp_path, address, 1))
        for name in ("pi-1", "pi-2", "pi-3"):
            where[name] = f"127.0.0.1:{free_port()}"
            arguments = worker_arguments(tmp_path, address, name, "--stay", "--reconnect-cap", "1s")
            arguments[arguments.index("--serve-address") + 1] = where[name]
            stack.enter_context(running_command(*arguments, log=tmp_path / f"{name}.log"))
        until_line(log, "run ended", first)

        started = fedgrpc(
            *("release", "@2", "--canary", "pi-1,pi-2", "--watch", "accuracy>=0", "--after", "8s"),
            *("--aggregator", address),
        )
        assert started.code == 0, started.error
        first.send_signal(signal.SIGKILL)
        first.wait()
        second, _ = stack.enter_context(aggregator(tmp_path, address, 2))
        done = until_phase(address, 1, "done")
        assert set(done["canaries"]) == {"pi-1", "pi-2"}
        file = tmp_path / "app.safetensors"
        for serving in where.values():
            until_followed(serving, file, "version 2 (release 1)")
        expected = load_file(tmp_path / "data" / "models" / "000002.safetensors")
        assert all((load_file(file)[key] == array).all() for key, array in expected.items())

        started = fedgrpc(
            *("release", "@3", "--canary", "pi-3", "--watch", "accuracy>=1.1", "--after", "10m"),
            *("--aggregator", address),
        )
        assert started.code == 0, started.error
        second.send_signal(signal.SIGKILL)
        second.wait()
        stack.enter_context(aggregator(tmp_path, address, 3))
        back = until_phase(address, 2, "rolled_back")
        assert "median accuracy of 1 device" in back["reason"]
        until_followed(where["pi-3"], file, "version 2 (release 1)")
        assert all((load_file(file)[key] == array).all() for key, array in expected.items())
        audit = fedgrpc("audit", "--last", "0", "--aggregator", address)
        assert audit.code == 0
        assert "Models/Done" in audit.out
        assert "Models/RolledBack" in audit.out
