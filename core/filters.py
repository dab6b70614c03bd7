"""Filters for lists of layers, in the grammar of containerd (``pkg/filters``).

::

    filter    := selector ("," selector)*          all of them have to match
    selector  := field ("." field)* [operator value]    without an operator: the field is present
    field     := quoted | [A-Za-z] [A-Za-z0-9_]*
    operator  := "==" | "!=" | "~="                ~= is a search with a regular expression
    value     := quoted | [^\\s,]+
    quoted    := a Go string in double quotes; after ~= also /…/ and |…|

Fields of a layer are ``name``, ``parent``, ``kind`` (``active``, ``view``, ``committed``) and ``labels.KEY``, where a
key with other characters is quoted: ``labels."a-b/c"``. The parts of a label's path are joined with dots. A label that
is not there is equal to nothing and different from everything.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from layerfs.errors import InvalidArgument
from layerfs.layer import Layer

_FIELD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_OPERATOR = re.compile(r"==|!=|~=")
_VALUE = re.compile(r'[^\s,"][^\s,]*')
_ESCAPE = r"\\(?:[abfnrtv\\\"]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3})"
_QUOTED = re.compile(rf'"(?:{_ESCAPE}|[^"\\\n])*"')
_PATTERN = re.compile(_QUOTED.pattern + r"|/(?:\\.|[^/\\\n])*/|\|(?:\\.|[^|\\\n])*\|")


@dataclass(frozen=True, slots=True)
class _Selector:
    path: tuple[str, ...]
    matches: Callable[[str | None], bool]


def parse(filters: Iterable[str]) -> Callable[[Layer], bool]:
    """What tells whether a layer matches any of ``filters``; without filters all do.

    Raises `InvalidArgument`, showing where a filter is wrong.
    """
    parsed = [_Parser(text).selectors() for text in filters]
    if not all(parsed):  # none at all, or an empty one, which matches everything
        return lambda _: True

    def match(layer: Layer) -> bool:
        return any(all(s.matches(_field(layer, s.path)) for s in selectors) for selectors in parsed)

    return match if parsed else lambda _: True


def _field(layer: Layer, path: tuple[str, ...]) -> str | None:
    match path:
        case ("name",):
            return layer.key
        case ("parent",):
            return layer.parent
        case ("kind",):
            return layer.kind.value
        case ("labels", *parts):
            return layer.labels.get(".".join(parts))
    return None


class _Parser:
    """Takes one filter apart, from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def selectors(self) -> list[_Selector]:
        """The selectors, in their order; none for an empty filter."""
        if not self._text:
            return []
        found = [self._selector()]
        while self._at < len(self._text):
            self._expect(",")
            found.append(self._selector())
        return found

    def _selector(self) -> _Selector:
        path = [self._name()]
        while self._text.startswith(".", self._at):
            self._at += 1
            path.append(self._name())
        if self._at == len(self._text) or self._text[self._at] == ",":
            return _Selector(tuple(path), lambda value: value is not None)
        operator = self._take(_OPERATOR)
        if operator is None:
            raise self._wrong("an operator (==, != or ~=) or a comma is missing")
        return _Selector(tuple(path), self._test(operator))

    def _test(self, operator: str) -> Callable[[str | None], bool]:
        start = self._at
        wanted = self._value(_PATTERN if operator == "~=" else _QUOTED)
        if operator == "==":
            return lambda value: value == wanted
        if operator == "!=":
            return lambda value: value != wanted
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            self._at = start
            raise self._wrong(f"that is no regular expression ({error})") from error
        return lambda value: pattern.search(value or "") is not None

    def _name(self) -> str:
        quoted = self._take(_QUOTED)
        if quoted is not None:
            return self._unquoted(quoted)
        name = self._take(_FIELD)
        if name is None:
            raise self._wrong("a field's name is missing; quote one with other characters than letters and digits")
        return name

    def _value(self, quotes: re.Pattern[str]) -> str:
        quoted = self._take(quotes)
        if quoted is not None:
            return self._unquoted(quoted)
        value = self._take(_VALUE)
        if value is None:
            raise self._wrong("a value is missing; an empty one or one with spaces or commas is quoted")
        return value

    def _unquoted(self, quoted: str) -> str:
        mark, inner = quoted[0], quoted[1:-1]
        if mark != '"':
            return inner.replace(f"\\{mark}", mark)
        return str(ast.literal_eval(quoted))  # Go's escapes inside double quotes are Python's as well

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found.group()

    def _expect(self, mark: str) -> None:
        if not self._text.startswith(mark, self._at):
            raise self._wrong(f"{mark!r} is missing")
        self._at += 1

    def _wrong(self, why: str) -> InvalidArgument:
        before, after = self._text[: self._at], self._text[self._at :]
        return InvalidArgument(f"the filter {before}»{after} is wrong at »: {why}")
