"""What proves a finished run: a fine one of every kind passes, and each damage is found by its own check."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from test_pipeline import tiny_pipeline
from typer.testing import CliRunner

from imgcurate import SemanticDedupStage, dedup_embeddings
from imgcurate.catalog import Manifest, write_parquet
from imgcurate.cli import app
from imgcurate.errors import ConfigError
from imgcurate.success import SUCCESS, FileDigest, Success, file_digest
from imgcurate.verification import Verification, verify_run

DEDUP = SemanticDedupStage(eps=0.05, n_clusters=4)


def mark(out: Path) -> None:
    """Write mark and manifest anew for the files as they are now, so that their checksums tell of nothing."""
    manifest = Manifest.load(str(out))
    files = {}
    for folder in ("catalog", "shards", "dedup"):
        for path in sorted((out / folder).glob("*")):
            files[f"{folder}/{path.name}"] = file_digest(str(path))
    for shard in manifest.shards:
        if digest := files.get(f"shards/{shard['name']}"):
            shard |= asdict(digest)
    manifest.save(str(out))
    Success(manifest.fingerprint, manifest.samples, manifest.counts, files).save(str(out))


def run(pipeline, out: Path, client: Client) -> Path:
    pipeline.run(str(out), client=client)
    return out


def kinds(done: Verification) -> set[str]:
    return {p.kind for p in done.problems}


def check_fine(out: Path, **options) -> Verification:
    done = verify_run(str(out), **options)
    assert done.ok, done.lines(20)
    return done


@pytest.fixture(scope="module")
def inputs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "in"
    shutil.copytree(shards, folder)
    return folder


@pytest.fixture(scope="module")
def finished(inputs: Path, client: Client) -> Path:
    """Return a finished run with duplicates: 72 samples, 60 kept in three shards."""
    return run(tiny_pipeline(str(inputs / "*.tar"), DEDUP, text_columns=("txt",)), inputs.parent / "OUT", client)


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of it, to be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "OUT"))


@pytest.fixture
def moved(finished: Path, inputs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a copy of it, and its inputs, which the test may spoil: they are put back."""
    copy = tmp_path / "inputs"
    shutil.copytree(inputs, copy)
    return Path(shutil.copytree(finished, tmp_path / "OUT")), copy


@pytest.fixture
def spoil_inputs(inputs: Path, tmp_path: Path):
    """Yield the folder of inputs, which is as it was after the test."""
    backup = shutil.copytree(inputs, tmp_path / "backup")
    yield inputs
    shutil.rmtree(inputs)
    shutil.copytree(backup, inputs)


