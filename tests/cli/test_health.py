"""`fedgrpc health`: what a container's health check runs."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import (
    NUMPY_TASK,
    aggregator_command,
    environment,
    fedgrpc,
    running_command,
    until_line,
    worker_arguments,
)
from tests.support.processes import free_address


def test_a_serving_aggregator_is_healthy_as_a_whole_and_by_service(tmp_path: Path) -> None:
    with aggregator_command(tmp_path, "--task", NUMPY_TASK) as (_, address):
        for service in ([], ["--service", "fedgrpc.v1.Aggregator"]):
            ended = fedgrpc("health", "--address", address, *service)
            assert (ended.code, ended.out, ended.error) == (0, "SERVING\n", "")
        other = fedgrpc("health", "--address", address, "--service", "fedgrpc.v1.Worker")
        assert (other.code, other.out) == (1, "NOT_FOUND\n")


def test_a_worker_is_healthy_while_its_aggregator_is_away(tmp_path: Path) -> None:
    aggregator, service = free_address(), free_address()
    arguments = worker_arguments(tmp_path, aggregator, "pi-1", "--serve-address", service)
    with running_command(*arguments, log=tmp_path / "pi-1.log") as worker:
        until_line(tmp_path / "pi-1.log", '"serving"', worker)
        ended = fedgrpc("health", "--service", "fedgrpc.v1.Worker", env={"FEDGRPC_HEALTH_ADDRESS": service})
        assert (ended.code, ended.out) == (0, "SERVING\n")


def test_nobody_there_is_unhealthy() -> None:
    ended = fedgrpc("health", "--address", free_address())
    assert (ended.code, ended.out, ended.error) == (1, "UNAVAILABLE\n", "")


def test_one_that_does_not_answer_in_time_is_unhealthy() -> None:
    """It accepts the connection, and says nothing: a process that hangs."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        ended = fedgrpc("health", "--address", address, "--timeout", "200ms")
    assert ended.code == 1
    assert ended.out in ("DEADLINE_EXCEEDED\n", "UNAVAILABLE\n")


def test_a_frozen_aggregator_is_unhealthy_and_healthy_again_when_it_goes_on(tmp_path: Path) -> None:
    with aggregator_command(tmp_path, "--task", NUMPY_TASK) as (process, address):
        process.send_signal(signal.SIGSTOP)
        frozen = fedgrpc("health", "--address", address, "--timeout", "300ms")
        process.send_signal(signal.SIGCONT)
        assert frozen.code == 1
        again = fedgrpc("health", "--address", address, "--timeout", "30s")
        assert (again.code, again.out) == (0, "SERVING\n")


def test_a_wrong_address_is_a_usage_error() -> None:
    ended = fedgrpc("health", "--address", "nonsense")
    assert ended.code == 2
    assert ended.error.startswith("error: ")


@pytest.mark.parametrize("module", ["numpy", "torch", "structlog", "rich", "importlib.metadata", "fedgrpc.rounds"])
def test_it_loads_no_more_than_it_needs(module: str) -> None:
    """It starts again every few seconds, on small devices."""
    code = f"import sys, fedgrpc.cli.health; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=300).returncode == 0
