"""Settings of a run as texts that an operator sends.

The rule: whoever calls from elsewhere names no file of the aggregator's host and no class to import there, since
reading the one and importing the other is more than steering runs. Every text is bounded before it is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from fedgrpc.aggregation.robust.aggregation import own_rules
from fedgrpc.aggregation.server_optimizer import OPTIMIZERS
from fedgrpc.algorithms.registry import own_class
from fedgrpc.errors import UsageError
from fedgrpc.plugins import comes_with_fedgrpc
from fedgrpc.rounds.selector import SELECTIONS
from fedgrpc.v1.aggregator_pb2 import RunSetting

# Settings that name a file of the aggregator's host.
_FILES: Final = frozenset({"initial_model", "local_models"})
_MOST_CHARS: Final = 4096


def _not_of(known: Mapping[str, object]) -> Callable[[str], str]:
    return lambda text: "" if comes_with_fedgrpc(text, known) else text


# Settings that name classes: what of a text does not come with fedgrpc.
_CLASSES: Final[Mapping[str, Callable[[str], str]]] = {
    "algorithm": own_class,
    "aggregation": own_rules,
    "server_optimizer": _not_of(OPTIMIZERS),
    "selection": _not_of(SELECTIONS),
}
_MOST_VALUES: Final = 1000


def received_texts(settings: Iterable[RunSetting], on_host: bool) -> dict[str, Sequence[str]]:
    """Return settings by their keys. `on_host`: the caller is on the aggregator's host. Raises `UsageError`."""
    texts: dict[str, Sequence[str]] = {}
    for each in settings:
        name = each.name.replace("-", "_")
        if name in texts:
            raise UsageError(f"the setting {name[:80]!r} is there twice")
        if len(each.values) > _MOST_VALUES or any(len(value) > _MOST_CHARS for value in each.values):
            raise UsageError(
                f"the setting {name[:80]!r} is too long: it has at most {_MOST_VALUES} values of {_MOST_CHARS} "
                "characters each"
            )
        if not on_host:
            _check_remote(name, each.values)
        texts[name] = list(each.values)
    return texts


def _check_remote(name: str, values: Iterable[str]) -> None:
    """Raise `UsageError` for what only a caller on the aggregator's host may set."""
    if name in _FILES:
        raise UsageError(f"{name} names a file on the aggregator's host: submit there, by --data-dir")
    own = _CLASSES.get(name)
    if own is not None and (found := next(filter(None, map(own, values)), "")):
        raise UsageError(
            f"{name} {found[:80]!r} does not come with fedgrpc, and for callers from elsewhere the aggregator "
            "imports nothing: submit on its host, by --data-dir"
        )
