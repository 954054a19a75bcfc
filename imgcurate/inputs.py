"""What a user names -> the shards that are read: tars, tables of images, files of folders.

- A *tar*, also compressed by gzip, zstd, bzip2 or xz, is a shard. So is a *table*: a Parquet or Arrow file
  with a column of images.
- A *folder* stands for the tars in it; if it holds none there or below, for the tables; if it holds images, for
  these (one that holds both images and tables of images is refused: which is meant?). Files of one path up to the
  last dot are one sample, but each image is one of its own; 256 samples are a shard.
- Images that are named one by one, as ``photos/*.jpg`` does, are such shards too, by folder.

The number of a shard, which is part of each ``uid``, is its place in the sorted list of all of them.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from imgcurate.archives import open_archive
from imgcurate.errors import InputError
from imgcurate.extensions import IMAGE_EXTENSIONS, TABLE_ENDINGS, TAR_ENDINGS
from imgcurate.folders import file_url, list_folder, quoted, stem
from imgcurate.patterns import expand_urls
from imgcurate.samples import split_key
from imgcurate.shards import Shard
from imgcurate.sidecars import FOLDER_TABLES, NO_SIDECARS, Sidecars
from imgcurate.storage import (
    StorageOptions,
    file_size,
    is_folder,
    is_local,
    list_tree,
    local_path,
    modified,
    open_source,
)
from imgcurate.streams import DamagedStreamError, is_compressed
from imgcurate.tables import TableSource, check_table, is_table
from imgcurate.tar_blocks import BLOCK, checksum_is_right

__all__ = ["CHANGED", "check_unchanged", "describe_shards", "find_shards", "state_of"]

CHANGED: Final = (
    "changed while the run was going on, so its output cannot be relied on: run again with --overwrite, or, if the "
    "file is as it was again, run again"
)

_SAMPLES_PER_SHARD: Final = 256
_TABLES_LOOKED_AT: Final = 16
_EXPECTED: Final = (
    "a tar (.tar, .tar.gz, .tar.zst ...), a Parquet or Arrow file with a column of images, a folder of any of these "
    "or of images"
)
_THREADS: Final = 16
logger = logging.getLogger(__name__)


def find_shards(
    patterns: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    storage_options: StorageOptions | None = None,
) -> list[Shard]:
    """Find the shards that paths, URLs and patterns stand for.

    Parameters
    ----------
    patterns : str or sequence of str
        fsspec URLs or paths of files and folders; braces and globs expand, see :func:`expand_urls`.
    storage_options : mapping, optional
        Passed to fsspec.

    Returns
    -------
    list of Shard
        Sorted by URL, then by name; each file once.

    Raises
    ------
    InputError
        If a pattern matches nothing, or something is of an unknown kind: the message says what was expected.
    """
    archives: set[str] = set()
    files: defaultdict[str, dict[str, int]] = defaultdict(dict)
    given = [patterns] if isinstance(patterns, (str, os.PathLike)) else patterns
    named = {os.fspath(pattern) for pattern in given}
    for url in expand_urls(patterns, storage_options):
        if url not in named and _is_statistics(url):
            continue
        kind = _kind(url, storage_options)
        if kind == "folder":
            found, listing = _look_into(url, storage_options)
            archives.update(found)
            files[url].update(listing)
        elif kind == "image":
            folder, _, name = url.rpartition("/")
            files[folder or "/"][quoted(name)] = -1 if is_local(url) else file_size(url, storage_options)
        else:
            archives.add(url)
    shards = [Shard(url) for url in archives if not _is_sidecar(url, archives)]
    for folder, listing in files.items():
        shards += _shards_of_files(folder, listing)
    _check_tables([s.url for s in shards], storage_options)
    return sorted(shards, key=lambda s: (s.url, s.files[:1]))


def describe_shards(
    shards: Sequence[Shard], storage_options: StorageOptions | None = None, sidecars: Sidecars = NO_SIDECARS
) -> list[dict[str, Any]]:
    """Return what the shards are now: URL, size and state of each, as plain data, and the state of joined sidecars.

    Raises
    ------
    InputError
        If a shard does not exist.
    """

    def describe(shard: Shard) -> dict[str, Any]:
        described = _describe(shard, storage_options)
        if sidecars.columns and (shard.tables or not shard.files):
            described["sidecar"] = sidecars.state(shard, storage_options)
        return described

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(describe, shards))


def _describe(shard: Shard, storage_options: StorageOptions | None) -> dict[str, Any]:
    if not shard.files:
        nbytes, state = file_size(shard.url, storage_options), modified(shard.url, storage_options)
        return {"url": shard.url, "nbytes": nbytes, "modified": state}
    states = _file_states(shard)
    digest = hashlib.sha256("\n".join(f"{f} {s}" for f, s in zip(shard.files, states, strict=True)).encode())
    return {"url": shard.url, "files": len(shard.files), "modified": digest.hexdigest()[:32]}


def state_of(described: Mapping[str, Any]) -> str:
    """Return what tells one state of a shard from another, as :func:`describe_shards` has it."""
    size = f"{described['files']} files" if "files" in described else f"{described['nbytes']} bytes"
    return f"{size}, {described['modified']}"


def check_unchanged(shard: Shard, storage_options: StorageOptions | None = None) -> None:
    """Refuse a shard that is not as it was when the run began.

    Raises
    ------
    InputError
        If it is another file now.
    """
    if not shard.state:
        return
    if state_of(_describe(shard, storage_options)) != shard.state:
        raise InputError(f"{shard.url} {CHANGED}")


def _file_states(shard: Shard) -> list[str]:
    if shard.sizes:
        return list(map(str, shard.sizes))
    states = []
    for text in shard.files:
        try:
            status = Path(local_path(file_url(shard.url, text))).stat()
            states.append(f"{status.st_size} {status.st_mtime_ns}")
        except OSError as exc:
            states.append(str(exc.strerror))
    return states


def _is_statistics(url: str) -> bool:
    """Return whether a file is one that img2dataset leaves beside each tar, and a glob finds too."""
    return url.endswith("_stats.json")


def _kind(url: str, storage_options: StorageOptions | None) -> str:
    """Return "archive", "folder" or "image"."""
    name = url.split("?", 1)[0].lower() if not is_local(url) else url.lower()
    if is_local(url) and is_folder(url):
        return "folder"
    if name.endswith((*TAR_ENDINGS, *TABLE_ENDINGS)):
        return "archive"
    if split_key(name)[1].rpartition(".")[2] in IMAGE_EXTENSIONS:
        return "image"
    if is_folder(url, storage_options):
        return "folder"
    file_size(url, storage_options)
    _check_magic(url, storage_options)
    return "archive"


def _check_magic(url: str, storage_options: StorageOptions | None) -> None:
    """Refuse a file whose name says nothing and whose first bytes are those of nothing that can be read."""
    source = open_source(url, storage_options)
    try:
        head = source.pread(0, BLOCK)
    finally:
        source.close()
    if not (is_compressed(head) or is_table(head) or (len(head) == BLOCK and checksum_is_right(head))):
        raise InputError(f"{url} is of an unknown kind (it begins with {head[:8]!r}): expected {_EXPECTED}")


def _look_into(folder: str, storage_options: StorageOptions | None) -> tuple[list[str], dict[str, int]]:
    """Return the archives in a folder, or its files with their sizes, -1 if not known."""
    sizes = dict.fromkeys(list_folder(folder), -1) if is_local(folder) else list_tree(folder, storage_options)
    visible = [n for n in sizes if not any(part.startswith(".") for part in n.split("/"))]
    images = sum(split_key(n)[1].rpartition(".")[2] in IMAGE_EXTENSIONS for n in visible)
    join: Callable[[str], str] = lambda name: f"{folder.rstrip('/')}/{name}"  # noqa: E731
    regular = [n for n in visible if not is_local(folder) or os.path.isfile(local_path(join(n)))]  # noqa: PTH113
    tars = [join(n) for n in regular if n.lower().endswith(TAR_ENDINGS)]
    if tars:
        if images:
            logger.warning("%s holds tars: %d images beside them are not read", folder, images)
        return tars, {}
    tables = sorted(join(n) for n in regular if n.lower().endswith(TABLE_ENDINGS))
    if tables and not images:
        return tables, {}
    if with_images := [t for t in tables[:_TABLES_LOOKED_AT] if _has_images(t, storage_options)]:
        raise InputError(
            f"the folder {folder} holds {images:,} images and {len(tables):,} tables, of which {with_images[0]} holds "
            "images too: name the files of one kind by a pattern, or a folder that holds just these"
        )
    if not images:
        bare = sum(not split_key(n)[1] for n in visible)
        why = f" ({bare:,} files without an extension are not looked at)" if bare else ""
        raise InputError(f"the folder {folder} holds no tar, no table and no image{why}: expected {_EXPECTED}")
    if bare := sum(not split_key(n)[1] for n in visible):
        logger.warning("%s: %d files without an extension belong to no sample", folder, bare)
    return [], {quoted(name): size for name, size in sizes.items()}


def _shards_of_files(folder: str, listing: dict[str, int]) -> Iterable[Shard]:
    tables = sorted(n for n in listing if n.rpartition("/")[2].lower() in FOLDER_TABLES)
    names = sorted(listing.keys() - set(tables), key=lambda n: (stem(n), n))
    samples = [list(group) for _, group in itertools.groupby(names, key=stem)]
    for first in range(0, len(samples), _SAMPLES_PER_SHARD):
        files = tuple(itertools.chain.from_iterable(samples[first : first + _SAMPLES_PER_SHARD]))
        sizes = tuple(listing[f] for f in files)
        beside = tuple(t for t in tables if any(f.startswith(t[: t.rfind("/") + 1]) for f in files))
        yield Shard(folder, files, () if is_local(folder) else sizes, tables=beside)


def _has_images(url: str, storage_options: StorageOptions | None) -> bool:
    try:
        source = open_archive(url, storage_options)
    except (InputError, DamagedStreamError):
        return False
    source.close()
    return isinstance(source, TableSource)


def _is_sidecar(url: str, archives: set[str]) -> bool:
    """Return whether a table lies beside a tar of its name, as a glob over both finds it."""
    name, _, ending = url.rpartition(".")
    return ending == "parquet" and any(name + e in archives for e in TAR_ENDINGS)


def _check_tables(urls: Sequence[str], storage_options: StorageOptions | None) -> None:
    """Refuse tables without images before a run starts; the first one tells."""
    first = min((u for u in urls if u.lower().endswith(TABLE_ENDINGS)), default=None)
    if first is not None:
        file_size(first, storage_options)
        check_table(first, storage_options)
