"""Hooks of mkdocs (mkdocs.yml): pages and files from outside of docs/, and links between both.

The rule: a page is written for readers of the repository, with relative links that work there. On the site, a link
to another page leads to that page, a link to any other file leads to a copy of it below `files/`, and a link to a
folder is text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Pages of the site that lie elsewhere in the repository, where their readers look for them.
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "protos/WIRE.md", "docker/README.md", "k8s/README.md")
HELM = "k8s/helm/README.md"
FILES = "files"
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*\])\(([^)\s]+)\)")
_FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_ELSEWHERE = re.compile(r"^([a-z][a-z0-9+.-]*:|#|/)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append to the guides in the navigation those that mkdocs.yml does not name, so that none is out of sight."""
    named = set(_named(config.nav or []))
    guides = next(section["How to"] for section in config.nav or [] if "How to" in section)
    guides += sorted(
        f"guide/{path.name}" for path in (DOCS / "guide").glob("*.md") if f"guide/{path.name}" not in named
    )
    return config


def _named(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for page in entry.values() if isinstance(entry, dict) else [entry]:
            yield from _named(page) if isinstance(page, list) else [page]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/, and copies of the files that pages link to."""
    for name in (*OUTSIDE, HELM):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    linked = {target for page in files.documentation_pages() for target in _linked_files(page.src_uri)}
    for name in sorted(linked):
        files.append(File.generated(config, f"{FILES}/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page from where it lies in the repository to where it is on the site."""
    home = _home(page.file.src_uri)

    def rewritten(found: re.Match[str]) -> str:
        text, link = found.groups()
        target, anchor = _target(home, link)
        if target is None:
            return found.group(0)
        if (ROOT / target).is_dir():
            return text[1:-1]
        return f"{text}({_relative(page.file.src_uri, _on_site(target))}{anchor})"

    return _outside_code(markdown, lambda prose: _LINK.sub(rewritten, prose))


def _linked_files(src_uri: str) -> set[str]:
    home = _home(src_uri)
    found: set[str] = set()

    def note(prose: str) -> str:
        for _, link in _LINK.findall(prose):
            target, _ = _target(home, link)
            if target and _on_site(target).startswith(f"{FILES}/") and (ROOT / target).is_file():
                found.add(target)
        return prose

    _outside_code((ROOT / home).read_text(encoding="utf-8"), note)
    return found


def _outside_code(text: str, change: Any) -> str:
    """Apply `change` to what is not in fences."""
    parts, end = [], 0
    for fence in _FENCED.finditer(text):
        parts += [change(text[end : fence.start()]), fence.group(0)]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def _home(src_uri: str) -> str:
    """Return where a page of the site lies in the repository."""
    return src_uri if src_uri in (*OUTSIDE, HELM) else f"docs/{src_uri}"


def _target(home: str, link: str) -> tuple[str | None, str]:
    """Return the file that a link of the page `home` leads to, relative to the root, and its anchor."""
    if _ELSEWHERE.match(link):
        return None, ""
    name, mark, anchor = link.partition("#")
    return os.path.normpath(os.path.join(os.path.dirname(home), name)), mark + anchor


def _on_site(target: str) -> str:
    if target == "README.md":
        return "index.md"
    if target in (*OUTSIDE, HELM):
        return target
    return target.removeprefix("docs/") if target.startswith("docs/") else f"{FILES}/{target}"


def _relative(from_uri: str, to_uri: str) -> str:
    return os.path.relpath(to_uri, os.path.dirname(from_uri) or ".")
