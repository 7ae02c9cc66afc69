"""In which recipes a worker's models and updates travel."""

import pytest

from fedgrpc.aggregator.negotiation import Negotiation
from fedgrpc.aggregator.registry import Worker
from fedgrpc.codec.recipe import Recipe
from fedgrpc.errors import UsageError
from fedgrpc.rounds.history import LinkRates, WorkerHistory
from fedgrpc.runs.task_context import Downlink
from fedgrpc.v1.aggregator_pb2 import RegisterRequest, WorkerRecord
from fedgrpc.v1.tensor_pb2 import COMPRESSION_ZSTD

ALL = ("int8", "int4", "entropy", "float16")


def worker(encodings=ALL, up=0, down=0, measured_up=(), measured_down=(), zstd=True):
    device = {"uplink_bits_per_second": up, "downlink_bits_per_second": down}
    about = RegisterRequest(
        worker="pi", device=device, encodings=encodings, compressions=[COMPRESSION_ZSTD] if zstd else []
    )
    history = WorkerHistory(uplink=LinkRates(measured_up), downlink=LinkRates(measured_down))
    return Worker(about, 0.0), history


def told(negotiation, worker):
    agreed = negotiation.agreed(*worker)
    down = agreed.downlink
    assert down.difference in (None, down.whole), "the difference has a recipe of its own"
    return str(down.whole), str(agreed.upload)


def test_one_recipe_each_way_is_what_everybody_gets():
    negotiation = Negotiation("int8+zstd", None, "entropy:c=8+zstd")
    assert told(negotiation, worker()) == ("int8+zstd", "entropy:c=8.0+zstd")
    assert told(negotiation, worker(up=100, down=100)) == ("int8+zstd", "entropy:c=8.0+zstd")
    assert negotiation.downlinks == (Downlink(Recipe.parse("int8+zstd"), Recipe.parse("int8+zstd")),)


def test_each_direction_goes_by_its_own_rate():
    auto = Negotiation("auto", None, "auto")
    assert told(auto, worker()) == ("int8+zstd", "int8+zstd")
    assert told(auto, worker(up=1_000_000)) == ("int8+zstd", "entropy:c=8.0+zstd")
    assert told(auto, worker(up=10_000_000)) == ("int8+zstd", "entropy+zstd")
    slow_down = auto.agreed(*worker(down=1_000_000)).downlink
    assert (str(slow_down.whole), str(slow_down.difference)) == ("int8+zstd", "entropy:c=1.0+zstd")
    assert told(auto, worker(encodings=["int8"], zstd=False)) == ("int8", "int8")
    assert told(auto, worker(encodings=[], zstd=False, down=9)) == ("raw", "raw")


def test_what_was_measured_counts_more_than_what_is_declared():
    auto = Negotiation("auto", None, "auto")
    fast_after_all = worker(up=1_000_000, measured_up=(1e6, 20e6, 30e6))
    assert told(auto, fast_after_all)[1] == "int8+zstd"
    slow_after_all = worker(up=1_000_000_000, measured_up=(1e5,))
    assert told(auto, slow_after_all)[1] == "entropy:c=8.0+zstd"
    record = WorkerRecord()
    auto.tell(*slow_after_all, record)
    assert (record.uplink_bytes_per_second, record.downlink_bytes_per_second) == (1e5, 0)
    assert (record.upload_recipe, record.download_recipe) == ("entropy:c=8.0+zstd", "int8+zstd")


@pytest.mark.parametrize(
    ("recipes", "lists", "why"),
    [
        (("raw", None, "int8+zstd"), {"encodings": ["raw"]}, "updates, int8\\+zstd; it lists raw, zstd"),
        (
            ("raw", None, "int8+zstd | int4"),
            {"encodings": ["int8"], "zstd": False},
            "updates, int8\\+zstd | int4;",
        ),
        (
            ("float16 | int8", None, "raw"),
            {"encodings": ["int4"]},
            "models, float16 | int8; it lists int4, raw, zstd",
        ),
        (("int8", "entropy:c=1", "raw"), {"encodings": ["int8"]}, "models, entropy:c=1.0"),
    ],
)
def test_who_lists_nothing_usable_is_told_what_would_be(recipes, lists, why):
    negotiation = Negotiation(*recipes)
    one, history = worker(**lists)
    with pytest.raises(UsageError, match=f"worker 'pi' knows no encoding of this run's {why}") as caught:
        negotiation.check(one.registration)
    assert "\n" not in str(caught.value)
    record = WorkerRecord()
    negotiation.tell(one, history, record)
    assert record.upload_recipe == ""


@pytest.mark.parametrize(
    "recipe", ["entropy:c=3+zstd", "int4", "raw | int2+zstd", "topk", "rotated4", "int8;*.bias=threshold"]
)
def test_a_recipe_too_coarse_for_whole_models_is_refused_with_the_cure(recipe):
    with pytest.raises(UsageError, match=r"--upload-encoding .* --download-encoding int8\+zstd"):
        Negotiation(recipe, None, "raw")
    Negotiation("int8+zstd", None, recipe)


def test_a_difference_that_would_let_errors_grow_and_a_budget_for_models_are_refused():
    with pytest.raises(UsageError, match="errors would grow"):
        Negotiation("int8", "int8 | entropy:c=5", "raw")
    for download, difference in (("entropy:budget=100", None), ("int8", "entropy:c=1,budget=link")):
        with pytest.raises(UsageError, match="a budget is for updates"):
            Negotiation(download, difference, "raw")
    with pytest.raises(UsageError, match="a link of unknown speed"):
        Negotiation("int8 below 1mbit", None, "raw")
