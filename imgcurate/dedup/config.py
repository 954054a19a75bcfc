"""The parameters of semantic deduplication, checked."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np

from imgcurate.dedup.keep import KeepOrder
from imgcurate.errors import ConfigError

__all__ = ["DEDUP_MODES", "DedupConfig"]

DEDUP_MODES: Final = ("representatives", "semdedup")
_ROWS_PER_CLUSTER: Final = 2000
_FIT_ROWS_PER_CLUSTER: Final = 64
_MIN_FIT_ROWS: Final = 20_000


@dataclass(frozen=True)
class DedupConfig:
    """How duplicates are found and which sample of a group stays.

    Attributes
    ----------
    eps : float
        Two samples are duplicates where their cosine similarity is >= 1 - eps; in [0, 1].
    n_clusters : int or "auto"
        Number of k-means clusters. ``"auto"`` takes n / 2000, but at most the square root of n: up to
        3000 samples one cluster, that is, an exact search.
    n_probe : int
        In how many clusters, nearest first, a sample is looked for; 1 does not look across borders.
    max_probe : int
        Up to so many, if `n_probe` is 2 or more, where something near it is likely to lie behind their
        borders; see :func:`imgcurate.dedup.kmeans.find_probes`. Those of ``n_probe`` are always among them.
    which_to_keep : {"hard", "easy", "random"}
        Keep the member of a group that is farthest from its centroid, nearest to it, or any.
    keep_by : sequence of str
        Columns that decide before `which_to_keep` does; see :class:`KeepOrder`. Ties go to the lower uid.
    mode : {"representatives", "semdedup"}
        ``"representatives"``: a sample goes only for one that stays. ``"semdedup"``: it goes if it is near
        *any* preferred sample of its cluster, also one that goes itself, with a similarity > 1 - eps:
        the published rule, which does not look across borders.
    eps_list : sequence of float
        Further thresholds for which to count what would stay.
    only_reference : bool
        Compare with the reference sets alone, not the samples with each other.
    fit_data_fraction : float, optional
        Share of the samples that k-means is fitted on, in (0, 1]; by default 64 per cluster, and at
        least 20,000.
    max_iter, tol, init, n_init, oversampling_factor
        As in cuML's and scikit-learn's ``KMeans``.
    random_state : int
        Seed of the sample, of k-means and of ``"random"``.

    Raises
    ------
    ConfigError
        If a value is out of its range.
    """

    eps: float = 0.05
    n_clusters: int | Literal["auto"] = "auto"
    n_probe: int = 2
    max_probe: int = 8
    which_to_keep: str = "hard"
    keep_by: Sequence[str] = ()
    mode: str = "representatives"
    eps_list: Sequence[float] = ()
    only_reference: bool = False
    fit_data_fraction: float | None = None
    max_iter: int = 25
    tol: float = 1e-4
    init: str = "k-means++"
    n_init: int = 1
    random_state: int = 42
    oversampling_factor: float = 2.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # The parameters are kept as JSON, which knows no numbers of NumPy.
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
            elif isinstance(value, (list, tuple)):
                plain = type(value)(v.item() if isinstance(v, np.generic) else v for v in value)
                object.__setattr__(self, name, plain)
        if isinstance(self.eps_list, (str, float, int)) or isinstance(self.keep_by, str):
            raise ConfigError(f"eps_list={self.eps_list!r} and keep_by={self.keep_by!r} should be sequences")
        for eps in (self.eps, *self.eps_list):
            if not _is_number(eps) or not 0 <= eps <= 1:
                raise ConfigError(
                    f"eps={eps!r} should be a number in [0, 1]: duplicates have a cosine similarity >= 1 - eps"
                )
        if self.mode not in DEDUP_MODES:
            raise ConfigError(f"mode={self.mode!r} is none of {', '.join(DEDUP_MODES)}")
        if self.n_clusters != "auto" and (not _is_whole(self.n_clusters) or self.n_clusters < 1):
            raise ConfigError(f"n_clusters={self.n_clusters!r} should be 'auto' or a whole number >= 1")
        for name in ("n_probe", "max_probe", "max_iter", "n_init"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise ConfigError(f"{name}={value!r} should be a whole number >= 1")
        fraction = self.fit_data_fraction
        if fraction is not None and (not _is_number(fraction) or not 0 < fraction <= 1):
            raise ConfigError(f"fit_data_fraction={fraction!r} should be in (0, 1]")
        if self.init not in ("k-means++", "random"):
            raise ConfigError(f"init={self.init!r} is none of k-means++, random")
        if not _is_number(self.tol) or not 0 <= self.tol < math.inf:
            raise ConfigError(f"tol={self.tol!r} should be a finite number >= 0")
        if not _is_number(self.oversampling_factor) or not 0 < self.oversampling_factor < math.inf:
            raise ConfigError(f"oversampling_factor={self.oversampling_factor!r} should be a finite number > 0")
        if not _is_whole(self.random_state) or not 0 <= self.random_state < 2**32:
            raise ConfigError(f"random_state={self.random_state!r} should be a whole number in [0, 2^32)")
        _ = self.keep_order

    @property
    def largest_eps(self) -> float:
        """The largest of all thresholds."""
        return max(self.eps, *self.eps_list, 0.0)

    @property
    def probes(self) -> int:
        """In how many clusters a sample is looked for, at most."""
        return 1 if self.mode == "semdedup" or self.n_probe == 1 else max(self.n_probe, self.max_probe)

    def with_eps(self, eps: float) -> DedupConfig:
        """Return the same parameters with another threshold."""
        return replace(self, eps=eps, eps_list=())

    @property
    def threshold(self) -> float:
        """The lowest cosine similarity of duplicates."""
        return 1.0 - self.eps

    @property
    def keep_order(self) -> KeepOrder:
        """The order in which members of a group are preferred."""
        return KeepOrder(self.which_to_keep, tuple(self.keep_by), self.random_state)

    def clusters_for(self, n_rows: int) -> int:
        """Return the number of clusters for `n_rows` embeddings; never more than there are rows."""
        if self.n_clusters != "auto":
            return max(1, min(int(self.n_clusters), n_rows))
        return max(1, round(min(n_rows / _ROWS_PER_CLUSTER, math.sqrt(n_rows))))

    def fit_rows(self, n_rows: int) -> int:
        """Return the number of rows that k-means is fitted on."""
        n_clusters = self.clusters_for(n_rows)
        if self.fit_data_fraction is not None:
            return min(n_rows, max(n_clusters, math.ceil(n_rows * self.fit_data_fraction)))
        return min(n_rows, max(_FIT_ROWS_PER_CLUSTER * n_clusters, _MIN_FIT_ROWS))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
