"""Take the pictures of the page in docs/images: a real aggregator, fifteen workers in this process, and a browser.

    python -m tools.page_images --to docs/images --rounds 30

Needs the extra `fedgrpc[test-extras]`, and chromium. Workers train a softmax regression of digits with NumPy, each
at the pace of its device. Some fail or are late on purpose.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fedgrpc.aggregator.server import Aggregator
from fedgrpc.aggregator.settings import AggregatorSettings
from fedgrpc.datasets.digits import load_digits
from fedgrpc.logging import configure
from fedgrpc.rounds.policy import RoundPolicy
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult
from fedgrpc.web.page import PageSettings, serve_page
from fedgrpc.worker.process import run_worker
from fedgrpc.worker.settings import WorkerSettings

# Device class, memory, seconds of a task, on battery, and how often in ten it fails.
FLEET: Mapping[str, tuple[str, int, float, bool, int]] = {
    **{f"pi4-{n}": ("raspberry-pi-4", 4 << 30, 2.5 + 0.3 * n, False, 0) for n in range(1, 6)},
    **{f"pi5-{n}": ("raspberry-pi-5", 8 << 30, 1.2 + 0.2 * n, False, 0) for n in range(1, 4)},
    **{f"nano-{n}": ("jetson-nano", 4 << 30, 1.6, False, 0) for n in range(1, 4)},
    **{f"orin-{n}": ("jetson-orin-nano", 8 << 30, 0.7, False, 0) for n in range(1, 3)},
    "buoy-7": ("raspberry-pi-zero-2", 512 << 20, 9.0, True, 0),
    "truck-12": ("raspberry-pi-4", 2 << 30, 3.0, True, 4),
}
DEADLINE_S = 8.0
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
PAGES = {
    **{"runs": "/runs", "run": "/runs/digits-field", "round": "/runs/digits-field/rounds/3"},
    **{"fleet": "/fleet", "device": "/fleet/truck-12", "audit": "/audit", "sign-in": "/sign-in"},
}


class SoftmaxTrainer:
    """Softmax regression on this device's share of digits."""

    def __init__(self, share: int, seconds: float, failures: int) -> None:
        self._x, self._y, self._tx, self._ty = _digits(share)
        self._seconds = seconds
        self._failures = failures

    def initial_weights(self) -> dict[str, np.ndarray]:
        return {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}

    def train(self, weights: Mapping[str, np.ndarray], job: TrainJob) -> TrainResult:
        if job.seed % 10 < self._failures:
            raise RuntimeError("the camera gives no pictures: /dev/video0 is busy")
        w, b = weights["w"].copy(), weights["b"].copy()
        losses, steps = [], 0
        for batch in job.batches(len(self._x), 16):
            steps += 1
            x, y = self._x[batch], self._y[batch]
            p = _softmax(x @ w + b)
            losses.append(float(-np.log(p[np.arange(len(y)), y] + 1e-9).mean()))
            p[np.arange(len(y)), y] -= 1
            w -= 0.02 * x.T @ p / len(y)
            b -= 0.02 * p.mean(axis=0)
            time.sleep(self._seconds / max(1, len(self._x) // 16))
        return TrainResult({"w": w, "b": b}, len(self._x), steps, {"train_loss": float(np.mean(losses))})

    def evaluate(self, weights: Mapping[str, np.ndarray]) -> EvalResult:
        p = _softmax(self._tx @ weights["w"] + weights["b"])
        loss = float(-np.log(p[np.arange(len(self._ty)), self._ty] + 1e-9).mean())
        accuracy = float((p.argmax(axis=1) == self._ty).mean())
        return EvalResult(len(self._ty), {"accuracy": accuracy, "loss": loss})


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def _digits(share: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return every fifteenth example from number `share` on, to train on and to score with."""
    data = load_digits()
    parts = [part.take(np.arange(share, len(part), len(FLEET))) for part in (data.train, data.held_out)]
    inputs = [part.inputs.reshape(-1, 64).astype(np.float32) / 16 for part in parts]
    return inputs[0], parts[0].labels, inputs[1], parts[1].labels


def settings_of(folder: Path) -> AggregatorSettings:
    """Return the settings of a run in which rounds take seconds."""
    model = folder / "initial.safetensors"
    save_file({"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}, model)
    policy = RoundPolicy(
        min_workers=12, quorum=8, deadline_s=DEADLINE_S, lease_s=30.0, selection_window_s=1.0, min_new_examples=0
    )
    return AggregatorSettings(
        folder / "aggregator",
        address="127.0.0.1:0",
        run_name="digits-field",
        rounds=60,
        policy=policy,
        initial_model=model,
        learning_task="fedgrpc.tasks.digits",
        stay=True,
        durable=False,
        drain_s=2.0,
    )


LINKS = {"raspberry-pi-4": 40_000_000, "jetson-nano": 100_000_000, "raspberry-pi-zero-2": 900_000}


def worker_settings(name: str, address: str, folder: Path) -> WorkerSettings:
    """Return the settings of one device of the fleet."""
    device_class, memory, _, on_battery, _ = FLEET[name]
    device = {"device_class": device_class, "memory_bytes": memory, "on_battery": on_battery}
    link = LINKS.get(device_class, 250_000_000)
    device |= {"uplink_bits_per_second": link // 3, "downlink_bits_per_second": link, "cpu_cores": 4}
    return WorkerSettings(
        name, address, folder / name, device=device, serve_address=None, exit_when_run_ends=False, poll_wait_s=5.0
    )


async def play(arguments: argparse.Namespace) -> None:
    """Run the fleet; take the pictures once enough rounds are done, or serve until interrupted."""
    folder = Path(tempfile.mkdtemp(prefix="fedgrpc-page-"))
    ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    url: list[str] = []

    @asynccontextmanager
    async def page(trust: Any, address: str) -> AsyncIterator[None]:
        async with serve_page(PageSettings(f"127.0.0.1:{arguments.port}"), address, trust.folder) as served:
            url.append(served)
            yield

    aggregator = Aggregator(settings_of(folder), beside=page)
    running = [asyncio.create_task(aggregator.run(ready.set_result))]
    try:
        address = f"127.0.0.1:{await ready}"
        for share, (name, (_, _, seconds, _, failures)) in enumerate(FLEET.items()):
            trainer = SoftmaxTrainer(share, seconds, failures)
            running.append(asyncio.create_task(run_worker(worker_settings(name, address, folder), trainer)))
        if arguments.to is None:
            print(f"{url[0]}, with the link in {folder}/aggregator/identity/page.link")
            await running[0]
        else:
            await _pictures(url[0], aggregator, arguments)
    finally:
        for task in running[1:]:
            task.cancel()
        aggregator.stop()
        await asyncio.gather(*running, return_exceptions=True)
        shutil.rmtree(folder, ignore_errors=True)


async def _pictures(url: str, aggregator: Aggregator, arguments: argparse.Namespace) -> None:
    from playwright.async_api import async_playwright

    coordinator = aggregator.coordinator
    assert coordinator is not None
    seen = -1
    while (last := coordinator.records.last) is None or last.number < arguments.rounds:
        seen = await coordinator.changes.wait(seen)
    # In the middle of a round.
    await asyncio.sleep(DEADLINE_S / 3)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for kind, (width, height) in SIZES.items():
                page = await browser.new_page(
                    viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=2
                )
                for name, path in PAGES.items():
                    file = f"page-{name}-{kind}-{scheme}.png"
                    if arguments.only not in file:
                        continue
                    await page.goto(url + path)
                    await page.wait_for_timeout(1500)
                    await page.screenshot(path=arguments.to / file, full_page=arguments.whole)
                await page.close()
        await browser.close()


def main() -> None:
    """Take the pictures, or serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--to", type=Path, help="folder of the pictures; without: serve the page until interrupted"
    )
    parser.add_argument("--rounds", type=int, default=30, help="rounds before the pictures")
    parser.add_argument("--only", default="", help="take only pictures whose names have this in them")
    parser.add_argument("--whole", action="store_true", help="whole pages, not only what a screen shows")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    configure(level="warning", log_format="console")
    asyncio.run(play(arguments))


if __name__ == "__main__":
    main()
