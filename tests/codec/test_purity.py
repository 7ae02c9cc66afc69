from __future__ import annotations

import ast
import sys
from pathlib import Path

import fedgrpc.codec

# zlib-ng, where it is installed, is a faster zlib.
ALLOWED = {"fedgrpc.errors", "fedgrpc.plugins", "ml_dtypes", "numpy", "xxhash", "zlib_ng.zlib_ng", "zstandard"}
FORBIDDEN = {"asyncio", "datetime", "random", "socket", "threading", "time"}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_the_codec_imports_numpy_zstd_xxhash_and_its_errors_and_neither_clocks_nor_grpc() -> None:
    modules = list(Path(fedgrpc.codec.__file__).parent.glob("*.py"))
    assert len(modules) > 15
    for path in modules:
        for name in imports_of(path):
            top = name.partition(".")[0]
            assert name not in FORBIDDEN, path
            pure = name in ALLOWED or name.startswith("fedgrpc.codec") or top in sys.stdlib_module_names
            assert pure, (path, name)
