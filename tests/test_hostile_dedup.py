"""Deduplication of what breakers thought of: published rule beside references, lost outputs, odd ids and numbers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

from imgcurate import dedup_embeddings, verify_run
from imgcurate.dedup import DedupConfig
from imgcurate.errors import ConfigError, InputError


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def write(path: Path, ids: object, x: np.ndarray, **columns: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ids, "embedding": list(x), **columns}), path)
    return str(path)


def pairs(n: int, seed: int, dim: int = 24) -> np.ndarray:
    """Return 2 n unit rows, each of the second half near one of the first."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim))
    return unit(np.concatenate([x, x + 0.02 * rng.standard_normal((n, dim))]))


@pytest.mark.parametrize("mode", ["representatives", "semdedup"])
def test_only_what_is_near_a_reference_goes_in_any_mode(mode: str, tmp_path: Path, client: Client) -> None:
    x, away = pairs(60, 0), pairs(20, 1)
    reference = write(tmp_path / "ref.parquet", range(50), np.concatenate([away, x[:10]]))
    own = write(tmp_path / "own.parquet", range(1000, 1120), x)
    result = dedup_embeddings(
        own, str(tmp_path / "OUT"), reference=[reference], only_reference=True, mode=mode, n_clusters=1, client=client
    )
    removed = pq.read_table(tmp_path / "OUT" / "removed.parquet").to_pydict()
    # The ten rows of the reference, and their near copies, though the rows of each set are near each other too.
    assert sorted(removed["id"]) == [*range(1000, 1010), *range(1060, 1070)]
    assert set(removed["duplicate_in"]) == {reference}
    assert result.summary["curve"][0] == {"eps": 0.05, "removed": 20, "kept": 100}
    assert verify_run(str(tmp_path / "OUT")).ok


def test_the_published_rule_beside_a_reference_whose_rows_are_near_each_other(tmp_path: Path, client: Client) -> None:
    x, old = pairs(60, 0), pairs(20, 2)
    reference = write(tmp_path / "ref.parquet", range(60), np.concatenate([old, x[:20]]))
    own = write(tmp_path / "own.parquet", range(1000, 1120), x)
    result = dedup_embeddings(
        own, str(tmp_path / "OUT"), reference=[reference], mode="semdedup", n_clusters=1, client=client
    )
    assert result.summary["curve"][0]["removed"] == result.removed
    kept = pq.read_table(tmp_path / "OUT" / "kept.parquet")["id"].to_numpy() - 1000
    # Of each pair that the reference knows both go, of the others one.
    assert not set(kept) & ({*range(20)} | {*range(60, 80)})
    assert len(kept) == 40
    assert {k % 60 for k in kept} == {*range(20, 60)}


@pytest.mark.parametrize("how", ["gone", "cut"])
@pytest.mark.parametrize("name", ["kept.parquet", "removed.parquet", "_SUCCESS", "dedup/dedup.json"])
def test_a_result_that_lost_a_file_is_made_whole(
    how: str, name: str, tmp_path: Path, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "OUT"
    arguments = (write(tmp_path / "a.parquet", range(80), pairs(40, 0)), str(out))
    first = dedup_embeddings(*arguments, client=client)
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert verify_run(str(out)).notes == ["of a deduplication of embeddings, similarities are not computed again"]
    if how == "gone":
        (out / name).unlink()
    else:
        (out / name).write_bytes((out / name).read_bytes()[:40])
    assert not verify_run(str(out)).ok
    with caplog.at_level(logging.WARNING, "imgcurate"):
        again = dedup_embeddings(*arguments, client=client)
    assert "are gone or cut" in caplog.text
    assert again == first
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert verify_run(str(out)).ok


def test_whole_numbers_that_no_float_holds_decide_who_stays(tmp_path: Path, client: Client) -> None:
    time = 1_795_856_240_000_000_000 + np.arange(80)[::-1] * 10**9
    x = pairs(40, 0)
    for name, type_ in (("signed", np.int64), ("unsigned", np.uint64)):
        file = write(tmp_path / f"{name}.parquet", range(80), x, t=time.astype(type_))
        dedup_embeddings(file, str(tmp_path / name), keep_by=["t"], client=client)
        # The later a row, the smaller its number.
        assert pq.read_table(tmp_path / name / "kept.parquet")["id"].to_pylist() == [*range(40, 80)]


def test_ids_may_be_views_of_text(tmp_path: Path, client: Client) -> None:
    names = [f"picture {i:03d}" for i in range(80)]
    file = write(tmp_path / "a.parquet", pa.array(names, pa.string_view()), pairs(40, 0))
    dedup_embeddings(file, str(tmp_path / "OUT"), client=client)
    kept, removed = (pq.read_table(tmp_path / "OUT" / f"{n}.parquet")["id"].to_pylist() for n in ("kept", "removed"))
    assert sorted([*kept, *removed]) == names
    assert len(kept) == 40


def test_a_file_without_rows_may_know_no_type(tmp_path: Path, client: Client) -> None:
    write(tmp_path / "in" / "a.parquet", [str(i) for i in range(80)], pairs(40, 0))
    none = pa.table({"id": pa.nulls(0), "embedding": pa.array([], pa.list_(pa.float32()))})
    pq.write_table(none, tmp_path / "in" / "b.parquet")
    assert dedup_embeddings(str(tmp_path / "in"), str(tmp_path / "OUT"), client=client).kept == 40


def test_what_cannot_be_read_is_told_in_words(tmp_path: Path) -> None:
    vectors = pa.array([[1.0]])
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2]), vectors], ["id", "id", "embedding"]),
                   tmp_path / "twice.parquet")  # fmt: skip
    with pytest.raises(InputError, match="has several columns 'id'"):
        dedup_embeddings(str(tmp_path / "twice.parquet"), str(tmp_path / "OUT"))
    run = tmp_path / "RUN"
    (run / "catalog").mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(InputError, match=r"embeddings are in .*/RUN/catalog"):
        dedup_embeddings(str(run), str(tmp_path / "OUT"))
    with pytest.raises(ConfigError, match="HTTP servers are read from"):
        dedup_embeddings(write(tmp_path / "a.parquet", [1], np.ones((1, 2))), "http://127.0.0.1:1/OUT")


@pytest.mark.parametrize("name", ["tol", "oversampling_factor"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_numbers_of_k_means_are_finite(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}=.*finite"):
        DedupConfig(**{name: value})
