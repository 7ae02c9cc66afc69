"""Cost and accuracy of local models of MobileNetV2, ShuffleNetV2 (Fashion-MNIST) and PointNet (generated solids).

    python -m tools.bench.device_models --steps 300 --out models.json

Rows of as many steps that the file already has stay as they are, so that a stopped measurement continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedgrpc.submodels.plan import (
    Arithmetic,
    Clustering,
    LocalModelPlan,
    Pruning,
    Quantization,
)
from fedgrpc.trainer import SliceableTrainer, Trainer, TrainJob
from fedgrpc.worker.task_loader import load_trainer

DEVICE_MODELS = ("mobilenetv2", "shufflenetv2", "pointnet")
MODEL_PLANS = {
    "whole": LocalModelPlan(),
    "width 0.5": LocalModelPlan(0.5),
    "width 0.25": LocalModelPlan(0.25),
    "pruned 50%": LocalModelPlan(pruning=Pruning(0.5)),
    "8-bit weights and activations": LocalModelPlan(quantization=Quantization(8, 8)),
    "16 clusters": LocalModelPlan(clustering=Clustering(16)),
    "bfloat16, native": LocalModelPlan(arithmetic=Arithmetic("bfloat16")),
}


def device_model(name: str) -> Trainer:
    """A trainer of the model; of Fashion-MNIST a twentieth: 3000 images to train on, 500 to score."""
    if name == "pointnet":
        return load_trainer("fedgrpc.tasks.shapes")
    return load_trainer("fedgrpc.tasks.fashion_mnist", model=name, partition="iid", part="1/20")


def measure_model(name: str, trainer: Trainer, plan: LocalModelPlan, steps: int) -> dict[str, Any]:
    """The model by that plan, trained once for so many steps: CPU ms of a step, bytes of tensors, accuracy."""
    assert isinstance(trainer, SliceableTrainer)
    whole = trainer.initial_weights()
    selection = trainer.channels().select(plan.sub_model(0), whole)
    given = {key: selection.coverage(key, its.shape).take(its).copy() for key, its in whole.items()}
    local_model = None if plan.plain else plan
    job = TrainJob(epochs=100, max_steps=steps, batch_size=16, local_model=local_model)
    job = job if name == "pointnet" else replace(job, learning_rate=0.005)
    begun = time.process_time()
    result = trainer.train(given, job)
    step_ms = 1000 * (time.process_time() - begun) / steps
    score = trainer.evaluate(result.weights)
    assert score is not None
    return {
        "steps": steps,
        "step_ms": round(step_ms, 1),
        "tensor_bytes": result.tensor_bytes,
        "parameters": sum(its.size for its in given.values()),
        "accuracy": score.metrics["accuracy"],
    }


def measure_models(names: Sequence[str], steps: int, path: Path, report: Callable[[str], None]) -> None:
    """The rows of these models, each written to `path` as soon as it is there."""
    rows = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        trainer = device_model(name)
        for plan_name, plan in MODEL_PLANS.items():
            key = f"{name}/{plan_name}"
            if rows.get(key, {}).get("steps") == steps:
                continue
            rows[key] = measure_model(name, trainer, plan, steps)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            report(f"{key}: {rows[key]}")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--model", action="append", choices=DEVICE_MODELS, help="repeat for each; without: all")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each row")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    names = asked.model or DEVICE_MODELS
    measure_models(names, asked.steps, asked.out, lambda line: print(line, flush=True))


if __name__ == "__main__":
    _main()
