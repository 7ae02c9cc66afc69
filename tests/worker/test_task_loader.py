"""`--task` finds a class, gives it what it asks for, and says in one line what is wrong."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from fedgrpc.errors import TaskError, UsageError
from fedgrpc.trainer import Cancelled, Trainer, TrainJob
from fedgrpc.worker.task_loader import load_trainer

PREAMBLE = "import numpy as np\nfrom fedgrpc.trainer import Cancelled, EvalResult, TrainResult\n"
ONE = """
class {name}:
    def __init__(self, {parameters}): self.given = dict(locals()); {init}
    def initial_weights(self): return {{'w': np.zeros(2)}}
    def train(self, weights, job): {train}
    def evaluate(self, weights): {evaluate}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Writes a module of tasks beside the user and gives its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_task_{tmp_path.name}"

    def write(*tasks: dict[str, str], extra: str = "") -> str:
        blank = {"name": "Own", "parameters": "*, x=1", "init": "pass", "train": "pass", "evaluate": "pass"}
        body = "".join(ONE.format(**{**blank, **task}) for task in tasks)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        (tmp_path / f"{name}.py").write_text(PREAMBLE + body + extra)
        return name

    yield write
    sys.modules.pop(name, None)


def given(trainer: Trainer) -> dict[str, object]:
    return trainer._inner.given  # type: ignore[attr-defined, no-any-return]


def test_the_only_class_of_a_module_beside_the_user_is_found(module) -> None:  # type: ignore[no-untyped-def]
    assert load_trainer(module({})).initial_weights()["w"].tolist() == [0, 0]


def test_of_several_classes_one_is_named_or_chosen_by_task(module) -> None:  # type: ignore[no-untyped-def]
    reference = module({"name": "First", "init": "self.given['x'] = 1"}, {"name": "Second"})
    assert load_trainer(f"{reference}:First")
    with pytest.raises(UsageError, match="classes found: First, Second"):
        load_trainer(reference)


def test_task_in_the_module_names_the_class(module) -> None:  # type: ignore[no-untyped-def]
    reference = module({"name": "First"}, {"name": "Second", "parameters": "second=2"}, extra="TASK = 'Second'\n")
    assert given(load_trainer(reference))["second"] == 2


def test_a_constructor_gets_the_settings_it_names_and_no_others(module, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reference = module({"parameters": "data, device, partition=None, part=None, seed=7"})
    trainer = load_trainer(reference, data=tmp_path, partition="iid", part="1/2", seed=3)
    asked = given(trainer)
    assert (asked["data"], asked["device"], asked["part"], asked["seed"]) == (tmp_path, "auto", "1/2", 3)


def test_options_take_the_type_of_their_default(module) -> None:  # type: ignore[no-untyped-def]
    reference = module({"parameters": "width=4, rate=0.5, fast=False, name='a'"})
    options = {"width": "8", "rate": "2", "fast": "true", "name": "8"}
    asked = given(load_trainer(reference, options=options))
    assert (asked["width"], asked["rate"], asked["fast"], asked["name"]) == (8, 2.0, True, "8")
    for name, text in {"width": "1.5", "rate": "x", "fast": "yes"}.items():
        with pytest.raises(UsageError, match=f"option {name} must be"):
            load_trainer(reference, options={name: text})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Path("x")}, "takes no --data"),
        ({"model": "lenet"}, "takes no --model"),
        ({"partition": "iid", "part": "1/2"}, "takes no --partition"),
        ({"options": {"depth": "3"}}, "takes no option 'depth'; it takes: x"),
        ({"partition": "iid"}, "--partition and --part go together"),
    ],
)
def test_a_setting_nobody_takes_is_refused(module, settings, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=message):
        load_trainer(module({}), **settings)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "must look like"),
        ("own/task.py", "must look like"),
        ("own_task.py", "without .py: own_task"),
        ("no_such_module_x", "there is no module 'no_such_module_x'"),
        ("fedgrpc.tasks.nothing", "there is no module 'fedgrpc.tasks.nothing'"),
        ("json", "task classes found: none"),
        ("json:Missing", "has no class 'Missing'"),
        ("json:loads", "has no class 'loads'"),
        ("json:JSONDecoder", "lacks initial_weights, train or evaluate"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused_in_one_line(reference: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_trainer(reference)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_needs_one_not_installed_says_which(module) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match="needs the module 'not_installed'"):
        load_trainer(module(extra="import not_installed.part\n"))


@pytest.mark.parametrize("extra", ["1 / 0", "raise SystemExit('no')", "def f(:"])
def test_a_module_that_raises_is_a_task_error(module, extra: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TaskError, match=r"raised (ZeroDivisionError|SystemExit|SyntaxError)"):
        load_trainer(module(extra=extra + "\n"))


def test_what_user_code_raises_becomes_one_line_that_names_it(module) -> None:  # type: ignore[no-untyped-def]
    reference = module({"train": "raise ValueError('bad\\n image')", "evaluate": "return {}[3]"})
    trainer = load_trainer(reference)
    with pytest.raises(TaskError, match=r"raised ValueError: bad image \(own_task_.*\.py:\d+\)$"):
        trainer.train({}, TrainJob())
    with pytest.raises(TaskError, match="raised KeyError: 3"):
        trainer.evaluate({})


def test_the_line_that_is_told_is_the_user_s_own_and_not_that_of_a_library_it_calls(module) -> None:  # type: ignore[no-untyped-def]
    trainer = load_trainer(module({"train": "return np.load('not there')"}))
    with pytest.raises(TaskError, match=r"raised FileNotFoundError: .* \(own_task_.*\.py:\d+\)$"):
        trainer.train({}, TrainJob())


def test_a_module_that_is_no_python_says_where(module) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TaskError, match=r"SyntaxError: .*\(own_task_.*\.py, line \d+\)$"):
        load_trainer(module(extra="def f(:\n"))


def test_a_constructor_that_raises_is_a_task_error(module) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TaskError, match="raised RuntimeError: no camera"):
        load_trainer(module({"init": "raise RuntimeError('no camera')"}))


def test_cancelling_passes_through(module) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Cancelled):
        load_trainer(module({"train": "raise Cancelled"})).train({}, TrainJob())


def test_the_protocol_and_a_numpy_task_import_no_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'examples');"
        "from fedgrpc.worker.task_loader import load_trainer; load_trainer('bring_your_own_numpy');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
