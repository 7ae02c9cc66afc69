"""One plan says everything about a device's local model, in TOML as in code."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedgrpc.errors import UsageError
from fedgrpc.protocol.plans import local_model_from_proto, local_model_to_proto
from fedgrpc.submodels import plan as local_model_plan
from fedgrpc.submodels.channels import SubModel
from fedgrpc.submodels.plan import (
    FORMATS,
    SHORT_FORMATS,
    Arithmetic,
    Clustering,
    LocalModelPlan,
    Memory,
    Pruning,
    Quantization,
    covers_all,
)
from fedgrpc.submodels.plan_table import PlanTable

NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)
LAYERS = st.lists(NAMES, min_size=1, max_size=3).map(tuple)
PLANS = st.builds(
    LocalModelPlan,
    width=st.floats(0, 1, exclude_min=True),
    rule=st.sampled_from(["prefix", "rolling", "random", "magnitude"]),
    personal_layers=st.just(()) | LAYERS,
    pruning=st.none()
    | st.builds(
        Pruning,
        st.floats(0, 1, exclude_min=True, exclude_max=True),
        st.sampled_from(["layer", "global"]),
        LAYERS,
    ),
    clustering=st.none() | st.builds(Clustering, st.integers(2, 256), LAYERS),
    quantization=st.none()
    | st.builds(Quantization, st.sampled_from([0, 2, 8, 16]), st.sampled_from([0, 4, 8]), LAYERS),
    arithmetic=st.none()
    | st.builds(
        Arithmetic,
        st.sampled_from([*FORMATS, "e5s9", "fixed8.4"]),
        st.sampled_from(["nearest", "stochastic"]),
        st.booleans(),
        st.integers(0, 20).map(lambda power: 2.0**power),
        st.booleans(),
    )
    | st.builds(Arithmetic, st.sampled_from(SHORT_FORMATS), float32_copy=st.booleans())
    | st.builds(
        Arithmetic,
        st.sampled_from(["e5s9", "fixed8.4"]),
        accumulate=st.sampled_from(["carrier", "format"]),
    ),
    trained_layers=st.just(("*",)) | LAYERS,
    memory=st.none() | st.builds(Memory, st.integers(1, 1 << 16), momentum=st.booleans()),
)


def test_a_checkpoint_comes_back_from_its_text_and_from_its_message() -> None:
    plan = LocalModelPlan(memory=Memory(checkpoint=True))
    assert LocalModelPlan.from_toml(plan.to_toml()) == plan
    assert local_model_from_proto(local_model_to_proto(plan, SubModel()))[0] == plan


@given(PLANS)
def test_any_combination_comes_back_from_its_text_and_from_its_message(plan: LocalModelPlan) -> None:
    text = plan.to_toml()
    tomllib.loads(text)
    assert LocalModelPlan.from_toml(text) == plan
    message = local_model_to_proto(plan, SubModel())
    assert local_model_from_proto(message)[0] == replace(plan, width=1.0, rule="prefix")


def test_a_plan_has_a_line_of_its_own() -> None:
    assert LocalModelPlan().to_line() == "the whole model"
    plan = LocalModelPlan(0.5, pruning=Pruning(), arithmetic=Arithmetic("float16", loss_scale=8.0))
    assert plan.to_line() == 'width = 0.5, pruning, arithmetic.format = "float16", arithmetic.loss_scale = 8.0'


def test_pruned_by_half_with_8_bit_weights_and_16_clusters_in_the_classifier_is_one_plan() -> None:
    text = """
        [pruning]
        ratio = 0.5

        [quantization]
        weight_bits = 8

        [clustering]
        clusters = 16
        layers = ["classifier.*"]
    """
    assert LocalModelPlan.from_toml(text) == LocalModelPlan(
        pruning=Pruning(0.5), quantization=Quantization(8), clustering=Clustering(16, ("classifier.*",))
    )


def test_the_example_in_the_documentation_is_a_plan() -> None:
    assert local_model_plan.__doc__ is not None
    plan = LocalModelPlan.from_toml(local_model_plan.__doc__.partition("In TOML:")[2].partition("A large")[0])
    assert plan.width == 0.5
    assert plan.arithmetic == Arithmetic("float16", "stochastic", loss_scale=256)
    assert plan.memory == Memory(4, momentum=False)


def test_the_default_changes_nothing_and_has_no_text() -> None:
    assert LocalModelPlan().to_toml() == ""
    assert LocalModelPlan().plain
    assert LocalModelPlan(width=0.5).plain
    assert not LocalModelPlan(nested=(0.5,)).plain
    assert LocalModelPlan.from_toml("nested = [0.5, 0.25]") == LocalModelPlan(nested=(0.5, 0.25))
    assert LocalModelPlan.from_toml(LocalModelPlan(nested=(0.5, 0.25)).to_toml()).nested == (0.5, 0.25)
    assert not LocalModelPlan(personal_layers=("head.*",)).plain


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("width = 0.0", "above 0 to 1"),
        ("width = 'half'", "width of the local-model plan is a number"),
        ("wdith = 0.5", "has no 'wdith'"),
        ("width = true", "is a number"),
        ("nested = ['half']", "an item of nested"),
        ("personal_layers = [1]", "an item of personal_layers .* is text"),
        ("rule = 'best'", "no rule 'best'"),
        ("personal_layers = 'head'", "is a list"),
        ("pruning = 0.5", "is a table"),
        ("[pruning]\nratio = 1.0", "below 1"),
        ("[pruning]\nscope = 'all'", "layer or global"),
        ("[pruning]\nlayers = []", "pruning is of some layers"),
        ("[quantization]\nweight_bits = 1", "2 to 16"),
        ("[quantization]\nweight_bits = true", "weight_bits of quantization of .* is a whole number"),
        ("[clustering]\nclusters = 1", "2 to 256"),
        ("[arithmetic]\nformat = 'float12'", "no number format"),
        ("[arithmetic]\nrounding = 'up'", "nearest or stochastic"),
        ("[arithmetic]\nloss_scale = 3", "a power of two from 1"),
        ("width 0.5", "not valid TOML"),
        ("nested = [0.5, 1.0]", "nested width is above 0 and below 1"),
        ("nested = 0.5", "is a list"),
        ("nested = [0.5]\nwidth = 0.5\nrule = 'rolling'", "cannot be nested"),
        ("nested = [0.5]\n[quantization]", "not trained with quantization"),
        ("memory.micro_batches = 0", "micro_batches are 1 to"),
        ("memory.checkpoint = true\n[quantization]", "without quantization"),
        ("memory.checkpoint = true\narithmetic = {format = 'e5s3', rounding = 'stochastic'}", "without emulated"),
        ("arithmetic.accumulate = 'wide'", "carrier or format"),
        ("arithmetic = {format = 'float16', accumulate = 'format'}", "emulated"),
        ("arithmetic.float32_copy = true", "float16 and bfloat16"),
        ("arithmetic = {format = 'float16', emulated = true, float32_copy = true}", "not emulated"),
        ("arithmetic = {format = 'float16', rounding = 'stochastic', float32_copy = true}", "loses no step"),
    ],
)
def test_a_plan_that_is_none_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        LocalModelPlan.from_toml(text)


def test_updates_lack_what_is_not_trained() -> None:
    plan = LocalModelPlan(trained_layers=("fc*",), personal_layers=("fc2.*",))
    assert [name for name in ("conv.weight", "fc1.weight", "fc2.weight") if not plan.is_kept_back(name)] == [
        "fc1.weight"
    ]
    assert not plan.plain
    assert not covers_all(plan)
    assert covers_all(LocalModelPlan(memory=Memory(4)))


@pytest.mark.parametrize(
    ("text", "emulated"),
    [
        ("", False),
        ("arithmetic.format = 'bfloat16'", False),
        ("arithmetic = {format = 'bfloat16', rounding = 'stochastic'}", False),
        ("arithmetic = {format = 'bfloat16', emulated = true}", True),
        ("arithmetic = {format = 'float32', rounding = 'stochastic'}", True),
        ("arithmetic.format = 'fixed8.4'", True),
    ],
)
def test_only_formats_that_torch_has_are_not_emulated(text: str, emulated: bool) -> None:
    assert LocalModelPlan.from_toml(text).emulated is emulated


def test_rolling_windows_move_with_the_round_and_prefixes_do_not() -> None:
    assert LocalModelPlan(0.5, "rolling").sub_model(3) != LocalModelPlan(0.5, "rolling").sub_model(4)
    assert LocalModelPlan(0.5, "prefix").sub_model(3) == LocalModelPlan(0.5, "prefix").sub_model(4)


def test_a_table_of_plans_is_read_from_toml() -> None:
    table = PlanTable.from_toml("""
        [default]
        width = 0.5

        [raspberry-pi-3]
        width = 0.25
        pruning.ratio = 0.7
    """)
    assert table.plan_of("other") == LocalModelPlan(0.5)
    assert table.plan_of("raspberry-pi-3") == LocalModelPlan(0.25, pruning=Pruning(0.7))
    with pytest.raises(UsageError, match="the plan of width is a table"):
        PlanTable.from_toml("width = 0.5")
    with pytest.raises(UsageError, match="the plan of pi has no 'wdith'"):
        PlanTable.from_toml("[pi]\nwdith = 0.5")


def test_a_table_pins_a_plan_per_device_class() -> None:
    table = PlanTable(LocalModelPlan(), {"raspberry-pi-3": LocalModelPlan(0.25)})
    assert table.plan_of("raspberry-pi-3").width == 0.25
    assert table.plan_of("jetson").width == 1.0
    assert not table.trivial
    assert PlanTable().trivial
