"""Whatever users' code raises or returns is an error of its task, in one line."""

import numpy as np
import pytest
import structlog

from fedgrpc.errors import TaskError
from fedgrpc.trainer import Cancelled, EvalResult, SliceableTrainer, TrainJob, TrainResult
from fedgrpc.worker.guarded_trainer import RAISED, guarded

WEIGHTS = {"w": np.zeros(3, np.float32)}


class Returning:
    """A trainer whose calls return or raise what the test says."""

    def __init__(self, **returned):
        self._returned = returned

    def _answer(self, method):
        answer = self._returned.get(method)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def initial_weights(self):
        return self._answer("initial_weights")

    def train(self, weights, job):
        return self._answer("train")

    def evaluate(self, weights):
        return self._answer("evaluate")


class Sliced(Returning):
    def channels(self):
        return self._answer("channels")


def call(trainer, method):
    match method:
        case "train":
            return trainer.train(WEIGHTS, TrainJob())
        case "evaluate":
            return trainer.evaluate(WEIGHTS)
    return getattr(trainer, method)()


@pytest.mark.parametrize("method", ["initial_weights", "train", "evaluate", "channels"])
@pytest.mark.parametrize("raised", [ValueError("no\nluck"), SystemExit(3)], ids=["exception", "exit"])
def test_what_a_call_raises_is_a_task_error_of_one_line(method, raised):
    trainer = guarded(Sliced(**{method: raised}), "mine:Task")
    with pytest.raises(TaskError, match=f"task mine:Task raised {type(raised).__name__}") as caught:
        call(trainer, method)
    assert "\n" not in str(caught.value)


def test_the_users_traceback_is_logged_once_for_each_place_that_raises(tmp_path, monkeypatch):
    (tmp_path / "users_module.py").write_text(
        "import json\n\n\ndef one(weights, job):\n    return json.loads('{')\n\n\n"
        "def two(weights, job):\n    raise KeyError('w')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import users_module

    with structlog.testing.capture_logs() as logged:
        for function in (users_module.one, users_module.two, users_module.one):
            trainer = guarded(Returning(train=None), "users_module:Task")
            monkeypatch.setattr(trainer._inner, "train", function, raising=False)
            with pytest.raises(TaskError):
                call(trainer, "train")
    first, second = [each["exception"] for each in logged if each["event"] == RAISED]
    # From the user's own first line to where it ends, without lines of fedgrpc.
    assert first.splitlines()[1].endswith('users_module.py", line 5, in one')
    assert "json.loads" in first
    assert first.splitlines()[-1].startswith("json.decoder.JSONDecodeError")
    assert "guarded_trainer" not in first
    assert second.splitlines()[-1] == "KeyError: 'w'"


@pytest.mark.parametrize("raised", [Cancelled(), TaskError("no data")], ids=["cancelled", "its own"])
def test_errors_that_a_worker_knows_pass(raised):
    with pytest.raises(type(raised)) as caught:
        call(guarded(Returning(train=raised)), "train")
    assert caught.value is raised


@pytest.mark.parametrize(
    ("method", "returned"),
    [
        ("initial_weights", None),
        ("initial_weights", {"w": [1.0]}),
        ("train", WEIGHTS),
        ("train", TrainResult(WEIGHTS, 0, 1)),
        ("train", TrainResult(WEIGHTS, 5, 1.5)),
        ("train", TrainResult(WEIGHTS, 5, 1, {"loss": "low"})),
        ("evaluate", 0.9),
        ("evaluate", EvalResult(-1, {})),
    ],
)
def test_a_result_of_another_type_or_range_is_a_task_error(method, returned):
    with pytest.raises(TaskError):
        call(guarded(Returning(**{method: returned})), method)


def test_results_pass_with_metrics_that_are_finite():
    result = TrainResult(WEIGHTS, 5, 2, {"loss": np.float32(0.5), "diverged": float("nan")})
    trainer = guarded(Returning(train=result, evaluate=EvalResult(4, {"loss": float("inf"), "accuracy": 1})))
    trained, scores = call(trainer, "train"), call(trainer, "evaluate")
    assert (trained.weights, dict(trained.metrics)) == (WEIGHTS, {"loss": 0.5})
    assert (dict(scores.metrics), scores.not_finite) == ({"accuracy": 1.0}, ("loss",))


def test_a_guarded_trainer_is_guarded_once_and_can_do_what_it_could():
    plain, sliced = guarded(Returning()), guarded(Sliced())
    assert (guarded(plain), guarded(sliced)) == (plain, sliced)
    assert (isinstance(plain, SliceableTrainer), isinstance(sliced, SliceableTrainer)) == (False, True)
