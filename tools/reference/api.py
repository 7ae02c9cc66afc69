"""The Python API: signature and docstring of each public name, as Markdown."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import fedgrpc

HEAD = """# Python API

The public names. Everything else in the package may change between two versions.

"""
# Where the names are while the package itself exports none.
PLACES = {
    "EvalResult": "fedgrpc.trainer",
    "FedgrpcError": "fedgrpc.errors",
    "TorchTask": "fedgrpc.torch.task",
    "TrainJob": "fedgrpc.trainer",
    "TrainResult": "fedgrpc.trainer",
    "Trainer": "fedgrpc.trainer",
}
_MOST_PER_LINE = 100


def page() -> str:
    named = dict(_public())
    rows = [f"| [`{name}`](#{name.lower()}) | {_first_sentence(value)} |" for name, value in named.items()]
    index = "| name | |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    return HEAD + index + "".join(_entry(name, value) for name, value in named.items())


def _public() -> Iterator[tuple[str, Any]]:
    names = getattr(fedgrpc, "__all__", None)
    for name in sorted(names or PLACES, key=str.lower):
        yield name, getattr(fedgrpc if names else importlib.import_module(PLACES[name]), name)


def _entry(name: str, value: Any) -> str:
    home = f"{value.__module__}" if hasattr(value, "__module__") else ""
    text = f"\n## {name}\n\n```python\n{_signature(name, value)}\n```\n\n"
    text += f"Defined in `{home}`.\n\n" if home not in ("", "fedgrpc") else ""
    text += _docstring(value)
    if inspect.isclass(value):
        text += "".join(_member(name, each, member) for each, member in _members(value))
    return text


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield public methods and properties with a docstring, of the class and of its bases in this package."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("fedgrpc"):
            continue
        for name, member in vars(base).items():
            inner = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            known = inspect.isfunction(inner) or isinstance(inner, property)
            if known and not name.startswith("_") and name not in seen and inspect.getdoc(inner):
                seen.add(name)
                yield name, inner


def _member(owner: str, name: str, member: Any) -> str:
    if isinstance(member, property):
        kind = inspect.signature(member.fget).return_annotation if member.fget else ""
        what = f"{owner}.{name}: {_plain(kind)}"
    else:
        what = _signature(f"{owner}.{name}", member)
    return f"\n### {owner}.{name}\n\n```python\n{what}\n```\n\n{_docstring(member)}"


def _signature(name: str, value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    prefix = "class " if inspect.isclass(value) else "async def " if inspect.iscoroutinefunction(value) else "def "
    if inspect.isclass(value) and (getattr(value, "_is_protocol", False) or issubclass(value, Exception)):
        return f"class {name}"
    kept = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    shown = [_parameter(each) for each in kept]
    stars = [each.kind for each in kept]
    if inspect.Parameter.KEYWORD_ONLY in stars and inspect.Parameter.VAR_POSITIONAL not in stars:
        shown.insert(stars.index(inspect.Parameter.KEYWORD_ONLY), "*")
    result = signature.return_annotation
    after = "" if result is inspect.Signature.empty or inspect.isclass(value) else f" -> {_plain(result)}"
    line = f"{prefix}{name}({', '.join(shown)}){after}"
    if len(line) <= _MOST_PER_LINE:
        return line
    return f"{prefix}{name}(\n" + "".join(f"    {each},\n" for each in shown) + f"){after}"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = star + parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {_plain(parameter.annotation)}"
    if parameter.default is inspect.Parameter.empty:
        return text
    default = parameter.default
    written = (
        "..." if callable(default) or "<" in repr(default) or dataclasses.is_dataclass(default) else repr(default)
    )
    return f"{text} = {written}"


def _plain(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)


def _docstring(value: Any) -> str:
    """Return the docstring as Markdown: indented blocks are code, and what looks like a tag is text."""
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value) and not value.__doc__:
        return ""
    blocks, fenced = [], False
    for line in text.splitlines():
        code = line.startswith("    ")
        if code and not fenced and (not blocks or not blocks[-1].strip()):
            blocks.append("```")
            fenced = True
        elif fenced and line.strip() and not code:
            blocks.insert(len(blocks) - (not blocks[-1].strip()), "```")
            fenced = False
        blocks.append(line.removeprefix("    ") if fenced else line.replace("<", "&lt;"))
    return "\n".join([*blocks, *["```"] * fenced]) + "\n"


def _first_sentence(value: Any) -> str:
    text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:]) ", text)[0].rstrip(":").replace("|", "\\|")
