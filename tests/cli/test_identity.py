"""`fedgrpc token`, `device` and `operator`, through the data folder and through a context file."""

import asyncio
import json

import pytest

from fedgrpc.cli.main import run
from fedgrpc.errors import UsageError
from fedgrpc.identity.context import Context
from fedgrpc.identity.folder import DeviceFolder
from fedgrpc.identity.tokens import JoinToken
from fedgrpc.worker.enrolment import join
from tests.support.joining import OUTSIDE, pass_certificate_time
from tests.support.running_federation import running_aggregator


@pytest.fixture
def shell(capsys):
    """Run a command; returns (exit code, standard output, standard error)."""

    async def call(*arguments):
        code = await asyncio.to_thread(run, [str(each) for each in arguments])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


async def joined(shell, running, tmp_path, name, *flags):
    code, out, _ = await shell("token", "create", "--data-dir", running.settings.data_dir, *flags)
    assert code == 0
    await join(running.address, JoinToken.parse(out), name, DeviceFolder(tmp_path / name))


async def test_a_token_is_one_line_and_is_shown_once(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        code, out, more = await shell("token", "create", *there, "--uses", 50, "--ttl", "1h", "--name", "pi-*")
        assert (code, out.count("\n")) == (0, 1)
        token = JoinToken.parse(out)
        assert "50 devices" in more
        _, listed, _ = await shell("token", "list", *there)
        assert token.id in listed
        assert token.secret not in listed
        _, listed, _ = await shell("token", "list", "--json", *there)
        assert json.loads(listed)[0]["uses_left"] == 50
        assert (await shell("token", "delete", token.id, *there))[0] == 0
        assert "no join tokens" in (await shell("token", "list", *there))[1]


async def test_devices_are_listed_shown_approved_revoked_renamed_and_forgotten(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        await joined(shell, running, tmp_path, "pi-7", "--needs-approval", "--tag", "attic")
        assert "waits for approval" in (await shell("device", "list", *there))[1]
        assert "may work" in (await shell("device", "approve", "pi-7", *there))[1]
        shown = (await shell("device", "show", "pi-7", *there))[1]
        assert "active" in shown
        assert "attic" in shown
        assert "pi-8" in (await shell("device", "rename", "pi-7", "pi-8", *there))[1]
        await shell("device", "revoke", "pi-8", "--why", "stolen \x1b[2J", *there)
        code, listed, _ = await shell("device", "list", *there)
        assert "revoked: stolen" in listed
        assert "\x1b" not in listed
        members = json.loads((await shell("device", "list", "--json", *there))[1])
        assert [(member["name"], member["state"]) for member in members] == [("pi-8", "revoked")]
        assert (await shell("device", "forget", "pi-8", *there))[0] == 0
        for command in (["show", "pi-8"], ["forget", "pi-8"], ["approve", "pi-8"], ["revoke", "pi-8"]):
            code, _, error = await shell("device", *command, *there)
            assert code == 1
            assert "no member 'pi-8'" in error


async def test_a_context_file_gives_its_role_and_nothing_more(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        await joined(shell, running, tmp_path, "pi-7")
        for name in ("viewer", "operator", "admin"):
            where = ("--address", running.address, "--out", tmp_path / name)
            assert (await shell("operator", "create", name, "--role", name, *where, *there))[0] == 0
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        viewer, operator, admin = (("--context", tmp_path / name) for name in ("viewer", "operator", "admin"))
        assert "running" in (await shell("status", *viewer))[1]
        code, _, error = await shell("pause", *viewer)
        assert code == 1
        assert "the viewer 'viewer' may not call PauseRun: that takes operator or admin" in error
        assert "paused" in (await shell("pause", *operator))[1]
        assert (await shell("device", "revoke", "pi-7", *operator))[0] == 0
        assert (await shell("token", "create", *operator))[0] == 1
        assert (await shell("token", "create", *admin))[0] == 0
        assert (await shell("operator", "revoke", "viewer", *admin))[0] == 0
        code, _, error = await shell("status", *viewer)
        assert code == 1
        assert "revoked" in error
        assert (await shell("operator", "create", "x", "--out", tmp_path / "admin", *admin))[0] == 2
        code, listed, _ = await shell("operator", "list", *admin)
        assert "viewer" in listed
        assert "pi-7" not in listed


async def test_nobody_becomes_an_operator_whose_context_cannot_be_written(shell, tmp_path):
    (tmp_path / "file").touch()
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        where = ("--address", running.address, "--out", tmp_path / "file" / "alice.context")
        code, _, error = await shell("operator", "create", "alice", *where, *there)
        assert code != 0
        assert "cannot write to" in error
        assert "there are no operators" in (await shell("operator", "list", *there))[1]


async def test_a_context_renews_its_certificate_when_that_is_due(shell, tmp_path, monkeypatch):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        where = ("--address", running.address, "--out", tmp_path / "alice")
        await shell("operator", "create", "alice", *where, "--data-dir", running.settings.data_dir)
        before = Context.read(tmp_path / "alice")
        text = (tmp_path / "alice").read_text()
        (tmp_path / "alice").write_text(text.replace(f"{before.renew_after:.0f}", "1"))
        pass_certificate_time(running, 40 * 86_400)
        assert (await shell("status", "--context", tmp_path / "alice"))[0] == 0
        after = Context.read(tmp_path / "alice")
        assert after.renew_after > 1
        assert (after.identity, after.aggregator) == (before.identity, before.aggregator)


async def test_the_authority_is_rotated_and_retired_and_a_context_follows(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        path = tmp_path / "alice.context"
        made = ("operator", "create", "alice", *there, "--role", "admin")
        assert (await shell(*made, "--address", running.address, "--out", path))[0] == 0
        (old,) = json.loads((await shell("ca", "list", "--json", *there))[1])
        code, out, _ = await shell("ca", "rotate", "--context", path)
        assert code == 0
        assert f"ca retire {old['name']}" in out
        code, _, error = await shell("ca", "retire", old["name"], *there)
        assert (code, "alice" in error) == (3, True)
        renew_after = Context.read(path).renew_after
        path.write_text(path.read_text().replace(f"{renew_after:.0f}", "1"))
        assert (await shell("ca", "list", "--context", path))[0] == 0
        assert (await shell("ca", "retire", old["name"], "--context", path))[0] == 0
        _, listed, _ = await shell("ca", "list", *there)
        assert old["name"] not in listed
        assert Context.read(path).server_name.split(".")[0] in listed


async def test_a_forced_retirement_puts_out_who_has_not_come_over(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        await joined(shell, running, tmp_path, "pi-7")
        (old,) = json.loads((await shell("ca", "list", "--json", *there))[1])
        assert old["members"] == 1
        await shell("ca", "rotate", *there)
        assert (await shell("ca", "retire", old["name"], *there))[0] == 3
        assert (await shell("ca", "retire", old["name"], "--force", *there))[0] == 0


async def test_without_an_aggregator_the_data_folder_is_read_or_said_to_be_alone(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        assert "running" in (await shell("status", *there))[1]
    assert (await shell("status", *there))[0] == 0
    code, _, error = await shell("device", "list", *there)
    assert code == 4
    assert "no aggregator runs here" in error
    assert "start it" in error


async def test_ways_to_an_aggregator_exclude_each_other(shell, tmp_path):
    (tmp_path / "c").write_text("")
    code, _, error = await shell("status", "--context", tmp_path / "c", "--aggregator", "a:1")
    assert code == 2
    assert "--aggregator" in error
    assert "--context" in error


async def test_a_group_lists_its_commands_and_suggests_the_right_one(shell):
    code, out, _ = await shell("device", "--help")
    assert all(word in out for word in ("list", "show", "approve", "revoke", "rename", "forget"))
    code, _, error = await shell("device", "revok", "x")
    assert code == 2
    assert "Did you mean 'revoke'?" in error


@pytest.mark.parametrize("content", ["", "rubbish", "# aggregator: a:1\n# renew after: 1\n"])
def test_what_is_no_context_file_is_said_so(tmp_path, content):
    path = tmp_path / "c"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="no context file"):
        Context.read(path)


def test_a_context_file_that_others_may_read_is_not_used(tmp_path):
    path = tmp_path / "c"
    path.write_text("x")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        Context.read(path)


async def test_the_audit_log_is_checked_and_shown_through_the_aggregator_and_from_a_copy(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        there = ("--data-dir", running.settings.data_dir)
        for number in range(3):
            await joined(shell, running, tmp_path, f"pi-{number}")
        await shell("device", "revoke", "pi-1", "--why", "stolen", *there)
        code, out, checked = await shell("audit", *there)
        assert code == 0
        assert "7 entries, and every seal holds" in checked
        assert out.splitlines()[-1].endswith('Identity/RevokeMember  name="pi-1" why="stolen"  ok')
        _, out, _ = await shell("audit", "--about", "Enroll", "--last", 2, *there)
        assert ["pi-1" in out.splitlines()[0], "pi-2" in out.splitlines()[1]] == [True, True]
    log = running.settings.data_dir / "identity" / "audit.jsonl"
    _, out, _ = await shell("audit", "--file", log, "--json", "--last", 0)
    assert out == log.read_text()
    log.write_text(log.read_text().replace("stolen", "broken"))
    code, _, complaint = await shell("audit", "--file", log)
    assert code == 1
    assert "line 7" in complaint


async def test_a_device_may_not_read_the_audit_log(shell, tmp_path):
    async with running_aggregator(tmp_path, **OUTSIDE) as running:
        await joined(shell, running, tmp_path, "pi-7")
        folder = tmp_path / "pi-7"
        tls = (
            "--tls-ca",
            folder / "ca.pem",
            "--tls-cert",
            folder / "certificate.pem",
            "--tls-key",
            folder / "key.pem",
        )
        code, _, complaint = await shell("audit", "--aggregator", running.address, *tls)
    assert code == 1
    assert "may not call" in complaint
