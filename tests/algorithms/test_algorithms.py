"""Each algorithm against a naive version of its paper, on devices with quadratic losses."""

import numpy as np
import pytest

from fedgrpc.aggregation.server_optimizer import PlainStep
from fedgrpc.algorithms.algorithm import Counted
from fedgrpc.algorithms.registry import ALGORITHMS, algorithm_of
from fedgrpc.errors import UsageError
from fedgrpc.training_plan import TrainingPlan
from tests.support.quadratics import Quadratic, optimum, play

RATE, STEPS, ROUNDS = 0.1, 5, 4
PLAN = TrainingPlan(learning_rate=RATE, momentum=0.0, max_steps=STEPS)
DEVICES = [Quadratic(seed) for seed in range(3)]


def flat(weights, suffix=""):
    return np.concatenate([weights["body.w" + suffix], weights["head.w" + suffix]])


def played(text, rounds=ROUNDS, devices=DEVICES, plan=PLAN, taking_part=None):
    return play(algorithm_of(text), devices, plan, rounds, PlainStep(), taking_part)


def steps_from(device, start, term=lambda w: 0.0, steps=STEPS):
    w = start.copy()
    for _ in range(steps):
        w = w - RATE * (device.a * (w - device.b) + term(w))
    return w


def test_fedavg_is_the_mean_of_the_devices_models():
    w = np.zeros(4)
    for _ in range(ROUNDS):
        w = np.mean([steps_from(device, w) for device in DEVICES], axis=0)
    assert np.allclose(flat(played(None)[0]), w, rtol=1e-12)


def test_fedprox_pulls_every_step_towards_the_global_model():
    w = np.zeros(4)
    for _ in range(ROUNDS):
        w = np.mean([steps_from(d, w, lambda y, w=w: 0.7 * (y - w)) for d in DEVICES], axis=0)
    assert np.allclose(flat(played("fedprox:mu=0.7")[0]), w, rtol=1e-12)


@pytest.mark.parametrize("taking_part", [None, [(0, 1), (1, 2), (2, 0)]])
def test_scaffold_is_algorithm_1_of_its_paper(taking_part):
    """Option II; |S|/N of the change of c, with N = 3."""
    x, c, own = np.zeros(4), np.zeros(4), [np.zeros(4) for _ in DEVICES]
    for number in range(ROUNDS):
        chosen = range(3) if taking_part is None else taking_part[number % 3]
        ys, changes = [], []
        for k in chosen:
            y = steps_from(DEVICES[k], x, lambda _, k=k, c=c: c - own[k])
            after = own[k] - c + (x - y) / (STEPS * RATE)
            ys.append(y)
            changes.append(after - own[k])
            own[k] = after
        x, c = np.mean(ys, axis=0), c + len(changes) / 3 * np.mean(changes, axis=0)
    version, kept = played("scaffold:workers=3", taking_part=taking_part)
    assert np.allclose(flat(version), x, rtol=1e-10)
    assert np.allclose(flat(version, "#control"), c, rtol=1e-10)
    assert all(np.allclose(flat(kept[k]), own[k]) for k in range(3))


def test_scaffold_and_feddyn_reach_the_optimum_that_fedavg_misses():
    best = flat(optimum(DEVICES))
    misses = {
        text: np.abs(flat(played(text, 400)[0]) - best).max() for text in (None, "scaffold", "feddyn:alpha=1")
    }
    assert misses[None] > 0.05
    assert misses["scaffold"] < 1e-6
    assert misses["feddyn:alpha=1"] < 1e-6


