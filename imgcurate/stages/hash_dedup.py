"""Exact and perceptual deduplication: hashes -> which samples are the same, and which one stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import dask.dataframe as dd
import pyarrow as pa
from distributed import Client

from imgcurate import schema
from imgcurate.catalog import Catalog
from imgcurate.dedup.hashes import HASH_COLUMNS, HashDedup
from imgcurate.dedup.keep import KeepOrder
from imgcurate.dedup.verdicts import CONTENT, PHASH, PIXELS, Ledger
from imgcurate.errors import ConfigError
from imgcurate.execution import Progress
from imgcurate.stages.base import DatasetStage, check_texts
from imgcurate.stages.dedup_frames import client_runner, dedup_frame

__all__ = ["ExactDedupStage", "PerceptualDedupStage", "exact_dedup", "perceptual_dedup"]

_ADDS: Final = (schema.DUPLICATE_OF, schema.DUPLICATE_BY, schema.SIMILARITY)
_MAX_DISTANCE: Final = 16


class _HashDedupStage(DatasetStage):
    """What exact and perceptual deduplication share."""

    keep_by: Sequence[str]

    adds: ClassVar[Mapping[str, str | pa.DataType]] = {name: schema.arrow_type(name) for name in _ADDS}

    def __post_init__(self) -> None:
        check_texts("keep_by", self.keep_by, "-width*height")
        _ = self._order

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The hash and the columns of ``keep_by``."""
        return (HASH_COLUMNS[self._kind], *self._order.columns)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The columns of ``keep_by``."""
        return self._order.columns

    @property
    def revises(self) -> tuple[str, ...]:
        """All that it adds: other dedup stages may stand before this one."""
        return _ADDS

    def process_dataset(self, ddf: dd.DataFrame) -> dd.DataFrame:
        """Process a frame; see :func:`exact_dedup` and :func:`perceptual_dedup`."""
        return self._process_frame(ddf, type(self).__name__, "auto", None)

    def process_catalog(
        self,
        before: Catalog,
        *,
        scratch_dir: str,
        client: Client,
        device: str,
        progress: Progress | None = None,
    ) -> Ledger:
        """Process a catalog, with checkpoints in `scratch_dir`; the way that :class:`Pipeline` takes."""
        del device
        ledger = Ledger(self._job(before, scratch_dir))
        run_tasks = client_runner(client, progress)
        ledger.job.run(run_tasks)
        ledger.run(run_tasks)
        return ledger

    @property
    def _kind(self) -> str:
        raise NotImplementedError(f"{type(self).__name__} does not say which hashes it compares")

    @property
    def _distance(self) -> int:
        return 0

    @property
    def _order(self) -> KeepOrder:
        return KeepOrder(keep_by=tuple(self.keep_by))

    def _job(self, catalog: Catalog, folder: str) -> HashDedup:
        return HashDedup(catalog, self._kind, self._distance, tuple(self.keep_by), folder)

    def _process_frame(self, ddf: dd.DataFrame, function: str, device: str, scratch_dir: str | None) -> dd.DataFrame:
        return dedup_frame(
            ddf, self._job, function=function, needs=self.needs, adds=_ADDS, device=device, scratch_dir=scratch_dir
        )


@dataclass(frozen=True)
class ExactDedupStage(_HashDedupStage):
    """Remove samples whose image is the same, byte for byte or pixel for pixel, as that of one that stays.

    Needs ``content_hash`` or ``pixel_hash`` of :class:`ImageQualityFilterStage`. Adds ``duplicate_of`` (the
    uid of a sample that is kept) and ``duplicate_by`` (``content`` or ``pixels``); the status of a sample
    that goes is ``duplicate``. Samples that have left already, and those without a hash, take no part.

    Attributes
    ----------
    by : {"content", "pixels"}
        Compare the encoded bytes, or the pixels once they are decoded, which finds the same picture in
        another lossless format and under other metadata. Captions do not count.
    keep_by : sequence of str
        Which one stays: the first by these columns, see :class:`imgcurate.dedup.keep.KeepOrder`; ties go
        to the lower uid.

    Raises
    ------
    ConfigError
        If a value is not understood.
    """

    by: str = CONTENT
    keep_by: Sequence[str] = schema.LARGEST_FIRST

    name: ClassVar[str] = "ExactDedupStage"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in (CONTENT, PIXELS):
            raise ConfigError(f"by={self.by!r} is none of {CONTENT}, {PIXELS}")

    @property
    def _kind(self) -> str:
        return self.by


@dataclass(frozen=True)
class PerceptualDedupStage(_HashDedupStage):
    """Remove samples whose perceptual hash differs in a few bits from that of one that stays.

    Needs ``phash`` of :class:`ImageQualityFilterStage`. Adds ``duplicate_of`` (the uid of a sample that is
    kept, at most ``max_distance`` bits away) and ``duplicate_by`` (``phash``); the status of a sample that
    goes is ``duplicate``. No two samples that stay are so near. Samples that have left already, and those
    without a hash (nearly flat pictures), take no part.

    Attributes
    ----------
    max_distance : int
        In how many of 64 bits duplicates may differ, 0 to 16. 4 takes recompressed and resized copies;
        beyond 8 different photos are merged.
    keep_by : sequence of str
        Which one stays, as in :class:`ExactDedupStage`.

    Raises
    ------
    ConfigError
        If a value is out of its range or not understood.

    Notes
    -----
    Every pair within the distance is found, by the pigeonhole principle (see
    :mod:`imgcurate.dedup.near_hashes`). Up to 6 bits the time is nearly that of sorting; towards 16 it is
    that of comparing all different hashes with all. Memory is that of a bucket of rows, and of the near
    pairs of different hashes.
    """

    max_distance: int = 4
    keep_by: Sequence[str] = schema.LARGEST_FIRST

    name: ClassVar[str] = "PerceptualDedupStage"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.max_distance, int) and not isinstance(self.max_distance, bool)
        if not whole or not 0 <= self.max_distance <= _MAX_DISTANCE:
            raise ConfigError(f"max_distance={self.max_distance!r} should be a whole number, 0 to {_MAX_DISTANCE} bits")

    @property
    def _kind(self) -> str:
        return PHASH

    @property
    def _distance(self) -> int:
        return self.max_distance


def exact_dedup(
    ddf: dd.DataFrame,
    *,
    by: str = CONTENT,
    keep_by: Sequence[str] = schema.LARGEST_FIRST,
    scratch_dir: str | None = None,
    device: str = "auto",
) -> dd.DataFrame:
    """Find samples of a frame whose images are the same.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        With ``content_hash`` or ``pixel_hash``, from :func:`score_quality`.
    by, keep_by
        As in :class:`ExactDedupStage`.
    scratch_dir, device
        As in :func:`semantic_dedup`.

    Returns
    -------
    dask.dataframe.DataFrame
        The same rows with ``duplicate_of``, ``duplicate_by`` and ``similarity``. Duplicates are still there,
        with the status ``duplicate``.

    Notes
    -----
    Computes the frame once, and stores it in `scratch_dir`.
    """
    return ExactDedupStage(by, keep_by)._process_frame(ddf, "exact_dedup", device, scratch_dir)


def perceptual_dedup(
    ddf: dd.DataFrame,
    *,
    max_distance: int = 4,
    keep_by: Sequence[str] = schema.LARGEST_FIRST,
    scratch_dir: str | None = None,
    device: str = "auto",
) -> dd.DataFrame:
    """Find samples of a frame that look alike by their perceptual hash.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        With ``phash``, from :func:`score_quality`.
    max_distance, keep_by
        As in :class:`PerceptualDedupStage`.
    scratch_dir, device
        As in :func:`semantic_dedup`.

    Returns
    -------
    dask.dataframe.DataFrame
        As from :func:`exact_dedup`.

    Notes
    -----
    Computes the frame once, and stores it in `scratch_dir`.
    """
    return PerceptualDedupStage(max_distance, keep_by)._process_frame(ddf, "perceptual_dedup", device, scratch_dir)
