"""Generate `fedgrpc/v1` from `protos/`; with --check, say whether the committed files are up to date."""

import argparse
import filecmp
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"


def generate(out: Path) -> list[Path]:
    """Write the modules and their stubs below `out`, and return their paths relative to it."""
    sources = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    flags = [f"-I{PROTOS}", f"-I{files('grpc_tools') / '_proto'}"]
    flags += [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    if protoc.main(["protoc", *flags, *sources]) != 0:
        sys.exit("protoc failed")
    package = out / "fedgrpc" / "v1"
    (package / "__init__.py").write_text('"""Generated from protos/fedgrpc/v1; do not edit."""\n')
    for path in package.glob("*_pb2_grpc.py"):
        if "class " not in path.read_text():
            path.unlink()
    return sorted(path.relative_to(out) for path in package.glob("*.py*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when something is stale")
    if not parser.parse_args().check:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        committed = sorted(path.relative_to(ROOT) for path in (ROOT / "fedgrpc" / "v1").glob("*.py*"))
        stale = sorted(set(fresh) ^ set(committed))
        both = [path for path in fresh if path in committed]
        stale += [path for path in both if not filecmp.cmp(Path(folder) / path, ROOT / path, shallow=False)]
    if stale:
        sys.exit(f"stale, run `make protos`: {', '.join(map(str, stale))}")


if __name__ == "__main__":
    main()
