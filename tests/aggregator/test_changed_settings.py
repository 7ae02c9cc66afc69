"""What may change on a used data folder."""

import pytest

from fedgrpc.aggregator.settings import AggregatorSettings, changes, compared_text
from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy


def text(folder, **about):
    return compared_text(AggregatorSettings(folder, **about))


def test_every_setting_that_has_changed_is_told_with_both_values(tmp_path):
    before = text(tmp_path)
    now = text(tmp_path, policy=RoundPolicy(deadline_s=6.0), upload_recipe="raw", max_examples=7)
    assert changes(before, now) == {
        "policy.deadline_s": "600.0 -> 6.0",
        "upload_recipe": "int8+zstd -> raw",
        "max_examples": "none -> 7",
    }
    assert changes(before, before) == {}


def test_another_model_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"model 'cnn' is not that of the run .*'lenet'"):
        changes(text(tmp_path, model="lenet"), text(tmp_path, model="cnn"))
    assert changes(text(tmp_path), text(tmp_path, model="cnn"))


def test_the_file_of_the_initial_model_may_move(tmp_path):
    assert not changes(text(tmp_path), text(tmp_path, initial_model=tmp_path / "elsewhere"))
