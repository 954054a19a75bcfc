"""Who is kept: an order of all samples that does not depend on partitions, workers or rounding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from imgcurate.errors import ConfigError

__all__ = ["KEEP_POLICIES", "KeepOrder", "hash_uids"]

KEEP_POLICIES: Final = ("hard", "easy", "random")


@dataclass(frozen=True, slots=True)
class KeepOrder:
    """An order in which the samples of a group are preferred.

    Attributes
    ----------
    which_to_keep : {"hard", "easy", "random"}
        Prefer low similarity to the sample's centroid, high similarity, or a hash of the identity.
    keep_by : tuple of str
        Numeric columns that are looked at first. Each entry is a column, or columns joined by ``*``;
        smaller values are preferred, with a leading ``-`` larger ones. ``("-width*height",
        "-aesthetic_score")`` keeps the image with the most pixels, among equals the prettiest.
        Missing values come last.
    random_state : int
        Seed for ``"random"``.

    Raises
    ------
    ConfigError
        If a value is not understood.
    """

    which_to_keep: str = "hard"
    keep_by: tuple[str, ...] = ()
    random_state: int = 42

    def __post_init__(self) -> None:
        if self.which_to_keep not in KEEP_POLICIES:
            raise ConfigError(f"which_to_keep={self.which_to_keep!r} is none of {', '.join(KEEP_POLICIES)}")
        for entry in self.keep_by:
            if not isinstance(entry, str) or not all(
                name.strip().isidentifier() for name in entry.removeprefix("-").split("*")
            ):
                raise ConfigError(
                    f"keep_by: {entry!r} is not understood: expected a column, or columns joined by '*', "
                    "after a '-' if larger values are preferred"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that must exist."""
        names = [n.strip() for entry in self.keep_by for n in entry.removeprefix("-").split("*")]
        return tuple(dict.fromkeys(names))

    @property
    def n_keys(self) -> int:
        """Number of columns of :meth:`keys`."""
        return len(self.keep_by) + 3

    def keys(
        self,
        identity: npt.NDArray[np.int64],
        centroid_similarity: npt.NDArray[np.float64],
        columns: Mapping[str, npt.NDArray[Any]],
    ) -> npt.NDArray[np.float64]:
        """Return the keys to sort by, first column first; smaller comes first.

        Parameters
        ----------
        identity : ndarray of int64 of shape (n,)
            What tells the samples apart: their uids, or hashes of their names.
        centroid_similarity : ndarray of float64 of shape (n,)
            Cosine similarity to the nearest centroid.
        columns : mapping of str to ndarray of shape (n,)
            The values of :attr:`columns`.

        Returns
        -------
        ndarray of float64 of shape (n, n_keys)
            Without NaN. Equal rows, whose identities are equal too, are told apart by uid.
        """
        keys = np.empty((len(identity), self.n_keys))
        for i, entry in enumerate(self.keep_by):
            value = np.ones(len(identity))
            for name in entry.removeprefix("-").split("*"):
                value = value * np.asarray(columns[name.strip()], dtype=np.float64)
            keys[:, i] = np.where(np.isnan(value), np.inf, -value if entry.startswith("-") else value)
        if self.which_to_keep == "random":
            keys[:, -3] = hash_uids(identity, self.random_state) / 2.0**64
        else:
            keys[:, -3] = centroid_similarity if self.which_to_keep == "hard" else -centroid_similarity
        # A float64 does not hold 64 bits.
        keys[:, -2], keys[:, -1] = np.divmod(identity, 2**32)
        return keys


def hash_uids(uid: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Return a uint64 hash of each uid, evenly spread (the finalizer of SplitMix64).

    References
    ----------
    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    x = uid.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (seed + 1) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
