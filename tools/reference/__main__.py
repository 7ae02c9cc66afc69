"""Write the pages of docs/reference from the code; with --check, say which are stale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.reference import api, commands, endings, metrics, rpcs

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "docs" / "reference"
PAGES = {
    "api.md": api.page,
    "commands.md": commands.page,
    "errors.md": endings.page,
    "metrics.md": metrics.page,
    "rpcs.md": rpcs.page,
}
HEAD = "<!-- Written by `python -m tools.reference`; `make lint` checks that it is fresh. -->\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is stale")
    pages = {FOLDER / name: HEAD + page() for name, page in PAGES.items()}
    if not parser.parse_args().check:
        for path, text in pages.items():
            path.write_text(text)
    elif stale := [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]:
        sys.exit(f"docs/reference: {', '.join(stale)} stale: run `make reference`")


if __name__ == "__main__":
    main()
