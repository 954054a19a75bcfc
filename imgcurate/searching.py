"""Samples of a run by what they show: the embeddings that are nearest to a text or a picture.

All embeddings of the catalog are compared, part by part, so what is found is exact, and memory is a few parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import Backend, array_from_list_column, cpu_count
from imgcurate.catalog import Catalog, Manifest
from imgcurate.errors import ConfigError, InputError
from imgcurate.models.encoders import EncoderSpec, load_encoder
from imgcurate.models.texts import prompt_embeddings
from imgcurate.pillow import UndecodableError, decode_with_pillow
from imgcurate.report import write_hits
from imgcurate.resize import make_views
from imgcurate.stages.embedding import ImageEmbeddingStage
from imgcurate.stages.reading import ImageReaderStage
from imgcurate.storage import StorageOptions, read_bytes

__all__ = ["search"]

_CPU: Final = Backend("cpu")
_MOST_THREADS: Final = 8
_SHOWN_NOT: Final = frozenset({schema.OFFSET, schema.ENCODER})

Floats = npt.NDArray[np.float32]


def search(
    run: str,
    text: str | None = None,
    *,
    image: str | None = None,
    n: int = 20,
    dropped: bool = False,
    page: str | None = None,
    model_dir: str | None = None,
    storage_options: StorageOptions | None = None,
) -> pd.DataFrame:
    """Find the samples of a finished run that are nearest to a text, a picture, or the mean of both.

    Parameters
    ----------
    run : str
        Output folder of a finished run with embeddings; for a text of an open_clip model.
    text : str, optional
        What the samples should show: ``"a red dress"``.
    image : str, optional
        Path or URL of a picture that they should be like.
    n : int
        How many.
    dropped : bool
        Look among the samples that left too, as far as they decoded.
    page : str, optional
        Where to write a page with their pictures; the inputs of the run have to be there for it.
    model_dir : str, optional
        Folder with the weights of the run's model, if it is not the one that the run had.
    storage_options : mapping, optional
        Passed to fsspec for `image` and the inputs of the run.

    Returns
    -------
    pandas.DataFrame
        ``similarity``, the cosine in [-1, 1], best first, equal ones by ``uid``; and the columns of the catalog, but
        for lists and places in shards.

    Raises
    ------
    InputError
        If `run` is no finished run, or has no embeddings.
    ConfigError
        If neither text nor image is given, `n` is less than 1, or the run's model knows no texts.
    WeightsError
        If the model's weights are missing and cannot be downloaded.
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(f"n={n!r} should be a whole number >= 1")
    for name, value in (("text", text), ("image", image), ("page", page)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{name}={value!r} should be a string")
    text = text if text is not None and text.strip() else None
    if image is None and text is None:
        raise ConfigError("give a text that samples should show, or an image that they should be like")
    manifest = Manifest.of_finished(run)
    catalog = Catalog(run, manifest.n_parts)
    if schema.EMBEDDING not in catalog.schema.names:
        raise InputError(f"{run} has no embeddings, so nothing can be found in it: make a run with an encoder")
    spec = _model(run, manifest.config["stages"], model_dir or manifest.source.get("model_dir"))
    wanted = [prompt_embeddings([[text]], spec)[0][0]] if text is not None else []
    wanted += [_embedded(image, spec, storage_options)] if image is not None else []
    query: npt.NDArray[np.float64] = np.asarray(np.mean(wanted, axis=0, dtype=np.float64))
    query /= np.linalg.norm(query) or 1
    table, similarity = _nearest(catalog, query, n, dropped)
    if page is not None:
        about = " and ".join([*([f'"{text}"'] if text else []), *([f"the picture {image}"] if image else [])])
        write_hits(page, f"Nearest to {about}", run, table, similarity, storage_options=storage_options)
    shown = table.select([c for c in table.column_names if c not in _SHOWN_NOT and not _is_nested(table, c)])
    # That of the catalog is to what a sample duplicates.
    found: pd.DataFrame = _CPU.frame_from_arrow(shown).drop(columns=schema.SIMILARITY, errors="ignore")
    found.insert(0, schema.SIMILARITY, similarity)
    return found


def _is_nested(table: pa.Table, column: str) -> bool:
    return bool(pa.types.is_nested(table.schema.field(column).type))


def _model(run: str, stages: list[Mapping[str, Any]], model_dir: str | None) -> EncoderSpec:
    """Return which model embedded the images of a run."""
    config = next((s for s in stages if s["stage"] == ImageEmbeddingStage.__name__), None)
    if config is None:
        raise ConfigError(
            f"a stage of one's own embedded the images of {run}: what it makes of a text or picture is not known"
        )
    spec = EncoderSpec(config["model"], config["pretrained"], model_dir, precision="fp32")
    recorded = config.get("encoder")
    if recorded is not None and (now := spec.identity()) != recorded:
        raise InputError(f"the images of {run} were embedded by {recorded}, and {config['pretrained']} is {now} now")
    return spec


def _embedded(image: str, spec: EncoderSpec, storage_options: StorageOptions | None) -> Floats:
    """Return the embedding of a picture, (d,)."""
    encoder = load_encoder(spec, _CPU)
    try:
        pixels = decode_with_pillow(read_bytes(image, storage_options), max_pixels=ImageReaderStage().max_pixels)
    except UndecodableError as exc:
        raise InputError(f"{image}: {exc}") from exc
    (view,) = make_views([pixels], [encoder.view])
    return np.asarray(encoder(view, at_most=1)[0], dtype=np.float32)


def _nearest(
    catalog: Catalog, query: npt.NDArray[np.float64], n: int, dropped: bool
) -> tuple[pa.Table, npt.NDArray[np.float64]]:
    """Return the rows of a catalog that are nearest to a vector, and their cosine similarities."""
    names = [c for c in catalog.schema.names if c != schema.EMBEDDING]

    def best_of(number: int) -> tuple[pa.Table, npt.NDArray[np.float64]]:
        columns = [schema.STATUS, schema.EMBEDDING]
        rows = catalog.read(number, columns)
        takes = pc.is_valid(rows[schema.EMBEDDING])
        if not dropped:
            takes = pc.and_(takes, pc.equal(rows[schema.STATUS], schema.STATUS_OK))
        places = np.flatnonzero(takes.to_numpy(zero_copy_only=False))
        if not len(places):
            return catalog.read(number, names).slice(0, 0), np.empty(0)
        x = array_from_list_column(rows[schema.EMBEDDING].take(pa.array(places)))
        products = np.asarray(x, np.float32) @ query.astype(np.float32)
        # Those of one part alone may be needed; a margin for what float32 rounds.
        lowest = np.partition(products, -n)[-n] if len(products) > n else -np.inf
        near = np.flatnonzero(products >= lowest - 1e-5)
        exact = _cosines(np.asarray(x[near], np.float64), query)
        order = np.argsort(-exact, kind="stable")[:n]
        taken = catalog.read(number, names).take(pa.array(places[near[order]]))
        return taken, exact[order]

    with ThreadPoolExecutor(min(_MOST_THREADS, cpu_count())) as pool:
        found = list(pool.map(best_of, range(catalog.n_parts)))
    table = pa.concat_tables([rows for rows, _ in found])
    similarity = np.concatenate([values for _, values in found])
    order = np.lexsort((table[schema.UID].to_numpy(), -similarity))[:n]
    return table.take(pa.array(order)), similarity[order]


def _cosines(x: npt.NDArray[np.float64], query: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the cosine of each row and a unit vector; 0 for a row of zeros."""
    lengths = np.linalg.norm(x, axis=1)
    cosines: npt.NDArray[np.float64] = np.clip((x * query).sum(axis=1) / np.where(lengths > 0, lengths, 1), -1, 1)
    return cosines
