"""Bad input: one line on standard error that says what and what to do, exit code 2, no traceback."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support.command_line import EndedCommand, aggregator_command, fedgrpc, fedgrpc_here, worker_arguments


def _is_one_line(ended: EndedCommand, *parts: str, code: int = 2) -> None:
    assert ended.code == code, ended.error
    assert ended.error.startswith("error: ")
    assert ended.error.count("\n") == 1, ended.error
    assert "Traceback" not in ended.error
    for part in parts:
        assert part in ended.error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["agregator"], ["No such command 'agregator'"]),
        (["aggregator"], ["--data-dir is missing", "fedgrpc aggregator --help"]),
        (["aggregator", "--data-dir", "d", "--round", "3"], ["No such option", "--round"]),
        (["aggregator", "--data-dir", "d", "--rounds", "three"], ["--rounds", "'three'"]),
        (["aggregator", "--data-dir", "d", "--rounds", "0"], ["rounds must be at least 1, not 0 (from --rounds)"]),
        (["aggregator", "--data-dir", "d", "--deadline", "soon"], ["--deadline", "'soon'", "10m"]),
        (["aggregator", "--data-dir", "d", "--fraction", "1.5"], ["fraction must be above 0 and at most 1"]),
        (["aggregator", "--data-dir", "d", "--encoding", "int9"], ["int9"]),
        (["aggregator", "--data-dir", "d", "--weight", "pi-1"], ["--weight", "'pi-1'", "NAME=VALUE"]),
        (["aggregator", "--data-dir", "d", "--weight", "pi-1=-1"], ["'pi-1' must be a number from 0"]),
        (["aggregator", "--data-dir", "d", "--target-metric", "good"], ["accuracy>=0.95", "'good'"]),
        (
            ["aggregator", "--data-dir", "d", "--server-optimizer", "adam"],
            ["no server optimizer 'adam'", "fedadam"],
        ),
        (["aggregator", "--data-dir", "d", "--initial-model", "no.safetensors"], ["no.safetensors", "not exist"]),
        (["aggregator", "--data-dir", "d", "--address", "50051"], ["'50051' must look like HOST:PORT"]),
        (["aggregator", "--data-dir", "d", "--metrics-address", "9090"], ["'9090' must look like HOST:PORT"]),
        (["aggregator", "--data-dir", "/dev/null/d"], ["/dev/null/d"]),
        (["aggregator", "--data-dir", "d", "--tls-key", __file__], ["TLS", "--tls-cert"]),
        (["aggregator", "--data-dir", ""], ["--data-dir: the path is empty"]),
        (
            ["aggregator", "--data-dir", "d", "--run-name", "a\nb"],
            ["run_name must be 1 to 200 printable characters"],
        ),
        (["aggregator", "--data-dir", "d", "--max-payload", "1e400"], ["--max-payload: '1e400' is more than"]),
        (["aggregator", "--data-dir", "d", "--lease", "1e300"], ["--lease: '1e300' is more than 100000h"]),
        (["rollback", "99999999999999999999"], ["VERSION"]),
        (["aggregator", "--data-dir", "d", "--initialiser", ""], ["initialiser must be a worker's name"]),
        (["aggregator", "--data-dir", "d", "--max-update-norm", "inf"], ["max_update_norm must be a number"]),
        (["worker"], ["--aggregator is missing"]),
        (["worker", "--aggregator", "a:1", "--allow-task", ""], ["--allow-task must name a task"]),
        (["worker", "--aggregator", "a:1", "--min-batch-size", "9" * 23], ["min_batch_size must be at most"]),
        (["worker", "--aggregator", "a:1", "--state-dir", ""], ["--state-dir: the path is empty"]),
        (["worker", "--aggregator", "a:1", "--link", "1e400"], ["--link: '1e400' is more than 100000gbit"]),
        (["worker", "--aggregator", "a:1", "--partition", "shards:x", "--part", "1/2"], ["partition 'shards:x'"]),
        (
            ["worker", "--aggregator", "a:1", "--partition", "iid", "--part", "3/2"],
            ["part '3/2' must look like 3/10"],
        ),
        (["worker", "--aggregator", "there"], ["'there' must look like HOST:PORT"]),
        (["worker", "--aggregator", "a:1", "--name", "a b"], ["worker name 'a b'"]),
        (["worker", "--aggregator", "a:1", "--data", "nowhere"], ["--data", "'nowhere' does not exist"]),
        (["worker", "--aggregator", "a:1", "--slowdown", "0.5"], ["slowdown", "at least 1"]),
        (["worker", "--aggregator", "a:1", "--reconnect-first", "2m"], ["--reconnect-first", "--reconnect-cap"]),
        (["worker", "--aggregator", "a:1", "--link", "fast"], ["--link", "50mbit"]),
        (["worker", "--aggregator", "a:1", "--profile", "legs=4"], ["'legs'", "cpu_cores"]),
        (["worker", "--aggregator", "a:1", "--profile", "cpu_cores=few"], ["cpu_cores", "'few'"]),
        (["worker", "--aggregator", "a:1", "--task", "no_such_task"], ["there is no module 'no_such_task'"]),
        (["worker", "--aggregator", "a:1", "--task", "fedgrpc.tasks:No"], ["has no class 'No'"]),
        (["worker", "--aggregator", "a:1", "--part", "1/2"], ["--partition and --part go together"]),
        (["status", "--aggregator", "there"], ["'there' must look like HOST:PORT"]),
        (["demo", "--workers", "0"], ["--workers"]),
        (["demo", "--encoding", "zip"], ["zip"]),
        (["demo", "--epochs", "0"], ["error: epochs must be a number above 0"]),
        (["demo", "--task", "no_such_task"], ["error: task no_such_task: there is no module 'no_such_task'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_wrong_flag_is_one_line_that_says_what_to_do(
    arguments: list[str], parts: list[str], tmp_path: Path
) -> None:
    _is_one_line(fedgrpc_here(*arguments, cwd=tmp_path), *parts)


def test_the_commands_are_listed_with_all_that_is_said_of_them(tmp_path: Path) -> None:
    listed = fedgrpc("--help", cwd=tmp_path)
    assert "hand out tasks, collect and average updates" in listed.out
    assert "..." not in listed.out.split("Commands:")[1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[aggregator", ["fleet.toml: not valid TOML"]),
        ("[aggregator]\nround = 3\n", ["[aggregator] has no setting 'round'; did you mean 'rounds'?"]),
        ("[agregator]\nrounds = 3\n", ["no table [agregator]; did you mean 'aggregator'?"]),
        ("[learning]\ntask = 't'\n[aggregator]\nrounds = 3\n", ["[learning] is for", "[aggregator] into a file"]),
        ("[aggregator]\nrounds = 3\n[[devices]]\ncount = 1\n", ["[devices] is for", "file of its own"]),
        ("rounds = 3\n", ["'rounds'", "outside of a table", "[aggregator]"]),
        ("[aggregator]\nrounds = 2.5\n", ["--rounds: '2.5'", "(from fleet.toml)"]),
        ("[aggregator]\nrounds = 0\n", ["rounds must be at least 1, not 0 (from fleet.toml)"]),
        ("[aggregator]\nrounds = true\n", ["--rounds: 'true'", "(from fleet.toml)"]),
        ("[aggregator]\nrounds = [1, 2]\n", ["rounds: expected text, a number, true or false, not [1, 2]"]),
        ("[aggregator.rounds]\na = 1\n", ["rounds: expected text, a number, true or false, not {'a': 1}"]),
        ("[aggregator]\nweight = [[1]]\n", ["weight: expected text, a number, true or false, not [1]"]),
        ("[aggregator]\ndeadline = 2024-01-01\n", ["deadline: expected text, a number, true or false"]),
    ],
)
def test_a_wrong_settings_file_is_one_line_that_names_it(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(text)
    _is_one_line(fedgrpc_here("aggregator", "--data-dir", "d", "--config", "fleet.toml", cwd=tmp_path), *parts)


def test_a_settings_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    ended = fedgrpc("aggregator", "--data-dir", "d", "--config", "none.toml", cwd=tmp_path)
    _is_one_line(ended, "cannot read none.toml: No such file or directory")


def test_a_settings_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_bytes(b"\xff\xfe\x00")
    ended = fedgrpc("aggregator", "--data-dir", "d", "--config", "fleet.toml", cwd=tmp_path)
    _is_one_line(ended, "fleet.toml is not UTF-8 text")


def test_a_wrong_variable_is_one_line_that_names_it(tmp_path: Path) -> None:
    ended = fedgrpc("aggregator", "--data-dir", "d", env={"FEDGRPC_AGGREGATOR_ROUNDS": "x"}, cwd=tmp_path)
    _is_one_line(ended, "--rounds: 'x'", "(from the variable FEDGRPC_AGGREGATOR_ROUNDS)")


@pytest.mark.parametrize(
    ("arguments", "variable", "complaint"),
    [
        ([], ("ROUNDS", "0"), "rounds must be at least 1, not 0 (from the variable FEDGRPC_AGGREGATOR_ROUNDS)"),
        ([], ("DEADLINE", "0s"), "number of seconds (from the variable FEDGRPC_AGGREGATOR_DEADLINE)"),
        (
            ["--min-sample-size", "5"],
            ("MAX_PARTICIPANTS", "3"),
            "(min_sample_size from --min-sample-size, "
            "max_participants from the variable FEDGRPC_AGGREGATOR_MAX_PARTICIPANTS)",
        ),
        (["--late", "discard"], ("BUFFER_SIZE", "3"), "buffer_size from the variable FEDGRPC_AGGREGATOR_BUFFER"),
    ],
)
def test_a_value_out_of_range_is_one_line_that_says_where_it_came_from(
    arguments: list[str], variable: tuple[str, str], complaint: str, tmp_path: Path
) -> None:
    name, value = variable
    env = {f"FEDGRPC_AGGREGATOR_{name}": value}
    _is_one_line(fedgrpc_here("aggregator", "--data-dir", "d", *arguments, env=env, cwd=tmp_path), complaint)


@pytest.mark.parametrize("setting", ["--address", "--metrics-address"])
def test_a_port_in_use_is_one_line(setting: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = fedgrpc("aggregator", "--data-dir", "d", setting, address, cwd=tmp_path)
    _is_one_line(ended, address, "in use")


def test_a_data_folder_in_use_is_one_line(tmp_path: Path) -> None:
    with aggregator_command(tmp_path):
        ended = fedgrpc("aggregator", "--data-dir", str(tmp_path / "data"), "--address", "127.0.0.1:0")
    _is_one_line(ended, str(tmp_path / "data"), "in use by another aggregator")


@pytest.mark.parametrize("command", ["status", "watch"])
def test_an_aggregator_out_of_reach_is_one_line(command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    _is_one_line(fedgrpc(command, "--aggregator", address), f"cannot reach an aggregator at {address}", code=4)


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("no_such_module", ["no module 'no_such_module'", "PYTHONPATH"]),
        ("fedgrpc.errors:Nothing", ["no class 'Nothing'"]),
        ("not a module", ["package.module:Class"]),
    ],
)
def test_a_task_that_cannot_be_loaded_ends_the_worker_with_one_line(
    task: str, parts: list[str], tmp_path: Path
) -> None:
    with aggregator_command(tmp_path) as (_, address):
        ended = fedgrpc(*worker_arguments(tmp_path, address, "pi-1", "--task", task, "--log-level", "error"))
    _is_one_line(ended, *parts)


def test_a_worker_without_a_task_says_that_nobody_named_one(tmp_path: Path) -> None:
    with aggregator_command(tmp_path, "--rounds", "1") as (_, address):
        ended = fedgrpc(*worker_arguments(tmp_path, address, "pi-1", "--log-level", "error"))
    _is_one_line(ended, "neither this worker", "--task")


@pytest.mark.parametrize("task", ["own_task", "unittest.__main__", "fedgrpc.tasks_of_mine:Task"])
def test_a_task_that_only_the_aggregator_names_is_not_imported_unless_it_is_allowed(
    task: str, tmp_path: Path
) -> None:
    (tmp_path / "own_task.py").write_text("open('ran', 'w')")
    with aggregator_command(tmp_path, "--task", task) as (_, address):
        arguments = worker_arguments(tmp_path, address, "pi-1", "--log-level", "error")
        ended = fedgrpc(*arguments, cwd=tmp_path)
    _is_one_line(ended, "does not allow", "--allow-task")
    assert not (tmp_path / "ran").exists()


def test_no_command_at_all_shows_the_help() -> None:
    ended = fedgrpc()
    assert ended.code == 2
    assert "aggregator" in ended.error
    assert "worker" in ended.error
