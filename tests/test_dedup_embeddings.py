"""Deduplication of embeddings in files of any source, against brute force."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from typer.testing import CliRunner

import imgcurate.dedup.vector_files as vector_files
from imgcurate import dedup_embeddings
from imgcurate.cli import app
from imgcurate.dedup.vector_files import find_vectors
from imgcurate.errors import ConfigError, ImgcurateError, InputError

EPS = 0.05


def planted(n: int, copies: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Return n unnormalised float32 vectors; the last `copies` of them are near others."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, dim)).astype(np.float32)
    x[n - copies :] = x[rng.integers(0, n - copies, copies)] + 0.04 * rng.standard_normal((copies, dim))
    return x * rng.uniform(0.1, 10, (n, 1)).astype(np.float32)


def write(path: Path, ids: Any, x: Any, row_group_size: int = 1000, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = x if isinstance(x, pa.Array) else pa.array(list(x))
    pq.write_table(pa.table({"id": ids, "embedding": vectors, **columns}), path, row_group_size=row_group_size)
    return str(path)


def outcome(out: Path) -> tuple[list, pd.DataFrame]:
    """Read both files as their readers do, and check that all of these agree."""
    kept, removed = pq.read_table(out / "kept.parquet"), pq.read_table(out / "removed.parquet")
    assert list(pd.read_parquet(out / "kept.parquet").id) == kept["id"].to_pylist()
    assert len(dd.read_parquet(out / "removed.parquet")) == len(removed)
    return kept["id"].to_pylist(), removed.to_pandas()


def check(x: np.ndarray, kept: list, removed: pd.DataFrame, eps: float = EPS) -> None:
    """Check the promises by brute force; ids are positions in x."""
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    assert sorted([*kept, *removed.id]) == list(range(len(x)))
    assert set(removed.duplicate_of) <= set(kept)
    cosine = (unit[removed.id] * unit[removed.duplicate_of]).sum(axis=1)
    np.testing.assert_allclose(cosine, removed.similarity, atol=1e-6)
    assert (removed.similarity >= 1 - eps).all()
    between = unit[kept] @ unit[kept].T - np.eye(len(kept))
    assert between.max(initial=-1) < 1 - eps + 1e-6


def test_dedup_embeddings_keeps_its_promises(tmp_path: Path, client: Client) -> None:
    x = planted(900, 300)
    result = dedup_embeddings(write(tmp_path / "a.parquet", range(900), x, 100), str(tmp_path / "out"), client=client)
    kept, removed = outcome(tmp_path / "out")
    check(x, kept, removed)
    assert len(removed) == 300
    assert result.accounting() == "900 rows in = 600 kept + 300 duplicate"
    assert result.summary["curve"] == [{"eps": EPS, "removed": 300, "kept": 600}]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "_SUCCESS", "dedup", "kept.parquet", "manifest.json", "removed.parquet",
    ]  # fmt: skip


def test_files_row_groups_and_workers_do_not_matter(tmp_path: Path, client: Client, monkeypatch: Any) -> None:
    x = planted(900, 300)
    whole = write(tmp_path / "whole.parquet", range(900), x, 900)
    several = [
        write(tmp_path / "several" / f"{i}.parquet", range(300 * i, 300 * i + 300), x[300 * i : 300 * i + 300], 70)
        for i in range(3)
    ]
    runs = {"whole": whole, "files": several, "reversed": several[::-1], "folder": str(tmp_path / "several"),
            "glob": f"{tmp_path}/several/*.parquet"}  # fmt: skip
    for name, inputs in runs.items():
        dedup_embeddings(inputs, str(tmp_path / name / "out"), client=client, n_clusters=7)
    monkeypatch.setattr(vector_files, "_PART_ROWS", 40)
    assert find_vectors(whole).n_parts == 23
    dedup_embeddings(whole, str(tmp_path / "ranges" / "out"), n_workers=2, device="cpu", n_clusters=7)
    expected = outcome(tmp_path / "whole" / "out")
    assert len(expected[1]) == 300
    for name in (*runs, "ranges"):
        kept, removed = outcome(tmp_path / name / "out")
        assert kept == expected[0], name
        pd.testing.assert_frame_equal(removed, expected[1])


@pytest.mark.parametrize("which_to_keep", ["hard", "random"])
@pytest.mark.parametrize("kind", ["number", "text", "snowflake"])
def test_the_order_of_rows_does_not_matter(tmp_path: Path, client: Client, kind: str, which_to_keep: str) -> None:
    x = planted(900, 300)
    x[1::9] = x[0]
    # Snowflakes that follow each other are one float64.
    numbers = np.arange(900) + (17 * 10**17 if kind == "snowflake" else 0)
    ids = np.array([f"photo-{i:04d}" for i in numbers]) if kind == "text" else numbers
    found = []
    for turn in range(3):
        order = np.random.default_rng(turn).permutation(900) if turn else np.arange(900)
        for i, rows in enumerate(np.split(order, [200, 650] if turn < 2 else [])):
            write(tmp_path / f"in{turn}" / f"{i}.parquet", pa.array(ids[rows]), x[rows])
        out = tmp_path / f"out{turn}"
        dedup_embeddings(
            str(tmp_path / f"in{turn}"), str(out), client=client, n_clusters=7, which_to_keep=which_to_keep,
            fit_data_fraction=0.3,
        )  # fmt: skip
        removed = pq.read_table(out / "removed.parquet").to_pandas().sort_values("id", ignore_index=True)
        found.append((sorted(pq.read_table(out / "kept.parquet")["id"].to_pylist()), removed))
    assert 200 < len(found[0][1]) < 500
    for kept, removed in found[1:]:
        assert kept == found[0][0]
        pd.testing.assert_frame_equal(removed, found[0][1])


@pytest.mark.parametrize(
    "kind", ["float16", "float32", "float64", "fixed", "large", "npy16", "tensor"]
)  # fmt: skip
def test_embeddings_of_any_type_are_read(tmp_path: Path, client: Client, kind: str) -> None:
    x = planted(60, 20).astype({"float16": "f2", "float64": "f8", "npy16": "f2"}.get(kind, "f4"))
    lists = pa.array(list(x))
    if kind == "npy16":
        np.save(tmp_path / "a.npy", x)
        source = str(tmp_path / "a.npy")
    else:
        flat = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 16)
        tensor = (
            pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [16]), flat) if kind == "tensor" else 0
        )
        column = {"fixed": flat, "large": lists.cast(pa.large_list(lists.type.value_type)), "tensor": tensor}
        source = write(tmp_path / "a.parquet", range(60), column.get(kind, lists))
    dedup_embeddings(source, str(tmp_path / "out"), client=client)
    kept, removed = outcome(tmp_path / "out")
    check(x, kept, removed)
    assert len(removed) == 20


@pytest.mark.parametrize(
    ("ids", "type_"),
    [
        ([-5, 0, 2**40], pa.int64()), ([1, 2, 200], pa.uint8()), ([0, 2**64 - 1, 7], pa.uint64()),
        (["a/b\n", "", "\x1bé"], pa.string()), (["x", "y", "x"], pa.large_string()),
        ([uuid.UUID(int=i).bytes for i in (1, 2**100, 0)], pa.binary(16)), ([b"", b"\xff\x00", b"z"], pa.binary()),
        (["p", "q", "p"], pa.dictionary(pa.int32(), pa.string())),
    ],
)  # fmt: skip
def test_ids_come_back_as_they_are(tmp_path: Path, client: Client, ids: list, type_: pa.DataType) -> None:
    column = pa.array(ids, type_)
    source = write(tmp_path / "a.parquet", column, np.ones((3, 4), np.float32))
    dedup_embeddings(source, str(tmp_path / "out"), client=client)
    removed = pq.read_table(tmp_path / "out" / "removed.parquet")
    # All are equal: one stays, of numbers the smallest.
    [stays] = pq.read_table(tmp_path / "out" / "kept.parquet")["id"].to_pylist()
    if type_ in (pa.int64(), pa.uint8()):
        assert stays == min(ids)
    assert [stays, *removed["id"].to_pylist()] in [[ids[i], *ids[:i], *ids[i + 1 :]] for i in range(3)]
    assert removed["duplicate_of"].to_pylist() == [stays] * 2
    assert removed["id"].type == removed["duplicate_of"].type == getattr(type_, "value_type", type_)


def test_rows_without_a_direction_stay(tmp_path: Path, client: Client) -> None:
    none = [None, [0.0, 0.0], [1.0, float("nan")], [float("inf"), 1.0], [1.0, None]]
    rows = [*none, [3.0, 4.0], [0.3, 0.4], [3e200, 4e200], [3e-200, 4e-200]]
    source = write(tmp_path / "a.parquet", range(9), pa.array(rows, pa.list_(pa.float64())))
    dedup_embeddings(source, str(tmp_path / "out"), client=client)
    kept, removed = outcome(tmp_path / "out")
    assert kept == [0, 1, 2, 3, 4, 5]
    assert list(removed.duplicate_of) == [5, 5, 5]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_few_rows(tmp_path: Path, client: Client, n: int) -> None:
    vectors = pa.array(list(np.eye(3, dtype=np.float32)[:n]), pa.list_(pa.float32()))
    source = write(tmp_path / "a.parquet", pa.array(range(n), pa.int32()), vectors)
    result = dedup_embeddings(source, str(tmp_path / "out"), client=client, n_clusters=50)
    kept, removed = outcome(tmp_path / "out")
    assert (kept, len(removed), result.rows) == (list(range(n)), 0, n)


def test_100_000_copies_of_one_vector_take_no_quadratic_time(tmp_path: Path, client: Client) -> None:
    x = np.tile(np.arange(1, 5, dtype=np.float32), (100_000, 1))
    x[::2] *= 3
    np.save(tmp_path / "a.npy", x)
    result = dedup_embeddings(str(tmp_path / "a.npy"), str(tmp_path / "out"), client=client)
    assert (result.kept, result.removed) == (1, 99_999)
    assert outcome(tmp_path / "out")[0] == [0]


def test_what_cannot_be_read_is_named(tmp_path: Path, client: Client) -> None:
    def fails(words: str, source: str, **kwargs: Any) -> None:
        with pytest.raises(InputError, match=words):
            dedup_embeddings(source, str(tmp_path / "out"), client=client, **kwargs)

    x = list(np.eye(4, dtype=np.float32))
    good = write(tmp_path / "good.parquet", ["a", "b", "c", "d"], x)
    fails(r"good.parquet has no column 'ids' of ids \(id_field, --id-field\); did you mean 'id'", good, id_field="ids")
    fails("good.parquet: id holds string: expected lists of numbers", good, embedding_field="id")
    fails("good.parquet has no column 'width'", good, keep_by=["-width"])
    fails("short.parquet: row 2 has an embedding of 3 values, and the first one has 4",
          write(tmp_path / "short.parquet", range(4), [x[0], x[1], x[2][:3], x[3]]))  # fmt: skip
    (tmp_path / "null").mkdir()
    fails("null.parquet: row 3 has no id", write(tmp_path / "null.parquet", ["a", "b", "c", None], x, 2))
    fails("id holds double: ids should be", write(tmp_path / "float.parquet", [0.5, 1, 2, 3], x))
    number = write(tmp_path / "number.parquet", range(4), x)
    fails("id holds strings in .*good.parquet and integers in .*number.parquet", [good, number])
    (tmp_path / "x.npz").write_bytes(b"PK")
    fails("x.npz is neither Parquet nor npy", str(tmp_path / "x.npz"))
    (tmp_path / "text.parquet").write_text("no Parquet")
    fails("cannot read .*text.parquet as Parquet", str(tmp_path / "text.parquet"))
    fails("null holds no Parquet and no npy files", str(tmp_path / "null"))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    fails("object.npy holds object", str(tmp_path / "object.npy"))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    fails("cut.npy is no npy file", str(tmp_path / "cut.npy"))
    fails("nothing.parquet", str(tmp_path / "nothing.parquet"))


def clip_retrieval(folder: Path, x: np.ndarray, sizes: list[int]) -> str:
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    start = 0
    for i, n in enumerate(sizes):
        np.save(folder / "img_emb" / f"img_emb_{i}.npy", x[start : start + n].astype(np.float16))
        paths = [f"{j:05d}.jpg" for j in range(start, start + n)]
        table = pa.table({"image_path": paths, "caption": ["c"] * n, "width": np.arange(start, start + n)})
        pq.write_table(table, folder / "metadata" / f"metadata_{i}.parquet")
        start += n
    return str(folder)


def test_clip_retrieval_folders_are_read_as_they_are(tmp_path: Path, client: Client) -> None:
    x = planted(240, 80)
    # Twelve files, for the tenth is named before the second.
    folder = clip_retrieval(tmp_path / "clip", x, [20] * 12)
    # Its column of ids is known.
    dedup_embeddings(folder, str(tmp_path / "out"), client=client, keep_by=["-width"])
    kept, removed = outcome(tmp_path / "out")
    position = {name: int(name[:5]) for name in [*kept, *removed.id]}
    removed = removed.assign(id=removed.id.map(position), duplicate_of=removed.duplicate_of.map(position))
    check(x.astype(np.float16), [position[k] for k in kept], removed)
    assert (removed.id < removed.duplicate_of).all()
    assert len(removed) == 80
    pq.write_table(pa.table({"image_path": ["a"]}), tmp_path / "clip" / "metadata" / "metadata_3.parquet")
    with pytest.raises(InputError, match=r"img_emb_3.npy has 20 rows and .*metadata_3.parquet 1: they must be equal"):
        dedup_embeddings(folder, str(tmp_path / "out2"), id_field="image_path", client=client)
    (tmp_path / "clip" / "metadata" / "metadata_3.parquet").unlink()
    with pytest.raises(InputError, match=r"img_emb_3.npy has no metadata/metadata_3.parquet"):
        dedup_embeddings(folder, str(tmp_path / "out2"), id_field="image_path", client=client)


@pytest.mark.parametrize("only", [False, True])
def test_what_a_reference_holds_stays(tmp_path: Path, client: Client, only: bool) -> None:
    x = planted(600, 200)
    old = write(tmp_path / "old.parquet", range(100), x[:100])
    new = write(tmp_path / "new.parquet", range(100, 600), x[100:])
    dedup_embeddings(new, str(tmp_path / "out"), reference=[old], only_reference=only, client=client)
    kept, removed = outcome(tmp_path / "out")
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    near_old = (unit[100:] @ unit[:100].T >= 1 - EPS).any(axis=1)
    by_old = removed[removed.duplicate_in.notna()]
    assert set(by_old.duplicate_in) == {old}
    assert (by_old.duplicate_of < 100).all()
    assert 20 < near_old.sum() < 190
    if only:
        assert sorted(by_old.id) == sorted(removed.id) == list(np.flatnonzero(near_old) + 100)
        return
    assert set(removed.duplicate_of[removed.duplicate_in.isna()]) <= set(kept)
    check(x, [*range(100), *kept], removed.drop(columns="duplicate_in"))


def test_a_folder_holds_one_run(tmp_path: Path, client: Client) -> None:
    source = write(tmp_path / "a.parquet", range(30), planted(30, 10))
    out = tmp_path / "out"
    first = dedup_embeddings(source, str(out), client=client)
    before = (out / "kept.parquet").stat().st_mtime_ns
    assert dedup_embeddings(source, str(out), client=client) == first
    assert (out / "kept.parquet").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"holds another run \(dedup.eps: 0.05 there, 0.2 asked for\)"):
        dedup_embeddings(source, str(out), eps=0.2, client=client)
    dedup_embeddings(source, str(out), eps=0.0, overwrite=True, client=client)
    assert len(outcome(out)[0]) == 30
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        dedup_embeddings(source, str(tmp_path / "foreign"), overwrite=True, client=client)


def test_the_output_may_lie_among_the_inputs(tmp_path: Path, client: Client) -> None:
    write(tmp_path / "a.parquet", range(30), planted(30, 10))
    first = dedup_embeddings(str(tmp_path), str(tmp_path / "out"), client=client, keep_by=["-uid"])
    removed = outcome(tmp_path / "out")[1]
    assert (removed.id < removed.duplicate_of).all()
    assert dedup_embeddings(str(tmp_path), str(tmp_path / "out"), client=client, keep_by=["-uid"]) == first
    with pytest.raises(InputError, match="the inputs lie in the output folder"):
        dedup_embeddings(str(tmp_path / "out" / "*.parquet"), str(tmp_path / "out"), client=client)


def test_a_stopped_run_goes_on(tmp_path: Path, client: Client) -> None:
    x = planted(300, 100)
    source = write(tmp_path / "a.parquet", range(300), x)

    class StoppedError(Exception):
        pass

    def stop(phase: str, *_: Any) -> None:
        if "within" in phase:
            raise StoppedError

    with pytest.raises(StoppedError):
        dedup_embeddings(source, str(tmp_path / "out"), client=client, progress=stop)
    centroids = tmp_path / "out" / "checkpoint" / "dedup-scratch" / "centroids.arrow"
    before = centroids.stat().st_mtime_ns

    def look(phase: str, *_: Any) -> None:
        assert centroids.stat().st_mtime_ns == before

    dedup_embeddings(source, str(tmp_path / "out"), client=client, progress=look)
    check(x, *outcome(tmp_path / "out"))


def test_a_file_of_pandas_without_rows_has_none(tmp_path: Path, client: Client) -> None:
    frame = pd.DataFrame({"id": range(3), "embedding": list(planted(3, 0))})
    frame.head(0).to_parquet(tmp_path / "none.parquet")
    result = dedup_embeddings(str(tmp_path / "none.parquet"), str(tmp_path / "out"), client=client)
    assert (result.rows, result.kept, result.removed) == (0, 0, 0)
    frame.to_parquet(tmp_path / "some.parquet")
    both = dedup_embeddings(str(tmp_path / "*.parquet"), str(tmp_path / "both"), client=client)
    assert both.kept == 3


@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_a_file_that_is_another_when_it_is_read_is_refused(tmp_path: Path, client: Client, kind: str) -> None:
    x, source = planted(300, 100), tmp_path / f"a.{kind}"

    def make(values: np.ndarray) -> None:
        np.save(source, values) if kind == "npy" else write(source, range(300), values)

    make(x)
    before = source.stat()

    def exchange(phase: str, *_: Any) -> None:
        if "cluster" in phase and "within" not in phase:
            make(planted(300, 100, seed=9))

    with pytest.raises(ImgcurateError, match=rf"a.{kind} changed while the run was going on"):
        dedup_embeddings(str(source), str(tmp_path / "out"), client=client, progress=exchange)
    make(x)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    dedup_embeddings(str(source), str(tmp_path / "out"), client=client)
    check(x, *outcome(tmp_path / "out"))


def test_the_command_does_what_the_function_does(tmp_path: Path) -> None:
    x = planted(120, 40)
    source = write(tmp_path / "a.parquet", range(120), x, size=np.arange(120))
    args = ["dedup", source, "-o", str(tmp_path / "out"), "--eps", "0.05", "--eps-list", "0.5", "--keep-by", "-size",
            "--n-clusters", "3", "--n-probe", "3", "--workers", "1", "--device", "cpu", "--quiet"]  # fmt: skip
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "120 rows in = 80 kept + 40 duplicate"
    kept, removed = outcome(tmp_path / "out")
    check(x, kept, removed)
    assert (removed.id < removed.duplicate_of).all()


def test_what_other_eps_would_keep_is_told(tmp_path: Path, client: Client) -> None:
    np.save(tmp_path / "a.npy", planted(240, 80).astype(np.float32))
    result = dedup_embeddings(str(tmp_path / "a.npy"), str(tmp_path / "out"), eps_list=[0.3, 0.001], client=client)
    small, large, line = result.accounting().splitlines()
    assert small.startswith("eps 0.001 would keep ")
    assert large.startswith("eps 0.3 would keep ")
    assert line == "240 rows in = 160 kept + 80 duplicate"
