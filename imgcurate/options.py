"""Values of the command line -> parameters of stages and of storage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import yaml

from imgcurate.errors import ConfigError
from imgcurate.members import JSON_KINDS

__all__ = [
    "caption_options",
    "column_options",
    "json_columns",
    "quality_ranges",
    "ranges_of",
    "storage_options",
    "value_lists",
    "zero_shot_options",
]

_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,19}")
_TEXT_OPTIONS: Final = frozenset({"key", "secret", "token", "username", "password"})


def ranges_of(
    option: str, texts: Sequence[str], form: str, example: str
) -> dict[str, tuple[float | None, float | None]]:
    """Return ranges from the command line.

    Parameters
    ----------
    option : str
        What they are given with, for errors.
    texts : sequence of str
        ``NAME=MIN:MAX`` each; what is left out is open.
    form, example : str
        What they look like, and one of them, for errors.

    Raises
    ------
    ConfigError
        If one cannot be understood, or a name stands twice.

    Examples
    --------
    >>> ranges_of("--quality", ["sharpness=100:", "aspect_ratio=:3"], "COLUMN=MIN:MAX", "sharpness=100:")
    {'sharpness': (100, None), 'aspect_ratio': (None, 3)}
    """
    ranges: dict[str, tuple[float | None, float | None]] = {}
    for text in texts:
        name, equals, bounds = text.partition("=")
        if name in ranges:
            raise ConfigError(f"{option} {name}=... is given twice")
        try:
            low, high = (_number(bound) if bound.strip() else None for bound in bounds.split(":"))
        except ValueError as exc:
            raise ConfigError(f"{option} {text} should be {form}, such as {example}") from exc
        if not equals or (low is None and high is None):
            raise ConfigError(f"{option} {text} names no bound: it should be {form}, such as {example}")
        ranges[name] = low, high
    return ranges


def _number(text: str) -> float:
    """Return a number; a whole one as such, for a float does not tell those beyond 2^53 apart."""
    return int(text) if _WHOLE.fullmatch(text.strip()) else float(text)


def quality_ranges(texts: Sequence[str]) -> dict[str, tuple[float | None, float | None]]:
    """Return the ranges of ``--quality``; see :func:`ranges_of`."""
    return ranges_of("--quality", texts, "COLUMN=MIN:MAX", "sharpness=100: or aspect_ratio=:3")


def value_lists(option: str, texts: Sequence[str]) -> dict[str, list[str] | str]:
    """Return the values of ``--is-in`` or ``--is-not-in``.

    Parameters
    ----------
    option : str
        Which of them, for errors.
    texts : sequence of str
        ``COLUMN=VALUE`` each, or ``COLUMN=@FILE``.

    Raises
    ------
    ConfigError
        If one cannot be understood, or a column has a file and something else.

    Examples
    --------
    >>> value_lists("--is-in", ["license=cc0", "license=cc-by", "key=@wanted.txt"])
    {'license': ['cc0', 'cc-by'], 'key': 'wanted.txt'}
    """
    found: dict[str, list[str] | str] = {}
    for text in texts:
        column, equals, value = text.partition("=")
        if not column or not equals or value == "@":
            raise ConfigError(f"{option} {text} should be COLUMN=VALUE or COLUMN=@FILE, such as license=cc0")
        before = found.get(column)
        if isinstance(before, str) or (before is not None and value.startswith("@")):
            raise ConfigError(f"{option} {column}=... takes one file, or values; give the values in the file too")
        found[column] = value[1:] if value.startswith("@") else [*(before or []), value]
    return found


def column_options(
    where: Sequence[str] | None, is_in: Sequence[str] | None, is_not_in: Sequence[str] | None
) -> dict[str, Any]:
    """Return the parameters of :class:`ColumnFilterStage` from the command line; of what is not given none."""
    given = {
        "ranges": ranges_of("--where", where or [], "COLUMN=MIN:MAX", "punsafe=:0.1"),
        "is_in": value_lists("--is-in", is_in or []),
        "is_not_in": value_lists("--is-not-in", is_not_in or []),
    }
    return {name: value for name, value in given.items() if value}


def json_columns(texts: Sequence[str]) -> dict[str, str]:
    """Return the columns of ``--json-column``.

    Examples
    --------
    >>> json_columns(["pwatermark", "license:text"])
    {'pwatermark': 'number', 'license': 'text'}
    """
    found: dict[str, str] = {}
    for text in texts:
        key, colon, kind = text.rpartition(":")
        if not colon:
            key, kind = text, "number"
        if not key or kind not in JSON_KINDS:
            raise ConfigError(
                f"--json-column {text} should be KEY or KEY:KIND, such as license:text; KIND is one of "
                f"{', '.join(JSON_KINDS)}"
            )
        if key in found:
            raise ConfigError(f"--json-column {key} is given twice")
        found[key] = kind
    return found


def zero_shot_options(labels: Sequence[str], ranges: Sequence[str]) -> dict[str, Any]:
    """Return the parameters of :class:`ImageZeroShotFilterStage` from the command line; of what is not given none.

    Parameters
    ----------
    labels : sequence of str
        ``LABEL=PROMPT`` each; of a label that stands twice both prompts count.
    ranges : sequence of str
        ``LABEL=MIN:MAX`` each.

    Raises
    ------
    ConfigError
        If one cannot be understood.

    Examples
    --------
    >>> zero_shot_options(["text=a page of text", "photo=a photo", "text=a scan"], ["text=:0.5"])
    {'labels': {'text': ['a page of text', 'a scan'], 'photo': ['a photo']}, 'ranges': {'text': (None, 0.5)}}
    """
    prompts: dict[str, list[str]] = {}
    for text in labels:
        label, equals, prompt = text.partition("=")
        if not equals:
            raise ConfigError(f"--zero-shot {text} should be LABEL=PROMPT, such as screenshot='a screenshot'")
        prompts.setdefault(label, []).append(prompt)
    given = {"labels": prompts, "ranges": ranges_of("--zero-shot-range", ranges, "LABEL=MIN:MAX", "screenshot=:0.5")}
    return {key: value for key, value in given.items() if value}


def caption_options(threshold: float | None, caption: str | None) -> dict[str, Any]:
    """Return the parameters of :class:`ImageCaptionFilterStage` from the command line; of what is not given none.

    Examples
    --------
    >>> caption_options(0.28, "json:meta.caption")
    {'score_threshold': 0.28, 'text_column': 'json', 'json_field': 'meta.caption'}
    """
    column, colon, key = (caption or "").partition(":")
    if caption is not None and (not column or (colon and not key)):
        raise ConfigError(f"--caption {caption} should be a kind of member, such as txt, or json:KEY")
    given = {"score_threshold": threshold, "text_column": column or None, "json_field": key or None}
    return {name: value for name, value in given.items() if value is not None}


def storage_options(pairs: Sequence[str]) -> dict[str, Any] | None:
    """Return fsspec options from the command line.

    Parameters
    ----------
    pairs : sequence of str
        ``key=value`` each. Values are YAML scalars, but for keys, secrets, tokens, names and passwords, which
        are text; dots nest.

    Raises
    ------
    ConfigError
        If one cannot be understood; the message does not tell its value, which may be a secret.

    Examples
    --------
    >>> storage_options(["anon=true", "client_kwargs.endpoint_url=http://127.0.0.1:5000"])
    {'anon': True, 'client_kwargs': {'endpoint_url': 'http://127.0.0.1:5000'}}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        *parents, name = key.split(".")
        if not equals or not all([*parents, name]):
            raise ConfigError(f"--storage-option {key}{equals and '=...'} should be KEY=VALUE, such as anon=true")
        place = options
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                break
        if not isinstance(place, dict) or name in place:
            raise ConfigError(f"--storage-option {key}=... is given twice, or one of them is within the other")
        place[name] = text if name in _TEXT_OPTIONS else _scalar(key, text)
    return options or None


def _scalar(key: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        value = []
    if isinstance(value, (dict, list, set)):
        raise ConfigError(f"--storage-option {key}=... should be text, a number, true, false or null")
    return value
