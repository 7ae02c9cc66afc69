"""Devices whose losses are quadratic, so that what an algorithm makes of them is plain arithmetic.

F_k(w) = 1/2 sum_i a_ki (w_i - b_ki)^2        gradient  a_k (w - b_k)
"""

from dataclasses import replace

import numpy as np

from fedgrpc.algorithms.algorithm import Counted
from fedgrpc.algorithms.carrying_out import carry_out
from fedgrpc.algorithms.companions import joined, received, suffix_of, with_companions
from fedgrpc.codec.layout import layout_of
from fedgrpc.trainer import EvalResult, TrainJob, TrainResult

SIZE = 4


class Quadratic:
    """A trainer in NumPy of one device's loss; it takes plain gradient steps with the algorithm's term."""

    def __init__(self, seed, examples=10):
        rng = np.random.default_rng(seed)
        self.a, self.b = rng.uniform(0.5, 2.0, SIZE), rng.normal(0, 3, SIZE)
        self.examples = examples

    def initial_weights(self):
        return {"body.w": np.zeros(SIZE // 2, np.float64), "head.w": np.zeros(SIZE // 2, np.float64)}

    def gradients(self, weights):
        w = np.concatenate([weights["body.w"], weights["head.w"]])
        g = self.a * (w - self.b)
        return {"body.w": g[: SIZE // 2], "head.w": g[SIZE // 2 :]}

    def loss(self, weights):
        w = np.concatenate([weights["body.w"], weights["head.w"]])
        return float(0.5 * (self.a * (w - self.b) ** 2).sum())

    def train(self, weights, job):
        term = job.term()
        start = {name: np.array(array) for name, array in weights.items()}
        w = {name: array.copy() for name, array in start.items()}
        steps = 0
        for _ in job.batches(self.examples, 1):
            steps += 1
            g = self.gradients(w)
            w = {n: w[n] - job.learning_rate * term.gradient(n, g[n], w[n], start) for n in w}
        return TrainResult(w, self.examples, steps, {"loss": self.loss(w)})

    def evaluate(self, weights):
        return EvalResult(self.examples, {"loss": self.loss(weights)})


class Termless(Quadratic):
    """A trainer that knows nothing of terms."""

    def train(self, weights, job):
        return TrainResult({n: w - 0.1 * self.gradients(weights)[n] for n, w in weights.items()}, 10, 1)


def optimum(devices):
    """The minimum of the mean of all losses."""
    a, b = np.stack([d.a for d in devices]), np.stack([d.b for d in devices])
    w = (a * b).sum(0) / a.sum(0)
    return {"body.w": w[: SIZE // 2], "head.w": w[SIZE // 2 :]}


def play(algorithm, devices, plan, rounds, inner, taking_part=None):
    """Play an algorithm with all weights equal, plainly; returns the version and what devices kept."""
    first = devices[0].initial_weights()
    version, _ = with_companions(algorithm, first, layout_of(first))
    kept = {k: {} for k in range(len(devices))}
    state = {}
    for number in range(rounds):
        chosen = range(len(devices)) if taking_part is None else taking_part[number % len(taking_part)]
        deltas, counted = [], []
        for k in chosen:
            device, job = devices[k], _job(plan, number)
            got = received(algorithm, version, kept[k])
            sent = carry_out(
                algorithm,
                got,
                plan,
                lambda wanted, device=device, job=job: device.train(wanted.start, _pass(job, wanted)),
                lambda weights, device=device: device.evaluate(weights).metrics,
            )
            new = joined(algorithm, version, sent)
            deltas.append({name: new[name] - version[name] for name in version})
            norm = np.sqrt(sum((d**2).sum() for d in deltas[-1].values()))
            counted.append(Counted(1.0, float(norm), device.loss(version)))
            kept[k] = kept[k] if sent.kept is None else sent.kept
        scales = algorithm.scales(counted, plan)
        steps = algorithm.optimizers(inner, len(deltas))
        after = {}
        for name, old in version.items():
            optimizer = steps[suffix_of(name, steps)]
            mean = sum(s * d[name] for s, d in zip(scales, deltas, strict=True)) / len(deltas)
            before = state.get(name, tuple(np.zeros_like(old) for _ in range(optimizer.state_count)))
            after[name], state[name] = optimizer.step(old, mean, before)
        version = after
    return version, kept


def _job(plan, number):
    asked = {name: value for name, value in vars(plan).items() if value is not None}
    return TrainJob(**asked, round=number)


def _pass(job, wanted):
    most = job.max_steps and max(1, round(job.max_steps * wanted.share))
    return replace(job, term=lambda: wanted.term, epochs=job.epochs * wanted.share, max_steps=most)