def test_scaffold_with_momentum_divides_by_what_its_steps_amount_to():
    """A device with a constant gradient g then has c_k = g exactly, whatever the momentum."""

    class Slope(Quadratic):
        def train(self, weights, job):
            result = super().train(weights, job)
            w, v = {n: np.array(a) for n, a in weights.items()}, dict.fromkeys(weights, 0.0)
            for _ in range(result.steps):
                v = {n: job.momentum * v[n] + 3.0 for n in w}
                w = {n: w[n] - job.learning_rate * v[n] for n in w}
            return type(result)(w, 10, result.steps)

    plan = TrainingPlan(learning_rate=RATE, momentum=0.9, max_steps=7)
    _, kept = played("scaffold", 1, [Slope(0)], plan)
    assert np.allclose(flat(kept[0]), 3.0)


def test_feddyn_is_algorithm_1_of_its_paper():
    alpha, w, h, own = 0.5, np.zeros(4), np.zeros(4), [np.zeros(4) for _ in DEVICES]
    for _ in range(ROUNDS):
        after = []
        for k, device in enumerate(DEVICES):
            y = steps_from(device, w, lambda y, k=k, w=w: -own[k] + alpha * (y - w))
            own[k] = own[k] - alpha * (y - w)
            after.append(y)
        h = h - alpha * np.mean([y - w for y in after], axis=0)
        w = np.mean(after, axis=0) - h / alpha
    assert np.allclose(flat(played("feddyn:alpha=0.5")[0]), w, rtol=1e-10)


def test_ditto_trains_the_global_model_as_fedavg_and_keeps_a_model_beside_it():
    w, own = np.zeros(4), [np.zeros(4) for _ in DEVICES]
    for number in range(ROUNDS):
        own = [
            steps_from(d, w if number == 0 else own[k], lambda v, w=w: 0.3 * (v - w))
            for k, d in enumerate(DEVICES)
        ]
        w = np.mean([steps_from(device, w) for device in DEVICES], axis=0)
    version, kept = played("ditto:strength=0.3")
    assert np.allclose(flat(version), w, rtol=1e-12)
    assert all(np.allclose(flat(kept[k]), own[k], rtol=1e-10) for k in range(3))


def test_fedrep_trains_the_head_then_the_body_and_sends_the_body_alone():
    plan = TrainingPlan(learning_rate=RATE, momentum=0.0, epochs=1.0)
    body, heads = np.zeros(2), [np.zeros(2) for _ in DEVICES]
    for _ in range(ROUNDS):
        bodies = []
        for k, d in enumerate(DEVICES):
            for _ in range(5):
                heads[k] = heads[k] - RATE * d.a[2:] * (heads[k] - d.b[2:])
            own = body
            for _ in range(5):
                own = own - RATE * d.a[:2] * (own - d.b[:2])
            bodies.append(own)
        body = np.mean(bodies, axis=0)
    version, kept = played("fedrep:head=head.*", plan=plan)
    assert np.allclose(version["body.w"], body, rtol=1e-12)
    assert not version["head.w"].any()
    assert all(np.allclose(kept[k]["head.w"], heads[k]) and set(kept[k]) == {"head.w"} for k in range(3))


def test_fedbn_keeps_the_layers_with_running_statistics_by_itself():
    names = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "fc.weight"]
    assert algorithm_of("fedbn").own(names) == names[1:5]
    assert algorithm_of("fedbn:layers=fc.*").own(names) == ["fc.weight"]
    with pytest.raises(UsageError, match="no tensor"):
        algorithm_of("fedbn").own(["fc.weight"])


def test_fedbn_sends_no_change_of_its_own_layers():
    version, kept = played("fedbn:layers=head.*")
    assert not version["head.w"].any()
    assert all(kept[k]["head.w"].any() for k in range(3))


def test_ifca_puts_devices_of_one_kind_into_one_cluster():
    near = [Quadratic(seed) for seed in range(4)]
    for k, device in enumerate(near):
        device.b = np.full(4, 5.0 if k % 2 else -5.0) + 0.1 * k
        device.initial_weights = lambda: {"body.w": np.array([0.3, -0.2]), "head.w": np.array([0.1, 0.4])}
    version, kept = played("ifca:clusters=2,spread=3", 60, near)
    clusters = [int(kept[k]["cluster"][0]) for k in range(4)]
    assert clusters[0] == clusters[2] != clusters[1] == clusters[3]
    for k, device in enumerate(near):
        own = flat(version, f"#cluster{clusters[k]}" if clusters[k] else "")
        assert np.abs(own - device.b).max() < 0.5


