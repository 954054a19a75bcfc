"""The output folder of a run: whether it may be written to, and what of it goes on."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from imgcurate.catalog import Manifest, fingerprint
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.results import REPORT
from imgcurate.stages.registry import works_by_batch
from imgcurate.storage import free_bytes, join_url, list_files, remove, remove_temporary_files, remove_tree
from imgcurate.success import Success

__all__ = ["FOLDERS", "PIPELINE", "difference", "find_run", "open_run", "warn_of_code", "warn_of_lost"]

logger = logging.getLogger(__name__)
FOLDERS: Final = ("catalog", "checkpoint", "dedup", "shards")
"""Those of an output folder that hold what a run made."""
PIPELINE: Final = "pipeline.yaml"
"""The file of an output folder that says what was run, as ``imgcurate run`` takes it."""
_FILES: Final = ("kept.parquet", "removed.parquet", REPORT, PIPELINE)
_MIN_FREE_BYTES: Final = 64 * 1024**2


def find_run(
    folder: str, config: dict[str, Any], *, work: str, overwrite: bool, resume: bool = False, grows: bool = False
) -> Manifest | None:
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
    resume : bool
        Whether the same run has to be there.
    grows : bool
        Whether the same run over fewer inputs will do, and one that is not done and decides otherwise later on.

    Raises
    ------
    ConfigError
        If it holds another run, or something else, or with `resume` nothing to go on with.
    """
    manifest = Manifest.load(folder)
    if (
        manifest is not None
        and manifest.fingerprint != fingerprint(config)
        and not (grows and _goes_on(manifest, config, resume=resume))
    ):
        done = [n for n in list_files(join_url(folder, work), "") if not n.startswith(".")]
        nothing_done = manifest.state == "running" and not done
        if (not overwrite and manifest.state != "clearing" and not nothing_done) or resume:
            # More inputs are no reason.
            more = grows and _only_more(manifest.config.get("inputs"), config.get("inputs"))
            old, new = ({**c, "inputs": None} if more else c for c in (manifest.config, config))
            raise ConfigError(
                f"{folder} holds another run ({difference(old, new)}): "
                "name another output folder, or overwrite it (--overwrite)"
            )
    if manifest is None:
        names = [n for n in list_files(folder, "") if not (n.startswith(".") and n.endswith(".tmp"))]
        if names:
            raise ConfigError(f"{folder} is not empty and holds no run of imgcurate: name another output folder")
        if resume:
            raise ConfigError(f"{folder} holds no run to go on with: leave --resume out to begin one")
    return manifest


