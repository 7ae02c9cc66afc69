"""Relative links in Markdown files lead to files of the repository, and anchors to headings."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)|<a\s+href=\"([^\"]+)\"|<img[^>]*\ssrc=\"([^\"]+)\"",
    re.MULTILINE,
)
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
HTML_ANCHOR = re.compile(r"<a\s+(?:id|name)=\"([^\"]+)\"")
OUTSIDE = re.compile(r"^[a-z][a-z0-9+.-]*:")


def markdown_files() -> list[Path]:
    # Untracked files count too, so that a new page is checked before its first commit.
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def links_of(text: str) -> list[str]:
    prose = INLINE_CODE.sub("code", FENCED.sub("", text))
    return [next(part for part in found if part) for found in LINK.findall(prose)]


def github_slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading: lower case, no punctuation, hyphens for spaces."""
    words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def anchors_of(text: str) -> set[str]:
    prose = FENCED.sub("", text)
    anchors, used = set(HTML_ANCHOR.findall(prose)), dict[str, int]()
    for heading in HEADING.findall(prose):
        slug = github_slug(heading)
        seen = used.get(slug, 0)
        used[slug] = seen + 1
        anchors.add(f"{slug}-{seen}" if seen else slug)
    return anchors


@cache
def anchors_in(path: Path) -> set[str]:
    return anchors_of(path.read_text(encoding="utf-8"))


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in links_of(page.read_text(encoding="utf-8")):
        if OUTSIDE.match(link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_relative_to(ROOT) or not target.exists():
            broken.append(f"{page.relative_to(ROOT)}: {link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in anchors_in(target):
            broken.append(f"{page.relative_to(ROOT)}: {link}: no such heading")
    return broken


def test_every_relative_link_leads_to_a_file_and_a_heading() -> None:
    pages = markdown_files()
    assert ROOT / "README.md" in pages
    assert [line for page in pages for line in broken_links(page)] == []


def test_links_in_code_are_text_and_headings_become_anchors_as_on_github() -> None:
    prose = "# What `fedgrpc` does, and why\n\n[a](b.md#c) `[x](y)`\n\n## Twice\n## Twice\n"
    text = prose + "\n```\n[no](no.md)\n# no\n```\n"
    assert links_of(text) == ["b.md#c"]
    assert anchors_of(text) == {"what-fedgrpc-does-and-why", "twice", "twice-1"}
