"""Measure how the package reads: sizes, imports, names, circles, comments.

    python tools/code_metrics.py [PACKAGE_FOLDER]

Generated code (`*_pb2*`) and tests do not count. A circle is a set of modules that import each other; imports that
only type checkers follow count, too.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_LONG_LINES = 30


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    tree: ast.Module
    lines: int
    import_lines: int
    comment_lines: int
    docstring_lines: int

    @classmethod
    def read(cls, path: Path, package: Path) -> Module:
        """Parse the file `path` of the folder `package`."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        parts = path.relative_to(package.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        return cls(
            name,
            tree,
            text.count("\n"),
            sum(_length(node) for node in imports),
            _comment_lines(path),
            sum(map(_docstring_lines, ast.walk(tree))),
        )

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Every function and method, nested ones too."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    def classes(self) -> Iterator[ast.ClassDef]:
        """Every class."""
        return (node for node in ast.walk(self.tree) if isinstance(node, ast.ClassDef))

    def imported(self, known: Mapping[str, Module]) -> set[str]:
        """Names of the modules of `known` that it imports, wherever in it the import stands."""
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        return {name for name in found if name in known and name != self.name}


def _length(node: ast.stmt | ast.expr) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _comment_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(file.readline))


def _docstring_lines(node: ast.AST) -> int:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
        return 0
    first = node.body[0]
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return _length(first) if is_docstring and isinstance(first.value.value, str) else 0  # type: ignore[attr-defined]


def read_package(folder: Path) -> dict[str, Module]:
    """Every module of a package by its full name, but for generated ones."""
    paths = [path for path in folder.rglob("*.py") if "_pb2" not in path.name]
    return {module.name: module for module in (Module.read(path, folder) for path in sorted(paths))}


def circles(modules: Mapping[str, Module]) -> list[set[str]]:
    """Sets of modules that reach each other through imports (strongly connected components)."""
    # Walking a tree takes long, and each module is reached from hundreds of others.
    imported = {name: module.imported(modules) for name, module in modules.items()}
    reach: dict[str, set[str]] = {}
    for name in modules:
        seen: set[str] = set()
        todo = [name]
        while todo:
            for other in imported[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        reach[name] = seen
    found = [
        {other for other in reach[name] if name in reach[other]} | {name}
        for name in modules
        if name in reach[name]
    ]
    return [set(one) for one in {frozenset(circle) for circle in found}]


def _spread(values: list[int]) -> str:
    ordered = sorted(values)
    p90 = ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]
    return f"median {statistics.median(ordered):.0f}, p90 {p90}, most {ordered[-1]}"


def report(modules: Mapping[str, Module]) -> list[str]:
    """The figures, a line each."""
    files = list(modules.values())
    lines = sum(module.lines for module in files)
    functions = [_length(node) for module in files for node in module.functions()]
    names = defaultdict(set)
    for module in files:
        for node in module.classes():
            names[node.name].add(module.name)
    twice = sorted(name for name, where in names.items() if len(where) > 1)
    importers = Counter(name for module in files for name in module.imported(modules))
    single = [module for module in files if importers[module.name] == 1]
    comments = sum(module.comment_lines for module in files)
    long = sum(length > _LONG_LINES for length in functions)
    found = circles(modules)
    return [
        f"lines {lines}",
        f"modules {len(files)}: {_spread([module.lines for module in files])} lines",
        f"functions {len(functions)}: {_spread(functions)} lines; {long} of more than {_LONG_LINES}",
        f"classes {sum(len(where) for where in names.values())}",
        f"import lines {100 * sum(module.import_lines for module in files) / lines:.1f} %",
        f"docstring lines {100 * sum(module.docstring_lines for module in files) / lines:.1f} %",
        f"comments per 100 lines {100 * comments / lines:.1f}",
        f"modules with one importer {len(single)}",
        f"class names used twice {len(twice)}: {', '.join(twice) or 'none'}",
        f"circles {len(found)}: {'; '.join(', '.join(sorted(one)) for one in found) or 'none'}",
    ]


def main() -> None:
    """Print the report of a package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = Path(__file__).parent.parent / "fedgrpc"
    parser.add_argument(
        "package", type=Path, nargs="?", default=package, help="its folder; the default is fedgrpc"
    )
    parser.add_argument("--comments", action="store_true", help="comments per 100 lines of each module")
    arguments = parser.parse_args()
    modules = read_package(arguments.package.resolve())
    print("\n".join(report(modules)))
    if arguments.comments:
        for module in sorted(modules.values(), key=lambda module: -module.comment_lines / max(1, module.lines)):
            print(f"{100 * module.comment_lines / max(1, module.lines):5.1f} {module.lines:5} {module.name}")


if __name__ == "__main__":
    main()
