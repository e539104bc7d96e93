"""Values of a config.json, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sq_stream.errors import BadInputError, UnsupportedModelError
from sq_stream.formats.strict_json import brief

MAX_SIZE = 2**20
"""No dimension of a known model comes near this; a larger one is a damaged config, not a model."""
MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS of llama.cpp."""
_MIN_FLOAT, _MAX_FLOAT = 2.0**-126, 2.0**127


class Config:
    """The text model's part of config.json: `text_config` over the top level, a null counting as absent.

    Every reader raises BadInputError for a value of the wrong kind or out of range, or when there is neither a value
    nor a default.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, path: str = ""):
        text = values.get("text_config")
        if text is not None and not isinstance(text, Mapping):
            raise BadInputError(f"config.json: text_config is {brief(text)}, not an object")
        given = {key: value for key, value in {**values, **(text or {})}.items() if value is not None}
        self._values = {**(defaults or {}), **given}
        self._path = path

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None, at_most: int = MAX_SIZE) -> int:
        """A whole number from 1 to `at_most`."""
        value = self._read(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
            raise self._error(key, value, f"a whole number from 1 to {at_most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number that a 32-bit float can hold."""
        value = self._read(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _MIN_FLOAT <= value <= _MAX_FLOAT:
            raise self._error(key, value, "a positive number that a 32-bit float can hold")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._read(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self._read(key, default)
        if not isinstance(value, str):
            raise self._error(key, value, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        value = self._read(key, None)
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self._error(key, value, "a list of strings")
        return value

    def integers(self, key: str, default: list[int], at_most_n: int) -> list[int]:
        """A list of up to `at_most_n` whole numbers from 0 to MAX_SIZE."""
        value = self._read(key, default)
        if (
            not isinstance(value, list)
            or not 1 <= len(value) <= at_most_n
            or not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= MAX_SIZE for x in value)
        ):
            raise self._error(key, value, f"a list of up to {at_most_n} whole numbers")
        return value

    def section(self, key: str) -> Config | None:
        """The object at `key`, or None where there is none or an empty one."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._error(key, value, "an object")
        return Config(value, path=f"{self._path}{key}.") if value else None

    def only(self, key: str, *supported: object) -> None:
        """Refuse a model whose `key` is given and is none of the `supported` values.

        Raises:
            UnsupportedModelError: as said.
        """
        if key in self._values and self._values[key] not in supported:
            raise UnsupportedModelError(
                f"config.json: {self._path}{key} is {brief(self._values[key])}; sq-stream supports only "
                f"{' or '.join(map(repr, supported))} for this architecture"
            )

    def _read(self, key: str, default: object) -> object:
        value = self._values.get(key, default)
        if value is None:
            raise BadInputError(f"config.json: {self._path}{key} is missing")
        return value

    def _error(self, key: str, value: object, wanted: str) -> BadInputError:
        return BadInputError(f"config.json: {self._path}{key} is {brief(value)}, not {wanted}")
