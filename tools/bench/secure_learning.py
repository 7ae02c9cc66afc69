"""Accuracy of real rounds over gRPC on Fashion-MNIST, with secure aggregation and without, at the same seeds.

    python -m tools.bench.secure_learning --rounds 10 --seeds 3 --modes float secure:8 secure:6 secure:4

An aggregator in a process of its own, and all workers in this one, with the network of
`tools.bench.secure_accuracy`. Models travel as float32 in every mode, and so do updates without masks, unless
`--encoding` says otherwise. A device draws the same batches in all modes of a seed, so they differ by the rounding
of updates alone. Modes with noise (`noise`, `noise+secure:8`) draw theirs under a key of their own: compare them
over seeds. Results are kept in FILE, so that a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fedgrpc import load_model
from fedgrpc.codec.layout import Array
from fedgrpc.datasets.fashion_mnist import load_fashion_mnist
from fedgrpc.datasets.partition import Dirichlet
from fedgrpc.logging import configure
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult, Weights
from fedgrpc.v1.round_pb2 import ROUND_PHASE_COMMITTED
from tools.bench.secure_accuracy import first_model, inputs_of, outputs_of, trained_from
from tools.bench.secure_rounds import finished


class SmallNetwork:
    """A trainer of one device: an epoch of plain SGD, whose rate falls to nothing over `rounds`."""

    def __init__(self, inputs: Array, labels: Array, rounds: int) -> None:
        self._inputs, self._labels, self._rounds = inputs, labels, rounds

    def initial_weights(self) -> Weights:
        return {}

    def train(self, weights: Weights, job: TrainJob) -> TrainResult:
        """Train an epoch in the order of the job's seed."""
        rate = 0.1 * (1 + np.cos(np.pi * (job.round - 1) / self._rounds)) / 2
        trained = trained_from(dict(weights), self._inputs, self._labels, rate, np.random.default_rng(job.seed))
        return TrainResult(trained, len(self._labels), -(-len(self._labels) // 32), {})

    def evaluate(self, weights: Weights) -> EvalResult | None:
        return None


def flags_of(mode: str, most_examples: int, arguments: argparse.Namespace) -> list[str]:
    """Return the aggregator's flags of "float" or "secure:BITS[:COORDINATES]", perhaps with "noise+" before it."""
    *noisy, kind = mode.split("+")
    if kind == "noise":
        noisy, kind = ["noise"], "float"
    _, bits, share, *_ = f"{kind}::".split(":")
    flags = ["--secure-aggregation", bits] if bits else []
    flags += ["--secure-coordinates", share] if share else []
    if noisy:
        cohort, multiplier = str(arguments.workers), str(arguments.noise_multiplier)
        flags += ["--privacy", "gaussian", "--noise-multiplier", multiplier, "--privacy-cohort", cohort]
        return [*flags, "--clip-norm", str(arguments.noise_clip_norm)]
    weights = ["--secure-weight-bits", "8"] if flags else []
    return [*flags, *weights, "--max-examples", str(most_examples), "--clip-norm", "10"]


async def accuracy(mode: str, seed: int, arguments: argparse.Namespace) -> float:
    """Return the accuracy after a run of this mode. Raises RuntimeError where a round was abandoned."""
    data = load_fashion_mnist()
    train, test = (inputs_of(part.inputs) for part in (data.train, data.held_out))
    parts = Dirichlet(0.5).split(data.train.labels, arguments.workers, seed)
    trainers = [SmallNetwork(train[part], data.train.labels[part], arguments.rounds) for part in parts]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = first_model(np.random.default_rng(seed))
        save_file({name: each.astype(np.float32) for name, each in model.items()}, folder / "model.safetensors")
        flags = flags_of(mode, max(map(len, parts)), arguments)
        flags += ["--initial-model", str(folder / "model.safetensors"), "--rounds", str(arguments.rounds)]
        flags += ["--seed", str(seed), "--encoding", arguments.encoding]
        records, _ = await finished(folder, flags, trainers)
        if any(each.phase != ROUND_PHASE_COMMITTED for each in records):
            raise RuntimeError(f"a round of {mode} was abandoned: {[each.reason for each in records]}")
        scores = outputs_of(load_model(folder / "aggregator"), test)[1]
    return float((scores.argmax(1) == data.held_out.labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", default=["float", "secure:8", "secure:6", "secure:4"])
    parser.add_argument("--noise-multiplier", type=float, default=0.02)
    parser.add_argument("--noise-clip-norm", type=float, default=1.0)
    parser.add_argument("--encoding", default="raw", help="of models, and of updates without masks")
    parser.add_argument("--file", type=Path, default=Path("secure_learning.json"))
    arguments = parser.parse_args()
    configure("warning")
    found = json.loads(arguments.file.read_text()) if arguments.file.exists() else {}
    for seed in range(arguments.seeds):
        for mode in arguments.modes:
            about = f"{mode} seed {seed} of {arguments.workers} workers, {arguments.rounds} rounds"
            if mode.startswith("noise"):
                about += f", noise {arguments.noise_multiplier}, clip norm {arguments.noise_clip_norm}"
            if arguments.encoding != "raw":
                about += f", encoding {arguments.encoding}"
            if about not in found:
                found[about] = asyncio.run(accuracy(mode, seed, arguments))
                arguments.file.write_text(json.dumps(found, indent=1))
            print(f"{about}: {100 * found[about]:.2f} %, load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
