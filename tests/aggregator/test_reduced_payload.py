"""The price of a pruned or clustered download is the bytes that the aggregator really encodes."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest

from fedgrpc.aggregator.negotiation import reduced_bits, reduced_recipe
from fedgrpc.codec.budget import expected_bits
from fedgrpc.codec.layout import layout_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.submodels.plan import Clustering, LocalModelPlan, Pruning
from fedgrpc.submodels.plan_size import elements_of
from fedgrpc.submodels.reduction import ReducedTensors, Reduction

SHAPES = {"conv.weight": (16, 6, 5, 5), "fc.weight": (300, 300), "head.weight": (10, 300), "fc.bias": (300,)}
PLANS = [
    *(LocalModelPlan(pruning=Pruning(ratio)) for ratio in (0.3, 0.5, 0.9)),
    *(LocalModelPlan(clustering=Clustering(count)) for count in (4, 16, 100)),
    LocalModelPlan(pruning=Pruning(0.9), clustering=Clustering(16)),
    LocalModelPlan(pruning=Pruning(0.9, layers=("fc.*",)), clustering=Clustering(8, layers=("conv.*",))),
    LocalModelPlan(pruning=Pruning(0.8, scope="global")),
]


@pytest.mark.parametrize("text", ["int8+zstd", "int4", "float16+zstd", "raw"])
@pytest.mark.parametrize("plan", PLANS, ids=LocalModelPlan.to_line)
def test_the_price_of_a_reduced_download_is_that_of_the_payload_that_is_encoded(
    plan: LocalModelPlan, text: str
) -> None:
    rng, recipe = np.random.default_rng(7), Recipe.parse(text)
    weights = {name: 0.05 * rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    reduction, layout = Reduction.of(plan), layout_of(weights)
    reduced = dict(ReducedTensors(weights, reduction, weights.keys()))
    written = write_payload(reduced, reduced_recipe(recipe, layout, reduction), BytesIO(), rng).size_bytes
    whole = write_payload(weights, recipe, BytesIO(), rng).size_bytes
    elements = elements_of(plan, SHAPES, None)
    bits = expected_bits(recipe, elements.own)
    assert elements.size(bits, 32, reduced_bits(recipe)).download_bytes == pytest.approx(written, rel=0.03)
    assert elements.size(bits, 32).download_bytes == pytest.approx(whole, rel=0.03)
