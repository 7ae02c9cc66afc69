"""Settings are declared once: every field has a flag, a variable and a key, in that order of precedence."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.cli import COMMANDS, aggregator, worker
from fedgrpc.cli.main import load_command
from fedgrpc.cli.options import SettingsCommand
from fedgrpc.cli.values import DURATION, RATE, SIZE
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.rounds.selection import SelectionPolicy
from fedgrpc.rpc.channel import Tls
from fedgrpc.runs.conditions import Condition
from fedgrpc.trainer import TaskSetup
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.worker.settings import WorkerSettings
from fedgrpc.worker.throttle import Throttle

# Fields that are made of several settings.
_COMPOSED = {"policy", "choosing", "plan", "privacy", "secure", "tls", "serve_tls", "throttle", "backoff"}


def _values(command: SettingsCommand, *arguments: str) -> dict[str, Any]:
    """What the command's own function would be called with."""
    assert command.name is not None
    return command.make_context(command.name, list(arguments)).params


def _aggregator(*arguments: str) -> AggregatorSettings:
    return aggregator.settings_from(_values(aggregator.COMMAND, "--data-dir", "d", *arguments))


def _worker(*arguments: str) -> WorkerSettings:
    return worker.settings_from(_values(worker.COMMAND, "--aggregator", "a:1", "--name", "pi-1", *arguments))


@pytest.mark.parametrize(
    ("command", "owner"),
    [
        (aggregator.COMMAND, AggregatorSettings),
        (aggregator.COMMAND, RoundPolicy),
        (aggregator.COMMAND, SelectionPolicy),
        (aggregator.COMMAND, TrainingPlan),
        (worker.COMMAND, WorkerSettings),
        (worker.COMMAND, Throttle),
        (worker.COMMAND, TaskSetup),
    ],
)
def test_every_field_of_the_settings_has_a_flag(command: SettingsCommand, owner: type) -> None:
    names = {setting.name for setting in command.settings()} | _COMPOSED
    assert {field.name for field in dataclasses.fields(owner)} <= names


def test_without_any_flag_the_settings_are_their_own_defaults() -> None:
    assert _aggregator() == AggregatorSettings(Path("d"))
    assert _worker("--state-dir", "s") == WorkerSettings("pi-1", "a:1", Path("s"))


def test_flags_reach_the_settings() -> None:
    settings = _aggregator(
        *("--rounds", "7", "--min-workers", "3", "--deadline", "2m", "--lease", "1500ms", "--epochs", "0.5"),
        *("--weight", "pi-1=0.5", "--weight", "pi-2=2", "--target-metric", "accuracy>=0.9", "--no-durable"),
        *("--encoding", "int8+zstd", "--upload-encoding", "float16", "--max-payload", "1GiB"),
    )
    assert settings.rounds == 7
    assert settings.policy == RoundPolicy(min_workers=3, deadline_s=120, lease_s=1.5)
    assert settings.plan == TrainingPlan(epochs=0.5)
    assert settings.worker_weights == {"pi-1": 0.5, "pi-2": 2.0}
    assert settings.target == Condition("accuracy", 0.9)
    assert (settings.durable, settings.max_payload_bytes) == (False, 1 << 30)
    assert (settings.download_recipe, settings.upload_recipe) == ("int8+zstd", "float16")


def test_worker_flags_reach_the_settings() -> None:
    settings = _worker(
        *("--role", "evaluator", "--slowdown", "3", "--link", "20mbit", "--device-class", "raspberry-pi-4"),
        *("--profile", "cpu_cores=4", "--profile", "on_battery=true", "--serve-address", "none", "--tls"),
    )
    assert settings.role is WorkerRole.EVALUATOR
    assert settings.throttle == Throttle(3.0, 20e6)
    assert settings.device == {"device_class": "raspberry-pi-4", "cpu_cores": 4, "on_battery": True}
    assert settings.serve_address is None
    assert settings.tls == Tls()


def test_a_flag_wins_over_the_variable_and_the_variable_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text('[aggregator]\nrounds = 1\nmin-workers = 1\nfraction = 0.25\n[worker]\nname = "x"\n')
    monkeypatch.setenv("FEDGRPC_AGGREGATOR_ROUNDS", "2")
    monkeypatch.setenv("FEDGRPC_AGGREGATOR_MIN_WORKERS", "2")
    settings = _aggregator("--config", str(config), "--rounds", "3")
    assert settings.rounds == 3
    assert settings.policy.min_workers == 2
    assert settings.policy.fraction == 0.25
    assert settings.policy.quorum == RoundPolicy.quorum


def test_the_file_itself_may_be_named_by_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fleet.toml").write_text('[aggregator]\ndata_dir = "from-the-file"\ndeadline = "90s"\n')
    monkeypatch.setenv("FEDGRPC_AGGREGATOR_CONFIG", str(tmp_path / "fleet.toml"))
    settings = aggregator.settings_from(_values(aggregator.COMMAND))
    assert settings.data_dir == Path("from-the-file")
    assert settings.policy.deadline_s == 90


def test_a_file_may_give_tables_lists_and_switches(tmp_path: Path) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text("[aggregator]\ndurable = false\n[aggregator.weight]\npi-1 = 0.5\npi-2 = 1\n")
    settings = _aggregator("--config", str(config))
    assert settings.worker_weights == {"pi-1": 0.5, "pi-2": 1.0}
    assert settings.durable is False


def test_repeated_settings_may_come_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGRPC_AGGREGATOR_WEIGHT", "pi-1=0.5 pi-2=1")
    assert _aggregator().worker_weights == {"pi-1": 0.5, "pi-2": 1.0}


def test_a_repeated_setting_may_be_a_list_or_a_single_value_in_the_file(tmp_path: Path) -> None:
    config = tmp_path / "fleet.toml"
    for text, weights in [('["pi-1=0.5", "pi-2=1"]', {"pi-1": 0.5, "pi-2": 1.0}), ('"pi-1=0.5"', {"pi-1": 0.5})]:
        config.write_text(f"[aggregator]\nweight = {text}\n")
        assert _aggregator("--config", str(config)).worker_weights == weights


@pytest.mark.parametrize("name", COMMANDS)
def test_no_two_settings_of_a_command_share_a_key(name: str) -> None:
    command = load_command(name)
    assert isinstance(command, SettingsCommand)
    keys = [setting.key for setting in command.settings()]
    assert len(keys) == len(set(keys))
    assert command.name == name


def test_quantities_read_what_they_show() -> None:
    for quantity, amount in [(DURATION, 0.25), (DURATION, 600), (SIZE, 4 << 30), (SIZE, 1500), (RATE, 5e6)]:
        assert quantity.convert(quantity.show(amount), None, None) == amount
    assert SIZE.show(4 << 30) == "4GiB"
    assert DURATION.convert(" 1.5 h ", None, None) == 5400
