"""Eligibility: an expression over what is known of a device, and whether the device meets it. Pure.

    expression  = conjunction { "or" conjunction }
    conjunction = term { "and" term }
    term        = "not" term | "(" expression ")" | fact | comparison | time range
    comparison  = fact ("==" | "!=" | "<" | "<=" | ">" | ">=") value
    value       = "text" | number [unit]
    time range  = HH:MM-HH:MM ("local" | "utc")

    accelerator == "cuda" and memory >= 2GB and label.site == "north" and on_mains and 22:00-06:00 local

The rule: the grammar is closed, and an expression is checked when it is parsed: every fact is known, every
value of its kind. What is not known of a device makes a comparison neither true nor false (Kleene's logic), and
only what is true counts: a device is not eligible by what it leaves unsaid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from operator import eq, ge, gt, le, lt, ne
from typing import Final, Protocol

from fedgrpc.errors import UsageError

MOST_CHARS: Final = 1000
# Nested parentheses and negations: the parser recurses.
_MOST_DEPTH: Final = 32
MINUTES_OF_DAY: Final = 24 * 60

Fact = str | float | bool
Facts = Mapping[str, Fact]


class FactKind(Enum):
    """Kind of a fact, which says what it may be compared with."""

    TEXT = "a text in double quotes"
    FLAG = "nothing, since it is true or false by itself"
    NUMBER = "a number"
    SHARE = "a number or percentage"
    SIZE = "a size, as in 2GB"
    RATE = "a rate, as in 10mbit"


# The facts of a device by their names in an expression. `label.NAME` is a text.
FACTS: Final[Mapping[str, FactKind]] = {
    "name": FactKind.TEXT,
    "device_class": FactKind.TEXT,
    "cpu_model": FactKind.TEXT,
    "cpu_cores": FactKind.NUMBER,
    "memory": FactKind.SIZE,
    "accelerator": FactKind.TEXT,
    "accelerator_name": FactKind.TEXT,
    "accelerator_memory": FactKind.SIZE,
    "uplink": FactKind.RATE,
    "downlink": FactKind.RATE,
    "software_version": FactKind.TEXT,
    "on_mains": FactKind.FLAG,
    "battery": FactKind.SHARE,
    "network": FactKind.TEXT,
    "unmetered": FactKind.FLAG,
    "temperature": FactKind.NUMBER,
    "load": FactKind.SHARE,
    "idle": FactKind.FLAG,
}
LABEL: Final = "label."
# Facts of which a time range is made: minutes of the day, 0 to 1439.
LOCAL_MINUTE, UTC_MINUTE = "local_minute", "utc_minute"

_BYTES: Final = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_BINARY: Final = {"KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
_UNITS: Final[Mapping[FactKind, Mapping[str, float]]] = {
    FactKind.NUMBER: {"": 1.0},
    FactKind.SHARE: {"": 1.0, "%": 0.01},
    FactKind.SIZE: {"": 1.0, **_BYTES, **_BINARY},
    FactKind.RATE: {"": 1.0, "bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9},
}
_COMPARISONS: Final[Mapping[str, Callable[[Fact, Fact], bool]]] = {
    "==": eq,
    "!=": ne,
    "<=": le,
    ">=": ge,
    "<": lt,
    ">": gt,
}
_KEYWORDS: Final = frozenset({"and", "or", "not", "local", "utc"})
_TOKEN: Final = re.compile(
    r"\s*(?:(?P<time>\d{1,2}:\d\d)|(?P<number>\d+(?:\.\d+)?)(?P<unit>[A-Za-z]+|%)?|(?P<text>\"[^\"\\]*\")"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*)|(?P<sign>==|!=|<=|>=|<|>|\(|\)|-))"
)


class Expression(Protocol):
    """A parsed expression."""

    def holds(self, facts: Facts) -> bool | None:
        """Return whether it is true of these facts; None where they do not say."""


@dataclass(frozen=True)
class Flag:
    """A fact that is true or false by itself."""

    fact: str

    def holds(self, facts: Facts) -> bool | None:
        """See `Expression.holds`."""
        value = facts.get(self.fact)
        return value if isinstance(value, bool) else None


@dataclass(frozen=True)
class Comparison:
    """A fact compared with a value: a text, or a number in bytes, bit/s or its own unit."""

    fact: str
    sign: str
    value: str | float

    def holds(self, facts: Facts) -> bool | None:
        """See `Expression.holds`."""
        known = facts.get(self.fact)
        if known is None or isinstance(known, str) is not isinstance(self.value, str):
            return None
        return _COMPARISONS[self.sign](known, self.value)


@dataclass(frozen=True)
class TimeRange:
    """Minutes of the day from `begin` to before `end`; over midnight where `end` is not after `begin`."""

    clock: str
    begin: int
    end: int

    def holds(self, facts: Facts) -> bool | None:
        """See `Expression.holds`."""
        minute = facts.get(self.clock)
        if not isinstance(minute, int | float):
            return None
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end


@dataclass(frozen=True)
class Not:
    """Negation. What is unknown stays so."""

    term: Expression

    def holds(self, facts: Facts) -> bool | None:
        """See `Expression.holds`."""
        known = self.term.holds(facts)
        return None if known is None else not known


@dataclass(frozen=True)
class All:
    """Conjunction of its terms; of none: true."""

    terms: tuple[Expression, ...]

    def holds(self, facts: Facts) -> bool | None:
        """See `Expression.holds`."""
        known = [term.holds(facts) for term in self.terms]
        return False if False in known else None if None in known else True


@dataclass(frozen=True)
class AnyOf:
    """Disjunction of its terms."""

    terms: tuple[Expression, ...]

    def holds(self, facts: Facts) -> bool | None:
        """See `Expression.holds`."""
        known = [term.holds(facts) for term in self.terms]
        return True if True in known else None if None in known else False


EVERYBODY: Final = All(())


def parse(text: str) -> Expression:
    """Parse an expression; an empty one is true of every device. Raises `UsageError`, which names the column."""
    if len(text) > MOST_CHARS:
        raise UsageError(f"an eligibility expression has at most {MOST_CHARS} characters, not {len(text)}")
    return EVERYBODY if not text.strip() else _Parser(text).parse()


def eligible(expression: Expression, facts: Facts) -> bool:
    """Return whether the expression is known to be true of a device."""
    return expression.holds(facts) is True


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    unit: str
    column: int

    def __str__(self) -> str:
        return f"{(self.text + self.unit)[:40]!r}" if self.kind != "end" else "the end"


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)
        self._at = 0
        self._depth = 0

    def parse(self) -> Expression:
        found = self._expression()
        if self._next.kind != "end":
            raise _wrong(self._next, "expected 'and', 'or' or the end")
        return found

    @property
    def _next(self) -> _Token:
        return self._tokens[self._at]

    def _take(self) -> _Token:
        token = self._tokens[self._at]
        self._at = min(self._at + 1, len(self._tokens) - 1)
        return token

    def _takes(self, text: str) -> bool:
        """Take the next token if it is this word or sign."""
        if self._next.kind in ("word", "sign") and self._next.text == text:
            self._take()
            return True
        return False

    def _expression(self) -> Expression:
        terms = [self._conjunction()]
        while self._takes("or"):
            terms.append(self._conjunction())
        return terms[0] if len(terms) == 1 else AnyOf(tuple(terms))

    def _conjunction(self) -> Expression:
        terms = [self._term()]
        while self._takes("and"):
            terms.append(self._term())
        return terms[0] if len(terms) == 1 else All(tuple(terms))

    def _term(self) -> Expression:
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise _wrong(self._next, f"more than {_MOST_DEPTH} terms within each other")
        try:
            if self._takes("not"):
                return Not(self._term())
            if self._takes("("):
                found = self._expression()
                if not self._takes(")"):
                    raise _wrong(self._next, "expected ')'")
                return found
            return self._time_range() if self._next.kind == "time" else self._about_fact()
        finally:
            self._depth -= 1

    def _time_range(self) -> Expression:
        begin = _minute(self._take())
        if not self._takes("-") or self._next.kind != "time":
            raise _wrong(self._next, "expected a range of times, as in 22:00-06:00 local")
        end = _minute(self._take())
        if self._takes("local"):
            return TimeRange(LOCAL_MINUTE, begin, end)
        if self._takes("utc"):
            return TimeRange(UTC_MINUTE, begin, end)
        raise _wrong(self._next, "expected 'local' or 'utc' after a range of times")

    def _about_fact(self) -> Expression:
        token = self._take()
        if token.kind != "word" or token.text in _KEYWORDS:
            raise _wrong(token, "expected a fact, a range of times, 'not' or '('")
        kind = _kind_of(token)
        if kind is FactKind.FLAG:
            return Flag(token.text)
        sign = self._take()
        if sign.kind != "sign" or sign.text not in _COMPARISONS:
            raise _wrong(sign, f"expected a comparison of {token.text}, as in {token.text} == ...")
        if kind is FactKind.TEXT and sign.text not in ("==", "!="):
            raise _wrong(sign, f"{token.text} is a text, which is only == or !=")
        return Comparison(token.text, sign.text, _value(self._take(), token.text, kind))


def _tokens(text: str) -> list[_Token]:
    found, at = [], 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            raise UsageError(f"column {at + 1}: {text[at]!r} has no meaning here")
        kind = str(match.lastgroup if match.lastgroup != "unit" else "number")
        found.append(_Token(kind, match[kind], match["unit"] or "", match.start(kind) + 1))
        at = match.end()
    return [*found, _Token("end", "", "", end + 1)]


def _kind_of(token: _Token) -> FactKind:
    if token.text.startswith(LABEL):
        return FactKind.TEXT
    if token.text not in FACTS:
        raise _wrong(token, f"no such fact; there are {', '.join(FACTS)} and {LABEL}NAME")
    return FACTS[token.text]


def _value(token: _Token, fact: str, kind: FactKind) -> str | float:
    if kind is FactKind.TEXT and token.kind == "text":
        return token.text[1:-1]
    if kind in _UNITS and token.kind == "number" and token.unit in _UNITS[kind]:
        return float(token.text) * _UNITS[kind][token.unit]
    raise _wrong(token, f"{fact} is compared with {kind.value}")


def _minute(token: _Token) -> int:
    hours, minutes = map(int, token.text.split(":"))
    if hours > 23 or minutes > 59:
        raise _wrong(token, "a time is from 00:00 to 23:59")
    return 60 * hours + minutes


def _wrong(token: _Token, why: str) -> UsageError:
    return UsageError(f"column {token.column}, at {token}: {why}")
