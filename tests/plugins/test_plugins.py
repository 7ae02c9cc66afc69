"""Plugins by name and by reference: what is imported, what is refused, and what a broken one costs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import numpy as np
import pytest

from fedgrpc import plugins
from fedgrpc.aggregation.server_optimizer import FedAdam, server_optimizer
from fedgrpc.codec import encoding
from fedgrpc.codec.recipe import Recipe
from fedgrpc.datasets.partition import parse_partition
from fedgrpc.errors import UsageError
from fedgrpc.rounds.selection import SelectionPolicy, choose_by
from fedgrpc.rounds.selector import selector_of
from fedgrpc.tracking.tracker import tracker_of

HERE = __name__


@dataclass(frozen=True)
class Chooses:
    """A selector that does as its option says."""

    does: str = "last"

    def choose(self, idle, count, histories, round_number, rng):
        if self.does == "raises":
            raise ValueError("not today")
        return {
            "last": sorted(idle)[-count:],
            "strange": ["nobody"],
            "twice": [idle[0], idle[0]],
            "all": list(idle) * 2,
            "none": None,
        }[self.does]


@dataclass(frozen=True)
class Halves:
    """A server optimizer that goes half of the way."""

    learning_rate: float = 1.0
    state_count: ClassVar[int] = 0

    def step(self, weights, delta, state):
        return weights + self.learning_rate / 2 * delta, ()


class NoDataclass:
    name = "mine"


@dataclass(frozen=True)
class Empty:
    name: ClassVar[str] = "mine"


@pytest.fixture
def entry(monkeypatch):
    """A function that installs entry points for the length of the test."""
    points: list[tuple[str, EntryPoint]] = []

    def found(kind):
        return tuple(point for own, point in points if own == kind)

    monkeypatch.setattr(plugins, "_entry_points", found)

    def install(kind, name, value):
        points.append((kind, EntryPoint(name, value, plugins.GROUPS[kind])))

    yield install
    selector_of.cache_clear()


def choose(text, idle=("a", "b", "c"), count=2):
    selector = selector_of(SelectionPolicy(selection=text).selection)
    assert selector is not None
    return choose_by(selector, text, idle, count, {}, 3, np.random.default_rng(0))


def test_a_selector_chooses_by_reference_and_by_its_installed_name(entry):
    assert [each.worker for each in choose(f"{HERE}:Chooses")] == ["b", "c"]
    entry("selection", "mine", f"{HERE}:Chooses")
    assert {each.reason for each in choose("mine:last")} == {"by mine:last"}


@pytest.mark.parametrize("does", ["raises", "strange", "twice", "all", "none"])
def test_a_selector_that_fails_costs_its_choice_and_says_so(does):
    chosen = choose(f"{HERE}:Chooses:{does}")
    assert len(chosen) == 2
    assert all("by lot" in each.reason and "failed" in each.reason for each in chosen)


def test_a_server_optimizer_takes_options_and_the_learning_rate():
    assert server_optimizer("fedadam:beta1=0.5,tau=0.1", 0.2) == FedAdam(0.2, beta1=0.5, tau=0.1)
    assert server_optimizer(f"{HERE}:Halves", 0.5) == Halves(0.5)
    with pytest.raises(UsageError, match="no step"):
        server_optimizer(f"{HERE}:Empty")
    with pytest.raises(UsageError, match="positive"):
        server_optimizer("fedavg", 0.0)


@pytest.mark.parametrize(
    ("make", "text", "word"),
    [
        (selector_of, "oord", "known"),
        (selector_of, "no.such.module:Class", "PYTHONPATH"),
        (selector_of, f"{HERE}:Missing", "no class"),
        (selector_of, f"{HERE}:NoDataclass", "dataclass"),
        (selector_of, f"{HERE}:Chooses:speed=3", "options"),
        (server_optimizer, "fedadm", "known"),
        (parse_partition, "stripe", "must be"),
        (parse_partition, f"{HERE}:Empty", "no split"),
        (tracker_of, "cvs:figures.csv", "known"),
        (tracker_of, f"{HERE}:Empty:file", "log"),
    ],
)
def test_what_is_no_plugin_is_refused_in_one_line(make, text, word):
    with pytest.raises(UsageError, match=word) as refused:
        make(text)
    assert "\n" not in str(refused.value)


def test_an_installed_name_never_stands_for_a_built_in_one(entry):
    entry("server optimizer", "fedadam", f"{HERE}:Halves")
    assert isinstance(server_optimizer("fedadam"), FedAdam)


def test_two_packages_with_one_name_are_told_apart_by_reference(entry):
    entry("server optimizer", "half", f"{HERE}:Halves")
    entry("server optimizer", "half", f"{HERE}:Empty")
    with pytest.raises(UsageError, match=r"write package\.module:Class"):
        server_optimizer("half")


def test_a_manifest_that_names_an_encoding_imports_nothing(entry):
    """Encodings come in messages of peers: only those that the process has loaded are found."""
    entry("encoding", "antigravity", "antigravity:Class")
    for text in ("antigravity", "antigravity:Class", f"{HERE}:Empty", "antigravity+zstd"):
        with pytest.raises(UsageError, match="unknown encoding"):
            Recipe.parse(text)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("int8", f"{HERE}:Empty", "fedgrpc has one"),
        ("other", f"{HERE}:Empty", "name"),
        ("mine", f"{HERE}:No", "class"),
    ],
)
def test_an_installed_encoding_that_cannot_be_is_refused_at_the_start(entry, name, value, word):
    entry("encoding", name, value)
    with pytest.raises(UsageError, match=word):
        encoding.load_encodings()
    assert encoding.encoding_names() == encoding.ENCODING_NAMES
