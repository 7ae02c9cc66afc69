"""Settings of a run as texts: what callers from elsewhere may not set, bounds, and the file of a run."""

import tomllib

import pytest

from fedgrpc.aggregator.run_files import write_texts
from fedgrpc.aggregator.run_texts import received_texts
from fedgrpc.errors import UsageError
from fedgrpc.v1.aggregator_pb2 import RunSetting


def setting(name, *values):
    return [RunSetting(name=name, values=values)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("initial_model", "/etc/passwd"),
        ("initial-model", "/etc/passwd"),
        ("local-models", "/etc/passwd"),
        ("algorithm", "antigravity:Class"),
        ("aggregation", "antigravity:Class"),
        ("aggregation", "nnm+antigravity:Class"),
        ("aggregation", "antigravity:Class+median"),
        ("server_optimizer", "antigravity:Class"),
        ("server-optimizer", "installed"),
        ("selection", "antigravity:Class"),
        ("selection", "installed:option=1"),
    ],
)
def test_callers_from_elsewhere_name_no_file_and_no_class_of_the_host(name, text):
    with pytest.raises(UsageError, match=r"host"):
        received_texts(setting(name, text), on_host=False)
    assert received_texts(setting(name, text), on_host=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("algorithm", "fedprox:mu=0.1"),
        ("aggregation", "nnm+krum:f=2"),
        ("aggregation", "mean"),
        ("selection", "oort"),
        ("server_optimizer", "fedadam:beta1=0.5"),
    ],
)
def test_callers_from_elsewhere_choose_among_what_comes_with_fedgrpc(name, text):
    assert received_texts(setting(name, text), on_host=False) == {name: [text]}


def test_a_setting_in_both_spellings_is_there_twice():
    with pytest.raises(UsageError, match="twice"):
        received_texts([*setting("keep-rounds", "1"), *setting("keep_rounds", "2")], on_host=True)


@pytest.mark.parametrize("values", [["x" * 5000], ["x"] * 1001])
def test_settings_are_bounded_before_they_are_parsed(values):
    with pytest.raises(UsageError, match="too long"):
        received_texts(setting("task", *values), on_host=True)


@pytest.mark.parametrize("text", ["\U0001f600", "\x7f", "\x00\t\n\"\\'", "\u2028é", "[run]\nx = 1"])
def test_every_text_is_read_again_as_it_was_written(tmp_path, text):
    path = tmp_path / "run.toml"
    write_texts(path, {"task": [text], "evaluator": [text, text]})
    assert tomllib.loads(path.read_text(encoding="utf-8"))["run"] == {"task": text, "evaluator": [text, text]}
