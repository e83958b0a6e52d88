"""Typed access to tables that anyone may have written, TOML recipes and plan.json; every error says where."""

import json
from typing import Any

from quantkit.errors import QuantkitError


class Fields:
    """One table of a TOML file."""

    def __init__(self, table: dict[str, Any], where: str):
        self.table, self.where = table, where

    def error(self, text: str) -> QuantkitError:
        """An error at this place, to be raised."""
        return QuantkitError(f"{self.where}: {text}")

    def known(self, *keys: str) -> None:
        """Refuse any other key."""
        for key in self.table:
            if key not in keys:
                raise self.error(f"unknown key {key!r}; known: {', '.join(keys)}")

    def required(self, key: str) -> Any:
        """The value, of whatever type."""
        if key not in self.table:
            raise self.error(f"{key} is missing")
        return self.table[key]

    def text(self, key: str) -> str:
        """One line of text."""
        return self._line(key, self.required(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """One string, or a list of them."""
        value = self.required(key)
        values = value if isinstance(value, list) else [value]
        if not values:
            raise self.error(f"{key} is an empty list")
        return tuple(self._line(key, v) for v in values)

    def choice(self, key: str, choices: Any) -> str:
        """One of these words."""
        return self.choice_of(key, self.text(key), choices)

    def choice_of(self, key: str, value: str, choices: Any) -> str:
        """`value`, if it is one of these words."""
        if value not in choices:
            raise self.error(f"unknown {key} {value!r}; known: {' '.join(choices)}")
        return value

    def _line(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 1000:
            raise self.error(f"{key} must be one line of text (1000 characters at most), not {value!r:.80}")
        return value


def load_json(text: str | bytes) -> Any:
    """The value of a JSON text without NaN, infinities and keys that stand twice; ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def typed(table: Any, key: str, kind: type, where: str) -> Any:
    """table[key], of exactly this type (True is no int)."""
    if not isinstance(table, dict):
        raise QuantkitError(f"{where} is not an object")
    if key not in table:
        raise QuantkitError(f"{where}: {key} is missing")
    if type(table[key]) is not kind:
        raise QuantkitError(f"{where}: {key} must be {kind.__name__}, not {table[key]!r:.60}")
    return table[key]


def text(table: Any, key: str, where: str) -> str:
    """table[key], one line of text, perhaps empty."""
    value = typed(table, key, str, where)
    if len(value) > 1000 or not (value.isprintable() or not value):
        raise QuantkitError(f"{where}: {key} must be one line of text, not {value!r:.60}")
    return value


def known(table: dict[str, Any], keys: set[str], where: str) -> None:
    """Refuse any other key."""
    for key in table:
        if key not in keys:
            raise QuantkitError(f"{where}: unknown key {key!r:.60}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r:.80} appears twice")
    return table


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
