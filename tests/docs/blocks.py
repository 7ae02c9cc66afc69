"""Code blocks of a Markdown page, as one script in the order of the page.

A block that begins with ```sh is run. One with the comment `<!-- file: NAME -->` before it is written to NAME.
Further comments: `<!-- not run: WHY -->` before a block, and `<!-- wait: WORD -->`, which waits until the output
has WORD. A block that begins with ```text holds lines which must have been printed, whatever the numbers in them;
`...` stands for any lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>file|not run): (?P<what>[^\n]+) -->\n+)?^```(?P<kind>\w*)[^\n]*\n(?P<code>.*?)^```$"
    r"|^<!-- wait: (?P<word>[^\n]+) -->$",
    re.MULTILINE | re.DOTALL,
)
RUN = ("sh", "python", "toml")


@dataclass(frozen=True)
class Block:
    kind: str
    code: str
    mark: str = ""
    what: str = ""


def blocks_of(text: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(text):
        if found["word"]:
            yield Block("wait", "", "wait", found["word"])
        else:
            yield Block(found["kind"], found["code"], found["mark"] or "", found["what"] or "")


def script_of(text: str, log: Path) -> str:
    """Return the page as a bash script whose output goes to `log`. Raises ValueError for a block nobody runs."""
    lines = ["set -euo pipefail"]
    for block in blocks_of(text):
        lines.append(_step(block, shlex.quote(str(log))))
    return "\n".join(lines) + "\n"


def _step(block: Block, log: str) -> str:
    if block.mark == "not run" or block.kind in ("text", ""):
        return ""
    if block.kind == "wait":
        word = shlex.quote(block.what)
        found = f"grep -qF -- {word} {log}"
        return f"for i in {{1..300}}; do ! {found} || break; sleep 0.2; done; {found}"
    if block.mark == "file":
        return f"cat > {shlex.quote(block.what)} <<'END-OF-FILE'\n{block.code}END-OF-FILE"
    if block.kind == "sh":
        return block.code
    raise ValueError(f"nothing runs this block of {block.kind}: give it a file name, or say why not\n{block.code}")


def printed(text: str) -> list[str]:
    """Return the lines that the page says are printed, in their order."""
    return [
        line
        for block in blocks_of(text)
        if block.kind == "text" and block.mark != "not run"
        for line in block.code.splitlines()
        if line.strip() and line.strip() != "..."
    ]


def shape(line: str) -> str:
    """Return a line without what differs between two runs: numbers, units of time and bytes, plurals, spaces."""
    # "<1 ms" is what a fast machine takes for a small step.
    line = re.sub(r"(<(?=\d+ ms))?[-+]?\d[\d.,:T]*Z?", "#", line)
    line = re.sub(r"# (ms|s|B|kB|MB|GB)\b", "#", line)
    return " ".join(re.sub(r"# threads\b", "# thread", line).split())
