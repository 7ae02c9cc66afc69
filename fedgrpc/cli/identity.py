"""`fedgrpc token`, `fedgrpc device` and `fedgrpc operator`: who may connect, and as what.

exit code 0     done
          1     no aggregator answers, or it refuses
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from rich.table import Table
from rich.text import Text

from fedgrpc.claims import printable
from fedgrpc.cli.as_json import json_text, plain
from fedgrpc.cli.options import Declare, Setting, SettingsCommand
from fedgrpc.cli.reach import RENEW_AFTER, reach_settings, reached
from fedgrpc.cli.value_types import DURATION
from fedgrpc.cli.view import piped_console, print_table
from fedgrpc.client import Client, IdentityClient
from fedgrpc.errors import NotFound, UsageError
from fedgrpc.identity.certificates import key_pem, make_key, make_request
from fedgrpc.identity.context import write_context
from fedgrpc.identity.messages import role_from_proto, role_to_proto
from fedgrpc.identity.roles import DEVICE_ROLES, OPERATOR_ROLES, Identity, Role
from fedgrpc.identity.tokens import MAX_USES
from fedgrpc.protocol.durations import duration_from_proto, duration_to_proto
from fedgrpc.rpc.address import dialled
from fedgrpc.storage.files import make_private, storage_errors
from fedgrpc.v1 import identity_pb2 as pb

_what = Declare("What")
_show = Declare("What to show")
_JSON: Final = _show("--json/--table", "JSON, for programs.", name="as_json", default=False)
_STATES: Final = {
    pb.MEMBER_STATE_PENDING: "waits for approval",
    pb.MEMBER_STATE_ACTIVE: "active",
    pb.MEMBER_STATE_REVOKED: "revoked",
}

Call = Callable[[IdentityClient, dict[str, Any]], Awaitable[None]]


def identity_command(name: str, call: Call, help: str, *settings: Setting, argument: str = "") -> SettingsCommand:
    """Return a command that reaches an aggregator and makes `call` there."""

    async def reach(values: dict[str, Any]) -> None:
        async with reached(values) as client:
            await call(client.identities, values)

    def run(**values: Any) -> None:
        asyncio.run(reach(values))

    command = SettingsCommand(name, run, [*settings, *reach_settings()], help)
    if argument:
        command.params[:0] = [click.Argument([word]) for word in argument.split()]
    return command


# Tokens.


async def _create_token(identities: IdentityClient, values: dict[str, Any]) -> None:
    role = Role(values["role"])
    request = pb.CreateTokenRequest(
        role=role_to_proto(role),
        ttl=duration_to_proto(values["ttl_s"]),
        uses=values["uses"],
        names=values["name"] or "",
        tags=values["tags"],
        needs_approval=values["needs_approval"],
    )
    answer = await identities.create_token(request)
    # The token alone on standard output, for scripts.
    click.echo(answer.secret)
    good_for = "one device" if values["uses"] == 1 else f"{values['uses']} devices"
    click.echo(
        f"good for {good_for} until {_time(answer.token.expires_at)}; it is not shown again. On a device:\n"
        "fedgrpc worker --aggregator HOST:PORT --join TOKEN",
        err=True,
    )


async def _list_tokens(identities: IdentityClient, values: dict[str, Any]) -> None:
    tokens = await identities.tokens()
    if values["as_json"]:
        click.echo(json_text([plain(token) for token in tokens]))
        return
    rows = [
        (
            *(token.id, role_from_proto(token.role).value, token.names, str(token.uses_left)),
            *(_time(token.expires_at), "yes" if token.needs_approval else "", " ".join(token.tags)),
        )
        for token in tokens
    ]
    print_rows(("token", "role", "names", "uses left", "expires", "approval", "tags"), rows, "no join tokens")


async def _delete_token(identities: IdentityClient, values: dict[str, Any]) -> None:
    await identities.delete_token(values["token"])
    click.echo(f"join token {values['token']} is deleted; devices that have joined with it stay")


TOKEN_CREATE = identity_command(
    "token create",
    _create_token,
    "Make a token with which devices join, and print it: one line.",
    _what(
        "--role",
        "Role of the devices.",
        type=click.Choice([role.value for role in DEVICE_ROLES]),
        default=Role.TRAINER.value,
    ),
    _what("--ttl", "How long the token is good.", name="ttl_s", type=DURATION, default=3600.0),
    _what("--uses", "How many devices may join with it.", type=click.IntRange(1, MAX_USES), default=1),
    _what(
        "--name",
        "Name that its device gets, or a pattern with * and ? for names that devices ask for; without: any.",
        type=str,
        default=None,
        metavar="NAME",
    ),
    _what(
        "--tag",
        "Tag of its devices; repeat for each.",
        name="tags",
        multiple=True,
        default=(),
        metavar="TAG",
    ),
    _what("--needs-approval", "Let devices wait for `fedgrpc device approve`.", is_flag=True, default=False),
)
TOKEN_LIST = identity_command("token list", _list_tokens, "Show join tokens, without their secrets.", _JSON)
TOKEN_DELETE = identity_command(
    "token delete", _delete_token, "Let nobody join with a TOKEN, named by its id, any more.", argument="token"
)


# Members.


def _lister(roles: Sequence[Role], nobody: str) -> Call:
    async def call(identities: IdentityClient, values: dict[str, Any]) -> None:
        members = [each for each in await identities.members() if role_from_proto(each.role) in roles]
        if values["as_json"]:
            click.echo(json_text([_plain(member) for member in members]))
            return
        rows = [
            (
                *(member.name, role_from_proto(member.role).value, _state(member)),
                *(_time(member.joined_at), _time(member.expires_at), " ".join(member.tags)),
            )
            for member in members
        ]
        print_rows(("name", "role", "state", "joined", "certificate until", "tags"), rows, nobody)

    return call


def _plain(member: pb.Member) -> dict[str, Any]:
    return {**plain(member), "key_sha256": member.key_sha256.hex()}


async def _show_member(identities: IdentityClient, values: dict[str, Any]) -> None:
    found = [each for each in await identities.members() if each.name == values["name"]]
    if not found:
        raise NotFound(f"there is no member {values['name'][:80]!r}; `fedgrpc device list` shows the names")
    (member,) = found
    if values["as_json"]:
        click.echo(json_text(_plain(member)))
        return
    rows = {
        "name": member.name,
        "role": role_from_proto(member.role).value,
        "state": _state(member),
        "joined": f"{_time(member.joined_at)} with token {member.token or 'none'}",
        "certificate until": _time(member.expires_at),
        "tags": " ".join(member.tags) or "none",
        "key (SHA-256)": member.key_sha256.hex() or "not known",
    }
    for name, value in rows.items():
        click.echo(f"{name:<18} {value}")


async def _approve(identities: IdentityClient, values: dict[str, Any]) -> None:
    member = await identities.approve(values["name"])
    click.echo(f"{member.name} may work")


async def _revoke(identities: IdentityClient, values: dict[str, Any]) -> None:
    member = await identities.revoke(values["name"], values["why"], values.get("drop_updates", False))
    click.echo(f"{member.name} is revoked; its calls have ended")


async def _rename(identities: IdentityClient, values: dict[str, Any]) -> None:
    member = await identities.rename(values["name"], values["new_name"])
    click.echo(f"{values['name']} is {member.name} now; its worker ends, and works under that name when it starts")


async def _forget(identities: IdentityClient, values: dict[str, Any]) -> None:
    await identities.forget(values["name"])
    click.echo(f"{values['name']} is forgotten; another may have the name")


_WHY: Final = _what("--why", "Reason in one line; it is kept and told.", type=str, default="", metavar="TEXT")

DEVICE_LIST = identity_command(
    "device list", _lister(DEVICE_ROLES, "no device has joined"), "Show devices.", _JSON
)
DEVICE_SHOW = identity_command("device show", _show_member, "Show the device NAME.", _JSON, argument="name")
DEVICE_APPROVE = identity_command(
    "device approve", _approve, "Let the device NAME work that waits for it.", argument="name"
)
DEVICE_REVOKE = identity_command(
    "device revoke",
    _revoke,
    "Refuse the device NAME from now on, and end its open calls.",
    _WHY,
    _what(
        "--drop-updates",
        "Do not count its accepted updates of rounds that are not committed yet.",
        is_flag=True,
        default=False,
    ),
    argument="name",
)
DEVICE_RENAME = identity_command(
    "device rename", _rename, "Give the device NAME the name NEW_NAME.", argument="name new_name"
)
DEVICE_FORGET = identity_command(
    "device forget", _forget, "Remove the device NAME: its certificate counts no more.", argument="name"
)


# Operators.


async def _create_operator(client: Client, values: dict[str, Any]) -> None:
    role, address = Role(values["role"]), values["address"] or client.address
    if address.startswith("unix:"):
        raise UsageError("--address HOST:PORT is missing: where the operator reaches the aggregator")
    dialled(address)
    path: Path = values["out"] or Path(f"{values['name']}.context")
    # Before anything is asked for: an operator whose key is nowhere would only take up the name.
    _check_free(path)
    key = make_key()
    made = await client.identities.create_operator(values["name"], role_to_proto(role), make_request(key))
    renew_after = time.time() + RENEW_AFTER * duration_from_proto(made.valid_for)
    identity = Identity(made.name, role)
    write_context(path, identity, address, renew_after, made.certificate, key_pem(key), made.ca)
    click.echo(
        f"{path}: whoever has this file is {identity}; use it with --context, or as ~/.config/fedgrpc/context"
    )


def _check_free(path: Path) -> None:
    folder = path.absolute().parent
    with storage_errors(folder, "write to"):
        if path.exists():
            raise UsageError(f"{path} is there already; name another file with --out")
        make_private(folder)
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UsageError(f"cannot write to {folder}; name another file with --out")


def _create_operator_command() -> SettingsCommand:
    async def reach(values: dict[str, Any]) -> None:
        async with reached(values) as client:
            await _create_operator(client, values)

    settings = [
        _what(
            "--role",
            "viewer: read all. operator: also steer, and revoke devices. admin: also admit, and revoke operators.",
            type=click.Choice([role.value for role in OPERATOR_ROLES]),
            default=Role.VIEWER.value,
        ),
        _what(
            "--address",
            "Where the operator reaches the aggregator; without: as this command does.",
            type=str,
            default=None,
            metavar="HOST:PORT",
        ),
        _what(
            "--out",
            "Context file to write; without: NAME.context.",
            type=click.Path(path_type=Path, dir_okay=False),
            default=None,
        ),
        *reach_settings(),
    ]
    command = SettingsCommand(
        "operator create",
        lambda **values: asyncio.run(reach(values)),
        settings,
        "Make NAME an operator, and write a context file for the command line.",
    )
    command.params[:0] = [click.Argument(["name"])]
    return command


OPERATOR_CREATE = _create_operator_command()
OPERATOR_LIST = identity_command(
    "operator list", _lister(OPERATOR_ROLES, "there are no operators"), "Show operators.", _JSON
)
OPERATOR_REVOKE = identity_command(
    "operator revoke", _revoke, "Refuse the operator NAME from now on.", _WHY, argument="name"
)
OPERATOR_FORGET = identity_command(
    "operator forget", _forget, "Remove the operator NAME: the certificate counts no more.", argument="name"
)


def _state(member: pb.Member) -> str:
    state = _STATES.get(member.state, "unknown")
    return f"{state}: {printable(member.why)}" if member.why else state


def _time(stamp: Any) -> str:
    return datetime.fromtimestamp(stamp.ToNanoseconds() / 1e9, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], nothing: str) -> None:
    """Print a table, or, without rows, `nothing`."""
    if not rows:
        click.echo(nothing)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        # Text, and no markup: what peers say must not reach the terminal as anything else.
        table.add_row(*(Text(printable(cell)) for cell in row))
    print_table(piped_console(), table)
