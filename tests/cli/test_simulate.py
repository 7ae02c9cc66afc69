from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.support.command_line import fedgrpc, running_command

FLEET = """
[model]
parameters = 100_000
[rules.policy]
min_workers = 5
max_participants = 5
deadline_s = 300.0
[[devices]]
name = "pi"
count = 20
train_s = 60.0
up_mbit = 8.0
down_mbit = 40.0
[[variants]]
name = "plain"
[[variants]]
name = "over-selected"
policy = { over_selection = 1.4 }
"""
EXAMPLE = Path(__file__).parents[2] / "examples" / "fleet.toml"


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.toml"
    path.write_text(FLEET)
    return path


def test_a_fleet_is_played_and_shown_with_what_is_not_modelled(fleet: Path, tmp_path: Path) -> None:
    ended = fedgrpc("simulate", "--fleet", str(fleet), "--hours", "1", "--plot", "p.png", cwd=tmp_path)
    assert ended.code == 0, ended.error
    for part in ("20 devices, 1 virtual hours", "plain", "over-selected", "abandoned", "pi (20)", "Not modelled"):
        assert part in ended.out
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_its_settings_come_from_variables_and_the_file_too(fleet: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text(f'[simulate]\nfleet = "{fleet}"\njobs = 1\nhours = 7\n')
    env = {"FEDGRPC_SIMULATE_HOURS": "1", "FEDGRPC_SIMULATE_CONFIG": "settings.toml"}
    ended = fedgrpc("simulate", "--table", env=env, cwd=tmp_path)
    assert ended.code == 0, ended.error
    assert "20 devices, 1 virtual hours" in ended.out


def test_a_wrong_setting_says_where_it_came_from(fleet: Path, tmp_path: Path) -> None:
    ended = fedgrpc("simulate", "--fleet", str(fleet), env={"FEDGRPC_SIMULATE_HOURS": "0"}, cwd=tmp_path)
    assert ended.code == 2
    assert "--hours: 0" in ended.error
    assert "(from the variable FEDGRPC_SIMULATE_HOURS)" in ended.error


def test_programs_get_the_same_as_json(fleet: Path, tmp_path: Path) -> None:
    ended = fedgrpc("simulate", "--fleet", str(fleet), "--hours", "1", "--json", cwd=tmp_path)
    plain, over = json.loads(ended.out)
    assert (plain["name"], over["name"]) == ("plain", "over-selected")
    assert plain["rounds_per_hour"] == plain["rounds"] > 20
    assert plain["wasted_training_share"] == 0.0 < over["wasted_training_share"]
    assert plain["classes"][0]["name"] == "pi"


def test_the_example_is_a_fleet(tmp_path: Path) -> None:
    arguments = ("simulate", "--fleet", str(EXAMPLE), "--hours", "0.2", "--jobs", "1")
    ended = fedgrpc(*arguments, cwd=tmp_path)
    assert ended.code == 0, ended.error
    assert "1000 devices" in ended.out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot read"), ("[", "not valid TOML"), ("[devices]", "double brackets")],
    ids=["missing", "no TOML", "no fleet"],
)
def test_a_bad_fleet_file_is_one_line_and_exit_code_2(content: str | None, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    if content is not None:
        path.write_text(content)
    ended = fedgrpc("simulate", "--fleet", str(path), cwd=tmp_path)
    assert ended.code == 2
    assert ended.error.startswith("error: ")
    assert complaint in ended.error
    assert ended.error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_it_ends_its_processes_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with running_command("simulate", "--fleet", str(EXAMPLE), "--hours", "2000", log=tmp_path / "log") as process:
        playing = _children(process.pid)
        process.send_signal(number)
        assert process.wait(timeout=60) == (130 if number == signal.SIGINT else -signal.SIGKILL)
        _, alive = psutil.wait_procs(playing, timeout=60)
        assert alive == []
    assert "Traceback" not in (tmp_path / "log").read_text()


def _children(pid: int) -> list[psutil.Process]:
    """The processes that play, once they are there."""
    for _ in range(1200):
        if len(found := psutil.Process(pid).children(recursive=True)) >= 2:
            return found
        time.sleep(0.05)
    raise AssertionError("nothing plays")


@pytest.mark.parametrize("plot", ["nowhere/x.png", "x.doc", "x"])
def test_a_plot_that_cannot_be_written_is_said_before_anything_is_played(
    fleet: Path, tmp_path: Path, plot: str
) -> None:
    ended = fedgrpc("simulate", "--fleet", str(fleet), "--hours", "100000", "--plot", plot, cwd=tmp_path)
    assert (ended.code, len(ended.error.splitlines())) == (2, 1)
    assert "cannot write the plot" in ended.error
