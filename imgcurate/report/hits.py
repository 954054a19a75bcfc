"""What a search found, on one page."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate.errors import printable
from imgcurate.report.album import Album, content_policy, page_of
from imgcurate.report.sample import CatalogSample
from imgcurate.storage import StorageOptions, atomic_write, check_page

__all__ = ["write_hits"]


def write_hits(
    url: str,
    title: str,
    run: str,
    rows: pa.Table,
    similarity: npt.NDArray[np.float64],
    *,
    storage_options: StorageOptions | None = None,
) -> None:
    """Write a page with the pictures of some samples: one HTML file that needs no other, and no network.

    Parameters
    ----------
    url : str
        Where it goes.
    title, run : str
        What was looked for, and in which run.
    rows : pa.Table
        The samples' rows of its catalog, in the order in which they are shown.
    similarity : ndarray of float64 of shape (n,)
        What stands below each.
    storage_options : mapping, optional
        Passed to fsspec for the inputs of the run.

    Raises
    ------
    StorageError
        If the page cannot be written.
    """
    check_page(url)
    album = Album(CatalogSample(rows, np.zeros(len(rows), np.int64), len(rows)), storage_options=storage_options)
    album.add(range(len(rows)))
    album.develop()
    pictures = [album.one(i, f"{value:.3f}") for i, value in enumerate(similarity)]
    html = page_of(
        "hits.html.jinja", title=printable(title), run=printable(run), pictures=pictures, policy=content_policy([])
    )
    with atomic_write(url) as out:
        out.write(html.encode())
