"""Forward passes in real 8-bit integer arithmetic against float32: `python -m tools.bench.int8`.

Training has no integer backward pass in torch, and its weights change each step. So an integer forward pass also
pays for quantizing its inputs and weights, and packing the weights, in each step. One thread, CPU time, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Channels in, channels out, side of the image: of LeNet's second convolution and of ResNet-18's stages.
CONVOLUTIONS = ((6, 16, 12), (64, 64, 28), (128, 128, 14), (512, 512, 4))
PRODUCTS = ((64, 400, 120), (1024, 576, 64), (1024, 1024, 1024))
BATCH, REPEATS = 16, 15


def median_ms(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return 1000 * statistics.median(times)


def packed(layer: nn.Conv2d) -> Any:
    """The layer's weights in 8 bits by channel, as the integer convolution takes them."""
    count = layer.out_channels
    scales, zeros = torch.full((count,), 0.01, dtype=torch.float64), torch.zeros(count, dtype=torch.int64)
    weight = torch.quantize_per_channel(layer.weight.detach(), scales, zeros, 0, torch.qint8)
    assert layer.bias is not None
    return torch.ops.quantized.conv2d_prepack(weight, layer.bias.detach(), [1, 1], [1, 1], [1, 1], 1)


def forward(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """All that a forward pass in training would have to do."""
    inputs = torch.quantize_per_tensor(images, 0.05, 128, torch.quint8)
    out: Tensor = torch.ops.quantized.conv2d(inputs, packed(layer), 0.1, 128)
    return out.dequantize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="onednn", choices=torch.backends.quantized.supported_engines)
    torch.backends.quantized.engine = parser.parse_args().engine
    torch.set_num_threads(1)
    print("| operation | float32, ms | integers, ms | with quantizing, ms |")
    print("| --- | --: | --: | --: |")
    with torch.no_grad():
        for channels, out, side in CONVOLUTIONS:
            layer, images = nn.Conv2d(channels, out, 3, padding=1), torch.randn(BATCH, channels, side, side)
            inputs, weights = torch.quantize_per_tensor(images, 0.05, 128, torch.quint8), packed(layer)
            alone = partial(torch.ops.quantized.conv2d, inputs, weights, 0.1, 128)
            works: tuple[Callable[[], object], ...] = (
                partial(layer, images),
                alone,
                partial(forward, layer, images),
            )
            shown = " | ".join(f"{median_ms(work):.2f}" for work in works)
            print(f"| convolution {channels} to {out}, {side}x{side} | {shown} |", flush=True)
        for rows, inner, columns in PRODUCTS:
            left, right = torch.randn(rows, inner), torch.randn(inner, columns)
            codes = [(10 * each).to(torch.int8) for each in (left, right)]
            times = median_ms(partial(torch.matmul, left, right)), median_ms(partial(torch._int_mm, *codes))
            print(f"| product {rows}x{inner}x{columns} | {times[0]:.2f} | {times[1]:.2f} | |", flush=True)


if __name__ == "__main__":
    main()
