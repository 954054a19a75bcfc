"""Deduplication of what lies on disk gives what deduplication in memory gives."""

from __future__ import annotations

from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client
from test_dedup import check_result, groups

from imgcurate import schema, semantic_dedup
from imgcurate.backend import Backend, list_array
from imgcurate.catalog import Catalog, Manifest
from imgcurate.dedup import DedupConfig, dedup_arrays
from imgcurate.dedup.catalog import CatalogDedup
from imgcurate.errors import ConfigError, EncoderMismatchError, InputError
from imgcurate.pipeline import Pipeline
from imgcurate.stages import FilePartitioningStage, ImageEmbeddingStage, ImageReaderStage, SemanticDedupStage
from imgcurate.stages.dedup_frames import run_here

N = 600


def table(x: np.ndarray, uid: np.ndarray, left: np.ndarray | None = None) -> pa.Table:
    """Return catalog rows; those of `left` have left already, NaN rows have no embedding."""
    n = len(x)
    valid = np.isfinite(x).all(axis=1)
    status = np.where(np.zeros(n, bool) if left is None else left, "nsfw", "ok")
    return pa.table(
        {
            "uid": pa.array(uid),
            "shard": pa.array([f"somewhere/{u >> 32:05d}.tar" for u in uid], pa.string()),
            "key": pa.array([f"key{u & 0xFFFF}" for u in uid], pa.string()),
            "status": pa.array(status.astype(object), pa.string()),
            "reason": pa.array(np.where(status == "ok", "", "because").astype(object), pa.string()),
            "width": pa.array((uid * 7 % 50).astype(np.int32)),
            "embedding": list_array(x[valid].astype(np.float32), valid),
        }
    )


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    x = groups(60, 10, spread=0.06, seed=5)
    x[::50] = np.nan
    left = np.arange(N) % 40 == 7
    return table(x, np.arange(N) // 100 * 2**32 + np.arange(N) % 100, left)


def catalog_of(folder: Path, parts: list[pa.Table]) -> Catalog:
    catalog = Catalog(str(folder), len(parts))
    catalog.make_folders()
    for i, part in enumerate(parts):
        catalog.write_part(i, part)
    return catalog


def run(folder: Path, parts: list[pa.Table], config: DedupConfig, bucket_bytes: int) -> dict[int, tuple[int, int]]:
    job = CatalogDedup(
        catalog_of(folder / "run", parts), config, str(folder / "scratch"), "cpu", bucket_bytes=bucket_bytes
    )
    job.run(run_here)
    found = {}
    for i, part in enumerate(parts):
        decided = job.decided(i)
        assert len(decided.keeper) == len(part)
        for uid, cluster, keeper in zip(part["uid"].to_pylist(), decided.cluster, decided.keeper, strict=True):
            found[uid] = (int(cluster), int(keeper))
    return found


def in_memory(rows: pa.Table, config: DedupConfig) -> dict[int, tuple[int, int]]:
    """Return the same from dedup_arrays."""
    takes_part = np.array([s == "ok" for s in rows["status"].to_pylist()]) & rows["embedding"].is_valid().to_numpy()
    uid = rows["uid"].to_numpy()
    x = np.array(rows["embedding"].filter(pa.array(takes_part)).to_pylist())
    columns = {"width": rows["width"].to_numpy()[takes_part]}
    result = dedup_arrays(x, uid=uid[takes_part], columns=columns, config=config, device="cpu")
    check_result(x, result, config.eps, config.n_probe)
    inside = uid[takes_part]
    found = {int(u): (-1, -1) for u in uid}
    for u, cluster, of in zip(inside, result.cluster, result.duplicate_of, strict=True):
        found[int(u)] = (int(cluster), int(inside[of]) if of >= 0 else -1)
    return found


@pytest.mark.parametrize("bucket_bytes", [2**30, 6000])
@pytest.mark.parametrize("keep_by", [(), ("-width",)])
def test_disk_gives_what_memory_gives(tmp_path: Path, rows: pa.Table, bucket_bytes: int, keep_by: tuple) -> None:
    config = DedupConfig(eps=0.08, n_clusters=12, keep_by=keep_by)
    expected = in_memory(rows, config)
    assert sum(of >= 0 for _, of in expected.values()) > 100
    parts = [rows.slice(i, 150) for i in range(0, N, 150)]
    assert run(tmp_path, parts, config, bucket_bytes) == expected


@pytest.mark.parametrize(("every", "fraction"), [(100, 0.001), (2, None), (600, None)])
def test_most_rows_may_have_no_direction(tmp_path: Path, every: int, fraction: float | None) -> None:
    x = np.zeros((3000, 16), np.float32)
    x[::every] = groups(-(-3000 // every), 1, dim=16, spread=0.3, seed=2)
    x[every :: 4 * every] = x[0]
    rows = table(x, np.arange(3000))
    config = DedupConfig(eps=0.1, n_clusters=6, fit_data_fraction=fraction)
    found = run(tmp_path, [rows.slice(0, 1000), rows.slice(1000)], config, 3000)
    result = dedup_arrays(x, config=config, device="cpu")
    assert [found[i][1] for i in range(3000)] == result.duplicate_of.tolist()
    assert result.kept.sum() < 3000


@pytest.mark.parametrize("seed", [8, 9, 10])
def test_orphans_come_back_or_go_for_another(tmp_path: Path, seed: int) -> None:
    # Few dimensions make rows near to each other in chains across borders.
    x = groups(N, 1, dim=3, seed=seed)
    rows = table(x, np.arange(N))
    config = DedupConfig(eps=0.02, n_clusters=20, n_probe=3, fit_data_fraction=1.0)
    expected = in_memory(rows, config)
    job = CatalogDedup(catalog_of(tmp_path / "a", [rows]), config, str(tmp_path / "s"), "cpu", bucket_bytes=3000)
    job.run(run_here)
    decider = job._decider(config.eps)
    assert sum(len(decider._rows("orphans-0", b)) for b in range(job.exchange.n_buckets)) > 5
    keeper = job.decided(0).keeper
    assert {u: int(k) for u, k in enumerate(keeper)} == {u: k for u, (_, k) in expected.items()}


def test_partitions_and_their_order_do_not_matter(tmp_path: Path, rows: pa.Table) -> None:
    config = DedupConfig(eps=0.08, n_clusters=12, fit_data_fraction=0.4, which_to_keep="easy")
    shuffled = rows.take(pa.array(np.random.default_rng(0).permutation(N)))
    layouts = {
        "one": [rows],
        "many": [rows.slice(i, 37) for i in range(0, N, 37)],
        "with empty ones": [rows.slice(0, 0), rows.slice(0, 300), rows.slice(0, 0), rows.slice(300)],
        "shuffled": [shuffled.slice(0, 500), shuffled.slice(500)],
    }
    found = {name: run(tmp_path / name, parts, config, 20_000) for name, parts in layouts.items()}
    for name in layouts:
        assert found[name] == found["one"], name


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, rows: pa.Table) -> None:
    config = DedupConfig(eps=0.08, n_clusters=12)
    parts = [rows.slice(i, 150) for i in range(0, N, 150)]
    expected = run(tmp_path / "whole", parts, config, 6000)
    scratch = tmp_path / "stopped"

    class StoppedError(Exception):
        pass

    def stop_in(step: str, after: int):
        def run_tasks(name, function, numbers, **_):
            if name != step:
                return run_here(name, function, numbers)
            run_here(name, function, list(numbers)[:after])
            raise StoppedError

        return run_tasks

    catalog = catalog_of(tmp_path / "run", parts)
    job = CatalogDedup(catalog, config, str(scratch), "cpu", bucket_bytes=6000)
    for step in ("sample", "assign", "eps 0.08: within clusters", "eps 0.08: across clusters"):
        with pytest.raises(StoppedError):
            job.run(stop_in(step, 2))
    job.run(run_here)
    found = {
        uid: (int(c), int(k))
        for i, part in enumerate(parts)
        for uid, c, k in zip(part["uid"].to_pylist(), job.decided(i).cluster, job.decided(i).keeper, strict=True)
    }
    assert found == expected


@pytest.mark.parametrize("kind", ["no rows", "no embeddings", "all left"])
def test_nothing_to_do(tmp_path: Path, kind: str) -> None:
    x = np.full((5, 4), np.nan) if kind == "no embeddings" else groups(5, 1, dim=4)
    rows = table(x, np.arange(5), np.full(5, kind == "all left"))
    found = run(tmp_path, [rows.slice(0, 0 if kind == "no rows" else 5)], DedupConfig(), 2**30)
    assert set(found.values()) <= {(-1, -1)}


def frame_of(rows: pa.Table, npartitions: int) -> dd.DataFrame:
    frame: pd.DataFrame = Backend("cpu").frame_from_arrow(rows)
    return dd.from_pandas(frame, npartitions=npartitions, sort=False)


def test_semantic_dedup_on_a_frame(rows: pa.Table, client: Client, backend: Backend) -> None:
    ddf = semantic_dedup(frame_of(rows, 3), eps=0.08, n_clusters=4, device=backend.name)
    out = ddf.compute()
    out = out if isinstance(out, pd.DataFrame) else out.to_pandas()
    assert list(out.uid) == rows["uid"].to_pylist()
    before = rows.to_pandas()
    goes = out.status == "duplicate"
    assert goes.sum() > 100
    assert (out.status[~goes].to_numpy() == before.status[~goes.to_numpy()].to_numpy()).all()
    by_uid = out.set_index("uid")
    for row in out[goes].itertuples():
        kept = by_uid.loc[row.duplicate_of]
        assert kept.status == "ok"
        assert row.similarity >= 0.92
        assert np.dot(row.embedding, kept.embedding) == pytest.approx(row.similarity, abs=1e-5)
        assert row.reason == f"duplicate of {Path(kept.shard).stem}/{kept.key}, cosine {row.similarity:.3f}"
    takes_part = (before.status == "ok") & rows["embedding"].is_valid().to_numpy()
    assert (out.cluster.notna().to_numpy() == takes_part.to_numpy()).all()
    # What was masked away before is not seen.
    masked = semantic_dedup(ddf[ddf.status == "ok"].drop(columns=["cluster", "duplicate_of", "similarity"]), eps=0.08)
    assert len(masked) == (out.status == "ok").sum()


def test_semantic_dedup_refuses_what_it_cannot_do(rows: pa.Table) -> None:
    ddf = frame_of(rows, 1)
    with pytest.raises(ConfigError, match="semantic_dedup needs the column 'embedding', and the frame has uid"):
        semantic_dedup(ddf.drop(columns="embedding"))
    with pytest.raises(ConfigError, match="unexpected keyword argument 'epz'"):
        semantic_dedup(ddf, epz=0.1)
    with pytest.raises(ConfigError, match="keep_by: the column 'key' does not hold numbers"):
        semantic_dedup(ddf, keep_by=["key"])
    with pytest.raises(ConfigError, match="needs the column 'sharpness'"):
        semantic_dedup(ddf, keep_by=["-sharpness"])
    assert schema.EMBEDDING in ddf.columns


def test_embeddings_of_several_lengths_are_refused(tmp_path: Path) -> None:
    parts = [table(groups(5, 1, dim=d), np.arange(5) + 100 * d) for d in (4, 8)]
    with pytest.raises(ConfigError, match="embeddings of 4 and 8 values cannot be compared"):
        run(tmp_path, parts, DedupConfig(), 2**30)


def test_eps_list_counts_what_each_threshold_alone_removes(tmp_path: Path, rows: pa.Table) -> None:
    catalog = catalog_of(tmp_path / "run", [rows.slice(0, 300), rows.slice(300)])
    eps_list = (0.02, 0.05, 0.12)
    config = DedupConfig(eps=0.08, eps_list=eps_list, n_clusters=12, fit_data_fraction=1.0)
    removed = CatalogDedup(catalog, config, str(tmp_path / "s"), "cpu", bucket_bytes=6000).run(run_here)
    assert list(removed) == [0.02, 0.05, 0.08, 0.12]
    for eps, n in removed.items():
        alone = in_memory(rows, DedupConfig(eps=eps, n_clusters=12, fit_data_fraction=1.0))
        # The reach of visitors is that of the largest threshold, which finds no pair less.
        assert n >= sum(of >= 0 for _, of in alone.values()) - 1
    assert sorted(removed.values()) == list(removed.values())
    assert removed[0.08] == sum(of >= 0 for _, of in in_memory(rows, config).values())


def finished_run(folder: Path, parts: list[pa.Table]) -> str:
    catalog_of(folder, parts)
    Manifest("0" * 64, {}, len(parts), state="done").save(str(folder))
    return str(folder)


def test_what_a_reference_kept_stays_kept(tmp_path: Path, client: Client) -> None:
    x = np.concatenate([groups(30, 10, spread=0.05, seed=11), groups(20, 5, spread=0.05, seed=12)])
    old = table(x[:200], np.arange(200) + (7 << 32), left=np.arange(200) % 5 == 0)
    new = table(x[200:], np.arange(200) + (3 << 32))
    folder = finished_run(tmp_path / "old", [old.slice(0, 90), old.slice(90)])
    ddf = semantic_dedup(frame_of(new, 3), eps=0.1, n_clusters=2, reference=[folder])
    out = ddf.compute().set_index("uid")
    assert len(out) == 200
    old_x = np.array(old["embedding"].to_pylist())
    old_ok = np.array([s == "ok" for s in old["status"].to_pylist()])
    by_reference = out.duplicate_in.notna()
    goes = out.status == "duplicate"
    assert 20 < by_reference.sum() < goes.sum()
    for row in out[by_reference].itertuples():
        position = int(row.duplicate_of) - (7 << 32)
        assert old_ok[position]
        assert old_x[position] @ row.embedding == pytest.approx(row.similarity, abs=1e-5)
        assert row.duplicate_in == folder
        assert row.reason.startswith(f"duplicate of {folder}: 00007/key{position}, cosine 0.9")
    assert (out.loc[out[goes & ~by_reference].duplicate_of].status == "ok").all()
    kept = np.stack(out.embedding[~goes].to_numpy())
    assert (kept @ kept.T - np.eye(len(kept)) < 0.9 + 1e-5).all()
    # Both of two clusters are probed: nothing near is missed.
    assert not (kept @ old_x[old_ok].T >= 0.9 + 1e-5).any()


def test_only_reference_leaves_the_rest_alone(tmp_path: Path, client: Client) -> None:
    x = groups(40, 10, spread=0.05, seed=11)
    evaluation = table(x[:40], np.arange(40))
    training = table(x[40:], np.arange(360))
    folder = finished_run(tmp_path / "eval", [evaluation])
    out = semantic_dedup(
        frame_of(training, 2), eps=0.1, n_clusters=1, reference=[folder], only_reference=True
    ).compute()
    near = (x[40:] @ x[:40].T >= 0.9).any(axis=1)
    np.testing.assert_array_equal((out.status == "duplicate").to_numpy(), near)
    assert (out.duplicate_in.notna() == (out.status == "duplicate")).all()


def test_a_reference_must_be_a_finished_run_of_the_same_encoder(tmp_path: Path, rows: pa.Table) -> None:
    ddf = frame_of(rows, 1)
    with pytest.raises(ConfigError, match="is not the output folder of a finished run"):
        semantic_dedup(ddf, reference=[str(tmp_path / "none")])
    with pytest.raises(ConfigError, match="only_reference=True needs a reference"):
        semantic_dedup(ddf, only_reference=True)
    theirs = rows.append_column("encoder", pa.array(["ViT-L-14/openai"] * N))
    ours = rows.append_column("encoder", pa.array(["tiny-image"] * N))
    folder = finished_run(tmp_path / "other", [theirs])
    with pytest.raises(EncoderMismatchError, match="has embeddings of ViT-L-14/openai, and the data set of tiny-image"):
        semantic_dedup(frame_of(ours, 1), reference=[folder])


def test_a_reference_that_cannot_be_compared_is_refused_before_anything_is_embedded(
    tmp_path: Path, rows: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_run(tmp_path / "other", [rows.append_column("encoder", pa.array(["ViT-L-14/openai"] * N))])
    finished_run(tmp_path / "bare", [rows.drop_columns(["embedding"])])
    monkeypatch.chdir(tmp_path)

    def plan(reference: str) -> SemanticDedupStage:
        stage = SemanticDedupStage(reference=[reference])
        stages = [FilePartitioningStage("x.tar"), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image"), stage]
        Pipeline(stages).plan()
        return stage

    with pytest.raises(EncoderMismatchError, match="has embeddings of ViT-L-14/openai, and the data set of tiny-image"):
        plan("other")
    with pytest.raises(InputError, match=r"bare' has no embeddings to compare with"):
        plan("bare")
    finished_run(tmp_path / "mine", [rows.append_column("encoder", pa.array(["tiny-image"] * N))])
    # What a run records has the same meaning from any folder.
    assert plan("mine").reference == (str(tmp_path / "mine"),)


def test_a_scratch_folder_may_be_used_again(tmp_path: Path, rows: pa.Table, client: Client) -> None:
    scratch = str(tmp_path / "scratch")
    removed = [
        (semantic_dedup(frame_of(rows, 2), eps=eps, scratch_dir=scratch).compute().status == "duplicate").sum()
        for eps in (0.01, 0.1)
    ]
    assert removed[0] < removed[1]
    half = semantic_dedup(frame_of(rows.slice(0, 250), 3), eps=0.1, scratch_dir=scratch).compute()
    assert len(half) == 250
