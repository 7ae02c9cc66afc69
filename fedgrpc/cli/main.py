"""The command `fedgrpc`: lazy loading of subcommands, errors as one line, exit codes.

exit code 0     done
          1     a `FedgrpcError`: one line that says what went wrong
          2     usage: a wrong flag, variable, file or setting; one line that says what to do
          3     the run, or the release, has ended; or the state of something does not allow that now
          4     no aggregator answers
          130   Ctrl-C
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import click

from fedgrpc.cli import COMMANDS, DEFAULTS, GROUPS
from fedgrpc.errors import FedgrpcError, IllegalTransition, LinkError, UsageError
from fedgrpc.process import prepare


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run or listed; `of`: how their names begin."""

    def __init__(self, *args: Any, of: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self._of = of
        self._names = [name.removeprefix(of) for name in COMMANDS if name.startswith(of)]

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(dict.fromkeys(name.split()[0] for name in self._names))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in GROUPS and not self._of:
            return LazyGroup(cmd_name, of=f"{cmd_name} ", help=GROUPS[cmd_name])
        name = self._of + cmd_name
        return load_command(name) if name in COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        default = DEFAULTS.get(self._of.strip())
        if default is not None and not args[0].startswith("-") and args[0] not in self._names:
            args = [default, *args]
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if close := get_close_matches(args[0], self.list_commands(ctx), 1):
                raise click.UsageError(f"{error.format_message()} Did you mean {close[0]!r}?", ctx) from error
            raise


def load_command(name: str) -> click.Command:
    """Import a command by its name."""
    module, _, attribute = COMMANDS[name].partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


def _tell_version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    """Show the version and exit."""
    if asked:
        from fedgrpc import __version__

        click.echo(f"fedgrpc, version {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    help="Show the version and exit.",
    callback=_tell_version,
)
def cli() -> None:
    """Federated learning for fleets of unequal edge devices, over gRPC."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    prepare()
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    try:
        return _exit_code(cli.main(arguments, prog_name="fedgrpc", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except click.ClickException as error:
        return _complain(error.format_message(), 2, error)
    except UsageError as error:
        return _complain(str(error), 2)
    except IllegalTransition as error:
        return _complain(str(error), 3)
    except LinkError as error:
        return _complain(str(error), 4)
    except FedgrpcError as error:
        return _complain(str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. Python must not fail when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _exit_code(result: Any) -> int:
    return result if isinstance(result, int) else 0


def _complain(message: str, code: int, error: click.ClickException | None = None) -> int:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    click.echo(f"error: {' '.join(message.split()).removesuffix('.')}{hint}", err=True)
    return code
