"""Exit codes of the commands and the tree of errors, from the docstrings that hold them."""

from __future__ import annotations

import inspect
import re

from fedgrpc import errors
from fedgrpc.cli import main

HEAD = """# Exit codes and errors

## Exit codes

An error is one line on standard error: what is wrong, then what to do.

| code | meaning |
| --- | --- |
"""
WATCH = """
`fedgrpc watch` ends with 0 once the run is finished, with 3 where an operator has stopped it, and with 4 where no
aggregator answers for longer than `--patience`.

## Errors

Everything that fedgrpc raises on purpose is a `fedgrpc.errors.FedgrpcError`. On the right is the gRPC status with
which it reaches a caller. The trailer `fedgrpc-error` has the name of the class.

"""


def page() -> str:
    rows = [f"| {code} | {meaning} |" for code, meaning in exit_codes()]
    return HEAD + "\n".join(rows) + "\n" + WATCH + f"```\n{_tree()}\n```\n\n{_classes()}"


def exit_codes() -> list[tuple[str, str]]:
    """Return the rows of the docstring of `fedgrpc.cli.main`."""
    text = inspect.getdoc(main) or ""
    found = re.findall(r"^(?:exit code)?\s+(\d+)\s{2,}(.+)$", text, re.MULTILINE)
    if len(found) < 5:
        raise RuntimeError("fedgrpc.cli.main does not list its exit codes any more")
    return found


def _tree() -> str:
    text = inspect.getdoc(errors) or ""
    start = text.index("FedgrpcError\n")
    return "\n".join(line.rstrip() for line in text[start:].splitlines())


def _classes() -> str:
    rows = ["| class | may succeed later | |", "| --- | --- | --- |"]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.FedgrpcError):
            about = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
            rows.append(f"| `{name}` | {'yes' if kind.retryable else 'no'} | {about} |")
    return "\n".join(rows) + "\n"
