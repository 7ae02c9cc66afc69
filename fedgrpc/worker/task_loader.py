"""Find the learning task that `--task` names, and construct its trainer."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedgrpc.errors import UsageError
from fedgrpc.process import rest_while_waiting
from fedgrpc.trainer import TaskSetup, Trainer
from fedgrpc.worker.guarded_trainer import guarded, users_code


def load_trainer(
    task: str | type,
    *,
    model: str | None = None,
    data: Path | None = None,
    device: str = "auto",
    partition: str | None = None,
    part: str | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    threads: int | None = None,
    here: bool = True,
) -> Trainer:
    """Find and construct a task: a class, `package.module:Class`, or `package.module` with one task class in it.

    `partition` (`iid`, `dirichlet:0.5`, `shards:2`, `labels:2`, `quantity:0.5`) with `part` (`3/10`) makes the
    task take its part of a common data set. With `here`, modules in the working folder are found, too. The
    returned trainer raises only `Cancelled` and errors of `fedgrpc.errors`: `TaskError` for anything else that
    the user's code raises.

    Raises:
        UsageError: there is no such module or class, it is no task, or it does not take a given setting.
        TaskError: importing or constructing it raised.
    """
    setup = TaskSetup(model, data, device, partition, part, seed, dict(options or {}), threads)
    reference = reference_of(task)
    found = find_task(task, here)
    with users_code(reference):
        trainer = _construct(found, setup, reference)
    return guarded(trainer, reference)


def reference_of(task: str | type) -> str:
    """Return the reference of a task that is named or given."""
    return task if isinstance(task, str) else f"{task.__module__}:{task.__qualname__}"


def find_task(task: str | type, here: bool = True) -> type:
    """Find the class that `load_trainer` constructs, with `here` also in the working folder. Raises likewise."""
    rest_while_waiting()
    if isinstance(task, type):
        if not _is_task(task):
            raise UsageError(f"task {reference_of(task)} lacks initial_weights, train or evaluate")
        return task
    reference = task
    module_name, _, class_name = reference.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UsageError(f"task {reference!r} must look like package.module or package.module:Class")
    if module_name.endswith(".py"):
        raise UsageError(f"task {reference!r} must be the name of a module, without .py: {module_name[:-3]}")
    if here and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script, unlike `python -m`, does not look beside the user
    with users_code(reference):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UsageError(_missing_module(reference, module_name, error)) from error
    class_name = class_name or getattr(module, "TASK", "")
    found = getattr(module, class_name, None) if class_name else _only_task(module, reference)
    if not isinstance(found, type):
        raise UsageError(f"task {reference}: module {module_name} has no class {class_name!r}")
    if not _is_task(found):
        raise UsageError(f"task {reference}: {class_name} lacks initial_weights, train or evaluate")
    return found


def _missing_module(reference: str, module_name: str, error: ModuleNotFoundError) -> str:
    missing = error.name or "?"
    if missing == module_name or module_name.startswith(missing + "."):
        return f"task {reference}: there is no module {missing!r}; is its folder on PYTHONPATH?"
    extra = " (pip install 'fedgrpc[torch]')" if missing == "torch" else ""
    return f"task {reference}: it needs the module {missing!r}, which is not installed{extra}"


def _only_task(module: Any, reference: str) -> type:
    own = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    tasks = [item for item in own if _is_task(item)]
    if len(tasks) != 1:
        names = ", ".join(item.__name__ for item in tasks) or "none"
        raise UsageError(f"task {reference}: name its class as module:Class; task classes found: {names}")
    return tasks[0]


def _is_task(item: type) -> bool:
    methods = ("initial_weights", "train", "evaluate")
    return hasattr(item, "build_trainer") or all(callable(getattr(item, name, None)) for name in methods)


def _construct(task: Any, setup: TaskSetup, reference: str) -> Trainer:
    """Call `build_trainer(setup)` if the class has it, as a `TorchTask` does, else its constructor."""
    if hasattr(task, "build_trainer"):
        trainer: Trainer = task.build_trainer(setup)
    else:
        trainer = task(**constructor_arguments(task, setup, reference))
    return trainer


def constructor_arguments(
    task: type, setup: TaskSetup, reference: str, taken: Collection[str] = ()
) -> dict[str, Any]:
    """Return the settings that `task`'s constructor names, with options converted to the type of their default.

    `taken` are settings and options that the caller handles itself, so that the constructor need not name them.

    Raises:
        UsageError: a setting was given that nothing uses, or an option does not parse.
    """
    parameters = _parameters(task)
    given: dict[str, Any] = {"data": setup.data, "model": setup.model, "device": setup.device}
    given |= {"partition": setup.partition, "part": setup.part, "seed": setup.seed, "setup": setup}
    given["threads"] = setup.threads
    arguments = {name: value for name, value in given.items() if name in parameters and value is not None}
    for name in ("data", "model", "partition"):
        if given[name] is not None and not {name, "setup"} & {*parameters, *taken}:
            both = "`partition` and `part`" if name == "partition" else f"`{name}`"
            raise UsageError(
                f"task {reference} takes no --{name}: leave it out, or let its constructor take {both}"
            )
    own = {name: each for name, each in parameters.items() if name not in given}
    for name, text in setup.options.items():
        if name in own:
            arguments[name] = _parse_option(name, text, own[name].default)
        elif name not in taken:
            raise UsageError(f"task {reference} takes no option {name!r}; it takes: {', '.join(own) or 'none'}")
    return arguments


def takes(task: type, setting: str) -> bool:
    """Return whether a task found by `find_task` uses a setting, such as `partition`."""
    return hasattr(task, "build_trainer") or bool({setting, "setup"} & {*_parameters(task)})


def _parameters(task: type) -> Mapping[str, inspect.Parameter]:
    if task.__init__ is object.__init__:  # type: ignore[misc]
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(task).parameters
    return {name: each for name, each in parameters.items() if each.kind in named}


def _parse_option(name: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"option {name} must be true or false, not {text!r}")
        return text.lower() == "true"
    if isinstance(default, int | float):
        try:
            return type(default)(text)
        except ValueError:
            raise UsageError(f"option {name} must be a number like {default}, not {text!r}") from None
    return text
