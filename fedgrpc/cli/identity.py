"""`fedgrpc device` and `fedgrpc operator`: members, their names and their roles.

exit code 0     done
          1     no aggregator answers, or it refuses
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click

from fedgrpc.calls import Calls, IdentityClient
from fedgrpc.claims import printable
from fedgrpc.cli.as_json import json_text, plain
from fedgrpc.cli.options import AS_JSON, Declare, Setting, SettingsCommand
from fedgrpc.cli.reach import client_command
from fedgrpc.cli.view import print_rows, time_text
from fedgrpc.errors import NotFound, UsageError
from fedgrpc.identity.certificates import key_pem, make_key, make_request
from fedgrpc.identity.context import write_context
from fedgrpc.identity.messages import role_from_proto, role_to_proto
from fedgrpc.identity.roles import DEVICE_ROLES, OPERATOR_ROLES, Identity, Role
from fedgrpc.protocol.durations import duration_from_proto
from fedgrpc.reach import RENEW_AFTER
from fedgrpc.rpc.address import dialled
from fedgrpc.storage.files import make_private, storage_errors
from fedgrpc.v1 import identity_pb2 as pb

_what = Declare("What")
_STATES: Final = {
    pb.MEMBER_STATE_PENDING: "waits for approval",
    pb.MEMBER_STATE_ACTIVE: "active",
    pb.MEMBER_STATE_REVOKED: "revoked",
}

Call = Callable[[IdentityClient, dict[str, Any]], Awaitable[None]]


def identity_command(name: str, call: Call, help: str, *settings: Setting, argument: str = "") -> SettingsCommand:
    """Return a command that calls the service of identities."""
    arguments = [click.Argument([word]) for word in argument.split()]
    return client_command(
        name, lambda client, values: call(client.identities, values), help, *settings, arguments=arguments
    )


def _lister(roles: Sequence[Role], nobody: str) -> Call:
    async def call(identities: IdentityClient, values: dict[str, Any]) -> None:
        members = [each for each in await identities.members() if role_from_proto(each.role) in roles]
        if values["as_json"]:
            click.echo(json_text([plain(member) for member in members]))
            return
        rows = [
            (
                *(member.name, role_from_proto(member.role).value, _state(member)),
                *(time_text(member.joined_at), time_text(member.expires_at), " ".join(member.tags)),
            )
            for member in members
        ]
        print_rows(("name", "role", "state", "joined", "certificate until", "tags"), rows, nobody)

    return call


async def _show_member(identities: IdentityClient, values: dict[str, Any]) -> None:
    found = [each for each in await identities.members() if each.name == values["name"]]
    if not found:
        raise NotFound(f"there is no member {values['name'][:80]!r}; `fedgrpc device list` shows the names")
    (member,) = found
    if values["as_json"]:
        click.echo(json_text(plain(member)))
        return
    rows = {
        "name": member.name,
        "role": role_from_proto(member.role).value,
        "state": _state(member),
        "joined": f"{time_text(member.joined_at)} with token {member.token or 'none'}",
        "certificate until": time_text(member.expires_at),
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
    "device list", _lister(DEVICE_ROLES, "no device has joined"), "Show devices.", AS_JSON
)
DEVICE_SHOW = identity_command("device show", _show_member, "Show the device NAME.", AS_JSON, argument="name")
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


async def _create_operator(client: Calls, values: dict[str, Any]) -> None:
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


OPERATOR_CREATE = client_command(
    "operator create",
    _create_operator,
    "Make NAME an operator, and write a context file for the command line.",
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
    arguments=[click.Argument(["name"])],
)
OPERATOR_LIST = identity_command(
    "operator list", _lister(OPERATOR_ROLES, "there are no operators"), "Show operators.", AS_JSON
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