def change_part(out: Path, number: int, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    """Change the rows of a part, and the checksums with them, so that rows alone tell of it."""
    path = out / "catalog" / f"part-{number:05d}.parquet"
    table = pq.read_table(path)
    frame = change(table.to_pandas(types_mapper=pd.ArrowDtype))
    write_parquet(str(path), pa.Table.from_pandas(frame, schema=table.schema, preserve_index=False))
    manifest = Manifest.load(str(out))
    statuses = pq.read_table(out / "catalog", columns=["status"])["status"].value_counts().to_pylist()
    manifest.counts = {s["values"]: s["counts"] for s in sorted(statuses, key=lambda s: s["values"])}
    manifest.samples = sum(manifest.counts.values())
    manifest.save(str(out))
    mark(out)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# What is fine.


def test_a_fine_run_passes_and_says_what_was_proved(finished: Path) -> None:
    done = check_fine(finished)
    assert done.checked["samples"] == 72
    assert done.checked["kept"] == 60
    assert done.checked["inputs"] == 4
    assert done.checked["shards"] == 3
    assert done.checked["duplicates"] == 12
    nbytes = sum(p.stat().st_size for f in ("catalog", "shards", "dedup") for p in (finished / f).iterdir())
    assert done.checked["nbytes"] == nbytes
    assert done.summary().startswith("72 samples, 3 shards, ")
    assert done.summary().endswith("B: all as in their sources")


def test_quick_leaves_the_inputs_alone(out: Path, spoil_inputs: Path) -> None:
    for path in spoil_inputs.iterdir():
        path.unlink()
    done = check_fine(out, quick=True)
    assert done.summary().endswith("all as recorded")
    assert done.checked["inputs"] == 0


def test_on_a_client_it_finds_the_same(out: Path, client: Client) -> None:
    check_fine(out, client=client)
    flip(out / "shards" / "00001.tar", 700)
    (out / "shards" / "00002.parquet").unlink()
    threads, tasks = verify_run(str(out)), verify_run(str(out), client=client)
    assert threads.problems == tasks.problems
    assert len(threads.problems) == threads.n_problems == 2


def test_two_inputs_to_a_partition(inputs: Path, tmp_path: Path, client: Client) -> None:
    check_fine(run(tiny_pipeline(str(inputs / "*.tar"), DEDUP, files_per_partition=3), tmp_path / "OUT", client))


def test_a_run_that_has_grown(inputs: Path, tmp_path: Path, client: Client) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for names in (("00001", "00002", "00003"), ("00000",)):
        for name in names:
            shutil.copy2(inputs / f"{name}.tar", folder)
        out = run(tiny_pipeline(str(folder), DEDUP, files_per_partition=2), tmp_path / "OUT", client)
    assert Manifest.load(str(out)).increments == [3, 4]
    done = check_fine(out)
    assert (done.checked["samples"], done.checked["inputs"], done.checked["duplicates"]) == (72, 4, 12)


def test_compressed_tars(inputs: Path, tmp_path: Path, client: Client) -> None:
    for path in inputs.glob("*.tar"):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    check_fine(run(tiny_pipeline(str(tmp_path / "*.gz")), tmp_path / "OUT", client))


def test_a_folder_of_files(tmp_path: Path, client: Client, photos, encode) -> None:
    folder = tmp_path / "photos"
    for i in range(300):
        path = folder / f"{i % 3}" / f"my.photo {i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photos[i % 20].resize((40, 40))))
        path.with_suffix(".txt").write_text(f"{i}")
    out = run(tiny_pipeline(str(folder), images_per_tar=100), tmp_path / "OUT", client)
    assert check_fine(out).checked["inputs"] == 2
    (folder / "1" / "my.photo 1.txt").write_text("changed, and longer")
    done = verify_run(str(out))
    assert kinds(done) == {"input", "source", "output"}
    assert any("spans" in p.message for p in done.problems)
    (folder / "1" / "my.photo 1.txt").unlink()
    done = verify_run(str(out))
    assert "input" in kinds(done)
    assert any("gone or changed" in p.message for p in done.problems)


def test_a_table_of_images(tmp_path: Path, client: Client, photos, encode) -> None:
    images = [{"bytes": encode(p), "path": f"{i}.jpg"} for i, p in enumerate(photos[:30])]
    pq.write_table(pa.table({"image": images, "text": [f"t{i}" for i in range(30)]}), tmp_path / "images.parquet")
    check_fine(run(tiny_pipeline(str(tmp_path / "images.parquet")), tmp_path / "OUT", client))


def test_tars_with_sidecars(tmp_path: Path, client: Client, write_tar, photos, encode) -> None:
    for k in range(2):
        keys = [f"{k}{i:04d}" for i in range(10)]
        write_tar(tmp_path / f"{k}.tar", [(key, {"jpg": encode(photos[i])}) for i, key in enumerate(keys)])
        columns = {"key": keys[:8], "score": [None, float("nan"), *range(6)], "n": [None, *range(7)],
                   "url": [None, *"abcdefg"], "tags": [["a", "b"]] * 8}  # fmt: skip
        pq.write_table(pa.table(columns), tmp_path / f"{k}.parquet")
    out = run(tiny_pipeline(str(tmp_path / "*.tar")), tmp_path / "OUT", client)
    check_fine(out)
    frame = pd.read_parquet(tmp_path / "1.parquet")
    frame.loc[3, "url"] = "another"
    frame.to_parquet(tmp_path / "1.parquet")
    done = verify_run(str(out))
    assert kinds(done) == {"input", "source"}
    assert any("the catalog has url 'c', the input 'another'" in p.message for p in done.problems)


def test_damaged_inputs_and_renamed_keys(tmp_path: Path, client: Client, write_tar, photos, encode) -> None:
    samples = [(f"{i:03d}", {"jpg": encode(p), "txt": b"x"}) for i, p in enumerate(photos[:12])]
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", samples[: 10 + k])
    flat = (tmp_path / "2.tar").read_bytes()
    (tmp_path / "2.tar").write_bytes(flat[: len(flat) // 2])
    (tmp_path / "3.tar").write_bytes(b"no tar at all" * 100)
    out = run(tiny_pipeline(str(tmp_path / "*.tar")), tmp_path / "OUT", client)
    names = pq.read_table(out / "shards" / "00000.parquet").to_pandas()
    assert (names.key != names.source_key).any()
    check_fine(out)


def test_a_reference_run_and_one_that_is_gone(finished: Path, inputs: Path, tmp_path: Path, client: Client) -> None:
    first = Path(shutil.copytree(finished, tmp_path / "FIRST"))
    stage = SemanticDedupStage(eps=0.05, n_clusters=4, reference=(str(first),))
    out = run(tiny_pipeline(str(inputs / "0000[12].tar"), stage), tmp_path / "OUT", client)
    done = check_fine(out)
    assert done.checked["duplicates"] == 36
    assert not done.notes
    part = first / "catalog" / "part-00001.parquet"
    frame = pq.read_table(part).to_pandas(types_mapper=pd.ArrowDtype)
    frame["status"] = "nsfw"
    write_parquet(str(part), pa.Table.from_pandas(frame, schema=pq.read_schema(part), preserve_index=False))
    done = verify_run(str(out))
    assert kinds(done) == {"reference"}
    assert f"of {first}, which is not kept" in done.problems[0].message
    shutil.rmtree(first)
    done = check_fine(out)
    assert done.checked["duplicates"] == 0
    assert done.notes == [f"the reference run {first} is gone, so duplicates of its samples are not checked"]


def test_nothing_kept_and_no_sample(tmp_path: Path, client: Client, write_tar) -> None:
    write_tar(tmp_path / "none.tar", [])
    write_tar(tmp_path / "text.tar", [("a", {"txt": b"x"})])
    out = run(tiny_pipeline(str(tmp_path / "*.tar"), DEDUP), tmp_path / "OUT", client)
    assert check_fine(out).checked == {
        "files": 3, "nbytes": sum(p.stat().st_size for p in out.glob("*/*")), "inputs": 2, "samples": 1, "kept": 0,
        "shards": 0, "duplicates": 0,
    }  # fmt: skip


def test_in_memory_store(finished: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    for path in finished.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/verify/{path.relative_to(finished)}", path.read_bytes())
    try:
        assert verify_run("memory://verify").ok
        fs.pipe_file("/verify/shards/00000.tar", b"x" * 20_000)
        assert kinds(verify_run("memory://verify")) == {"damaged"}
    finally:
        fs.rm("/verify", recursive=True)


# What is not: files.


def offset_of(out: Path, what: str) -> int:
    row = pq.read_table(out / "shards" / "00000.parquet").to_pandas().iloc[0]
    content = (out / "shards" / "00000.tar").read_bytes()
    return {"content": 512 + 100, "header": 5, "padding": 512 + int(row.nbytes) + 1, "end": len(content) - 1}[what]


@pytest.mark.parametrize("what", ["content", "header", "padding", "end"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_flipped_byte_in_a_tar(what: str, listed: bool, out: Path) -> None:
    flip(out / "shards" / "00000.tar", offset_of(out, what))
    if listed:
        mark(out)
    done = verify_run(str(out))
    (problem,) = done.problems
    assert problem.place == "shards/00000.tar"
    assert problem.kind == ("output" if listed else "damaged")
    assert verify_run(str(out), quick=True).ok == listed


@pytest.mark.parametrize(("offset", "listed"), [(0, False), (500, False), (500, True), (-6, True)])
def test_a_flipped_byte_in_a_part(offset: int, listed: bool, out: Path) -> None:
    path = out / "catalog" / "part-00002.parquet"
    flip(path, offset % path.stat().st_size)
    if listed:
        mark(out)
    done = verify_run(str(out))
    assert not done.ok
    if not listed:
        assert ("damaged", "catalog/part-00002.parquet") in {p[:2] for p in done.problems}


@pytest.mark.parametrize("cut", [0, 3, 1000])
def test_a_part_that_is_cut(cut: int, out: Path) -> None:
    path = out / "catalog" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    mark(out)
    done = verify_run(str(out))
    assert kinds(done) == {"damaged"}
    assert any("not checked" in n for n in done.notes)


@pytest.mark.parametrize(
    "name", ["catalog/part-00001.parquet", "shards/00002.tar", "shards/00001.parquet", "dedup/02-dedup.json"]
)
def test_a_file_that_is_missing(name: str, out: Path) -> None:
    path = out / name if (out / name).exists() else next((out / "dedup").glob("*.json"))
    path.unlink()
    missing = [p for p in verify_run(str(out)).problems if p.kind == "missing"]
    assert [p.place for p in missing] == [str(path.relative_to(out))]
    mark(out)
    if path.parent.name != "dedup":
        assert not verify_run(str(out)).ok


@pytest.mark.parametrize("name", ["catalog/part-00009.parquet", "shards/00009.tar", "shards/.00001.tar.x.tmp"])
def test_a_file_too_many(name: str, out: Path) -> None:
    (out / name).write_bytes(b"x")
    (problem,) = verify_run(str(out)).problems
    assert (problem.kind, problem.place) == ("unlisted", name)


def test_a_sidecar_that_says_other_things(out: Path) -> None:
    path = out / "shards" / "00001.parquet"
    frame = pq.read_table(path).to_pandas(types_mapper=pd.ArrowDtype)
    frame.loc[3, "txt"] = "another caption"
    write_parquet(str(path), pa.Table.from_pandas(frame, schema=pq.read_schema(path), preserve_index=False))
    mark(out)
    (problem,) = verify_run(str(out), quick=True).problems
    assert problem == ("output", "shards/00001.parquet", "the column txt is not what the catalog says")


# What is not: the mark and the manifest.


def test_no_mark(out: Path) -> None:
    (out / SUCCESS).unlink()
    (problem,) = verify_run(str(out)).problems
    assert problem.kind == "unfinished"


@pytest.mark.parametrize("cut", [0, 1, 200])
def test_a_mark_that_is_cut(cut: int, out: Path) -> None:
    (out / SUCCESS).write_bytes((out / SUCCESS).read_bytes()[:cut])
    (problem,) = verify_run(str(out)).problems
    assert problem.kind == "mark"
    assert "is damaged" in problem.message


def test_a_mark_of_another_run(out: Path) -> None:
    found = Success.load(str(out))
    Success("0" * 64, found.samples, {"ok": 72}, found.files).save(str(out))
    assert [p.message.split()[1] for p in verify_run(str(out)).problems] == ["fingerprint", "counts"]
    files = dict(found.files) | {"shards/00001.tar": FileDigest(1, "0" * 64)}
    Success(found.fingerprint, found.samples, found.counts, files).save(str(out))
    assert kinds(verify_run(str(out), quick=True)) == {"damaged", "mark"}


def test_an_unfinished_run_and_no_run(out: Path, tmp_path: Path) -> None:
    (out / SUCCESS).unlink()
    manifest = Manifest.load(str(out))
    manifest.state = "running"
    manifest.save(str(out))
    assert kinds(verify_run(str(out))) == {"unfinished"}
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="holds no run of imgcurate"):
            verify_run(str(folder))
    (out / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json is damaged.*nothing can be verified"):
        verify_run(str(out))


# What is not: rows, with checksums that fit.


def messages(done: Verification) -> str:
    return "\n".join(p.line() for p in done.problems)


def test_a_doubled_row(out: Path) -> None:
    change_part(out, 1, lambda f: pd.concat([f.iloc[:3], f.iloc[2:]]))
    done = verify_run(str(out), quick=True)
    assert f"uid {(1 << 32) + 2} is there twice" in messages(done)


def test_rows_out_of_order_and_of_another_input(out: Path) -> None:
    change_part(out, 1, lambda f: f.iloc[::-1])
    assert "out of order" in messages(verify_run(str(out), quick=True))
    change_part(out, 1, lambda f: f.iloc[::-1].assign(uid=lambda g: g.uid + (1 << 32)))
    assert "is of input 2, not of this part" in messages(verify_run(str(out), quick=True))


def test_rows_that_name_another_input(out: Path, inputs: Path) -> None:
    change_part(out, 1, lambda f: f.assign(shard=str(inputs / "00000.tar")))
    line = f"rows of input 1, {inputs}/00001.tar, name {inputs}/00000.tar"
    assert line in messages(verify_run(str(out), quick=True))


def test_a_row_without_a_sample(out: Path) -> None:
    def more(frame: pd.DataFrame) -> pd.DataFrame:
        extra = frame.iloc[-1:].copy()
        extra["uid"], extra["key"], extra["status"], extra["phase"] = extra["uid"] + 1, "invented", "decode_error", 0
        return pd.concat([frame, extra])

    change_part(out, 3, more)
    assert verify_run(str(out), quick=True).ok
    done = verify_run(str(out))
    (problem,) = done.problems
    assert problem.kind == "source"
    assert "the row 'invented'" in problem.message
    assert "has no sample" in problem.message


@pytest.mark.parametrize("position", [-1, 4])
def test_a_sample_without_a_row(position: int, out: Path) -> None:
    def fewer(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.drop(frame.index[position])

    change_part(out, 0, fewer)
    done = verify_run(str(out))
    assert any(p.kind == "source" and "has no row" in p.message for p in done.problems)
    # Of the last one only the inputs know.
    gap = "is missing before others" in messages(verify_run(str(out), quick=True))
    assert gap == (position == 4)


@pytest.mark.parametrize(
    ("column", "value"),
    [("key", "another"), ("ext", "png"), ("members", ["jpg"]), ("spans", [0, 1024]), ("offset", 1), ("nbytes", 7),
     ("txt", "another caption")],
)  # fmt: skip
def test_a_changed_row(column: str, value: object, out: Path) -> None:
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        values = frame[column].tolist()
        values[5] = value
        return frame.assign(**{column: pd.Series(values, dtype=frame[column].dtype)})

    change_part(out, 2, change)
    done = verify_run(str(out))
    assert any(
        p.kind == "source" and f"uid {(2 << 32) + 5}: the catalog has {column}" in p.message for p in done.problems
    )


def test_a_swapped_status(out: Path) -> None:
    def swap(frame: pd.DataFrame) -> pd.DataFrame:
        status = frame.status.tolist()
        gone, stays = status.index("duplicate"), status.index("ok")
        status[gone], status[stays] = "ok", "decode_error"
        return frame.assign(status=pd.Series(status, dtype=frame.status.dtype))

    with_duplicates = next(
        i for i in range(4)
        if "duplicate" in pq.read_table(out / "catalog" / f"part-{i:05d}.parquet")["status"].to_pylist()
    )  # fmt: skip
    change_part(out, with_duplicates, swap)
    done = verify_run(str(out))
    assert kinds(done) >= {"catalog", "output"}
    assert "and left in phase" in messages(done)


def test_a_status_that_the_input_contradicts(tmp_path: Path, client: Client, write_tar, photos, encode) -> None:
    write_tar(tmp_path / "0.tar", [("a", {"jpg": encode(photos[0])}), ("b", {"txt": b"no image"})])
    out = run(tiny_pipeline(str(tmp_path / "0.tar")), tmp_path / "OUT", client)
    check_fine(out)
    change_part(out, 0, lambda f: f.assign(status=["ok", "nsfw"]))
    assert "status is 'nsfw', by the input 'no_image'" in messages(verify_run(str(out)))


def test_a_duplicate_of_a_row_that_is_dropped_or_not_there(out: Path) -> None:
    parts = [pq.read_table(p).to_pandas() for p in sorted((out / "catalog").iterdir())]
    whole = pd.concat(parts)
    dropped = int(whole[whole.status == "duplicate"].uid.iloc[0])
    number = next(i for i, p in enumerate(parts) if (p.status == "duplicate").any())
    for target in (dropped, (3 << 32) + 5000, (17 << 32) + 1, -5):

        def change(frame: pd.DataFrame, target: int = target) -> pd.DataFrame:
            first = frame.index[frame.status == "duplicate"][0]
            frame.loc[first, "duplicate_of"] = target
            return frame

        change_part(out, number, change)
        (problem,) = verify_run(str(out)).problems
        assert problem.kind == "reference"
        assert f"is a duplicate of {target}, which is not kept" in problem.message
    change_part(out, number, lambda f: f.assign(duplicate_of=pd.Series([None] * len(f), dtype=f.duplicate_of.dtype)))
    assert "duplicates do not say of what" in messages(verify_run(str(out), quick=True))


def test_what_dedup_keeps_a_later_filter_may_drop(inputs: Path, tmp_path: Path, client: Client) -> None:
    from test_pipeline import Dark

    pipeline = tiny_pipeline(str(inputs / "*.tar"), DEDUP)
    stages = list(pipeline.stages)
    check_fine(run(type(pipeline)([*stages[:2], Dark(), *stages[2:]]), tmp_path / "OUT", client))
    out = tmp_path / "LATER"
    run(pipeline, out, client)
    manifest = Manifest.load(str(out))
    manifest.config["stages"].insert(-1, {"stage": "mine.Filter"})
    manifest.save(str(out))
    named = next(int(p.duplicate_of) for p in pq.read_table(out / "catalog").to_pandas().itertuples()
                 if p.status == "duplicate")  # fmt: skip

    def drop(frame: pd.DataFrame, status: str) -> pd.DataFrame:
        return frame.assign(status=frame.status.where(frame.uid != named, status))

    change_part(out, named >> 32, lambda f: drop(f, "mine"))
    assert "reference" not in kinds(verify_run(str(out)))
    change_part(out, named >> 32, lambda f: drop(f, "decode_error"))
    assert "reference" in kinds(verify_run(str(out)))


# What is not: inputs.


def test_an_input_that_changed(out: Path, spoil_inputs: Path) -> None:
    path = spoil_inputs / "00002.tar"
    rows = pq.read_table(out / "catalog").to_pandas()
    kept = rows[(rows.status == "ok") & (rows.shard == str(path))].iloc[0]
    flip(path, int(kept.offset) + 50)
    done = verify_run(str(out))
    assert kinds(done) == {"input", "output"}
    assert any(p.place == str(path) and "changed since the run: modified was" in p.message for p in done.problems)


def test_an_input_that_is_gone_or_cut(out: Path, spoil_inputs: Path) -> None:
    path = spoil_inputs / "00002.tar"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    done = verify_run(str(out))
    assert kinds(done) == {"input", "source", "output"}
    path.unlink()
    done = verify_run(str(out))
    (problem,) = done.problems
    assert (problem.kind, problem.place) == ("input", str(path))
    assert "is gone: no such input" in problem.message
    assert done.checked["shards"] < 3
    assert done.notes == [f"{3 - done.checked['shards']} of 3 shards are not compared with sources that are gone"]


# Deduplication of embeddings, partitions, and the command.


def test_a_deduplication_of_embeddings(tmp_path: Path, client: Client) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 8)).astype(np.float32)
    x[150:] = x[:50] + 0.001
    pq.write_table(pa.table({"id": [f"id{i}" for i in range(200)], "embedding": list(x)}), tmp_path / "e.parquet")
    out = tmp_path / "OUT"
    dedup_embeddings(str(tmp_path / "e.parquet"), str(out), n_clusters=2, client=client)
    done = check_fine(out)
    assert done.checked["duplicates"] == 50
    removed = pq.read_table(out / "removed.parquet").to_pandas()
    removed.loc[3, "duplicate_of"] = removed.id[4]
    write_parquet(str(out / "removed.parquet"), pa.Table.from_pandas(removed, preserve_index=False))
    assert kinds(verify_run(str(out))) >= {"reference"}
    (tmp_path / "e.parquet").unlink()
    assert kinds(verify_run(str(out))) >= {"reference", "input"}
    (out / "kept.parquet").write_bytes(b"PAR1")
    assert kinds(verify_run(str(out))) >= {"damaged", "input"}


def test_a_record_that_was_changed(out: Path) -> None:
    manifest = Manifest.load(str(out))
    manifest.config["stages"][3]["eps"] = 0.5
    manifest.save(str(out))
    assert kinds(verify_run(str(out), quick=True)) == {"record"}
    manifest.config["inputs"].pop()
    manifest.save(str(out))
    assert kinds(verify_run(str(out), quick=True)) >= {"record", "catalog"}


def test_the_command(out: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(out), "--quiet"])
    assert (done.exit_code, done.stdout.startswith("72 samples, 3 shards, ")) == (0, True)
    assert len(done.stdout.splitlines()) == 1
    flip(out / "shards" / "00000.tar", 700)
    (out / "shards" / "00001.tar").unlink()
    for i in range(40):
        (out / "catalog" / f"x{i}").touch()
    done = CliRunner().invoke(app, ["verify", str(out), "--quiet"])
    lines = done.stdout.splitlines()
    assert done.exit_code == 1
    assert lines[0] == "unlisted: catalog/x0: is not a file of the run: _SUCCESS does not list it"
    assert len(lines) == 22
    assert lines[-2].startswith("... and 22 more problems")
    assert lines[-1] == f"42 problems in {out}"
    done = CliRunner().invoke(app, ["verify", str(out), "--json"])
    content = json.loads(done.stdout)
    assert (done.exit_code, content["ok"], content["n_problems"]) == (1, False, 42)
    assert len(content["problems"]) == 42
