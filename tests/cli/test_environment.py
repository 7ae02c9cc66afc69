"""The command in odd environments: variables of services, no home, closed streams, folders that go."""

import json
import shutil
import subprocess
import sys
import time

import pytest

from fedgrpc.cli.options import check_variables
from fedgrpc.errors import UsageError
from tests.support.command_line import environment, fedgrpc, running_command

PREFIX = "FEDGRPC_AGGREGATOR_"
KNOWN = [PREFIX + key for key in ("ROUNDS", "ADDRESS", "PORT_FILE", "MIN_WORKERS", "DEADLINE")]


@pytest.mark.parametrize("key", ["ROUND", "ROUNDSS", "ADRESS", "MIN_WORKER", "DEAD_LINE"])
def test_a_misspelt_variable_is_refused_with_the_one_that_was_meant(key):
    with pytest.raises(UsageError, match=f"{PREFIX}{key}; did you mean {PREFIX}"):
        check_variables(KNOWN, PREFIX, [PREFIX + key])


@pytest.mark.parametrize(
    "key",
    [
        *("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_GRPC", "PORT", "PORT_50051_TCP", "PORT_50051_TCP_PROTO"),
        *("PORT_50051_TCP_PORT", "PORT_50051_TCP_ADDR", "METRICS_PORT_9090_TCP", "METRICS_SERVICE_HOST", "IMAGE"),
        *("ROUNDS", "PORT_FILE"),
    ],
)
def test_variables_of_kubernetes_and_of_others_are_left_alone(key):
    check_variables(KNOWN, PREFIX, [PREFIX + key, "FEDGRPC_WORKER_ROUND", "PATH"])


def test_a_misspelt_variable_ends_the_command_before_it_does_anything(tmp_path):
    folder = tmp_path / "run"
    ended = fedgrpc("aggregator", "--data-dir", str(folder), env={"FEDGRPC_AGGREGATOR_ROUND": "5"})
    assert (ended.code, folder.exists()) == (2, False)
    assert "FEDGRPC_AGGREGATOR_ROUNDS" in ended.error
    assert len(ended.error.strip().splitlines()) == 1


def test_a_user_without_a_home_is_asked_for_the_state_folder(monkeypatch):
    code = """
import os, pwd, sys
os.environ.pop("HOME", None)
def nobody(*_):
    raise KeyError
pwd.getpwuid = nobody
from fedgrpc.cli.main import run
sys.exit(run(["worker", "--aggregator", "127.0.0.1:1", "--name", "pi"]))
"""
    own = {name: value for name, value in environment().items() if name not in ("HOME", "XDG_STATE_HOME")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own, timeout=120)
    assert done.returncode == 2
    assert "--state-dir" in done.stderr
    assert "Traceback" not in done.stderr


def closed(*arguments):
    """The command, started with all three standard streams closed."""
    program = [sys.executable, "-m", "fedgrpc", *arguments]
    return subprocess.Popen(["bash", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "bash", *program], env=environment())


def test_an_aggregator_and_a_worker_with_closed_streams_do_their_work(tmp_path):
    port = tmp_path / "port"
    place = ("--data-dir", str(tmp_path / "run"), "--address", "127.0.0.1:0", "--port-file", str(port))
    leading = closed("aggregator", *place, "--rounds", "1", "--min-workers", "1")
    try:
        until(lambda: port.exists() and port.read_text())
        working = closed("worker", *worker_arguments(port, tmp_path / "pi"))
        try:
            assert working.wait(120) == 0
            assert leading.wait(60) == 0
        finally:
            working.kill()
            working.wait()
    finally:
        leading.kill()
        leading.wait()


def worker_arguments(port, state):
    target = f"127.0.0.1:{port.read_text().strip()}" if port.exists() else "127.0.0.1:1"
    who = ("--aggregator", target, "--name", "pi", "--state-dir", str(state), "--serve-address", "none")
    return (*who, "--task", "bring_your_own_numpy")


def until(condition):
    ends_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.05)


def test_an_aggregator_whose_folder_is_removed_ends_with_one_line(tmp_path):
    folder, port = tmp_path / "run", tmp_path / "port"
    place = ("--data-dir", str(folder), "--address", "127.0.0.1:0", "--port-file", str(port))
    with running_command("aggregator", *place, log=tmp_path / "log") as aggregator:
        until(port.exists)
        shutil.rmtree(folder)
        assert aggregator.wait(60) == 2
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert str(folder) in last
    assert "removed" in last


def test_a_worker_whose_state_folder_is_removed_ends_with_one_line(tmp_path):
    port, state = tmp_path / "port", tmp_path / "pi"
    place = ("--data-dir", str(tmp_path / "run"), "--address", "127.0.0.1:0", "--port-file", str(port))
    policy = ("--min-workers", "1", "--rounds", "1000000")
    with running_command("aggregator", *place, *policy, log=tmp_path / "log"):
        until(lambda: port.exists() and port.read_text())
        with running_command("worker", *worker_arguments(port, state), log=tmp_path / "log-pi") as worker:
            until(lambda: "update acknowledged" in (tmp_path / "log-pi").read_text())
            shutil.rmtree(state, ignore_errors=True)
            shutil.rmtree(state, ignore_errors=True)
            assert worker.wait(60) == 2
    lines = (tmp_path / "log-pi").read_text().splitlines()
    assert str(state) in lines[-1]
    assert "Traceback" not in "\n".join(lines)
    assert all(json.loads(line)["event"] for line in lines[:-1])


def test_a_second_aggregator_is_refused_though_files_of_the_folder_were_deleted(tmp_path):
    folder, port = tmp_path / "run", tmp_path / "port"
    place = ("--data-dir", str(folder), "--address", "127.0.0.1:0")
    with running_command("aggregator", *place, "--port-file", str(port), log=tmp_path / "log"):
        until(port.exists)
        for path in folder.glob("lock*"):
            path.unlink()
        ended = fedgrpc("aggregator", *place)
    assert ended.code == 2
    assert "in use" in ended.error


def test_no_line_of_grpc_stands_between_the_lines_of_the_log(tmp_path):
    arguments = worker_arguments(tmp_path / "no port", tmp_path / "pi")
    with running_command("worker", *arguments, log=tmp_path / "log") as worker:
        until(lambda: (tmp_path / "log").read_text().count("disconnected") > 1)
        worker.terminate()
        worker.wait(60)
    assert all(json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines())
