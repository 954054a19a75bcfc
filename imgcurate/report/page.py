"""Everything a report tells, on one page."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from imgcurate import schema
from imgcurate.catalog import Catalog, Manifest
from imgcurate.errors import printable
from imgcurate.report import findings
from imgcurate.report.album import Album, content_policy, page_of, unsafe
from imgcurate.report.sample import CatalogSample, embeddings, load_sample
from imgcurate.report.thumbnails import thumbnails
from imgcurate.results import REPORT, Result
from imgcurate.storage import StorageOptions, atomic_write, check_page, is_local, join_url, local_path

__all__ = ["is_wanted", "make_report", "project"]

logger = logging.getLogger(__name__)
_SWITCH: Final = "IMGCURATE_REPORT"
_MAP_SIDE: Final = 80
_LEAST_ON_MAP: Final = 12
_COMPONENTS: Final = 50
_FLAT: Final = 1e-9
# Their colours on the map; others would make tabs without end.
_MAP_VALUES: Final = (
    schema.AESTHETIC_SCORE,
    schema.NSFW_SCORE,
    schema.CAPTION_SIMILARITY,
    schema.SHARPNESS,
    schema.BRIGHTNESS,
)


def is_wanted(asked: bool | None) -> bool:
    """Return whether a run makes a report: as it is asked for, else unless ``IMGCURATE_REPORT`` is ``0``."""
    return os.environ.get(_SWITCH, "1") != "0" if asked is None else asked


def make_report(
    run: str,
    output: str | None = None,
    *,
    show_nsfw: bool = False,
    groups: int = findings.GROUPS,
    storage_options: StorageOptions | None = None,
) -> str:
    """Write the report of a finished run: one HTML file that needs no other, and no network.

    Parameters
    ----------
    run : str
        Output folder of a finished run.
    output : str, optional
        Where the page goes; by default ``report.html`` in that folder.
    show_nsfw : bool
        Show pictures with an ``nsfw_score`` of 0.5 or more as they are; otherwise blurred. Without that
        score nothing is known, and nothing blurred.
    groups : int
        So many groups of duplicates are shown of the largest, and of those least alike.
    storage_options : mapping, optional
        Passed to fsspec for the inputs of the run, of which the pictures are made.

    Returns
    -------
    str
        The page's path or URL.

    Raises
    ------
    InputError
        If `run` is no finished run.
    StorageError
        If the page cannot be written.

    Notes
    -----
    Of a catalog of more than a million rows some parts are read, about a million rows, spread evenly, and the page
    says so; the funnel counts all. Pictures are at most some 1,800, of a few kB each, unless
    more `groups` are asked for.
    """
    manifest = Manifest.of_finished(run)
    url = output or join_url(run, REPORT)
    check_page(url)
    html = _render(run, manifest, groups, show_nsfw, storage_options)
    with atomic_write(url) as out:
        out.write(html.encode())
    return local_path(url) if is_local(url) else url


def _render(
    run: str, manifest: Manifest, most_groups: int, show_nsfw: bool, storage_options: StorageOptions | None
) -> str:
    from bokeh.embed import components

    catalog = Catalog(run, manifest.n_parts)
    sample = load_sample(catalog, manifest.samples)
    scores, leavers = findings.scores(manifest, sample), findings.leavers(manifest, sample)
    groups = findings.groups(sample, most_groups)
    result = Result(run, manifest.samples, manifest.counts, [], catalog)
    embedded = embeddings(catalog, sample)
    if result.dedup:
        groups += findings.most_alike(sample, *embedded)
    album = Album(sample, show_nsfw=show_nsfw, storage_options=storage_options)
    album.add(r for score in scores for examples in score.examples for r in examples.rows)
    album.add(r for examples in leavers for r in examples.rows)
    album.add(r for _, those in groups for group in those for r in group.rows)
    album.develop()
    charts = _charts(scores, result.dedup, manifest.timeline, sample)
    if (chart := _map(sample, *embedded, show_nsfw, storage_options)) is not None:
        charts["map"] = chart
    scripts = [_bokeh_js()]
    places: Mapping[str, Any] = {}
    if charts:
        script, places = components(charts, wrap_script=False)
        scripts.append(script)
    return page_of(
        "page.html.jinja", run=printable(run), manifest=manifest, result=result, sample=sample,
        stages=_stages(manifest),
        version=importlib.metadata.version("imgcurate"), printable=printable, blurred=not show_nsfw,
        has_nsfw=schema.NSFW_SCORE in sample.table.column_names, policy=content_policy(scripts),
        funnel=findings.funnel(manifest, sample), scores=scores, leavers=leavers, groups=groups,
        errors=findings.errors(sample), pictures=album.pictures, keeper=album.one,
        charts={name: Markup(div) for name, div in places.items()},  # noqa: S704 - Bokeh's own
        scripts=[Markup(s) for s in scripts],  # noqa: S704 - Bokeh's, and ours
    )  # fmt: skip


def _charts(
    scores: Sequence[findings.Score], dedup: Sequence[Mapping[str, Any]], timeline: Sequence[tuple[float, int]],
    sample: CatalogSample,
) -> dict[str, Any]:  # fmt: skip
    from imgcurate.report import charts

    made = {f"score {score.column}": charts.score_chart(score) for score in scores}
    for i, stage in enumerate(dedup):
        measured = len(stage.get("curve", [])) > 1
        # Which stage a duplicate left by is not in its row.
        points = stage["curve"] if measured else findings.curve(stage, sample) if len(dedup) == 1 else []
        if points:
            made[f"{'curve' if measured else 'estimate'} {i}"] = charts.curve_chart(points, stage["eps"])
    if len(timeline) > 1:
        made["timeline"] = charts.progress_chart(timeline)
    return made


def _map(
    sample: CatalogSample, rows: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32], show_nsfw: bool,
    storage_options: StorageOptions | None,
) -> Any:  # fmt: skip
    """Return the map of the embeddings of some rows; None if there are too few."""
    from imgcurate.report.charts import map_chart

    if len(rows) < _LEAST_ON_MAP:
        return None
    chosen = rows.tolist()
    hidden = frozenset() if show_nsfw else frozenset(rows[unsafe(sample)[rows]].tolist())
    uris = thumbnails(sample, chosen, _MAP_SIDE, blurred=hidden, storage_options=storage_options)
    columns = {
        "key": [printable(str(k)) for k in sample.values(schema.KEY, chosen)],
        "note": [printable(str(r or "")) for r in sample.values(schema.REASON, chosen)],
        "picture": [uris.get(row, _NO_PICTURE) for row in chosen],
    }
    labels = {"status": [str(s) for s in sample.values(schema.STATUS, chosen)]}
    if schema.CLUSTER in sample.table.column_names:
        labels["cluster"] = [_cluster(c) for c in sample.values(schema.CLUSTER, chosen)]
    values = {c: sample.numbers(c)[rows] for c in _MAP_VALUES if c in sample.table.column_names}
    return map_chart(project(vectors), columns, labels, values)


_NO_PICTURE: Final = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


def _cluster(number: int | None) -> str:
    return "none" if number is None else f"{number}"


def project(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return places in the plane, (m, 2), in which near embeddings are near: t-SNE of their principal components."""
    from sklearn.manifold import TSNE

    x = np.nan_to_num(np.asarray(vectors, np.float64))
    left, spread, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    x = (left * spread)[:, :_COMPONENTS]
    if spread[0] < _FLAT:
        return np.zeros((len(x), 2))
    perplexity = min(30.0, (len(x) - 1) / 3)
    start = x[:, :2] if x.shape[1] > 1 else np.column_stack([x, np.zeros(len(x))])
    start = start / max(float(start[:, 0].std()), 1e-12) * 1e-4
    places = TSNE(2, perplexity=perplexity, init=start, random_state=0, max_iter=500, n_jobs=1).fit_transform(x)
    return np.asarray(places, np.float64)


def _bokeh_js() -> str:
    from bokeh.resources import Resources

    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def _stages(manifest: Manifest) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the stages with their parameters, as text."""
    return [
        (str(entry["stage"]), [(k, printable(str(v))) for k, v in entry.items() if k != "stage" and v is not None])
        for entry in manifest.config["stages"]
    ]
