"""Declarations of settings: the flag, environment variable, key in the TOML file and default of each.

The rule: a setting that belongs to a field of a dataclass takes its name, default and type from it. A flag wins
over the environment variable, which wins over the file, which wins over the default.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource

from fedgrpc.cli.values import Quantity, read_table, texts_of
from fedgrpc.errors import UsageError

T = TypeVar("T")

_WORD = re.compile(r"\w+")
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_OF_A_SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)$")
_ASK_FOR_HELP = frozenset({"-h", "--help"})
_ABOUT_SETTINGS = re.compile(r"^\w+ (must|goes with)\b")

# Flags of other frameworks' tutorials, and the flag of this one that does the same (docs/coming_from.md).
AGGREGATOR_FLAGS: Final = {
    "--server-address": "--address",
    "--min-num-clients": "--min-workers",
    "--min-available-clients": "--min-workers",
    "--client-num-in-total": "--min-workers",
    "--min-fit-clients": "--min-sample-size",
    "--client-num-per-round": "--max-participants",
    "--sample-fraction": "--fraction",
    "--fraction-fit": "--fraction",
    "--num-rounds": "--rounds",
    "--comm-round": "--rounds",
    "--local-epochs": "--epochs",
    "--lr": "--learning-rate",
    "--federated-optimizer": "--server-optimizer",
    "--dataset": "--task",
    "--pretrained": "--initial-model",
}
WORKER_FLAGS: Final = {
    "--server-address": "--aggregator",
    "--server-uri": "--aggregator",
    "--superlink": "--aggregator",
    "--cid": "--name",
    "--client-id": "--name",
    "--client-uuid": "--name",
    "--node-id": "--name",
    "--partition-id": "--part",
    "--partition-method": "--partition",
    "--partition-alpha": "--partition",
    "--data-dir": "--data",
    "--dataset": "--task",
    "--use-cuda": "--device",
}
_TABLES: Final[Mapping[str, Mapping[str, str]]] = {"aggregator": AGGREGATOR_FLAGS, "worker": WORKER_FLAGS}
# As the flags of a training plan were each client's own elsewhere, and here are the run's.
_OF_THE_RUN: Final = frozenset(
    {"--epochs", "--batch-size", "--learning-rate", "--momentum", "--rounds", "--weight-decay"}
)


class Setting(click.Option):
    """An option with a heading in `--help`, whose errors name the flag, variable or file of the value."""

    def __init__(self, flags: Sequence[str], *, heading: str, **attributes: Any) -> None:
        self.heading = heading
        super().__init__(flags, **attributes)

    @property
    def key(self) -> str:
        """Return the key in the TOML file: the flag without its dashes."""
        longest = max(self.opts, key=len)
        return longest.removeprefix("--").replace("-", "_")

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Show defaults of quantities with their unit, as a person would write them."""
        extra = super().get_help_extra(ctx)
        if isinstance(self.type, Quantity) and isinstance(self.default, int | float):
            extra["default"] = self.type.show(self.default)
        return extra

    def handle_parse_result(
        self, ctx: click.Context, opts: Mapping[str, Any], args: list[str]
    ) -> tuple[Any, list[str]]:
        try:
            return super().handle_parse_result(ctx, opts, args)
        except click.MissingParameter as error:
            raise click.UsageError(f"{self.opts[0]} is missing", ctx) from error
        except click.BadParameter as error:
            origin = self.origin(ctx)
            where = "" if origin in ("", self.opts[0]) else f" (from {origin})"
            complaint = f"{self.opts[0]}: {error.message.removesuffix('.')}{where}"
            raise click.UsageError(complaint, ctx) from error

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert as click does, but refuse an empty path, which would be the working folder."""
        if isinstance(self.type, click.Path) and value == "":
            raise click.BadParameter("the path is empty", ctx, self)
        return super().type_cast_value(ctx, value)

    def origin(self, ctx: click.Context) -> str:
        """Return the variable, file or flag that gave the value; "" for the default."""
        source = ctx.get_parameter_source(self.name or "")
        if source is ParameterSource.ENVIRONMENT:
            return f"the variable {self.resolve_envvar_name(ctx)}"
        if source is ParameterSource.DEFAULT_MAP:
            return str(ctx.params.get("config"))
        return self.opts[0] if source is ParameterSource.COMMANDLINE else ""

    def resolve_envvar_name(self, ctx: click.Context) -> str:
        """Return the variable by command and flag, as FEDGRPC_AGGREGATOR_MIN_WORKERS.

        Not click's own prefix: that would name variables after the parameters (deadline_s), not the flags.
        """
        return f"{_prefix(ctx.command.name)}{self.key.upper()}"

    def value_from_envvar(self, ctx: click.Context) -> Any:
        self.envvar = self.resolve_envvar_name(ctx)
        return super().value_from_envvar(ctx)


class Declare:
    """Declarations of settings under one heading, optionally those of a dataclass."""

    def __init__(self, heading: str, owner: type | None = None) -> None:
        self._heading = heading
        self._fields = {field.name: field for field in dataclasses.fields(owner)} if owner else {}
        self._hints = typing.get_type_hints(owner) if owner else {}

    def __call__(self, flags: str, help: str, name: str | None = None, **attributes: Any) -> Setting:
        """Declare one setting; `name` is its field where that differs from the flag."""
        flag = flags.split("/")[0].split()[-1]
        name = name or flag.removeprefix("--").replace("-", "_")
        if field := self._fields.get(name):
            attributes = {**_from_field(field, self._hints[name]), **attributes}
        default = attributes.get("default")
        attributes.setdefault("show_default", default not in (None, "", ()))
        return Setting([*flags.split(), name], heading=self._heading, help=help, **attributes)


AS_JSON: Final = Declare("What to show")("--json/--table", "JSON, for programs.", name="as_json", default=False)


def _from_field(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    """Return the type and the default of a dataclass's field as attributes of a click option."""
    if isinstance(hint, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    attributes: dict[str, Any] = {}
    if hint in (bool, int, float, str):
        attributes["type"] = hint
    elif typing.get_origin(hint) is typing.Literal:
        attributes["type"] = click.Choice(typing.get_args(hint))
    elif hint is Path:
        attributes["type"] = click.Path(path_type=Path)
    if field.default is not dataclasses.MISSING:
        attributes["default"] = field.default
    return attributes


class SettingsCommand(click.Command):
    """Command whose settings come from flags, variables and one table of a TOML file."""

    def __init__(
        self, name: str, callback: Callable[..., Any], params: Sequence[click.Parameter], help: str
    ) -> None:
        config = Declare("Settings file")(
            "--config",
            f"TOML file with the same settings in its table [{name}].",
            type=click.Path(path_type=Path, dir_okay=False),
            is_eager=True,
            callback=self._read_config,
        )
        settings = [each for each in params if isinstance(each, Setting)]
        epilog = (
            f"Each setting is also the variable {_prefix(name)}<SETTING>, as in "
            f"{_example_variable(name, settings)}, and a key in the file. A flag wins over the variable, "
            "the variable over the file."
        )
        context = {"max_content_width": 110, "help_option_names": ["-h", "--help"]}
        super().__init__(name, context, callback, [*params, config], help, epilog, short_help=help)

    def settings(self) -> list[Setting]:
        """Return the settings in the order of `--help`."""
        return [param for param in self.params if isinstance(param, Setting)]

    def values_of(self, table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values of a table of settings, with those `given` by name, and defaults for what is left.

        Flags and variables have no say. Raises `UsageError`.
        """
        settings = {setting.key: setting for setting in self.settings() if setting.key != "config"}
        texts = texts_of(table, self.name or "", {key: each.multiple for key, each in settings.items()})
        context = click.Context(self, info_name=self.name)
        values = dict(given)
        for key, setting in settings.items():
            if (name := setting.name or "") in given:
                continue
            value = texts.get(key, setting.get_default(context))
            if setting.value_is_missing(value):
                values[name] = () if setting.multiple else None
                continue
            try:
                values[name] = setting.process_value(context, value)
            except click.BadParameter as error:
                raise UsageError(f"[{self.name}] {key}: {error.message.removesuffix('.')}") from error
        return values

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, but refuse misspelt variables first."""
        known = [setting.resolve_envvar_name(ctx) for setting in self.settings()]
        if not _ASK_FOR_HELP.intersection(args):
            check_variables(known, _prefix(self.name), os.environ)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = {flag for param in self.params for flag in (*param.opts, *param.secondary_opts)}
            if hint := hint_for(ctx.info_name or "", error.option_name, flags):
                raise click.UsageError(f"No such option {error.option_name!r}. {hint}.", ctx) from error
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; add the origin of values to errors about them."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise UsageError(f"{error}{self._origins(ctx, str(error))}") from error

    def _origins(self, ctx: click.Context, complaint: str) -> str:
        """Return the origins of the settings that an error such as "quorum must be at least 1" names."""
        if not _ABOUT_SETTINGS.search(complaint):
            return ""
        words = frozenset(_WORD.findall(complaint))
        named = {setting.name: setting.origin(ctx) for setting in self.settings() if setting.name in words}
        given = {name: origin for name, origin in named.items() if origin}
        if len(named) == 1:
            return "".join(f" (from {origin})" for origin in given.values())
        listed = ", ".join(f"{name} from {origin}" for name, origin in given.items())
        return f" ({listed})" if listed else ""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the settings under their headings."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                heading = "Arguments" if isinstance(param, click.Argument) else "Settings file"
                heading = param.heading if isinstance(param, Setting) else heading
                sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)

    def _read_config(self, ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            settings = {setting.key: setting for setting in self.settings() if setting.key != "config"}
            may_repeat = {key: setting.multiple for key, setting in settings.items()}
            values = read_table(path, self.name or "", may_repeat)
            ctx.default_map = {settings[key].name or "": value for key, value in values.items()}
            ctx.params["config"] = path
        return path


def hint_for(command: str, flag: str, known: Collection[str]) -> str | None:
    """Return a sentence on what to write in place of the unknown `flag`; None where nothing is known of it."""
    dashed = flag.replace("_", "-")
    if dashed in known:
        return f"Write {dashed}"
    if right := _TABLES.get(command, {}).get(dashed):
        return f"Here it is {right} (docs/coming_from.md)"
    run_flag = AGGREGATOR_FLAGS.get(dashed, dashed)
    if command == "worker" and run_flag in _OF_THE_RUN:
        return f"The run has it for all workers: fedgrpc aggregator {run_flag}"
    return None


def check_variables(known: Sequence[str], prefix: str, given: Iterable[str]) -> None:
    """Raise `UsageError` for a variable with this prefix that is close to, but not, one of `known`.

    Other variables are ignored: Kubernetes sets some for every service, named after it.
    """
    keys = [name.removeprefix(prefix) for name in known]
    for name in sorted(given):
        if not name.startswith(prefix) or name in known or _OF_A_SERVICE.search(name):
            continue
        if close := difflib.get_close_matches(name.removeprefix(prefix), keys, n=1, cutoff=0.75):
            raise UsageError(f"there is no variable {name}; did you mean {prefix}{close[0]}?")


def _example_variable(name: str, params: Sequence[Setting]) -> str:
    return f"{_prefix(name)}{params[-1].key.upper()}"


def _prefix(command: str | None) -> str:
    """Return how the variables of a command begin, as FEDGRPC_TOKEN_CREATE_."""
    return f"FEDGRPC_{(command or '').upper().replace(' ', '_')}_"


def pick(owner: type[T], values: Mapping[str, Any], **more: Any) -> T:
    """Build `owner` from the items of `values` that are its fields, and from `more`."""
    names = {field.name for field in dataclasses.fields(owner)}  # type: ignore[arg-type]
    return owner(**{name: value for name, value in values.items() if name in names} | more)
