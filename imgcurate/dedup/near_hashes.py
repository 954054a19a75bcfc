"""Hashes -> equal ones and near ones, in memory.

Near pairs are found by the pigeonhole principle: the 64 bits are cut into m bands, and of two hashes
that differ in at most d bits at least m - d bands are equal. So for each choice of m - d bands the
hashes are sorted by these, and only those that agree in them are compared: nothing is missed, and the
more bands, the fewer are compared in vain and the more often each is sorted.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate.dedup.records import Records

__all__ = ["HASH_BITS", "Hashes", "band_masks", "best_of_each", "near_pairs_of", "positions_in"]

HASH_BITS: Final = 64
_MAX_CHOICES: Final = 200
_ROW_COST: Final = 200
"""How many comparisons cost as much as sorting and storing a row once."""


@dataclass(frozen=True)
class Hashes(Records):
    """Rows with a hash.

    Attributes
    ----------
    uid : ndarray of int64 of shape (n,)
        Identity.
    keys : ndarray of float64 of shape (n, k)
        Preference, smaller first, column by column; then the uid.
    words : ndarray of uint64 of shape (n, w)
        The hash, 64 bits a column.
    name : ndarray of object of shape (n,)
        How the row is named in words.
    """

    uid: npt.NDArray[np.int64]
    keys: npt.NDArray[np.float64]
    words: npt.NDArray[np.uint64]
    name: npt.NDArray[Any]


def best_of_each(rows: Hashes) -> Hashes:
    """Return the preferred row of each hash, by hash."""
    order = np.lexsort((rows.uid, *rows.keys.T[::-1], *rows.words.T[::-1]))
    words = rows.words[order]
    first = np.ones(len(words), dtype=bool)
    first[1:] = (words[1:] != words[:-1]).any(axis=1)
    return rows.take(order[first])


def positions_in(words: npt.NDArray[np.uint64], table: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return where hashes stand in a table.

    Parameters
    ----------
    words : ndarray of uint64 of shape (n, w)
        Hashes, each of which is in the table.
    table : ndarray of uint64 of shape (m, w)
        Hashes, each once.
    """
    both = np.concatenate([table, words])
    # The sort is stable, so that in each run of equal hashes the one of the table comes first.
    order = np.lexsort(both.T[::-1])
    is_table = order < len(table)
    run = np.cumsum(is_table) - 1
    out = np.empty(len(words), dtype=np.int64)
    out[order[~is_table] - len(table)] = order[is_table][run[~is_table]]
    return out


def band_masks(n_rows: int, max_distance: int, *, split: bool = False) -> tuple[int, ...]:
    """Return masks of bits, one of which two hashes agree in if they differ in at most `max_distance`.

    Parameters
    ----------
    n_rows : int
        How many hashes will be compared, which decides the number of bands and nothing else.
    max_distance : int
        0 to 16 bits.
    split : bool
        Whether the rows should be split by the masked bits, so that comparing all with all is no choice.
    """
    choices = range(max_distance + (1 if split else 0), HASH_BITS // 2)
    bands = min(choices, key=lambda m: _cost(n_rows, m, m - max_distance))
    return _masks(max(1, bands), bands - max_distance)


def _cost(n_rows: int, bands: int, agree: int) -> float:
    """Estimate the work; real hashes are less even than random ones: three quarters of the bits count."""
    sorts = math.comb(bands, agree)
    if sorts > _MAX_CHOICES:
        return math.inf
    bits = HASH_BITS // max(1, bands) * agree
    return sorts * (n_rows + n_rows**2 / 2 ** (0.75 * bits) / _ROW_COST)


@functools.cache
def _masks(bands: int, agree: int) -> tuple[int, ...]:
    # Neighbouring bits tell much the same, so each band takes every m-th bit.
    parts = [sum(1 << bit for bit in range(band, HASH_BITS, bands)) for band in range(bands)]
    return tuple(sum(chosen) for chosen in itertools.combinations(parts, agree))


def near_pairs_of(
    hashes: npt.NDArray[np.uint64], masks: tuple[int, ...], number: int, max_distance: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the near pairs that one mask finds, and that no mask before it does.

    Parameters
    ----------
    hashes : ndarray of uint64 of shape (n,)
        Each once.
    masks : tuple of int
        From :func:`band_masks`.
    number : int
        Which of them.
    max_distance : int
        Bits.

    Returns
    -------
    i, j : ndarray of int64 of shape (n_pairs,)
        Positions, in no particular order; each pair once.
    distance : ndarray of int64 of shape (n_pairs,)
        Bits in which they differ.
    """
    key = hashes & np.uint64(masks[number])
    order = np.argsort(key, kind="stable")
    key, sorted_ = key[order], hashes[order]
    found: list[tuple[npt.NDArray[Any], ...]] = [(np.empty(0, np.int64),) * 3]
    left = np.arange(len(key))
    for shift in itertools.count(1):
        # Each row against the one `shift` places on, while that has the same bits.
        left = left[left + shift < len(key)]
        left = left[key[left] == key[left + shift]]
        if not len(left):
            break
        differ = sorted_[left] ^ sorted_[left + shift]
        distance = np.bitwise_count(differ)
        near = distance <= max_distance
        for before in masks[:number]:
            near[near] = (differ[near] & np.uint64(before)) != 0
        if near.any():
            at = left[near]
            found.append((order[at], order[at + shift], distance[near].astype(np.int64)))
    i, j, distances = (np.concatenate(column) for column in zip(*found, strict=True))
    return i, j, distances
