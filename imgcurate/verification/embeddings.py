"""What can be checked of a finished deduplication of embeddings: its two files, and that its inputs are the same."""

from __future__ import annotations

from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.catalog import Manifest, read_parquet
from imgcurate.errors import ImgcurateError
from imgcurate.storage import StorageOptions, file_size, join_url, modified

__all__ = ["is_of_embeddings", "verify_embeddings"]

_EXAMPLES = 20


class Findings(Protocol):
    """What takes note of problems."""

    checked: dict[str, int]
    notes: list[str]

    def add(self, kind: str, place: str, message: str) -> None:
        """Note a problem."""


def is_of_embeddings(manifest: Manifest) -> bool:
    """Return whether a manifest is that of a deduplication of embeddings."""
    return "embedding_field" in manifest.config and "stages" not in manifest.config


def verify_embeddings(
    folder: str, manifest: Manifest, found: Findings, *, options: StorageOptions | None, quick: bool
) -> None:
    """Check that the ids are as many as counted, that duplicates name ids that stay, and that no input changed."""
    if not quick:
        _check_inputs(manifest.config["inputs"], options, found)
    try:
        kept = read_parquet(join_url(folder, "kept.parquet"))
        removed = read_parquet(join_url(folder, "removed.parquet"))
        own = removed
        if schema.DUPLICATE_IN in removed.column_names:
            own = removed.filter(removed[schema.DUPLICATE_IN].is_null())
        named = pc.is_in(own[schema.DUPLICATE_OF], kept["id"].combine_chunks())
    except (ImgcurateError, pa.ArrowException, KeyError) as exc:
        found.add("damaged", folder, " ".join(str(exc).split()))
        return
    counts = {schema.STATUS_OK: len(kept), schema.STATUS_DUPLICATE: len(removed)}
    if counts != manifest.counts or len(kept) + len(removed) != manifest.samples:
        found.add("catalog", folder, f"has {counts}, and manifest.json {manifest.counts}")
    if manifest.config["dedup"].get("only_reference") and len(own):
        found.add("reference", "removed.parquet", f"{len(own):,} rows go for none of a reference, which alone counts")
    if manifest.config["dedup"].get("mode") != "semdedup":
        lost = own.filter(pc.invert(named))
        for row in lost.slice(0, _EXAMPLES).to_pylist():
            message = f"id {row['id']!r} is a duplicate of {row[schema.DUPLICATE_OF]!r}, which does not stay"
            found.add("reference", "removed.parquet", message)
        if len(lost) > _EXAMPLES:
            found.add("reference", "removed.parquet", f"and so are {len(lost) - _EXAMPLES:,} more")
    found.checked |= {"samples": manifest.samples, "kept": len(kept), "duplicates": len(own)}
    found.notes.append("of a deduplication of embeddings, similarities are not computed again")


def _check_inputs(inputs: list[dict[str, Any]], options: StorageOptions | None, found: Findings) -> None:
    for before in inputs:
        url = before["url"]
        try:
            now = {"url": url, "nbytes": file_size(url, options), "modified": modified(url, options)}
        except (ImgcurateError, OSError) as exc:
            found.add("input", url, f"is gone: {exc}")
            continue
        if now != before:
            found.add("input", url, "changed since the run")
