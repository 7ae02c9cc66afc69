"""Bytes of pruned and clustered models, down and up, beside the whole model raw and in int8+zstd.

Down is the first pull of a device of that plan; up is an update of normal values, packed as the plan says.
`python -m tools.bench.reduced_bytes --model lenet --model resnet18` prints one row for each plan.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping

import numpy as np
import torch

from fedgrpc.aggregation.partial_update import pack
from fedgrpc.aggregator.negotiation import reduced_recipe
from fedgrpc.codec.layout import Array, layout_of
from fedgrpc.codec.payload import write_payload
from fedgrpc.codec.recipe import Recipe
from fedgrpc.submodels.plan import Clustering, LocalModelPlan, Pruning
from fedgrpc.submodels.reduction import ReducedTensors, Reduction
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.models import build_model
from fedgrpc.torch.weights import weights_of

PLANS = {
    "whole": LocalModelPlan(),
    **{f"pruned {100 * ratio:.0f} %": LocalModelPlan(pruning=Pruning(ratio)) for ratio in (0.3, 0.5, 0.9)},
    **{f"{count} clusters": LocalModelPlan(clustering=Clustering(count)) for count in (16, 4)},
}


def size(tensors: Mapping[str, Array], recipe: Recipe) -> int:
    """Bytes of a payload."""
    return write_payload(tensors, recipe, io.BytesIO(), np.random.default_rng(0)).size_bytes


def down(weights: Mapping[str, Array], plan: LocalModelPlan, recipe: Recipe) -> tuple[int, int]:
    """Bytes of the reduced model, as zeros and values in the usual recipe, and in its own encodings."""
    reduction, layout = Reduction.of(plan), layout_of(weights)
    reduced = dict(ReducedTensors(weights, reduction, weights.keys()))
    return size(reduced, recipe), size(reduced, reduced_recipe(recipe, layout, reduction))


def up(model: torch.nn.Module, plan: LocalModelPlan, recipe: Recipe) -> int:
    """Bytes of an update of that plan."""
    local = LocalModel(model, plan)
    rng, packed = np.random.default_rng(1), dict[str, Array]()
    for name, values in weights_of(local.module).items():
        change = torch.from_numpy(0.01 * rng.standard_normal(values.shape).astype(np.float32))
        mask = local.masks.get(name)
        if name in local.clusters:
            change = local.clusters[name].equalized(local.clusters[name].projected(change, mask), mask)
        kept = None if mask is None else mask.numpy()
        packed |= pack(name, change.numpy(), kept, clustered=name in local.clusters)
    return size(packed, recipe)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="without: lenet and resnet18")
    raw, recipe = Recipe.parse("raw"), Recipe.parse("int8+zstd")
    print("| model | plan | down | the same in int8+zstd | up | raw |\n| --- | --- | --- | --- | --- | --- |")
    for name in parser.parse_args().model or ("lenet", "resnet18"):
        channels, side = (1, 28) if name == "lenet" else (3, 32)
        torch.manual_seed(0)
        model = build_model(name, num_classes=10, in_channels=channels, image_size=side)
        weights = weights_of(model)
        for label, plan in PLANS.items():
            model.load_state_dict({key: torch.from_numpy(values.copy()) for key, values in weights.items()})
            dense, reduced = down(weights, plan, recipe)
            print(f"| {name} | {label} | {reduced} | {dense} | {up(model, plan, recipe)} | {size(weights, raw)} |")


if __name__ == "__main__":
    _main()
