"""Which series an expression of Prometheus gives, by labels alone: what is matched with nothing shows without a server.

Knows the part of PromQL that rules and dashboard use. Values are not computed: a comparison lets every series pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["Series", "read_series", "series_of"]

Series = dict[str, str]
"""The labels of one series; its name is the label `__name__`."""
_TOKEN = re.compile(
    r'\s*(?:(\d+(?:\.\d+)?)|([a-zA-Z_][\w:]*)|"([^"]*)"|(\[[^\]]*\])|(>=|<=|==|!=|=~|!~|[-+*/><=(){},]))'
)
_LEVELS = (("or",), ("and", "unless"), ("==", "!=", ">", "<", ">=", "<="), ("+", "-"), ("*", "/"))
"""Binary operators, those that bind least first."""


def read_series(text: str) -> list[Series]:
    """Return the series of an answer to /metrics."""
    return [
        {"__name__": name, **dict(re.findall(r'(\w+)="([^"]*)"', labels))}
        for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.M)
        if name != "#"
    ]


def series_of(expression: str, known: Sequence[Series]) -> list[Series] | None:
    """Return the labels of what an expression gives of the known series; None for a number.

    Raises `ValueError` for what cannot be read, and where Prometheus would refuse a match of many to one.
    """
    words = _words(expression)
    found = _Reader(words, known).binary(0)
    if words:
        raise ValueError(f"{expression}: {words[0]!r} is not expected")
    return found


def _words(expression: str) -> list[str]:
    words, at = [], 0
    text = expression.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"{expression}: {text[at:]!r} is not read")
        words.append(f'"{found[3]}' if found[3] is not None else next(group for group in found.groups() if group))
        at = found.end()
    return words


class _Reader:
    def __init__(self, words: list[str], known: Sequence[Series]) -> None:
        self._words, self._known = words, known

    def _next(self, expected: str = "") -> str:
        word = self._words.pop(0) if self._words else "the end"
        if expected and word != expected:
            raise ValueError(f"{word!r} is there instead of {expected!r}")
        return word

    def _is(self, *words: str) -> bool:
        return bool(self._words) and self._words[0] in words

    def _names(self) -> list[str]:
        self._next("(")
        names = []
        while not self._is(")"):
            names.append(self._next())
            if self._is(","):
                self._next()
        self._next(")")
        return names

    def binary(self, level: int) -> list[Series] | None:
        if level == len(_LEVELS):
            return self._one()
        left = self.binary(level + 1)
        while self._is(*_LEVELS[level]):
            operator, on, ignored = self._next(), None, ["__name__"]
            if self._is("on"):
                self._next()
                on = self._names()
            elif self._is("ignoring"):
                self._next()
                ignored += self._names()
            left = _matched(operator, left, self.binary(level + 1), on=on, ignored=ignored)
        return left

    def _one(self) -> list[Series] | None:
        if self._is("("):
            self._next()
            found = self.binary(0)
            self._next(")")
            return found
        word = self._next()
        if word[0].isdigit():
            return None
        if word in ("sum", "max", "min", "avg", "count"):
            how = self._next() if self._is("by", "without") else ""
            names = self._names() if how else []
            (of,) = self._arguments()
            return _unique(
                {k: v for k, v in one.items() if k != "__name__" and (k in names) == (how != "without")}
                for one in of or ()
            )
        if self._is("("):
            *_, of = self._arguments()
            gone = {"__name__"} | ({"le"} if word == "histogram_quantile" else set())
            return _unique({k: v for k, v in one.items() if k not in gone} for one in of or ())
        return self._selected(word)

    def _arguments(self) -> list[list[Series] | None]:
        self._next("(")
        found = [self.binary(0)]
        while self._is(","):
            self._next()
            found.append(self.binary(0))
        self._next(")")
        return found

    def _selected(self, name: str) -> list[Series]:
        found = [one for one in self._known if one["__name__"] == name]
        if self._is("{"):
            self._next()
            while not self._is("}"):
                label, operator, value = self._next(), self._next(), self._next()[1:]
                found = [one for one in found if _passes(one.get(label, ""), operator, value)]
                if self._is(","):
                    self._next()
            self._next("}")
        if self._words and self._words[0].startswith("["):
            self._next()
        return found


def _passes(given: str, operator: str, value: str) -> bool:
    same = re.fullmatch(value, given) is not None if "~" in operator else given == value
    return same == (operator[0] == "=")


def _unique(found: Iterable[Series]) -> list[Series]:
    return [dict(one) for one in dict.fromkeys(tuple(sorted(one.items())) for one in found)]


def _matched(
    operator: str, left: list[Series] | None, right: list[Series] | None, *, on: list[str] | None, ignored: list[str]
) -> list[Series] | None:
    """Return what two sides give: series are matched by the labels of `on`, or by all but the ignored."""
    if left is None or right is None:
        return left if right is None else right

    def key(one: Series) -> tuple[tuple[str, str], ...]:
        return tuple(sorted((k, v) for k, v in one.items() if (k in on if on is not None else k not in ignored)))

    keys = {key(one) for one in right}
    if operator == "or":
        return [*left, *(one for one in right if key(one) not in {key(other) for other in left})]
    if operator == "unless":
        return [one for one in left if key(one) not in keys]
    found = [one for one in left if key(one) in keys]
    if operator != "and" and (len({key(one) for one in found}) < len(found) or len(keys) < len(right)):
        raise ValueError(f"{operator}: several series match one")
    return found if operator == "and" or operator in _LEVELS[2] else [dict(key(one)) for one in found]
