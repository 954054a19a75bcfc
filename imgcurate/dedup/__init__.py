"""Deduplication: embeddings or hashes -> which samples show the same thing, and which of them stays.

In the order of the data path: :mod:`~imgcurate.dedup.config` (parameters), :mod:`~imgcurate.dedup.kmeans`
(clusters), :mod:`~imgcurate.dedup.keep` (who is preferred), :mod:`~imgcurate.dedup.similarity` (kernels on
arrays), :mod:`~imgcurate.dedup.passes` (within and across clusters), :mod:`~imgcurate.dedup.arrays` (data
in memory) and :mod:`~imgcurate.dedup.catalog` (data on disk, on a cluster).

By hashes, exact or near: :mod:`~imgcurate.dedup.near_hashes` (in memory) and :mod:`~imgcurate.dedup.hashes` (on a
cluster). What all ways have decided, one after the other: :mod:`~imgcurate.dedup.verdicts`.
"""

from imgcurate.dedup.arrays import DedupResult, dedup_arrays
from imgcurate.dedup.config import DedupConfig

__all__ = ["DedupConfig", "DedupResult", "dedup_arrays"]
