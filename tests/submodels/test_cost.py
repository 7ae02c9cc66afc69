"""A device gets the most capable plan that it can keep, by what it has shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.submodels.cost import (
    FIRST_TASK_BYTES,
    PROCESS_BYTES,
    DeviceLimits,
    Observation,
    errors_of,
    killed_observation,
    most_weights_bytes,
    predict,
    shown_upload_bits,
)
from fedgrpc.submodels.plan import Arithmetic, Clustering, LocalModelPlan, Memory, Pruning, Quantization
from fedgrpc.submodels.plan_choice import choose, choose_of, misfit
from fedgrpc.submodels.plan_size import PlanSize, bits_per_element, payload_bytes
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.submodels.technique_cost import technique_cost

MIB = 1 << 20
LADDER = [LocalModelPlan(1.0), LocalModelPlan(0.5), LocalModelPlan(0.25)]


def size_of(plan: LocalModelPlan) -> PlanSize:
    share = plan.width**2
    return PlanSize(share, int(40 * MIB * share), int(10 * MIB * share), int(10 * MIB * share))


def seen(plan: LocalModelPlan, local_s: float, rate: float = MIB, peak: int = 0) -> Observation:
    """A task on a link of `rate` bytes a second."""
    size = size_of(plan)
    down_s, up_s = size.download_bytes / rate, size.upload_bytes / rate
    return Observation(
        size.share, size.weights_bytes, down_s, local_s, up_s, size.download_bytes, size.upload_bytes, peak
    )


def test_a_device_that_nothing_is_known_of_gets_the_most_capable_plan() -> None:
    choice = choose(LADDER, size_of, DeviceLimits(), [], 60.0)
    assert choice.plan.width == 1.0
    assert choice.prediction.local_s is None
    assert "fits" in choice.reason


def test_a_slow_link_gets_the_plan_whose_bytes_arrive_by_the_deadline() -> None:
    device = DeviceLimits(uplink_bits_per_second=8 * MIB, downlink_bits_per_second=8 * MIB)
    assert choose(LADDER, size_of, device, [], 25.0).plan.width == 1.0
    assert choose(LADDER, size_of, device, [], 10.0).plan.width == 0.5
    assert choose(LADDER, size_of, device, [], 2.0).plan.width == 0.25
    worst = choose(LADDER, size_of, device, [], 0.1)
    assert worst.plan.width == 0.25
    assert "none fits" in worst.reason


def test_little_memory_gets_the_plan_that_fits_it() -> None:
    base = PROCESS_BYTES + FIRST_TASK_BYTES
    enough, little = DeviceLimits(memory_bytes=base + 121 * MIB), DeviceLimits(memory_bytes=base + 50 * MIB)
    assert choose(LADDER, size_of, enough, [], 60.0).plan.width == 1.0
    choice = choose(LADDER, size_of, little, [], 60.0)
    assert choice.plan.width == 0.5
    assert f"{(base >> 20) + 120} MiB of {(base >> 20) + 50}" in choice.reason


def test_memory_is_what_the_worker_takes_without_a_model_and_what_its_training_adds() -> None:
    device = DeviceLimits(process_bytes=100 * MIB, activation_bytes=80 * MIB)
    base = 100 * MIB + FIRST_TASK_BYTES
    whole = predict(device, [], PlanSize(1.0, 40 * MIB, MIB, MIB)).peak_memory_bytes
    assert whole == base + 3 * 40 * MIB + 80 * MIB
    quarter = predict(device, [], PlanSize(0.25, 10 * MIB, MIB, MIB)).peak_memory_bytes
    assert quarter == base + 3 * 10 * MIB + 40 * MIB


PLANS = [
    LocalModelPlan(),
    LocalModelPlan(pruning=Pruning()),
    LocalModelPlan(arithmetic=Arithmetic("bfloat16")),
    LocalModelPlan(arithmetic=Arithmetic("float64", emulated=True)),
    LocalModelPlan(memory=Memory(momentum=False)),
    LocalModelPlan(quantization=Quantization()),
]


@pytest.mark.parametrize("plan", PLANS, ids=LocalModelPlan.to_line)
def test_no_model_is_too_large_to_take_for_which_the_prediction_finds_room(plan: LocalModelPlan) -> None:
    device = DeviceLimits(memory_bytes=900 * MIB, process_bytes=200 * MIB)
    most = most_weights_bytes(device.memory_bytes, device.process_bytes, plan)

    def fits(weights_bytes: int) -> bool:
        size = PlanSize(1.0, weights_bytes, 0, 0, plan=plan, technique=technique_cost(plan))
        return misfit(device, predict(device, [], size), 60.0) == ""

    assert 90 * MIB < most < 700 * MIB
    assert fits(most - 64)
    assert not fits(most + 64)


def test_a_model_is_taken_whatever_share_of_it_the_plan_trains() -> None:
    plan = LocalModelPlan(trained_layers=("fc.*",))
    device = DeviceLimits(memory_bytes=900 * MIB, process_bytes=200 * MIB)
    size = PlanSize(1.0, 600 * MIB, 0, 0, plan=plan, technique=technique_cost(plan, 0.01))
    assert misfit(device, predict(device, [], size), 60.0) == ""
    assert most_weights_bytes(device.memory_bytes, device.process_bytes, plan) >= size.weights_bytes
    assert most_weights_bytes(0, device.process_bytes, plan) == 0


def test_a_plan_that_changes_its_weights_keeps_them_as_they_were_too() -> None:
    pruned = PlanSize(1.0, 40 * MIB, MIB, MIB, plan=LocalModelPlan(pruning=Pruning(0.5)))
    plain = PlanSize(1.0, 40 * MIB, MIB, MIB)
    cost = [predict(DeviceLimits(), [], size).peak_memory_bytes for size in (pruned, plain)]
    assert cost[0] - cost[1] == 40 * MIB


def test_what_a_device_has_shown_counts_more_than_what_it_says() -> None:
    device = DeviceLimits(uplink_bits_per_second=8e12, downlink_bits_per_second=8e12)
    history = [seen(LADDER[0], local_s=1.0, rate=MIB)]
    prediction = predict(device, history, size_of(LADDER[0]))
    assert prediction.download_s == pytest.approx(10.0)
    assert prediction.upload_s == pytest.approx(10.0)


def test_two_plans_in_the_history_tell_what_slicing_saves_on_this_device() -> None:
    """T_local = 2 s + 8 s * share."""
    history = [seen(LADDER[0], 10.0), seen(LADDER[1], 4.0), seen(LADDER[0], 10.0)]
    assert predict(DeviceLimits(), history, size_of(LADDER[2])).local_s == pytest.approx(2.5)


def test_one_slow_night_does_not_change_the_prediction() -> None:
    history = [seen(LADDER[0], 1.0) for _ in range(4)] + [seen(LADDER[0], 100.0, rate=100.0)]
    prediction = predict(DeviceLimits(), history, size_of(LADDER[0]))
    assert prediction.local_s == pytest.approx(1.0)
    assert prediction.upload_s == pytest.approx(10.0)


def test_the_memory_that_was_measured_predicts_that_of_other_plans() -> None:
    history = [seen(LADDER[1], 1.0, peak=500 * MIB)]
    assert predict(DeviceLimits(), history, size_of(LADDER[1])).peak_memory_bytes == 500 * MIB
    assert predict(DeviceLimits(), history, size_of(LADDER[0])).peak_memory_bytes == 590 * MIB


@given(st.lists(st.tuples(st.sampled_from(LADDER), st.floats(0.1, 50)), max_size=6), st.floats(0.5, 200))
def test_more_time_never_gives_a_smaller_plan(
    measured: list[tuple[LocalModelPlan, float]], deadline_s: float
) -> None:
    history = [seen(plan, local_s) for plan, local_s in measured]
    tight = choose(LADDER, size_of, DeviceLimits(), history, deadline_s)
    loose = choose(LADDER, size_of, DeviceLimits(), history, 2 * deadline_s)
    assert loose.plan.width >= tight.plan.width


def test_errors_are_relative_to_what_was_measured() -> None:
    history = [seen(LADDER[0], 10.0, peak=500 * MIB)]
    prediction = predict(DeviceLimits(), history, size_of(LADDER[0]))
    errors = errors_of(prediction, seen(LADDER[0], 8.0, rate=2 * MIB, peak=500 * MIB))
    assert errors == pytest.approx({"download": 1.0, "local": 0.25, "upload": 1.0, "memory": 0.0})


@pytest.mark.parametrize(
    ("plan", "bits"),
    [
        (LocalModelPlan(), 32),
        (LocalModelPlan(pruning=Pruning(0.75)), 1 + 8),
        (LocalModelPlan(clustering=Clustering(16)), 4),
        (LocalModelPlan(pruning=Pruning(0.5), clustering=Clustering(16)), 1 + 2),
        (LocalModelPlan(clustering=Clustering(16, ("fc*",))), 32),
    ],
)
def test_bytes_of_an_update_follow_from_its_plan(plan: LocalModelPlan, bits: float) -> None:
    assert payload_bytes(8000, 32, plan) == 1000 * bits


@pytest.mark.parametrize("plan", [LocalModelPlan(), LocalModelPlan(0.5, pruning=Pruning(0.75))], ids=str)
def test_the_bits_of_an_update_are_told_from_its_bytes(plan: LocalModelPlan) -> None:
    assert bits_per_element(payload_bytes(8000, 5.5, plan), 8000, plan) == pytest.approx(5.5, rel=1e-3)


def test_codes_of_clusters_tell_nothing_of_the_encoding_and_are_left_out() -> None:
    clustered = LocalModelPlan(clustering=Clustering(16))
    assert bits_per_element(4000, 8000, clustered) == 0.0
    history = [Observation(1.0, 1, 1, 1, 1, 1, 1, upload_bits=bits) for bits in (0.0, 2.0, 3.0, 7.0)]
    assert shown_upload_bits(history) == 3.0
    assert shown_upload_bits(history[:1]) is None


def test_activations_shrink_with_the_width_and_weights_with_its_square() -> None:
    """Of 90 MiB of tensors 30 are weights, gradients and velocities, 60 activations."""
    whole = PlanSize(1.0, 10 * MIB, MIB, MIB)
    history = [Observation(1.0, 10 * MIB, 1, 1, 1, MIB, MIB, 400 * MIB, 90 * MIB)]
    assert predict(DeviceLimits(), history, whole).peak_memory_bytes == 400 * MIB
    quarter = predict(DeviceLimits(), history, PlanSize(0.25, 10 * MIB // 4, MIB, MIB)).peak_memory_bytes
    assert quarter == 400 * MIB - 30 * MIB - (30 * MIB - 3 * (10 * MIB // 4))


COARSE = LocalModelPlan(0.5, arithmetic=Arithmetic("fixed8.5", "stochastic"))


def noisy(plan: LocalModelPlan, *ratios: float) -> list[Observation]:
    return [replace(seen(plan, 1.0), plan=plan, noise_ratio=ratio) for ratio in ratios]


def test_a_plan_whose_format_adds_nothing_is_left_out_of_the_ladder() -> None:
    table = PlanTable(automatic=(COARSE, LocalModelPlan(0.25)))

    def chosen(history: list[Observation]) -> LocalModelPlan:
        return choose_of(table, "", size_of, DeviceLimits(), history, 60.0).plan

    assert chosen([]) == chosen(noisy(COARSE, 50.0, 60.0)) == COARSE
    assert chosen(noisy(COARSE, 5.0, 60.0, 2.0)) == COARSE
    assert chosen(noisy(COARSE, 50.0, 60.0, 2.0)) == LocalModelPlan(0.25)
    assert chosen(noisy(LocalModelPlan(0.25), 50.0, 60.0, 70.0)) == COARSE


def test_a_device_with_one_plan_trains_it_in_float32_where_its_format_adds_nothing() -> None:
    history = noisy(COARSE, 50.0, 60.0, 70.0)
    choice = choose_of(PlanTable(classes={"pi": COARSE}), "pi", size_of, DeviceLimits(), history, 60.0)
    assert choice.plan == LocalModelPlan(0.5)
    assert "fixed8.5 adds nothing" in choice.reason
    alone = choose_of(PlanTable(automatic=(COARSE,)), "pi", size_of, DeviceLimits(), history, 60.0)
    assert alone.plan == LocalModelPlan(0.5)


def test_a_plan_that_was_killed_and_larger_ones_do_not_fit_until_it_is_forgotten() -> None:
    history = [killed_observation(size_of(LocalModelPlan(0.5)))]
    choice = choose(LADDER, size_of, DeviceLimits(), history, 60.0)
    assert choice.plan.width == 0.25
    assert "killed" in choice.reason
    # Nothing else is learned of it.
    assert choice.prediction.local_s is None
    assert choose(LADDER, size_of, DeviceLimits(), [seen(LADDER[0], 5.0)], 60.0).plan.width == 1.0
    smallest = [killed_observation(size_of(LADDER[-1]))]
    assert "none fits" in choose(LADDER, size_of, DeviceLimits(), smallest, 60.0).reason
