"""Check a built site: no page asks another host for anything, and every picture and file that it needs is there.

    python -m tools.check_site build/site

Links for people to follow may lead anywhere. What a browser loads by itself may not.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser loads by itself, by element; a link counts by its rel.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
RELATIONS = {
    "stylesheet",
    "icon",
    "preload",
    "preconnect",
    "dns-prefetch",
    "prefetch",
    "modulepreload",
    "manifest",
}
_IN_CSS = re.compile(r"(?:url\(|@import\s+)\s*['\"]?((?:https?:)?//[^'\")\s]+)")


class Loads(HTMLParser):
    """The addresses that one page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in LOADED and given.get(LOADED[tag]):
            self.addresses.append(given[LOADED[tag]])
        if tag == "link" and RELATIONS & set(given.get("rel", "").split()):
            self.addresses.append(given.get("href", ""))


def faults(site: Path) -> Iterator[str]:
    for page in sorted(site.rglob("*.html")):
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        for address in loads.addresses:
            parts = urlsplit(address)
            if parts.scheme in ("http", "https") or parts.netloc:
                yield f"{page.relative_to(site)} loads {address}"
            elif not parts.scheme and not exists(site, page, parts.path):
                yield f"{page.relative_to(site)} needs {address}, which is not there"
    for sheet in sorted(site.rglob("*.css")):
        for address in _IN_CSS.findall(sheet.read_text(encoding="utf-8")):
            yield f"{sheet.relative_to(site)} loads {address}"


def exists(site: Path, page: Path, path: str) -> bool:
    base = site if path.startswith("/") else page.parent
    return (base / unquote(path).lstrip("/")).exists()


def main() -> None:
    site = Path(sys.argv[1])
    pages = len(list(site.rglob("*.html")))
    if found := list(faults(site)):
        sys.exit("\n".join(found))
    if not pages:
        sys.exit(f"{site} has no page")
    print(f"{pages} pages in {site}; none of them loads anything from another host")


if __name__ == "__main__":
    main()
