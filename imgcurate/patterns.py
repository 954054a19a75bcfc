"""Patterns of inputs -> URLs: braces and globs expand, names of this machine become absolute."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from braceexpand import braceexpand

from imgcurate.errors import InputError
from imgcurate.filesystems import StorageOptions, filesystem, retry
from imgcurate.storage import is_local, local_path

__all__ = ["expand_urls"]

_MAX_URLS: Final = 10_000_000
_RANGE: Final = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def expand_urls(
    patterns: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: StorageOptions | None = None,
) -> list[str]:
    """Expand brace and glob patterns into a sorted list of distinct URLs.

    Parameters
    ----------
    patterns : str or sequence of str
        fsspec URLs or paths; ``{00000..00099}`` and ``{a,b}`` expand as in a shell, ``*``, ``?``,
        ``[...]`` and ``**`` are globs. Local paths come back absolute, since workers may run in
        another folder. A name without a pattern is taken as it is, also if it does not exist.

    Raises
    ------
    InputError
        If nothing was given or a glob matches nothing.
    """
    if isinstance(patterns, (str, os.PathLike)):
        patterns = [patterns]
    urls: set[str] = set()
    for pattern in map(_expanduser, patterns):
        if not pattern.strip():
            raise InputError("an input has no name: is a variable of the shell not set? '.' is the working folder")
        if is_local(pattern) and os.path.exists(local_path(pattern)):  # noqa: PTH110 - Path.exists raises for long names
            urls.add(_absolute(pattern))
            continue
        urls.update(url for name in _braces(pattern) for url in _glob(name, storage_options))
    if not urls:
        raise InputError("no input was given: expected tar shards, as paths, URLs or patterns")
    for url in urls:
        try:
            url.encode()
        except UnicodeEncodeError as exc:
            raise InputError(f"the name of {url!r} is not UTF-8, as the record of a run is: rename it") from exc
    return sorted(urls)


def _expanduser(pattern: str | os.PathLike[str]) -> str:
    text = os.fspath(pattern)
    return str(Path(text).expanduser()) if text.startswith("~") else text


def _glob(pattern: str, storage_options: StorageOptions | None) -> list[str]:
    path_part = pattern.split("://", 1)[-1]
    has_glob = any(c in path_part for c in "*[") or ("?" in path_part and not pattern.startswith("http"))
    if not has_glob:
        return [_absolute(pattern) if is_local(pattern) else pattern]
    fs, path = filesystem(pattern, storage_options)
    fs.invalidate_cache()
    found = retry(lambda: fs.glob(path), f"cannot list {pattern}")
    if not found:
        where = f" in {Path.cwd()}" if is_local(pattern) and not local_path(pattern).startswith("/") else ""
        raise InputError(f"nothing matches {pattern!r}{where}")
    return [str(f) if is_local(pattern) else fs.unstrip_protocol(f) for f in found]


def _braces(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern with braces stands for."""
    for first, last, step in _RANGE.findall(pattern):
        # They would all be in memory before the first of them came.
        if abs(int(last) - int(first)) // max(1, abs(int(step or 1))) >= _MAX_URLS:
            raise InputError(f"{pattern!r} expands to more than {_MAX_URLS:,} names")
    try:
        names = braceexpand(pattern)
    except ValueError as exc:
        raise InputError(f"unbalanced braces in {pattern!r}") from exc
    for count, name in enumerate(names):
        if count >= _MAX_URLS:
            raise InputError(f"{pattern!r} expands to more than {_MAX_URLS:,} names")
        yield name


def _absolute(url: str) -> str:
    """Return a path of this machine in full; one that goes up and down (``a/../a``) is not another file."""
    path = Path(local_path(url)).absolute()
    return str(path.resolve() if ".." in path.parts else path)
