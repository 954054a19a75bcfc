"""The report of a run: what it tells, that it is one harmless file, and how it looks in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from browser import visit
from distributed import Client
from markupsafe import Markup
from PIL import Image
from typer.testing import CliRunner

from imgcurate import ImageBatch, Pipeline, PixelView, ProcessingStage, Rule, make_report, refilter
from imgcurate.catalog import Catalog, Manifest
from imgcurate.cli import app
from imgcurate.errors import InputError
from imgcurate.report import findings, page, sample
from imgcurate.results import Result
from imgcurate.stages import (
    ExactDedupStage,
    FilePartitioningStage,
    ImageEmbeddingStage,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    SemanticDedupStage,
)
from imgcurate.timeline import Timeline

HOSTILE = "<img src=x onerror=alert(1)>\"'</script>@picture"


class Unsafe(ProcessingStage):
    """Scores bright pictures as not safe for work, and drops none."""

    name = "nsfw"
    needs = ("image",)
    adds = {"nsfw_score": "float32"}
    views = (PixelView(8, 8),)
    rules = (Rule("nsfw_score", "<=", 1.0, "nsfw"),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch["nsfw_score"] = (batch.pixels(self.views[0]).float().mean(dim=(1, 2, 3)) > 128).float()
        return batch


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, client: Client, photos: list[Image.Image],
    encode: Callable[..., bytes], write_tar: Callable[..., Path],
) -> Result:  # fmt: skip
    """Return a run over photos, copies, broken files, and a sample whose key is hostile."""
    folder = tmp_path_factory.mktemp("report")
    samples = [(f"photo/{i:03d}", {"jpg": encode(p)}) for i, p in enumerate(photos)]
    samples += [(f"copy/{i:03d}", {"jpg": encode(photos[i], quality=40)}) for i in range(12)]
    brightest = max(photos, key=lambda p: float(np.asarray(p).mean()))
    samples += [(f"same/{i:03d}", {"jpg": encode(brightest)}) for i in range(12)]
    samples += [(f"broken/{i}", {"jpg": encode(photos[i])[: 200 + i]}) for i in range(3)]
    samples += [(HOSTILE, {"jpg": encode(photos[20].rotate(90, expand=True))})]
    for k in range(3):
        write_tar(folder / "in" / f"{k}.tar", samples[k::3])
    stages = [
        FilePartitioningStage(str(folder / "in")), ImageReaderStage(),
        ImageQualityFilterStage({"brightness": (60, None)}), Unsafe(), ImageEmbeddingStage(model="tiny-image"),
        ExactDedupStage(), SemanticDedupStage(eps=0.05, eps_list=[0.01, 0.1]), ImageWriterStage(100),
    ]  # fmt: skip
    return Pipeline(stages).run(str(folder / "OUT"), client=client, report=True)


def of(run: Result) -> tuple[Manifest, sample.CatalogSample]:
    manifest = Manifest.load(run.output_dir)
    assert manifest is not None
    return manifest, sample.load_sample(Catalog(run.output_dir, manifest.n_parts), manifest.samples)


class Tags(HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1] += data


def test_more_groups_are_shown_if_they_are_asked_for(run: Result, tmp_path: Path) -> None:
    _, rows = of(run)
    (title, largest), *_ = findings.groups(rows, 1)
    assert (title, len(largest)) == ("The largest groups", 1)
    all_of_them = findings.groups(rows, 1000)[0][1]
    assert len(all_of_them) == len({g.keeper for g in all_of_them}) > 1
    assert sum(g.size for g in all_of_them) == run.counts["duplicate"]
    few, many = (make_report(run.output_dir, str(tmp_path / f"{n}.html"), groups=n) for n in (1, 1000))
    assert Path(many).stat().st_size > Path(few).stat().st_size


def test_funnel_accounts_for_every_sample(run: Result) -> None:
    manifest, rows = of(run)
    steps = findings.funnel(manifest, rows)
    assert [s.label for s in steps] == [
        "cannot be decoded", "quality: not brightness >= 60", "duplicates, exact", "duplicates, semantic",
    ]  # fmt: skip
    left = manifest.samples
    for step in steps:
        left -= step.dropped
        assert step.left == left
    assert left == run.kept
    assert steps[0].dropped == 3
    found = rows.table.filter(pa.compute.equal(rows.table["status"], "duplicate"))["phase"].to_pylist()
    assert [steps[2].dropped, steps[3].dropped] == [found.count(1), found.count(2)]
    assert all(count > 0 for count in (found.count(1), found.count(2)))


def test_funnel_of_a_part_of_the_catalog_counts_all_samples(run: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_MAX_ROWS", 40)
    manifest, rows = of(run)
    assert 0 < len(rows) < manifest.samples
    steps = findings.funnel(manifest, rows)
    assert steps[-1] == findings.Step("duplicates", run.counts["duplicate"], run.kept)


def test_scores_count_every_decoded_sample_once(run: Result) -> None:
    manifest, rows = of(run)
    scores = {s.column: s for s in findings.scores(manifest, rows)}
    assert next(iter(scores)) in ("brightness", "nsfw_score")
    decoded = manifest.samples - 3
    for score in scores.values():
        assert sum(score.kept) + sum(score.left) + sum(score.elsewhere) + score.missing == decoded
        assert bool(score.rules) or not any(score.left)
        assert sum(score.kept) == run.kept
    bright = scores["brightness"]
    catalog = run.catalog[["brightness", "status"]].compute()
    assert [r.threshold for r in bright.rules] == [60]
    below = next(e for e in bright.examples if e.label == "just below 60")
    assert sum(bright.left) == run.counts["quality"]
    expected = catalog[catalog.brightness < 60].brightness.sort_values().tail(6)
    assert rows.numbers("brightness")[below.rows].tolist() == pytest.approx(expected.tolist())
    lowest = bright.examples[0]
    assert rows.numbers("brightness")[lowest.rows[0]] == catalog.brightness.min()


def test_examples_beside_a_threshold_come_first_where_there_are_few_samples(run: Result) -> None:
    x = np.array([57.9, 65.1, 70.7, 74.7, 101.0, 106.0, 114.0])
    examples = list(findings._along(x, np.arange(7), [80]))
    assert [(e.label, e.rows) for e in examples] == [("just below 80", [0, 1, 2, 3]), ("from 80 on", [4, 5, 6])]
    many = list(findings._along(np.arange(40.0), np.arange(40), [20]))
    assert [e.label for e in many] == ["lowest", "just below 20", "from 20 on", "highest"]
    assert [e.rows[0] for e in many] == [0, 14, 20, 34]


def test_most_alike_pairs_stayed_and_are_those_of_brute_force(run: Result) -> None:
    manifest, rows = of(run)
    found, vectors = sample.embeddings(Catalog(run.output_dir, manifest.n_parts), rows)
    ((title, pairs),) = findings.most_alike(rows, found, vectors)
    assert "larger eps" in title
    shown = [r for pair in pairs for r in pair.rows]
    assert len(shown) == len(set(shown))
    assert set(rows.values("status", shown)) == {"ok"}
    kept = np.flatnonzero(rows.kept[found])
    x = vectors[kept] / np.linalg.norm(vectors[kept], axis=1, keepdims=True)
    best = (x @ x.T)[np.triu_indices(len(x), 1)].max()
    assert pairs[0].members.notes == [f"{best:.3f}"]
    assert best < 1 - 0.05


def test_groups_show_who_stayed_and_the_least_alike_first(run: Result) -> None:
    _, rows = of(run)
    (_, largest), (_, closest) = findings.groups(rows)
    assert largest[0].size == 12
    for group in largest + closest:
        assert group.keeper is not None
        assert rows.values("status", [group.keeper]) == ["ok"]
        assert rows.values("duplicate_of", group.members.rows) == rows.values("uid", [group.keeper]) * len(
            group.members.rows
        )
        similarity = rows.numbers("similarity")[group.members.rows]
        known = similarity[np.isfinite(similarity)]
        assert (np.diff(known) >= 0).all()
    assert rows.numbers("similarity")[closest[0].members.rows[0]] == np.nanmin(rows.numbers("similarity"))


def test_a_sample_of_another_run_is_another_one_than_ours_of_the_same_uid() -> None:
    table = pa.table({
        "uid": [1, 2, 3, 4], "shard": ["a"] * 4, "key": ["k1", "k2", "k3", "k4"], "status": ["ok"] + ["duplicate"] * 3,
        "duplicate_of": pa.array([None, 1, 1, 1], pa.int64()), "duplicate_in": [None, None, "/OLD", "/OLD"],
        "duplicate_by": [None] + ["embedding"] * 3, "similarity": [None, 0.99, 0.98, 0.97],
    })  # fmt: skip
    rows = sample.CatalogSample(table, np.zeros(4, np.int64), 4)
    ((_, largest),) = findings.groups(rows)
    shown = [(g.keeper, g.keeper_name, g.members.rows, g.size) for g in largest]
    assert shown == [(None, "sample 1 of /OLD", [3, 2], 2), (0, "k1", [1], 1)]


def test_curve_of_one_eps_is_estimated_from_the_pairs_found(run: Result) -> None:
    measured = run.dedup[0]["curve"]
    _, rows = of(run)
    one = {**run.dedup[0], "curve": [p for p in measured if p["eps"] == 0.05]}
    estimate = findings.curve(one, rows)
    assert [p["eps"] for p in estimate][:: len(estimate) - 1] == [0, 0.05]
    assert all(p["kept"] + p["removed"] == one["samples"] for p in estimate)
    kept = [p["kept"] for p in estimate]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == one["curve"][0]["kept"]
    (exact,) = [p["kept"] for p in measured if p["eps"] == 0.01]
    assert kept[4] >= exact >= np.interp(0.01, [p["eps"] for p in estimate], kept) - 2


def test_curve_of_one_eps_is_on_the_page_and_says_what_it_is(tmp_path: Path, client: Client, shards: Path) -> None:
    stages = [
        FilePartitioningStage(str(shards)), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image"),
        SemanticDedupStage(eps=0.05), ImageWriterStage(100),
    ]  # fmt: skip
    Pipeline(stages).run(str(tmp_path / "OUT"), client=client, report=True)
    html = (tmp_path / "OUT" / "report.html").read_text()
    assert "How many stay, for which eps" in html
    assert "estimated from the pairs found" in html


def test_errors_are_counted_by_their_reason(run: Result) -> None:
    _, rows = of(run)
    kinds = findings.errors(rows)
    assert sum(k.count for k in kinds) == 3
    assert {k.status for k in kinds} == {"decode_error"}
    assert all(key.startswith("broken/") for kind in kinds for key in kind.keys)


def test_page_is_one_file_whose_policy_lets_its_own_scripts_run(run: Result) -> None:
    text = (Path(run.output_dir) / "report.html").read_text()
    found = Tags(text)
    policy = next(a["content"] for t, a in found.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in found.scripts]
    assert len(digests) == 2
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert all((a["src"] or "").startswith("data:image/") for t, a in found.tags if t == "img")
    assert not [t for t, a in found.tags if t in ("link", "iframe", "object") or (t == "script" and "src" in a)]
    assert not [a for t, a in found.tags if any(name.startswith("on") for name in a)]
    assert len(text) < 15_000_000


def test_hostile_key_is_text(run: Result) -> None:
    text = (Path(run.output_dir) / "report.html").read_text()
    assert HOSTILE not in text
    assert str(Markup.escape(HOSTILE.rpartition("/")[2])) in text


def test_pictures_that_are_not_safe_are_blurred_unless_asked(run: Result, tmp_path: Path) -> None:
    text = (Path(run.output_dir) / "report.html").read_text()
    plain = Path(make_report(run.output_dir, str(tmp_path / "plain.html"), show_nsfw=True)).read_text()
    unsafe = run.catalog[["nsfw_score"]].compute().nsfw_score.eq(1).sum()
    assert unsafe > 0
    assert len(re.findall(r'class="photo \w+ blurred"', text)) > 0
    assert not re.findall(r'class="photo \w+ blurred"', plain)
    assert 'id="unblur"' in text
    assert 'id="unblur"' not in plain


def test_report_works_in_a_browser(run: Result) -> None:
    path = Path(run.output_dir) / "report.html"
    loaded = "[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length"
    fits = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    drawn = "Bokeh.index.roots.length"
    paper = "getComputedStyle(document.body).backgroundColor"
    for width, dark in ((1280, False), (390, True)):
        seen = visit(path, loaded, fits, drawn, paper, "document.title", width=width, dark=dark)
        missing, over, roots, colour, title = seen.values
        assert (missing, over) == (0, 0)
        assert roots >= 10
        assert colour == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
        assert title.startswith("imgcurate: ")
        assert seen.complaints == []
        assert seen.requests == [path.as_uri()]


def test_report_waits_until_the_run_is_done(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the output folder of a finished run"):
        make_report(str(tmp_path))


def test_report_of_a_run_without_decoding_has_no_scores(tmp_path: Path, client: Client, shards: Path) -> None:
    stages = [FilePartitioningStage(str(shards)), ImageReaderStage(), ImageWriterStage(100)]
    result = Pipeline(stages).run(str(tmp_path / "OUT"), client=client, report=True)
    text = (tmp_path / "OUT" / "report.html").read_text()
    assert f"{result.kept} of {result.samples} samples kept" in text
    assert 'id="map"' not in text


def test_report_of_nothing(tmp_path: Path, client: Client, write_tar: Callable[..., Path]) -> None:
    write_tar(tmp_path / "0.tar", [])
    stages = [FilePartitioningStage(str(tmp_path / "0.tar")), ImageReaderStage(),
              ImageEmbeddingStage(model="tiny-image"), SemanticDedupStage(), ImageWriterStage(100)]  # fmt: skip
    Pipeline(stages).run(str(tmp_path / "OUT"), client=client, report=True)
    assert "0 of 0 samples kept" in (tmp_path / "OUT" / "report.html").read_text()


def test_report_without_its_inputs_has_no_pictures(
    tmp_path: Path, client: Client, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for shard in shards.iterdir():
        (tmp_path / "in" / shard.name).write_bytes(shard.read_bytes())
    stages = [FilePartitioningStage(str(tmp_path / "in")), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image"),
              SemanticDedupStage(), ImageWriterStage(100)]  # fmt: skip
    Pipeline(stages).run(str(tmp_path / "OUT"), client=client)
    assert not (tmp_path / "OUT" / "report.html").exists()
    first, *others = sorted((tmp_path / "in").iterdir())
    first.unlink()
    some = Path(make_report(str(tmp_path / "OUT"))).read_text()
    assert some.count("data:image/webp") > 100
    assert "of 1 shards" in caplog.text
    for shard in others:
        shard.unlink()
    text = Path(make_report(str(tmp_path / "OUT"))).read_text()
    assert "no picture" in text
    assert "data:image/webp" not in text
    assert "of 4 shards" in caplog.text


def test_refilter_makes_its_own_report_and_a_changed_run_none_that_is_stale(
    run: Result, tmp_path: Path, client: Client
) -> None:
    changes: dict[str, Any] = {"ImageQualityFilterStage": {"ranges": {"brightness": [100, None]}}}
    again = refilter(run.output_dir, str(tmp_path / "OUT"), changes, client=client, report=True)
    assert f"{again.kept} of {again.samples} samples kept" in (tmp_path / "OUT" / "report.html").read_text()
    changes["ImageQualityFilterStage"]["ranges"]["brightness"][0] = 90
    refilter(run.output_dir, str(tmp_path / "OUT"), changes, client=client, overwrite=True)
    assert not (tmp_path / "OUT" / "report.html").exists()


def test_command_writes_the_page_where_it_is_asked_to(run: Result, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", run.output_dir, "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1_000_000


def test_is_wanted_follows_what_is_asked_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMGCURATE_REPORT", raising=False)
    assert page.is_wanted(None)
    monkeypatch.setenv("IMGCURATE_REPORT", "0")
    assert not page.is_wanted(None)
    assert page.is_wanted(True)


def test_project_is_the_same_each_time_and_takes_equal_rows() -> None:
    x = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    first = page.project(x)
    assert first.shape == (40, 2)
    assert np.array_equal(first, page.project(x))
    assert page.project(np.ones((20, 4), np.float32)).shape == (20, 2)


@pytest.mark.parametrize(("n", "wanted"), [(0, 5), (3, 5), (100, 7), (10**6, 1000)])
def test_spread_is_even_and_distinct(n: int, wanted: int) -> None:
    chosen = sample.spread(n, wanted)
    assert len(chosen) == min(n, wanted)
    assert len(np.unique(chosen)) == len(chosen)
    if n > wanted:
        assert (chosen[0], chosen[-1]) == (0, n - 1)
        assert np.ptp(np.diff(chosen)) <= 1


def test_timeline_keeps_the_last_count_of_each_span() -> None:
    calls: list[int] = []
    timeline = Timeline(lambda phase, done, total, result: calls.append(done))
    assert timeline.points() == []
    for done in range(1, 1001):
        timeline("read", done, 1000, {"counts": {"ok": 2, "nsfw": 1}})
    points = timeline.points()
    assert calls == list(range(1, 1001))
    assert 0 < len(points) <= 120
    assert points[-1][1] == 3000
    assert points == sorted(points)


def test_catalog_sample_reads_numbers_and_masks() -> None:
    table = pa.table({"uid": [1, 2, 3], "shard": ["a"] * 3, "status": ["ok", "nsfw", "ok"], "width": [1, None, 3]})
    rows = sample.CatalogSample(table, np.zeros(3, np.int64), 3)
    assert rows.kept.tolist() == [True, False, True]
    assert rows.numbers("width")[[0, 2]].tolist() == [1, 3]
    assert np.isnan(rows.numbers("width")[1])
    assert np.isnan(rows.numbers("nothing")).all()
    assert rows.values("nothing", [0, 1]) == [None, None]


@pytest.mark.parametrize(
    ("similarity", "shown"),
    [
        (0.5, "0.500"),
        (-0.1234, "-0.123"),
        (0.9994, "0.999"),
        (0.99997, "0.99997"),
        (0.9999994, "0.999999"),
        (1.0, "1.000000"),
    ],
)
def test_similarities_have_the_digits_that_tell_them_from_1(similarity: float, shown: str) -> None:
    from imgcurate.report.findings import _shown

    assert _shown(similarity) == shown
