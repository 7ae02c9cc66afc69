"""What may change on a used data folder."""

import pytest

from fedgrpc.aggregator.changed_settings import changes, compared_text
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.training_plan import TrainingPlan


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


def test_an_algorithm_with_other_companions_is_refused_and_one_with_the_same_is_told(tmp_path):
    def with_algorithm(text):
        return compared_text(
            AggregatorSettings(tmp_path, plan=TrainingPlan(learning_rate=0.1, momentum=0.0, algorithm=text))
        )

    assert changes(with_algorithm(None), with_algorithm("fedprox:mu=1")) == {
        "plan.algorithm": "none -> fedprox:mu=1"
    }
    with pytest.raises(UsageError, match="other companion tensors than fedavg"):
        changes(with_algorithm(None), with_algorithm("scaffold"))
