"""Rounding once per operation beside rounding every product and partial sum, in an emulated format.

Trains the same model on the same batches of normal values both ways, and prints the share of weights that differ
after three steps and how much longer the steps take: `python -m tools.bench.accumulate --format bfloat16`.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedgrpc.submodels.plan import Arithmetic, LocalModelPlan
from fedgrpc.torch.local_model.formats import parse_format
from fedgrpc.torch.local_model.local_model import LocalModel
from fedgrpc.torch.models import build_model
from fedgrpc.torch.optimizer import MomentumSgd

_STEPS, _BATCH = 3, 16


def built(name: str) -> nn.Module:
    """Return the model with the same weights each time."""
    torch.manual_seed(0)
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    return build_model(name, num_classes=10, in_channels=1, image_size=28)


def trained(name: str, number_format: str, accumulate: str) -> tuple[Tensor, float]:
    """Return the weights after the steps, and the CPU seconds that they took."""
    plan = LocalModelPlan(arithmetic=Arithmetic(number_format, emulated=True, accumulate=accumulate))
    local = LocalModel(built(name), plan)
    optimizer = MomentumSgd(local.module.parameters(), 0.05, 0.9, 0.0)
    draw = torch.Generator().manual_seed(1)
    began_s = time.process_time()
    for _ in range(_STEPS):
        images = torch.randn(_BATCH, 1, 28, 28, generator=draw)
        labels = torch.randint(0, 10, (_BATCH,), generator=draw)
        for parameter in local.module.parameters():
            parameter.grad = None
        with local.arithmetic():
            functional.cross_entropy(local(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    took_s = time.process_time() - began_s
    return torch.cat([parameter.detach().reshape(-1) for parameter in local.module.parameters()]), took_s


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", help="without: bfloat16, float16 and float8_e4m3")
    parser.add_argument("--model", action="append", help="without: mlp and lenet")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | format | weights that moved | that differ | time |\n| --- | --- | --- | --- | --- |")
    for name in args.model or ("mlp", "lenet"):
        for number_format in args.format or ("bfloat16", "float16", "float8_e4m3"):
            trained(name, number_format, "carrier")
            (wide, wide_s), (narrow, narrow_s) = (
                trained(name, number_format, each) for each in ("carrier", "format")
            )
            start = parse_format(number_format).round(
                torch.cat([each.detach().reshape(-1) for each in built(name).parameters()])
            )
            moved, differ = (100 * float((wide != each).float().mean()) for each in (start, narrow))
            ratio = narrow_s / wide_s
            print(f"| {name} | {number_format} | {moved:.0f} % | {differ:.0f} % | {ratio:.0f} times |", flush=True)


if __name__ == "__main__":
    _main()
