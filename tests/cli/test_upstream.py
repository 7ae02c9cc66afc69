"""`--upstream`: what it makes of an aggregator, and what is not its to decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.cli import aggregator
from fedgrpc.cli.aggregator import upstream_from
from fedgrpc.errors import UsageError
from fedgrpc.hierarchy.process import Leaf
from fedgrpc.privacy.policy import PrivacyPolicy
from fedgrpc.protocol.tasks import WorkerRole
from fedgrpc.rpc.channel import Tls
from fedgrpc.runs.conditions import Condition
from fedgrpc.training_plan import TrainingPlan
from fedgrpc.worker.settings import WorkerSettings


def above(*arguments: str) -> WorkerSettings | None:
    values = aggregator.COMMAND.make_context("aggregator", ["--data-dir", "d", *arguments]).params
    return upstream_from(values, Path("d"))


def test_an_aggregator_without_upstream_is_a_root() -> None:
    assert above() is None


def test_an_aggregator_with_upstream_is_a_worker_there() -> None:
    settings = above("--upstream", "root:50051", "--upstream-name", "leaf-1")
    assert settings is not None
    assert (settings.name, settings.aggregator, settings.role) == ("leaf-1", "root:50051", WorkerRole.AGGREGATOR)
    assert settings.state_dir == Path("d/upstream")
    assert settings.tls is None


def test_the_link_up_has_tls_of_its_own(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.touch()
    settings = above("--upstream", "root:50051", "--upstream-tls-ca", str(ca))
    assert settings is not None
    assert settings.tls == Tls(ca)


@pytest.mark.parametrize("arguments", [["--upstream-tls"], ["--upstream-name", "leaf"]])
def test_settings_of_a_link_that_there_is_not_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="go with --upstream"):
        above(*arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": 3},
        {"plan": TrainingPlan(epochs=2)},
        {"server_optimizer": "fedadam"},
        {"target": Condition("accuracy", 0.9)},
        {"initial_model": Path("m.safetensors")},
        {"noise_weights": False},
        {"privacy": PrivacyPolicy("gaussian", noise_multiplier=1.0, cohort=3), "clip_norm": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_one_above_decides_is_refused_below(change: dict[str, Any]) -> None:
    link = WorkerSettings("leaf", "root:1", Path("d/upstream"), WorkerRole.AGGREGATOR)
    settings = AggregatorSettings(Path("d"))
    Leaf(settings, link)
    with pytest.raises(UsageError, match=f"{next(iter(change))} is for the parent"):
        Leaf(replace(settings, **change), link)