@pytest.mark.parametrize("q", [0.0, 1.0, 2.0])
def test_qfedavg_is_algorithm_2_of_its_paper(q):
    w, lipschitz = np.zeros(4), 1 / RATE
    for _ in range(ROUNDS):
        steps, sizes = [], []
        for d in DEVICES:
            loss = 0.5 * (d.a * (w - d.b) ** 2).sum()
            change = lipschitz * (w - steps_from(d, w))
            steps.append(loss**q * change)
            sizes.append(q * loss ** (q - 1) * (change**2).sum() + lipschitz * loss**q)
        w = w - sum(steps) / sum(sizes)
    assert np.allclose(flat(played(f"qfedavg:q={q}")[0]), w, rtol=1e-9)


def test_qfedavg_bounds_what_a_claimed_loss_can_do():
    honest = [Counted(1.0, 1.0, 2.0)] * 4
    claims = algorithm_of("qfedavg:q=1").scales([*honest, Counted(1.0, 1.0, 1e30)], PLAN)
    assert claims[4] / claims[0] == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("fedasync:alpha=0.5,s=constant", [0.5, 0.5, 0.5, 0.5]),
        ("fedasync:alpha=0.5,a=1", [0.5, 0.25, 0.5 / 3, 0.125]),
        ("fedasync:alpha=0.8,s=hinge,a=10,b=1", [0.8, 0.8, 0.8 / 11, 0.8 / 21]),
    ],
)
def test_fedasync_mixes_by_the_staleness_functions_of_its_paper(text, shares):
    algorithm = algorithm_of(text)
    assert [algorithm.mixing(staleness) for staleness in range(4)] == pytest.approx(shares)


def test_fedasync_pulls_as_fedprox_does():
    assert played("fedasync:mu=0.7")[0].keys() == played("fedprox:mu=0.7")[0].keys()
    assert np.array_equal(flat(played("fedasync:mu=0.7")[0]), flat(played("fedprox:mu=0.7")[0]))


@pytest.mark.parametrize("text", [*ALGORITHMS, "fednova:mu=0.1"])
def test_every_algorithm_plays_a_round(text):
    """The options have defaults, but for fedrep, which has to know the head."""
    text = f"{text}:head=head.*" if text == "fedrep" else f"{text}:layers=head.*" if text == "fedbn" else text
    version, _ = played(text, 1)
    assert all(np.isfinite(values).all() for values in version.values())


def test_a_class_of_ones_own_is_an_algorithm():
    found = algorithm_of("fedgrpc.algorithms.fedprox:FedProx:mu=0.25")
    assert found.mu == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fedmagic", "known: fedavg"),
        ("fedprox:mu=big", "must be a number"),
        ("fedprox:nu=1", "takes the options mu"),
        ("fedprox:mu=-1", "above 0"),
        ("fedasync:alpha=1.5", "at most 1"),
        ("fedasync:s=linear", "hinge"),
        ("fedasync:a=0", "above 0"),
        ("fedrep", "needs head"),
        ("scaffold:workers=-2", "from 0"),
        ("no.such.module:Class", "no.such.module"),
        ("json:JSONDecoder", "no dataclass"),
        ("fedgrpc.training_plan:TrainingPlan", "both halves"),
    ],
)
def test_a_text_that_names_no_algorithm_is_refused_in_one_line(text, words):
    with pytest.raises(UsageError, match=words) as refused:
        algorithm_of(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", [".x:Mine", ":Mine", "a..b:Mine", "no.such.module:Mine"])
def test_a_class_that_cannot_be_imported_is_refused_in_one_line(text):
    with pytest.raises(UsageError, match="algorithm"):
        algorithm_of(text)
