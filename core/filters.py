"""Filters for lists of layers, in the grammar of containerd (``pkg/filters``).

::

    filter    := selector ("," selector)*          all of them have to match
    selector  := field ("." field)* [operator value]    without an operator: the field is present
    field     := quoted | [A-Za-z0-9_-]+
    operator  := "==" | "!=" | "~="                ~= is a search with a regular expression
    value     := quoted | [^\\s,"/|] [^\\s,]*
    quoted    := a Go string in double quotes; after ~= also in /…/ and |…|

There may be white space before a field, an operator and a value.

Fields of a layer are ``name``, ``parent``, ``kind`` (``active``, ``view``, ``committed``) and ``labels.KEY``, where a
key with other characters is quoted: ``labels."a.b/c"``. The parts of a label's path are joined with dots. A label that
is not there is equal to nothing, and different from everything but the empty text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from layerfs.errors import InvalidArgument
from layerfs.layer import Layer

_FIELD = re.compile(r"[A-Za-z0-9_-]+")
_OPERATOR = re.compile(r"==|!=|~=")
_VALUE = re.compile(r'[^\s,"/|][^\s,]*')
_SPACE = re.compile(r"\s*")
_CODE = (  # of a byte or of a character, but for the surrogates
    r"x[0-9a-fA-F]{2}|[0-3][0-7]{2}"
    r"|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|U(?!0000[dD][89a-fA-F])(?:000[0-9a-fA-F]|0010)[0-9a-fA-F]{4}"
)
_ESCAPE = re.compile(rf"\\({_CODE}|.)")
_CONTROLS = dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True))


def _quotes(mark: str) -> str:
    return rf"{mark}(?:\\(?:[abfnrtv\\]|{mark}|{_CODE})|(?!{mark})[^\\\n])*{mark}"


_QUOTED = re.compile(_quotes('"'))
_PATTERN = re.compile("|".join(map(_quotes, ('"', "/", r"\|"))))


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
        self._pass_space()
        operator = self._take(_OPERATOR)
        if operator is None:
            raise self._wrong("an operator (==, != or ~=) or a comma is missing")
        return _Selector(tuple(path), self._test(operator))

    def _test(self, operator: str) -> Callable[[str | None], bool]:
        self._pass_space()
        start = self._at
        wanted = self._value(_PATTERN if operator == "~=" else _QUOTED)
        if operator == "==":
            return lambda value: value == wanted
        if operator == "!=":
            return lambda value: (value or "") != wanted
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            self._at = start
            raise self._wrong(f"that is no regular expression ({error})") from error
        return lambda value: pattern.search(value or "") is not None

    def _name(self) -> str:
        self._pass_space()
        quoted = self._take(_QUOTED)
        if quoted is not None:
            return _unquoted(quoted)
        name = self._take(_FIELD)
        if name is None:
            raise self._wrong("a field's name is missing; quote one with other characters than letters and digits")
        return name

    def _value(self, quotes: re.Pattern[str]) -> str:
        quoted = self._take(quotes)
        if quoted is not None:
            return _unquoted(quoted)
        value = self._take(_VALUE)
        if value is None:
            raise self._wrong("a value is missing; quote one that is empty, has spaces or commas, or starts with / |")
        return value

    def _pass_space(self) -> None:
        found = _SPACE.match(self._text, self._at)
        assert found is not None
        self._at = found.end()

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


def _unquoted(quoted: str) -> str:
    """The text that is meant; escapes of bytes may make up characters."""
    text = _ESCAPE.sub(_meant, quoted[1:-1])
    return text.encode(errors="surrogateescape").decode(errors="surrogateescape")


def _meant(escape: re.Match[str]) -> str:
    code = escape[1]
    if len(code) == 1:
        return _CONTROLS.get(code, code)
    if code[0] in "uU":
        return chr(int(code[1:], 16))
    byte = int(code[1:], 16) if code[0] == "x" else int(code, 8)
    return bytes([byte]).decode(errors="surrogateescape")
