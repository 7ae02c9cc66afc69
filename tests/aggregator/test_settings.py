"""Settings are checked when they are made; a wrong one is named in one line."""

import pytest

from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.errors import UsageError
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.training_plan import TrainingPlan

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "epochs": (0.0, -1.0, NAN, INF),
        "max_steps": (0, -1, 1 << 32),
        "batch_size": (0, -1, 1 << 32),
        "learning_rate": (0.0, -0.1, NAN, INF),
        "momentum": (-0.1, 1.0, NAN),
        "weight_decay": (-0.1, NAN, INF),
        "label_adjustment": (-0.1, NAN, INF),
    }.items(),
)
def test_a_plan_that_no_worker_could_follow_is_refused(name, values):
    for value in values:
        with pytest.raises(UsageError, match=f"^{name} must") as caught:
            TrainingPlan(**{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "rounds": (0, -1, 1 << 32),
        "keep_versions": (0,),
        "max_workers": (0,),
        "max_uploads": (0, -5),
        "max_chunk_bytes": (0, 1 << 30),
        "max_payload_bytes": (0, 1 << 40),
        "max_upload_memory_bytes": (0,),
        "max_update_norm": (0.0, -1.0, NAN),
        "max_examples": (0, -1, 1 << 63),
        "seed": (-1,),
        "poll_wait_s": (0.0, -1.0, NAN, INF),
        "drain_s": (-1.0, NAN, INF),
        "heartbeat_interval_s": (0.0, -1.0, NAN, 30.0),
    }.items(),
)
def test_a_setting_out_of_its_range_is_named(tmp_path, name, values):
    for value in values:
        with pytest.raises(UsageError, match=f"^{name} must") as caught:
            AggregatorSettings(tmp_path, **{name: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["evaluators", "leaves", "initialisers"])
@pytest.mark.parametrize("pattern", ["", " ", "a b", "a\nb", "n" * 65])
def test_a_pattern_that_no_workers_name_can_match_is_refused(tmp_path, name, pattern):
    with pytest.raises(UsageError, match="must be a worker's name") as caught:
        AggregatorSettings(tmp_path, **{name: ("pi-*", pattern)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight", [-1.0, NAN, INF, 1e308])
def test_a_weight_that_is_no_weight_is_named_with_its_worker(tmp_path, weight):
    with pytest.raises(UsageError, match="the weight of worker 'pi-1' must be a number from 0"):
        AggregatorSettings(tmp_path, worker_weights={"pi-1": weight})


@pytest.mark.parametrize("name", ["download_recipe", "upload_recipe"])
def test_a_recipe_that_does_not_exist_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="unknown encoding 'telepathy'"):
        AggregatorSettings(tmp_path, **{name: "telepathy+zstd"})


def test_heartbeats_are_due_thrice_within_a_lease_and_at_least_every_five_seconds(tmp_path):
    def heartbeat_s(**changes):
        return AggregatorSettings(tmp_path, **changes).heartbeat_s

    assert heartbeat_s(policy=RoundPolicy(lease_s=6.0)) == 2.0
    assert heartbeat_s(policy=RoundPolicy(lease_s=600.0)) == 5.0
    assert heartbeat_s(heartbeat_interval_s=7.0) == 7.0
