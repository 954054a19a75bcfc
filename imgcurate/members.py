"""Members of samples -> columns: texts as they are, and what stands under keys of JSON objects."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa

from imgcurate import schema
from imgcurate.errors import ConfigError, nearest

__all__ = ["JSON_KINDS", "NO_MEMBERS", "MemberColumns", "free_name", "json_value"]

_JSON: Final = "json"
# The pseudo-column of pixels, of which stages know; no column may be called so.
_IMAGE: Final = "image"
JSON_KINDS: Final[Mapping[str, pa.DataType]] = {
    "number": pa.float64(), "integer": pa.int64(), "text": pa.string(), "boolean": pa.bool_(),
}  # fmt: skip
"""What a key of a JSON object may be said to hold, and the type of its column."""


@dataclass(frozen=True)
class MemberColumns:
    """Columns that are made of members of samples.

    Attributes
    ----------
    texts : tuple of str
        Extensions of members to have as string columns of these names.
    json : tuple of (str, str)
        Keys of the objects in members ``.json``, and what they hold, of :data:`JSON_KINDS`.
    """

    texts: tuple[str, ...] = ()
    json: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, text_columns: Sequence[str] = (), json_columns: Mapping[str, str] | None = None) -> MemberColumns:
        """Return the columns that a user asks for.

        Raises
        ------
        ConfigError
            If they are not what they should be, or would hide a column of imgcurate.
        """
        if isinstance(text_columns, str) or not isinstance(text_columns, Sequence):
            raise ConfigError(f"text_columns={text_columns!r} should be a sequence, such as ('txt',)")
        if not all(isinstance(c, str) and c and c == c.lower() for c in text_columns):
            raise ConfigError(f"text_columns={list(text_columns)!r} should be extensions, such as 'txt'")
        if clash := set(text_columns) & {_IMAGE, *schema.COLUMNS}:
            raise ConfigError(f"text_columns: {', '.join(sorted(clash))} would hide a column of imgcurate")
        json_columns = json_columns if json_columns is not None else {}
        if not isinstance(json_columns, Mapping) or not all(isinstance(k, str) and k for k in json_columns):
            expected = "a mapping of keys to what they hold, as pwatermark: number"
            raise ConfigError(f"json_columns={json_columns!r} should be {expected}")
        for key, kind in json_columns.items():
            if not isinstance(kind, str) or kind not in JSON_KINDS:
                hint = nearest(kind, JSON_KINDS) if isinstance(kind, str) else ""
                raise ConfigError(f"json_columns: {key} is said to hold {kind!r}, not {', '.join(JSON_KINDS)}{hint}")
        return cls(tuple(dict.fromkeys(text_columns)), tuple(json_columns.items()))

    @property
    def types(self) -> dict[str, pa.DataType]:
        """The names of the columns, and their types.

        A key that is the name of a column of imgcurate comes as ``source_<key>``, as such columns of sidecars do.
        """
        types = dict.fromkeys(self.texts, pa.string())
        for key, kind in self.json:
            types[free_name(key, {*schema.COLUMNS, _IMAGE, *types})] = JSON_KINDS[kind]
        return types

    @property
    def extensions(self) -> tuple[str, ...]:
        """The extensions of the members that have to be read."""
        return (*self.texts, *([_JSON] if self.json and _JSON not in self.texts else []))

    def arrays(self, texts: Mapping[str, Sequence[str | None]]) -> dict[str, pa.Array]:
        """Return the columns of some samples.

        Parameters
        ----------
        texts : mapping of str to sequence
            Of each of :attr:`extensions` the texts of the samples' members; None where there is none.
        """
        values: list[Any] = [texts[ext] for ext in self.texts]
        if self.json:
            found = [_loaded(text) for text in texts[_JSON]]
            values += [[_AS[kind](_at(each, key)) for each in found] for key, kind in self.json]
        return {name: pa.array(column, type_) for (name, type_), column in zip(self.types.items(), values, strict=True)}


NO_MEMBERS: Final = MemberColumns()


def free_name(name: str, used: set[str]) -> str:
    """Return the name of a column that is not imgcurate's: ``source_<name>`` where that is taken."""
    while name in used:
        name = f"source_{name}"
    return name


def json_value(text: str, path: str) -> Any:
    """Return what stands under a key of a JSON object; dots lead into objects within. None where nothing does."""
    return _at(_loaded(text), path)


def _loaded(text: str | None) -> Any:
    try:
        return json.loads(text.removeprefix("\ufeff")) if text is not None else None
    except (ValueError, RecursionError):
        return None


def _at(found: Any, path: str) -> Any:
    if isinstance(found, Mapping) and path in found:
        return found[path]
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _number(value: Any) -> float | None:
    """Return a number, also one that stands there as text; None for what is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _integer(value: Any) -> int | None:
    """Return a whole number of 64 bits, also one that stands there as text or as 3.0."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = _number(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return value if fits else None


def _text(value: Any) -> str | None:
    """Return text; of what is none its JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # JSON may name halves of characters, which no UTF-8 has.
    return text.encode("utf-8", "replace").decode()


def _boolean(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


_AS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "number": _number, "integer": _integer, "text": _text, "boolean": _boolean,
}  # fmt: skip
