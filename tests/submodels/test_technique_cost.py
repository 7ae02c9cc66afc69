"""Techniques have a price until they were measured."""

from __future__ import annotations

import pytest

from fedgrpc.submodels.cost import DeviceLimits, Observation, predict
from fedgrpc.submodels.plan import FORMATS, Arithmetic, Clustering, LocalModelPlan, Memory, Pruning, Quantization
from fedgrpc.submodels.plan_choice import choose_of
from fedgrpc.submodels.plan_size import PlanSize, elements_of
from fedgrpc.submodels.plan_table import PlanTable
from fedgrpc.submodels.technique_cost import carrier_bytes, saves_nothing, technique_cost

MIB = 1 << 20
MODEL = {"conv.weight": (64, 64, 3, 3), "conv.bias": (64,), "fc.weight": (10, 64), "fc.bias": (10,)}
WHOLE, HALF = LocalModelPlan(), LocalModelPlan(0.5)
SHORT = LocalModelPlan(arithmetic=Arithmetic("bfloat16"))
EMULATED = LocalModelPlan(arithmetic=Arithmetic("fixed8.4"))


def size_of(plan: LocalModelPlan) -> PlanSize:
    return elements_of(plan, MODEL, None).size(32.0, 32.0)


def seen(plan: LocalModelPlan, local_s: float, peak: int = 0, activations: int = 0) -> Observation:
    size = size_of(plan)
    tensors = size.state_bytes + activations
    return Observation(
        size.share, size.weights_bytes, 0, local_s, 0, 0, 0, peak, tensors, 0.0, plan, size.technique
    )


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("", 12),
        ("memory.momentum = false", 8),
        ("arithmetic.format = 'bfloat16'", 6),
        ("arithmetic = {format = 'bfloat16', rounding = 'stochastic'}", 8),
        ("memory.momentum = false\narithmetic = {format = 'bfloat16', rounding = 'stochastic'}", 4),
        ("arithmetic = {format = 'float16', float32_copy = true}", 12),
        ("arithmetic.format = 'float24'", 24),
        ("[quantization]", 24),
        ("arithmetic.format = 'fixed8.4'", 12),
    ],
)
def test_bytes_of_a_weight_are_those_of_its_types(text: str, bytes_: int) -> None:
    assert technique_cost(LocalModelPlan.from_toml(text)).state_bytes == bytes_


def test_layers_that_are_not_trained_cost_neither_gradients_nor_the_way_back_to_them() -> None:
    size = size_of(LocalModelPlan(trained_layers=("fc.*",)))
    assert size.technique.state_bytes == pytest.approx(4, abs=0.2)
    assert size.step_shares.time < 0.6
    assert size.step_shares.kept == pytest.approx(0.5)
    assert size_of(LocalModelPlan(trained_layers=("*.bias",))).sent_elements == 74


@pytest.mark.parametrize("lever", ["checkpoint = true", "micro_batches = 4"])
def test_levers_take_time_and_save_activations(lever: str) -> None:
    cost = technique_cost(LocalModelPlan.from_toml(f"memory.{lever}"))
    assert cost.time > 1
    assert cost.activations <= 0.5


def test_techniques_that_save_nothing_say_so() -> None:
    assert saves_nothing(WHOLE) == saves_nothing(SHORT) == saves_nothing(HALF) == ""
    assert "emulated" in saves_nothing(EMULATED)
    for part in ({"pruning": Pruning()}, {"clustering": Clustering()}, {"quantization": Quantization()}):
        plan = LocalModelPlan(**part)  # type: ignore[arg-type]
        assert "neither memory" in saves_nothing(plan)
        assert technique_cost(plan).time > 1
        assert technique_cost(plan).activations >= 1


def test_the_bytes_of_a_carrier_are_those_of_torchs() -> None:
    formats = pytest.importorskip("fedgrpc.torch.local_model.formats")
    for name in (*FORMATS, "e5s3", "e7s17", "e9s5", "e8s11", "fixed12.8", "fixed16.10"):
        assert carrier_bytes(name) == formats.parse_format(name).carrier.itemsize, name


def test_what_a_plan_cost_on_the_device_counts_before_any_formula() -> None:
    history = [seen(WHOLE, 10.0, 500 * MIB), seen(SHORT, 3.0, 300 * MIB), seen(SHORT, 5.0, 310 * MIB)]
    found = predict(DeviceLimits(), history, size_of(SHORT))
    assert (found.local_s, found.peak_memory_bytes) == (4.0, 300 * MIB)


def test_what_a_plan_cost_in_the_class_counts_before_any_formula_in_proportion_to_the_devices_own() -> None:
    peers = [seen(WHOLE, 10.0, 500 * MIB), seen(EMULATED, 30.0, 600 * MIB), seen(EMULATED, 32.0, 640 * MIB)]
    new = predict(DeviceLimits(), [], size_of(EMULATED), peers)
    assert (new.local_s, new.peak_memory_bytes) == (31.0, 620 * MIB)
    slow = predict(DeviceLimits(), [seen(WHOLE, 20.0)], size_of(EMULATED), peers)
    assert slow.local_s == 62.0


def test_without_measurements_of_the_plan_its_factors_count() -> None:
    history = [seen(WHOLE, 2.0, 500 * MIB, 100 * MIB)]
    found = predict(DeviceLimits(), history, size_of(EMULATED))
    assert found.local_s == pytest.approx(2 * technique_cost(EMULATED).time)
    assert technique_cost(EMULATED).time > 5
    saving = predict(DeviceLimits(), history, size_of(LocalModelPlan(memory=Memory(4))))
    assert saving.peak_memory_bytes == 425 * MIB
    back = predict(DeviceLimits(), [seen(EMULATED, found.local_s or 0.0)], size_of(WHOLE))
    assert back.local_s == pytest.approx(2.0)


def test_a_ladder_of_formats_is_chosen_from_by_their_time() -> None:
    table = PlanTable(automatic=(EMULATED, WHOLE, HALF))
    history = [seen(WHOLE, 5.0)]
    assert choose_of(table, "", size_of, DeviceLimits(), history, 20.0).plan == WHOLE
    assert choose_of(table, "", size_of, DeviceLimits(), history, 600.0).plan == EMULATED


def test_the_first_task_of_a_device_gets_the_plan_that_its_class_could_keep() -> None:
    table = PlanTable(automatic=(WHOLE, SHORT))
    device = DeviceLimits(memory_bytes=400 * MIB)
    assert choose_of(table, "pi", size_of, device, [], 60.0).plan == WHOLE
    peers = [seen(WHOLE, 5.0, 500 * MIB), seen(SHORT, 6.0, 350 * MIB)]
    assert choose_of(table, "pi", size_of, device, [], 60.0, peers).plan == SHORT
