"""Folders of files -> samples: files that share a path up to the last dot are one, but each image is one of its own.

In a tar the first dot ends a key, and photos are often called ``2023.06.01 beach.jpg``: so in keys, and in the
names of exported members, dots of the base name are ``_``.

A sample's files are named in the column ``files``, relative to the folder in ``shard``, the image first;
its ``spans`` are ``0, size`` for each. A ``%`` in a name is written ``%25``, and bytes that are not UTF-8
``%XX``, so that any name can stand in a column of text.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import numpy as np

from imgcurate.extensions import IMAGE_EXTENSIONS
from imgcurate.storage import StorageError, StorageOptions, join_url, local_path, open_source
from imgcurate.tar import Members, Problem, quoted_name
from imgcurate.tar_blocks import PLAIN_HEADER, padding, tar_header

__all__ = ["FileMembers", "copy_files", "file_name", "file_url", "files_members", "list_folder", "quoted", "stem"]

_COPY_BYTES: Final = 8 * 1024 * 1024


def quoted(name: str) -> str:
    """Return a file's name, with surrogates for bytes that are not UTF-8, as valid text; see above."""
    plain = name.replace("%", "%25")
    return "".join(f"%{ord(c) - 0xDC00:02X}" if "\udc80" <= c <= "\udcff" else c for c in plain)


def file_name(text: str) -> str:
    """Return the name that :func:`quoted` made `text` of."""
    return unquote_to_bytes(text).decode("utf-8", "surrogateescape")


def file_url(folder: str, text: str) -> str:
    """Return the URL of a file that a row names."""
    return join_url(folder, file_name(text))


def list_folder(folder: str) -> Iterator[str]:
    """Return the paths, relative to `folder`, of all files in a local folder and below, in no order.

    Hidden folders are left out. Links to folders are not followed: they could lead round in circles.
    """
    top = local_path(folder)
    for parent, folders, names in os.walk(top):
        folders[:] = [f for f in folders if not f.startswith(".")]
        prefix = os.path.relpath(parent, top)
        yield from names if prefix == "." else (f"{prefix}/{name}" for name in names)


@dataclass(frozen=True, slots=True)
class FileMembers:
    """Files as the members of an archive.

    Attributes
    ----------
    members : Members
        Under the names that they have in a tar; each begins at 0, in a file of its own.
    files : list of str
        Their own names, quoted.
    rows : ndarray of shape (n,), int64
        Of each the number of its sample, ascending.
    unreadable : dict of int to str
        Why a file cannot be read, by its position.
    """

    members: Members
    files: list[str]
    rows: np.ndarray
    unreadable: dict[int, str]


def stem(name: str) -> str:
    """Return a file's path up to the last dot of its base name; all of it for hidden files and without a dot."""
    base = name[name.rfind("/") + 1 :]
    dot = base.rfind(".")
    return name if dot <= 0 or base.startswith(".") else name[: len(name) - len(base) + dot]


def member_name(name: str) -> str:
    """Return a file's name in a tar, where the first dot ends the key: other dots of the base name are ``_``."""
    folder, slash, base = stem(name).rpartition("/")
    return name if stem(name) == name else folder + slash + base.replace(".", "_") + name[len(stem(name)) :]


def files_members(folder: str, files: Sequence[str], sizes: Sequence[int], problems: list[Problem]) -> FileMembers:
    """Return files as the members of an archive, with what is wrong with some of them.

    Parameters
    ----------
    folder : str
        URL of their folder.
    files : sequence of str
        Their names, quoted, those of one stem together.
    sizes : sequence of int
        Bytes of each; empty for a local folder, where they are looked up.
    problems : list of Problem
        Gets what is no regular file.
    """
    names: list[bytes] = []
    kept: list[str] = []
    nbytes: list[int] = []
    rows: list[int] = []
    unreadable: dict[int, str] = {}
    for row, i in _in_samples(files):
        text = files[i]
        name = file_name(text)
        size, reason = (sizes[i], "") if len(sizes) else _look_up(file_url(folder, text))
        if size < 0 and not reason:
            shown = quoted_name(name.encode("utf-8", "surrogateescape"))
            problems.append(Problem(0, "special file", f"{shown} is no regular file"))
            continue
        if reason:
            unreadable[len(names)] = reason
        names.append(member_name(name).encode("utf-8", "surrogateescape") + b"\0")
        kept.append(text)
        nbytes.append(max(size, 0))
        rows.append(row)
    zeros, size_of = np.zeros(len(names), np.int64), np.array(nbytes, np.int64)
    return FileMembers(
        Members(b"".join(names), zeros, zeros, size_of, size_of), kept, np.array(rows, np.int64), unreadable
    )


def _in_samples(files: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Return (sample, position) of files, by their stems; each image is a sample, and other files go with the first."""
    row = -1
    for _, group in itertools.groupby(range(len(files)), key=lambda i: stem(files[i])):
        positions = list(group)
        images = [i for i in positions if files[i].rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
        row += 1
        yield from ((row, i) for i in [*images[:1], *(i for i in positions if i not in images)])
        for i in images[1:]:
            row += 1
            yield row, i


def _look_up(url: str) -> tuple[int, str]:
    """Return a local file's size, -1 if it has none, and why it cannot be read."""
    path = Path(local_path(url))
    try:
        status = path.stat()
    except OSError as exc:
        return -1, f"cannot read the file: {exc.strerror}"
    if not stat.S_ISREG(status.st_mode):
        return -1, ""
    return (status.st_size, "") if os.access(path, os.R_OK) else (-1, "cannot read the file: Permission denied")


def copy_files(
    folder: str, files: Sequence[str], spans: Sequence[int], key: str | None, out: Any, options: StorageOptions | None
) -> int:
    """Write a sample's files as members of a tar.

    Parameters
    ----------
    folder : str
        URL of the files' folder.
    files : sequence of str
        Their names, quoted.
    spans : sequence of int
        ``0, size`` of each.
    key : str, optional
        The key to write them under, if not that of their names.
    out : binary file
        Gets the bytes.
    options : mapping, optional
        Passed to fsspec.

    Returns
    -------
    int
        Number of bytes written.

    Raises
    ------
    StorageError
        If a file is no longer as it was.
    """
    written = 0
    for text, size in zip(files, spans[1::2], strict=True):
        name, url = member_name(file_name(text)), file_url(folder, text)
        if key is not None:
            name = key + name[name.index(".", name.rfind("/") + 1) :]
        source = open_source(url, options)
        try:
            if source.size != size:
                raise StorageError(f"{url} has {source.size:,} bytes and had {size:,}: it changed since it was indexed")
            header = tar_header(name, size, PLAIN_HEADER)
            out.write(header)
            for start in range(0, size, _COPY_BYTES):
                block = source.pread(start, min(_COPY_BYTES, size - start))
                out.write(block)
            out.write(padding(size))
        finally:
            source.close()
        written += len(header) + size + len(padding(size))
    return written
