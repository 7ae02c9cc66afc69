"""`fedgrpc ca`: the aggregator's built-in certificate authority, and its rotation.

exit code 0     done
          1     no aggregator answers, or it refuses
"""

from __future__ import annotations

from typing import Any, Final

import click

from fedgrpc.cli.as_json import json_text, plain
from fedgrpc.cli.identity import identity_command, print_rows
from fedgrpc.cli.options import Declare
from fedgrpc.client import IdentityClient
from fedgrpc.v1 import identity_pb2 as pb

_what = Declare("What")
_JSON: Final = Declare("What to show")("--json/--table", "JSON, for programs.", name="as_json", default=False)


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
        click.echo(json_text([_plain(each) for each in found]))
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


def _plain(authority: pb.Authority) -> dict[str, Any]:
    return {**plain(authority), "key_sha256": authority.key_sha256.hex()}


async def _retire(identities: IdentityClient, values: dict[str, Any]) -> None:
    await identities.retire_authority(values["name"], values["force"])
    click.echo(f"{values['name']} is trusted no more, and its join tokens are deleted")


ROTATE = identity_command(
    "ca rotate", _rotate, "Make a new authority, which signs from now on; the one before stays trusted."
)
LIST = identity_command("ca list", _list, "Show the authorities, and how many members and tokens each has.", _JSON)
RETIRE = identity_command(
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
