"""The output folder of a run: whether it may be written to, and what of it goes on."""

from __future__ import annotations

from typing import Any, Final

from imgcurate.catalog import Manifest, fingerprint
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.storage import free_bytes, join_url, list_files, remove, remove_temporary_files, remove_tree

__all__ = ["difference", "find_run", "open_run"]

_FOLDERS: Final = ("catalog", "checkpoint", "dedup", "shards")
_FILES: Final = ("kept.parquet", "removed.parquet")
_MIN_FREE_BYTES: Final = 64 * 1024**2


def find_run(folder: str, config: dict[str, Any], *, work: str, overwrite: bool) -> Manifest | None:
    """Return the manifest in an output folder; refuse what must not be touched.

    Parameters
    ----------
    folder : str
        The output folder.
    config : dict
        All that decides the results of the run that is asked for.
    work : str
        Folder in it whose files are what a run has done.
    overwrite : bool
        Whether another run may be there.

    Raises
    ------
    ConfigError
        If it holds another run, or something else.
    """
    manifest = Manifest.load(folder)
    if manifest is not None and manifest.fingerprint != fingerprint(config):
        done = [n for n in list_files(join_url(folder, work), "") if not n.startswith(".")]
        nothing_done = manifest.state == "running" and not done
        if not overwrite and manifest.state != "clearing" and not nothing_done:
            raise ConfigError(
                f"{folder} holds another run ({difference(manifest.config, config)}): "
                "name another output folder, or overwrite it (--overwrite)"
            )
    names = [n for n in list_files(folder, "") if not (n.startswith(".") and n.endswith(".tmp"))]
    if manifest is None and names:
        raise ConfigError(f"{folder} is not empty and holds no run of imgcurate: name another output folder")
    return manifest


def open_run(folder: str, config: dict[str, Any], n_parts: int, *, work: str, overwrite: bool) -> Manifest:
    """Start a run in an output folder, or find the one that is to go on; see :func:`find_run`."""
    digest = fingerprint(config)
    manifest = find_run(folder, config, work=work, overwrite=overwrite)
    if manifest is not None and (manifest.fingerprint != digest or manifest.state == "clearing"):
        # Said first, so that a run which is killed now does not pass for the old one.
        manifest.state = "clearing"
        manifest.save(folder)
        for name in _FOLDERS:
            remove_tree(join_url(folder, name))
        for name in _FILES:
            remove(join_url(folder, name))
        manifest = None
    remove_temporary_files(folder)
    if manifest is None:
        free = free_bytes(folder)
        if free is not None and free < _MIN_FREE_BYTES:
            raise ImgcurateError(f"only {free:,} bytes are free on the disk of {folder}")
        manifest = Manifest(digest, config, n_parts)
        manifest.save(folder)
    return manifest


def difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """Name the first place where two configurations differ, with both values."""
    for key in sorted({*old, *new}):
        a, b, where = old.get(key), new.get(key), f"{path}{key}"
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            return difference(a, b, f"{where}.")
        if isinstance(a, list) and isinstance(b, list):
            if len(a) == len(b):
                i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
                if isinstance(a[i], dict) and isinstance(b[i], dict):
                    return difference(a[i], b[i], f"{where}[{i}].")
                return f"{where}[{i}]: {a[i]} there, {b[i]} asked for"
            return f"{where}: {len(a)} there, {len(b)} asked for"
        return f"{where}: {a} there, {b} asked for"
    return "the same configuration"