def _grown(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether a configuration asks for the same run over more inputs: the old ones, then others."""
    return _only_more(old.get("inputs"), new.get("inputs")) and {**old, "inputs": None} == {**new, "inputs": None}


def _goes_on(manifest: Manifest, config: dict[str, Any], *, resume: bool) -> bool:
    """Return whether what the first phase of another run has made is what this one begins with."""
    if manifest.state == "clearing":
        return False
    return _grown(manifest.config, config) or (
        not resume and manifest.state != "done" and _before_decisions(manifest.config) == _before_decisions(config)
    )


def _before_decisions(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the stages that come after all images are looked at."""
    return {**config, "stages": list(itertools.takewhile(works_by_batch, config.get("stages", ())))}


def _only_more(before: Any, now: Any) -> bool:
    """Return whether inputs are others, then more."""
    if not isinstance(before, list) or not isinstance(now, list):
        return False
    return len(now) > len(before) and now[: len(before)] == before


def open_run(
    folder: str,
    config: dict[str, Any],
    n_parts: int,
    *,
    work: str,
    overwrite: bool,
    resume: bool = False,
    grows: bool = False,
    increments: Sequence[int] = (),
    source: dict[str, Any] | None = None,
) -> Manifest:
    """Start a run in an output folder, or find the one that is to go on; see :func:`find_run`.

    The state of a run whose inputs have grown, or that is to decide otherwise, is ``growing``: what was decided has
    to be taken back.
    """
    digest = fingerprint(config)
    manifest = find_run(folder, config, work=work, overwrite=overwrite, resume=resume, grows=grows)
    is_other = manifest is not None and manifest.fingerprint != digest
    if manifest is not None and grows and is_other and _goes_on(manifest, config, resume=resume):
        manifest.fingerprint, manifest.config, manifest.n_parts = digest, config, n_parts
        manifest.increments, manifest.source = list(increments), source or {}
        manifest.state, manifest.exporting = "growing", False
        manifest.samples, manifest.counts, manifest.shards = 0, {}, []
        manifest.save(folder)
    elif manifest is not None and (manifest.fingerprint != digest or manifest.state == "clearing"):
        # Said first, so that a run which is killed now does not pass for the old one.
        manifest.state = "clearing"
        manifest.save(folder)
        Success.withdraw(folder)
        for name in FOLDERS:
            remove_tree(join_url(folder, name))
        for name in _FILES:
            remove(join_url(folder, name))
        manifest = None
    if manifest is None:
        _check_space(folder)
        manifest = Manifest(digest, config, n_parts, increments=list(increments), source=source or {})
        manifest.save(folder)
    if manifest.state != "done":
        Success.withdraw(folder)
        remove_temporary_files(folder)
    return manifest


def warn_of_lost(folder: str) -> bool:
    """Whether files of a run that is done are gone or cut; say so, for it is made whole then."""
    lost = Success.lost_from(folder)
    if lost:
        logger.warning(
            "of the finished run in %s %d files are gone or cut (%s): it is made whole again",
            folder, len(lost), lost[0],
        )  # fmt: skip
    return bool(lost)


def warn_of_code(folder: str, source: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Say so where the code of stages is another than when a run began: what they made then stays."""
    before, now = source.get("code", {}), now["code"]
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            logger.warning(
                "the code of %s is not what it was when the run in %s began, and what it made then stays as it is: "
                "name another output folder, or overwrite it (--overwrite)", name, folder,
            )  # fmt: skip


def _check_space(folder: str) -> None:
    free = free_bytes(folder)
    if free is not None and free < _MIN_FREE_BYTES:
        raise ImgcurateError(
            f"only {free / 2**20:.1f} MiB are free on the disk of {folder}, and no run begins under "
            f"{_MIN_FREE_BYTES / 2**20:.0f}: free some, or name a folder on another disk (--dry-run says how much it "
            "takes)"
        )


def difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str:
    """Name the first place where two configurations differ, with both values."""
    for key in sorted({*old, *new}):
        a, b, where = old.get(key), new.get(key), f"{path}{key}"
        if a == b:
            continue
        if where == "inputs" and isinstance(a, list) and isinstance(b, list):
            return _input_difference(a, b)
        if isinstance(a, dict) and isinstance(b, dict):
            return difference(a, b, f"{where}.")
        if isinstance(a, list) and isinstance(b, list):
            if len(a) == len(b):
                i = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
                if isinstance(a[i], dict) and isinstance(b[i], dict):
                    return difference(a[i], b[i], f"{a[i].get('stage', f'{where}[{i}]')}.")
                return f"{where}[{i}]: {a[i]} there, {b[i]} asked for"
            return _list_difference(where, a, b)
        return f"{where}: {_shown(key, a)} there, {_shown(key, b)} asked for"
    return "the same configuration"


def _shown(key: str, value: Any) -> str:
    """Return a value for people: a time in ns since 1970 as a date."""
    if key != "modified" or not str(value).isdecimal():
        return str(value)
    return f"{np.datetime64(int(value), 'ns')} UTC"


def _list_difference(where: str, old: list[Any], new: list[Any]) -> str:
    """Say which stages are in one of two lists alone, or how long they are."""
    names = [[e["stage"] for e in entries if isinstance(e, dict) and "stage" in e] for entries in (old, new)]
    there, asked = [Counter(n) for n in names]
    only = [f"{n} there, and not asked for" for n in there - asked]
    only += [f"{n} asked for, and not there" for n in asked - there]
    return f"{where}: {'; '.join(only) if only else f'{len(old)} there, {len(new)} asked for'}"


def _input_difference(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> str:
    """Say which input of a run is gone or has changed; new ones alone would make it grow."""
    now: dict[str, list[dict[str, Any]]] = {}
    for shard in new:
        now.setdefault(shard["url"], []).append(shard)
    for shard in old:
        alike = now.get(shard["url"], [])
        if shard not in alike:
            if not alike:
                return f"inputs: {len(old)} there, {len(new)} asked for; {shard['url']} is not among them any more"
            if {**shard, "sidecar": None} == {**alike[0], "sidecar": None}:
                was, is_ = shard.get("sidecar"), alike[0].get("sidecar")
                what = "has changed" if was and is_ else "was not there" if is_ else "is gone"
                return f"inputs: the table of metadata of {shard['url']} {what}"
            return f"inputs: {shard['url']} has changed: {difference(shard, alike[0])}"
    return f"inputs: {len(old)} there, {len(new)} asked for"
