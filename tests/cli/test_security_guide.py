"""docs/guide/security.md: its commands, against a real aggregator, print what the page shows."""

import asyncio
import re
import shlex

from fedgrpc.cli.main import run
from fedgrpc.identity.folder import DeviceFolder
from fedgrpc.identity.tokens import JoinToken
from fedgrpc.worker.enrolment import join
from tests.support.command_line import ROOT
from tests.support.joining import OUTSIDE
from tests.support.running_federation import running_aggregator

PAGE = ROOT / "docs" / "guide" / "security.md"
# What differs from run to run, and how the test sees it.
CHANGING = [
    (r"fg1\.\S+", "TOKEN"),
    (r"\b[0-9a-f]{64}\b", "HASH"),
    (r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME"),
    (r"127\.0\.0\.1:\d+", "ADDRESS"),
    (r"(?<=after: )\d+", "SECONDS"),
    (r"[ \t]+", " "),
]


def commands():
    """(command, what it prints) of every block of the page that is a session."""
    found = []
    for block in re.findall(r"```console\n(.+?)```", PAGE.read_text(), re.DOTALL):
        for part in block.split("$ ")[1:]:
            command, _, printed = part.partition("\n")
            found.append((command, printed))
    return found


def comparable(text, token_id):
    for pattern, instead in [(re.escape(token_id), "ID"), *CHANGING]:
        text = re.sub(pattern, instead, text)
    return [line.strip() for line in text.strip().splitlines()]


class Session:
    """The page's shell: commands of fedgrpc run as they are, in a folder; workers only join."""

    def __init__(self, running, folder, capsys):
        self.running, self.folder, self.capsys = running, folder, capsys
        self.token_id = ""

    async def play(self, command):
        words = shlex.split(command)
        if words[0] in ("cat", "head"):
            return "".join((self.folder / words[-1]).read_text().splitlines(keepends=True)[:3])
        assert words[0] == "fedgrpc"
        if words[1] == "worker":
            return await self._join(words)
        target = None
        if ">" in words:
            *words, _, target = words
        here = {"/var/lib/fedgrpc": str(self.running.settings.data_dir), "127.0.0.1:50051": self.running.address}
        here |= {"uu4vzr7t": self.token_id, "alice.context": str(self.folder / "alice.context")}
        code = await asyncio.to_thread(run, [here.get(word, word) for word in words[1:]])
        out = self.capsys.readouterr()
        assert (code != 0) == out.err.startswith("error:"), out.err
        if target is None:
            return out.out + out.err
        (self.folder / target).write_text(out.out)
        self.token_id = self.token_id or JoinToken.parse(out.out).id
        return out.err

    async def _join(self, words):
        name, token = words[words.index("--name") + 1], words[words.index("--join") + 1]
        secret = JoinToken.parse((self.folder / token).read_text())
        await join(self.running.address, secret, name, DeviceFolder(self.folder / name))
        return ""


async def test_the_guide_shows_what_its_commands_print(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    played = 0
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        session = Session(running, tmp_path, capsys)
        for command, shown in commands():
            printed = await session.play(command)
            played += 1
            if " worker " in command:
                continue
            if " audit " in command:
                assert re.fullmatch(r"\d+ entries, and every seal holds; .+", printed.splitlines()[-1])
                for action in ("Enroll", "RevokeMember", "ForgetMember"):
                    assert action in printed
                    assert action in shown
                continue
            assert comparable(printed, session.token_id) == comparable(shown, "uu4vzr7t"), command
    assert played >= 20
