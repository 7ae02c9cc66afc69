"""`fedgrpc token` and `fedgrpc ca`: join tokens, and the built-in certificate authority with its rotation.

exit code 0     done
          1     no aggregator answers, or it refuses
"""

from __future__ import annotations

from typing import Any

import click

from fedgrpc.calls import IdentityClient
from fedgrpc.cli.as_json import json_text, plain
from fedgrpc.cli.identity import identity_command
from fedgrpc.cli.options import AS_JSON, Declare
from fedgrpc.cli.values import DURATION
from fedgrpc.cli.view import print_rows, time_text
from fedgrpc.identity.messages import role_from_proto, role_to_proto
from fedgrpc.identity.roles import DEVICE_ROLES, Role
from fedgrpc.identity.tokens import MAX_USES
from fedgrpc.protocol.durations import duration_to_proto
from fedgrpc.v1 import identity_pb2 as pb

_what = Declare("What")


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
        f"good for {good_for} until {time_text(answer.token.expires_at)}; it is not shown again. On a device:\n"
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
            *(time_text(token.expires_at), "yes" if token.needs_approval else "", " ".join(token.tags)),
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
TOKEN_LIST = identity_command("token list", _list_tokens, "Show join tokens, without their secrets.", AS_JSON)
TOKEN_DELETE = identity_command(
    "token delete", _delete_token, "Let nobody join with a TOKEN, named by its id, any more.", argument="token"
)


# The certificate authority.


async def _rotate(identities: IdentityClient, values: dict[str, Any]) -> None:
    made = await identities.rotate_authority()
    former = (await identities.authorities())[-1]
    click.echo(
        f"{made.name} signs now; members change to it when they renew. Once `fedgrpc ca list` shows no member of "
        f"{former.name}: fedgrpc ca retire {former.name}"
    )


async def _list(identities: IdentityClient, values: dict[str, Any]) -> None:
    found = await identities.authorities()
    if values["as_json"]:
        click.echo(json_text([plain(each) for each in found]))
        return
    rows = [
        (
            *(each.name, "trusted" if number else "signs", str(each.members), str(each.tokens)),
            each.key_sha256.hex(),
        )
        for number, each in enumerate(found)
    ]
    nothing = "this aggregator has no authority of its own: it listens without TLS, or with --tls-cert"
    print_rows(("authority", "state", "members", "tokens", "key (SHA-256)"), rows, nothing)


async def _retire(identities: IdentityClient, values: dict[str, Any]) -> None:
    await identities.retire_authority(values["name"], values["force"])
    click.echo(f"{values['name']} is trusted no more, and its join tokens are deleted")


CA_ROTATE = identity_command(
    "ca rotate", _rotate, "Make a new authority, which signs from now on; the one before stays trusted."
)
CA_LIST = identity_command(
    "ca list", _list, "Show the authorities, and how many members and tokens each has.", AS_JSON
)
CA_RETIRE = identity_command(
    "ca retire",
    _retire,
    "Trust the authority NAME no more, and delete its tokens.",
    _what(
        "--force",
        "Also while members have shown no newer certificate: they have to join again.",
        is_flag=True,
        default=False,
    ),
    argument="name",
)
