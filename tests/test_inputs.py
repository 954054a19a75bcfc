"""What is read besides tars: folders, tables of images, sidecars; from the names to the exported shards."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_pipeline import checksums, output_members, tiny_pipeline
from typer.testing import CliRunner

import imgcurate as ic
from imgcurate import schema
from imgcurate.archives import Archives
from imgcurate.cli import app
from imgcurate.config import RunConfig
from imgcurate.errors import ConfigError, InputError
from imgcurate.folders import file_name, list_folder, quoted
from imgcurate.inputs import check_unchanged, describe_shards, find_shards, state_of
from imgcurate.inspection import inspect_shards
from imgcurate.members import MemberColumns
from imgcurate.options import column_options
from imgcurate.shards import Shard, index_shard
from imgcurate.sidecars import find_sidecars
from imgcurate.stages import (
    ExactDedupStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    PerceptualDedupStage,
    Rule,
    SemanticDedupStage,
)
from imgcurate.tables import image_column


def column(table: pa.Table, name: str) -> list[Any]:
    return table[name].to_pylist()


@pytest.fixture
def folder(tmp_path: Path, photos: list[Image.Image], encode) -> Path:
    """Return a folder of images in two levels, with captions, odd names and files that are no samples."""
    top = tmp_path / "photos"
    for i, photo in enumerate(photos[:12]):
        path = top / f"class{i % 3}" / f"{i:03d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo))
        path.with_suffix(".txt").write_text(f"caption {i}")
    (top / "a b%20\u00fc.png").write_bytes(encode(photos[12], "PNG"))
    Path(os.fsdecode(os.fsencode(top) + b"/\xff.jpg")).write_bytes(encode(photos[13]))
    (top / "broken.jpg").write_bytes(encode(photos[14])[:500])
    (top / "README.md").write_text("no image")
    (top / ".hidden.jpg").write_bytes(b"x")
    (top / ".cache").mkdir()
    (top / ".cache" / "x.jpg").write_bytes(b"x")
    os.mkfifo(top / "pipe.jpg")
    (top / "gone.jpg").symlink_to(top / "nowhere.jpg")
    return top


def test_a_folder_of_images_is_curated_to_shards(folder: Path, client: Client, tmp_path: Path, read_tar) -> None:
    result = tiny_pipeline(str(folder), text_columns=("txt",)).run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute().set_index("key")
    assert result.counts == {"decode_error": 1, "no_image": 1, "ok": 14, "read_error": 1}
    assert len(catalog) == result.samples == 17
    assert catalog.txt["class1/004"] == "caption 4"
    assert catalog.reason["gone"] == "member jpg: cannot read the file: No such file or directory"
    assert catalog.reason["README"] == "no image among its members: md"
    assert catalog.reason["broken"].startswith("truncated JPEG")
    members = output_members(result, read_tar)
    expected = {
        n: (folder / n).read_bytes()
        for n in list_folder(str(folder))
        if n.startswith(("class", "a b")) or n == os.fsdecode(b"\xff.jpg")
    }
    assert members == expected
    sidecar = pd.concat([pq.read_table(s.replace(".tar", ".parquet")).to_pandas() for s in result.shards])
    assert set(sidecar.key) == set(catalog.index[catalog.status == "ok"])


def test_a_folder_gives_the_same_output_for_any_partitions(
    folder: Path, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("imgcurate.inputs._SAMPLES_PER_SHARD", 4)
    assert len(find_shards(str(folder))) > 4
    a = tiny_pipeline(str(folder)).run(str(tmp_path / "a"), client=client)
    b = tiny_pipeline(str(folder), files_per_partition=3).run(str(tmp_path / "b"), client=client)
    assert a.catalog.npartitions > b.catalog.npartitions > 1
    assert (a.counts, checksums(tmp_path / "a")) == (b.counts, checksums(tmp_path / "b"))


def test_samples_of_one_key_are_told_apart_in_exported_files(
    photos, encode, client: Client, tmp_path: Path, read_tar
) -> None:
    for name, photo in (("one", photos[0]), ("two", photos[1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(encode(photo))
        (tmp_path / name / "x.txt").write_text(name)
    inputs = [str(tmp_path / "one" / "*.jpg"), str(tmp_path / "one" / "x.txt"), str(tmp_path / "two")]
    with pytest.raises(InputError, match=r"x\.txt is of an unknown kind"):
        find_shards(inputs)
    result = tiny_pipeline([inputs[0], inputs[2]]).run(str(tmp_path / "OUT"), client=client)
    uid = 1 << 32
    assert output_members(result, read_tar) == {
        "x.jpg": encode(photos[0]), f"x_{uid}.jpg": encode(photos[1]), f"x_{uid}.txt": b"two",
    }  # fmt: skip


def test_files_that_change_under_a_run_are_an_error(folder: Path, client: Client, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(str(folder))
    pipeline.run(str(tmp_path / "OUT"), client=client)
    (folder / "class0" / "000.txt").write_text("another caption")
    with pytest.raises(ConfigError, match="holds another run"):
        pipeline.run(str(tmp_path / "OUT"), client=client)


def test_a_sample_is_never_divided_between_shards(tmp_path: Path) -> None:
    for i in range(700):
        for ext in ("jpg", "json", "txt"):
            (tmp_path / f"{i}.{ext}").write_bytes(b"x")
        (tmp_path / f"{i}-x.jpg").write_bytes(b"x")
    shards = find_shards(str(tmp_path))
    assert [len({f.split(".")[0] for f in s.files}) for s in shards] == [256] * 5 + [120]
    tables = [index_shard(s, i).table for i, s in enumerate(shards)]
    table = pa.concat_tables(tables)
    assert len(set(column(table, schema.KEY))) == len(table) == 1400
    assert sum(map(len, column(table, schema.MEMBERS))) == 2800
    assert column(tables[1], schema.UID) == list(range(1 << 32, (1 << 32) + 256))
    assert describe_shards(shards) == describe_shards(shards)
    before = describe_shards(shards)
    (tmp_path / "699.txt").write_bytes(b"y!")
    changed = [a != b for a, b in zip(before, describe_shards(find_shards(str(tmp_path))), strict=True)]
    assert changed.count(True) == 1


@given(st.binary(min_size=1, max_size=20).filter(lambda b: b"\0" not in b and b"/" not in b))
def test_quoted_names_come_back(raw: bytes) -> None:
    name = os.fsdecode(raw)
    quoted(name).encode()
    assert file_name(quoted(name)) == name


def test_a_folder_stands_for_the_tars_in_it(shards: Path, tmp_path: Path) -> None:
    assert [s.url for s in find_shards(str(shards))] == sorted(str(p) for p in shards.iterdir())
    assert find_shards([str(shards), str(shards / "*.tar")]) == find_shards(str(shards))
    with pytest.raises(InputError, match="holds no tar, no table and no image: expected a tar"):
        find_shards(str(tmp_path))
    (tmp_path / "page").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"and no image \(1 files without an extension are not looked at\): expected"):
        find_shards(str(tmp_path))
    with pytest.raises(InputError, match="is of an unknown kind .*: expected a tar"):
        find_shards(str(tmp_path / "page"))
    tar = next(shards.glob("*.tar"))
    (tmp_path / "shard-without-ending").write_bytes(tar.read_bytes())
    assert find_shards(str(tmp_path / "shard-without-ending")) == [Shard(str(tmp_path / "shard-without-ending"))]


# Tables


def huggingface_table(photos, encode) -> pa.Table:
    """Return a table as the datasets library writes it: a struct of bytes and path, and a label."""
    images: list[Any] = [{"bytes": encode(p), "path": f"{i:04d}.jpg"} for i, p in enumerate(photos[:70])]
    images[3] = {"bytes": None, "path": "elsewhere.jpg"}
    images[5] = {"bytes": b"<html>404</html>", "path": "0005.jpg"}
    images[7] = {"bytes": encode(photos[7], "PNG"), "path": None}
    images[8] = None
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    n = len(images)
    table = pa.table({
        "label": pa.array(range(n)),
        "image": image,
        "text": [None if i == 9 else f"caption {i}" for i in range(n)],
        "mask": [encode(Image.new("L", (4, 4), i), "PNG") if i < 2 else None for i in range(n)],
    })  # fmt: skip
    features = {"label": {"_type": "ClassLabel"}, "image": {"_type": "Image"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_table(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=25)
    elif path.name.startswith("stream"):
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    else:
        with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return path


@pytest.mark.parametrize("name", ["train-00000-of-00001.parquet", "data.arrow", "stream.arrow"])
def test_a_table_of_images_is_curated_to_shards(
    name: str, photos, encode, client: Client, tmp_path: Path, read_tar
) -> None:
    photos = [photos[i % 60].rotate(90 * (i // 60)) for i in range(70)]
    write_table(huggingface_table(photos, encode), tmp_path / name)
    result = tiny_pipeline(str(tmp_path / name), text_columns=("txt", "json")).run(str(tmp_path / "OUT"), client=client)
    assert result.counts == {"decode_error": 1, "no_image": 2, "ok": 67}
    catalog = result.catalog.compute()
    stem = name.rpartition(".")[0]
    assert catalog.key[:10].tolist() == [
        "0000", "0001", "0002", "elsewhere", "0004", "0005", "0006", f"{stem}/000000007", f"{stem}/000000008", "0009",
    ]  # fmt: skip
    assert catalog.uid.tolist() == list(range(70))
    assert catalog.txt[4] == "caption 4"
    assert pd.isna(catalog.txt[9])
    assert json.loads(catalog.json[0]) == {"image": "0000.jpg", "label": 0, "text": "caption 0"}
    assert catalog.reason[5] == "not an image: text/html"
    members = output_members(result, read_tar)
    for i in (0, 1, 2, 4, 7, 69):
        key = catalog.key[i]
        image = encode(photos[i], "PNG") if i == 7 else encode(photos[i])
        assert members[f"{key}.{'png' if i == 7 else 'jpg'}"] == image
        assert members[f"{key}.txt"] == f"caption {i}".encode()
    assert members["0001.mask.png"] == encode(Image.new("L", (4, 4), 1), "PNG")
    assert not any(name.startswith("0005") for name in members)


def test_a_table_is_the_tar_that_its_rows_make(photos, encode, tmp_path: Path) -> None:
    path = write_table(huggingface_table([photos[i % 60] for i in range(70)], encode), tmp_path / "t.parquet")
    table = index_shard(str(path), 0).table
    with Archives() as archives:
        # From the last to the first, so that each goes back.
        for row in reversed(table.to_pylist()):
            data = archives(str(path)).pread(*row["spans"])
            with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
                names = tar.getnames()
                assert names == [f"{row['key']}.{ext}" for ext in row["members"]]
                if row["status"] == "ok":
                    image = tar.extractfile(f"{row['key']}.{row['ext']}").read()
                    assert archives(str(path)).pread(row["offset"], row["nbytes"]) == image


def test_rows_of_one_key_stay_rows_of_their_own(photos, encode, tmp_path: Path) -> None:
    table = pa.table({"key": ["a", "a", "b", "a"], "jpg": [encode(p) for p in photos[:3]] + [None], "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "t.parquet")
    index = index_shard(str(tmp_path / "t.parquet"), 0, columns=MemberColumns(("json",))).table
    assert column(index, schema.KEY) == ["a", "a", "b", "a"]
    assert column(index, schema.STATUS) == ["ok", "ok", "ok", "no_image"]
    assert column(index, schema.REASON)[3] == "column 'jpg' has no bytes in this row; paths are not followed"
    assert [json.loads(j)["n"] for j in column(index, "json")] == [1, 2, 3, 4]


def test_only_one_column_of_images_is_looked_at(photos, encode, tmp_path: Path) -> None:
    first, second = [encode(photos[0]), None], [encode(photos[1]), encode(photos[2])]
    pq.write_table(pa.table({"id": ["a", "b"], "image": first, "mask": second}), tmp_path / "t.parquet")
    index = index_shard(str(tmp_path / "t.parquet"), 0).table
    assert column(index, schema.STATUS) == ["ok", "no_image"]
    assert column(index, schema.EXT) == ["jpg", ""]
    assert column(index, schema.MEMBERS) == [["jpg", "json", "mask.jpg"], ["json", "mask.jpg"]]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/b.c/d.jpg", "a/b.c/d"), ("../../etc/x", "etc/x"), ("/abs/x.png", "abs/x"), ("v1.2.jpg", "v1_2"),
        ("https://x.org/i.jpeg", "https:/x.org/i"), ("a\0b", "a_b"), ("x.2024", "x_2024"), ("", "t/000000000"),
        ("..", "t/000000000"), ("__x__", "_x__"), ("__a/b", "_a/b"), ("a/__x__", "a/__x__"),
        (None, "t/000000000"), ("n" * 300, "n" * 300), ("\u00e4", "\u00e4"),
    ],
)  # fmt: skip
def test_keys_of_rows_name_members_that_are_read_back(key: str | None, expected: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"key": pa.array([key], pa.string()), "jpg": [b"\xff\xd8\xff"]}), tmp_path / "t.parquet")
    index = index_shard(str(tmp_path / "t.parquet"), 0).table
    assert (column(index, schema.KEY), column(index, schema.MEMBERS)) == ([expected], [["jpg", "json"]])


def test_image_column_goes_by_metadata_type_and_name() -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    metadata = {"huggingface": json.dumps({"info": {"features": {"b": {"_type": "Image"}}}})}
    cases: list[tuple[pa.Schema, str | None]] = [
        (pa.schema([("a", struct), ("b", struct)]), "a"),
        (pa.schema([("a", struct), ("b", struct)], metadata), "b"),
        (pa.schema([("embedding", pa.binary()), ("jpg", pa.large_binary())]), "jpg"),
        (pa.schema([("anything", pa.binary()), ("n", pa.int64())]), "anything"),
        (pa.schema([("x", pa.binary()), ("y", pa.binary())]), None),
        (pa.schema([("image", pa.string())]), None),
        (pa.schema([("x", pa.binary())], {"huggingface": "not json"}), "x"),
    ]
    assert [image_column(s) for s, _ in cases] == [expected for _, expected in cases]


JPEG = b"\xff\xd8\xff\xe0"


@pytest.mark.parametrize(
    ("columns", "members", "json_"),
    [
        ({"image": pa.array([JPEG]).dictionary_encode()}, ["jpg"], None),
        ({"image": pa.array([JPEG], pa.large_binary()), "txt": [b"as bytes"]}, ["jpg", "txt"], None),
        ({"image": [JPEG], "caption": pa.array(["x"]).dictionary_encode()}, ["jpg", "txt", "json"], {"caption": "x"}),
        ({"image": [JPEG], "a b": [b"1"], "a.b": [b"2"]}, ["jpg", "a_b.bin", "a_b_1.bin"], None),
        ({"image": pa.array([{"bytes": b"<html>", "path": "x.txt"}]), "text": ["c"]}, ["jpg", "txt", "json"],
         {"image": "x.txt", "text": "c"}),
        ({"image": pa.array([{"bytes": JPEG, "path": None}]), "image_id": ["i.1"]}, ["jpg", "json"],
         {"image_id": "i.1"}),
        ({"image": [JPEG], "f": [float("nan")], "g": [[float("inf"), 1.0]], "t": [dt.date(2024, 2, 29)],
          "d": [decimal.Decimal("1.50")], "s": [{"b": b"x", "n": None}]}, ["jpg", "json"],
         {"f": None, "g": ["inf", 1.0], "t": "2024-02-29", "d": "1.50", "s": {"b": "eA==", "n": None}}),
    ],
    ids=["dictionary", "large and bytes", "dictionary of captions", "words alike", "misleading", "no path", "odd"],
)  # fmt: skip
def test_columns_become_members(
    columns: dict[str, Any], members: list[str], json_: dict[str, Any] | None, tmp_path: Path
) -> None:
    for path in (tmp_path / "t.parquet", tmp_path / "t.arrow"):
        write_table(pa.table(columns), path)
        index = index_shard(find_shards(str(path))[0], 0, columns=MemberColumns(("json",))).table
        assert column(index, schema.MEMBERS) == [members]
        found = column(index, "json")[0]
        assert (None if found is None else json.loads(found, parse_constant=pytest.fail)) == json_


def test_row_groups_after_a_damaged_one_stay(photos, encode, tmp_path: Path) -> None:
    path = write_table(huggingface_table([photos[i % 60] for i in range(70)], encode), tmp_path / "t.parquet")
    data = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    index = index_shard(str(path), 0).table
    assert column(index, schema.KEY)[24:27] == ["0024", "0050", "0051"]
    assert column(index, schema.REASON)[-1].endswith("(25 rows are lost)")
    with Archives() as archives:
        for row in index.to_pylist():
            if row["status"] == "ok":
                data = archives(str(path)).pread(row["offset"], row["nbytes"])
                assert data[:3] in (b"\xff\xd8\xff", b"<ht", b"\x89PN")


def test_a_table_of_other_columns_among_others_is_a_row(photos, encode, client: Client, tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [encode(photos[0])]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "b.parquet")
    twice = pa.Table.from_arrays([pa.array([encode(photos[1])]), pa.array([1]), pa.array([2])], ["jpg", "n", "n"])
    pq.write_table(twice, tmp_path / "c.parquet")
    result = tiny_pipeline(str(tmp_path)).run(str(tmp_path / "OUT"), client=client)
    assert result.counts == {"ok": 1, "tar_error": 2}
    reasons = result.catalog.compute().reason.tolist()
    assert "has no column of images among url" in reasons[1]
    assert "has two columns 'n'" in reasons[2]


def test_a_table_without_images_is_refused_before_the_run(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["x"], "n": [1]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="has no column of images among url, n: expected a struct"):
        find_shards(str(tmp_path / "t.parquet"))


def test_a_damaged_table_is_a_row(photos, encode, client: Client, tmp_path: Path) -> None:
    table = huggingface_table([photos[i % 60] for i in range(70)], encode)
    path = write_table(table, tmp_path / "b.parquet")
    write_table(table.slice(0, 4), tmp_path / "a.parquet")
    data = bytearray(path.read_bytes())
    (tmp_path / "c.parquet").write_bytes(data[:5000])
    for number in (1, 2):
        group = pq.ParquetFile(path).metadata.row_group(number).column(1)
        data[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(data)
    result = tiny_pipeline(str(tmp_path / "*.parquet")).run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute()
    assert catalog.groupby("shard").size().tolist() == [4, 26, 1]
    reasons = catalog.reason[catalog.status == "tar_error"].tolist()
    assert reasons[0].startswith("damaged table: row group 1, row 25: ")
    assert reasons[0].endswith(", and 1 more row groups (45 rows are lost)")
    assert reasons[1].startswith("not a readable Parquet or Arrow file: ")


# Sidecars


@pytest.fixture
def img2dataset(tmp_path: Path, photos, encode, write_tar) -> Path:
    """Return a folder as img2dataset leaves it: tars, Parquet files with a row per URL, stats."""
    top = tmp_path / "laion"
    for shard in range(2):
        keys = [f"{shard:05d}{i:04d}" for i in range(6)]
        samples = [
            (k, {"jpg": encode(photos[6 * shard + i]), "txt": b"c", "json": b"{}"})
            for i, k in enumerate(keys)
            if i != 2
        ]
        write_tar(top / f"{shard:05d}.tar", samples)
        frame = pd.DataFrame({
            "key": keys, "url": [f"https://x.org/{k}.jpg" for k in keys], "caption": ["c"] * 6,
            "status": ["failed_to_download" if i == 2 else "success" for i in range(6)],
            "error_message": None, "width": range(6), "punsafe": [0.25 * i for i in range(6)],
            "exif": ['{"Make": "x"}'] * 6,
        })  # fmt: skip
        frame["tags"] = [["a", str(i)] for i in range(6)]
        frame.to_parquet(top / f"{shard:05d}.parquet")
        (top / f"{shard:05d}_stats.json").write_text("{}")
    return top


def test_columns_of_sidecars_join_the_frame_and_the_output(img2dataset: Path, client: Client, tmp_path: Path) -> None:
    result = tiny_pipeline(str(img2dataset)).run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute().set_index("key")
    assert result.counts == {"ok": 10}
    assert catalog.url["000010004"] == "https://x.org/000010004.jpg"
    assert catalog.source_status["000000001"] == "success"
    assert catalog.status["000000001"] == "ok"
    assert catalog.source_width["000010005"] == 5
    assert catalog.punsafe["000000003"] == 0.75
    assert json.loads(catalog.tags["000000003"]) == ["a", "3"]
    assert catalog.error_message.isna().all()
    pipeline = tiny_pipeline(str(img2dataset))
    assert pipeline.run(str(tmp_path / "OUT"), client=client) == result
    os.utime(img2dataset / "00001.parquet", (0, 0))
    with pytest.raises(ConfigError, match=r"inputs: the table of metadata of \S+00001.tar has changed"):
        pipeline.run(str(tmp_path / "OUT"), client=client)
    sidecar = pq.read_table(result.shards[0].replace(".tar", ".parquet"))
    assert column(sidecar, "url")[:2] == ["https://x.org/000000000.jpg", "https://x.org/000000001.jpg"]
    # What imgcurate wrote is read again without its own sidecars.
    again = tiny_pipeline(str(tmp_path / "OUT" / "shards")).run(str(tmp_path / "again"), client=client)
    assert again.counts == {"ok": 10}
    assert "url" not in again.catalog.columns


def test_columns_of_sidecars_decide(img2dataset: Path, client: Client, tmp_path: Path) -> None:
    def run(out: str, *stages: ic.ProcessingStage) -> ic.Result:
        source = ic.FilePartitioningStage(str(img2dataset))
        return ic.Pipeline([source, ic.ImageReaderStage(), *stages]).run(str(tmp_path / out), client=client)

    embedding = ImageEmbeddingStage(model="tiny-image")
    where = ic.ColumnFilterStage({"punsafe": (0.5, None), "source_width": (None, 4)})
    result = run("OUT", embedding, where, SemanticDedupStage(keep_by=["-punsafe"]))
    rows = result.catalog.compute()
    keeps = (rows.punsafe >= 0.5) & (rows.source_width <= 4)
    assert 0 < keeps.sum() < len(rows)
    assert list(rows.status == "column") == list(~keeps)
    assert set(rows.reason[~keeps]) > {"punsafe 0.25 < 0.50", "source_width 5 > 4"}
    # Other ranges, of a column that is there, need no image.
    changes = {"ColumnFilterStage": {"ranges": {"punsafe": (None, 0.3)}}}
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), changes, client=client)
    assert anew.counts["column"] == (rows.punsafe > 0.3).sum()
    # What the sidecars do not tell is not kept.
    (img2dataset / "00001.parquet").unlink()
    rest = run("REST", embedding, ic.ColumnFilterStage({"punsafe": (0, None)})).catalog.compute()
    assert list(rest.status) == ["ok"] * 5 + ["column"] * 5
    for wrong, message in (
        (ic.ColumnFilterStage({"punsave": (0, 1)}), "needs the column 'punsave', which no stage before it gives"),
        (ic.ColumnFilterStage({"url": (0, 1)}), "the column 'url' does not hold numbers, but string"),
        (SemanticDedupStage(keep_by=["url"]), "keep_by: the column 'url' does not hold numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            run("WRONG", embedding, wrong)
    for ranges in ({"x": 3}, {"x": (2, 1)}, {"": (0, 1)}, [("x", 1)]):
        with pytest.raises(ConfigError, match="ranges"):
            ic.ColumnFilterStage(ranges)


def test_whole_numbers_are_compared_as_such(img2dataset: Path, client: Client, tmp_path: Path) -> None:
    large = 2**53
    for name in ("00000", "00001"):
        table = pq.read_table(img2dataset / f"{name}.parquet")
        numbers = pa.array([large, large + 1, None, large + 2, large + 3, None], pa.int64())
        pq.write_table(table.append_column("big", numbers), img2dataset / f"{name}.parquet")
    source = ic.FilePartitioningStage(str(img2dataset))
    where = ic.ColumnFilterStage({"big": (large + 1, large + 2)})
    result = ic.Pipeline([source, ic.ImageReaderStage(), where]).run(str(tmp_path / "OUT"), client=client)
    rows = result.catalog.compute()
    assert list(rows.status) == ["column", "ok", "ok", "column", "column"] * 2
    assert rows.reason.iloc[0] == f"big {large} < {large + 1}"
    assert column_options([f"big={large + 1}:", "x=:0.5"], None, None)["ranges"] == {
        "big": (large + 1, None),
        "x": (None, 0.5),
    }


def test_tables_tell_of_their_own_folder_and_the_nearer_one_counts(tmp_path: Path, photos, encode) -> None:
    for name in ("top.jpg", "a/low.jpg", "a/b/lowest.jpg"):
        path = tmp_path / "f" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photos[len(name)]))
    names = ["top.jpg", "a/low.jpg", "a/b/lowest.jpg"]
    pd.DataFrame({"file_name": names, "text": "from the top"}).to_csv(tmp_path / "f" / "metadata.csv", index=False)
    below = pd.DataFrame({"file_name": ["../top.jpg", "./low.jpg", "/etc/passwd"], "text": "from below"})
    below.to_csv(tmp_path / "f" / "a" / "metadata.csv", index=False)
    frame = ic.read_webdataset(str(tmp_path / "f")).compute(scheduler="sync").set_index("key")
    assert frame.text.to_dict() == {"top": "from the top", "a/low": "from below", "a/b/lowest": "from the top"}


def test_tables_of_a_folder_that_tell_of_no_image_are_told(tmp_path: Path, photos, encode, caplog) -> None:
    (tmp_path / "x.jpg").write_bytes(encode(photos[0]))
    (tmp_path / "metadata.csv").write_text("name;text\nx.jpg;a\n")
    assert list(ic.read_webdataset(str(tmp_path)).columns) == list(schema.INDEX_COLUMNS)
    assert "metadata.csv has no column 'file_name', so it tells of no image" in caplog.text
    (tmp_path / "metadata.csv").write_text("file_name,text,text\nx.jpg,a,b\n")
    caplog.clear()
    assert list(ic.read_webdataset(str(tmp_path)).columns) == list(schema.INDEX_COLUMNS)
    assert "it has two columns 'text'" in caplog.text


def test_a_command_keeps_ranges_of_columns(img2dataset: Path, tmp_path: Path) -> None:
    model = ["--encoder", "tiny-image", "--no-dedup", "--workers", "1", "--quiet"]
    out, anew = tmp_path / "OUT", tmp_path / "ANEW"
    done = CliRunner().invoke(app, ["curate", str(img2dataset), "-o", str(out), *model, "--where", "punsafe=:0.5"])
    assert done.exit_code == 0, done.output
    assert pd.read_parquet(out / "catalog").status.value_counts().to_dict() == {"column": 6, "ok": 4}
    for option in (["--caption", "txt"], ["--zero-shot", "a=b"]):
        bare = ["curate", str(img2dataset), "-o", str(tmp_path / "X"), "--encoder", "none", *option]
        with pytest.raises(ConfigError, match="these options need an --encoder"):
            CliRunner().invoke(app, bare, catch_exceptions=False)
    done = CliRunner().invoke(app, ["refilter", str(out), "-o", str(anew), "--where", "punsafe=1:", "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert pd.read_parquet(anew / "catalog").status.value_counts().to_dict() == {"column": 6, "ok": 4}


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def imagefolder(request: pytest.FixtureRequest, tmp_path: Path, photos: list[Image.Image], encode) -> Path:
    """Return a folder as Hugging Face's imagefolder has it: two splits with a table each, one image in no table."""
    top = tmp_path / "imagefolder"
    for split, first in (("train", 0), ("test", 6)):
        rows = []
        for i in range(first, first + 6):
            path = top / split / ("cats" if i % 2 else "dogs") / f"a {i}%.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(photos[i]))
            # Of the last of each split nothing is told.
            if i % 6 != 5:
                name = f"{path.parent.name}/{path.name}"
                rows.append({"file_name": name, "text": f"caption {i}", "label": i, "good": i / 10})
        frame = pd.DataFrame(rows)
        if request.param == "jsonl":
            frame.to_json(top / split / "metadata.jsonl", orient="records", lines=True)
        else:
            getattr(frame, f"to_{request.param}")(top / split / f"metadata.{request.param}", index=False)
    return top


def test_tables_of_a_folder_of_images_join(imagefolder: Path, client: Client, tmp_path: Path) -> None:
    result = tiny_pipeline(str(imagefolder)).run(str(tmp_path / "OUT"), client=client)
    rows = result.catalog.compute()
    assert result.counts == {"ok": 12}
    told = {f"a {i}%": (f"caption {i}", i, i / 10) for i in range(12) if i % 6 != 5}
    for row in rows.itertuples():
        name = row.key.rpartition("/")[2]
        if name in told:
            assert (row.text, row.label, row.good) == told[name]
        else:
            assert pd.isna(row.text)
            assert pd.isna(row.label)
    sidecar = pq.read_table(result.shards[0].replace(".tar", ".parquet"))
    assert sorted(filter(None, column(sidecar, "text"))) == sorted(text for text, _, _ in told.values())
    assert ic.verify_run(result.output_dir).ok
    # A table that changed makes it another run.
    table = next((imagefolder / "train").glob("metadata.*"))
    os.utime(table, (0, 0))
    with pytest.raises(ConfigError, match="has changed"):
        tiny_pipeline(str(imagefolder)).run(str(tmp_path / "OUT"), client=client)


def test_tables_of_a_folder_decide_and_may_be_damaged(imagefolder: Path, client: Client, tmp_path: Path) -> None:
    stages = [
        ic.FilePartitioningStage(str(imagefolder)),
        ic.ImageReaderStage(),
        ImageEmbeddingStage(model="tiny-image"),
    ]
    where = ic.ColumnFilterStage({"label": (None, 2)})
    result = ic.Pipeline([*stages, where, ic.ImageWriterStage()]).run(str(tmp_path / "OUT"), client=client)
    assert result.counts == {"ok": 3, "column": 9}
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), {"ColumnFilterStage": None}, client=client)
    assert anew.counts == {"ok": 12}
    frame = ic.read_webdataset(str(imagefolder), sidecar_columns=("text",)).compute(scheduler="sync")
    assert frame.text.notna().sum() == 10
    assert "text" not in ic.read_webdataset(str(imagefolder), sidecar_columns=()).columns
    next((imagefolder / "test").glob("metadata.*")).write_bytes(b"file_name,text\nx\n")
    frame = ic.read_webdataset(str(imagefolder)).compute(scheduler="sync")
    assert len(frame) == 12
    assert frame.text.notna().sum() == 5
    with pytest.raises(InputError, match=r"cannot read .*metadata\."):
        ic.read_webdataset(str(imagefolder), sidecar_columns=("text",)).compute(scheduler="sync")


def test_sidecars_on_frames(img2dataset: Path) -> None:
    ddf = ic.read_webdataset(str(img2dataset), sidecar_columns=("punsafe", "caption"))
    frame = ddf.compute(scheduler="sync")
    assert list(frame.columns[-2:]) == ["punsafe", "caption"]
    assert frame.dtypes.to_dict() == ddf.dtypes.to_dict()
    assert frame.punsafe.tolist() == [0.0, 0.25, 0.75, 1.0, 1.25] * 2
    assert "punsafe" not in ic.read_webdataset(str(img2dataset), sidecar_columns=()).columns
    with pytest.raises(ConfigError, match="no column 'nsfw' beside the shards: key, url"):
        ic.read_webdataset(str(img2dataset), sidecar_columns=("nsfw",))
    with pytest.raises(ConfigError, match="should be 'auto' or a sequence"):
        ic.read_webdataset(str(img2dataset), sidecar_columns="url")


def test_shards_without_a_sidecar_have_nulls(img2dataset: Path) -> None:
    assert RunConfig(inputs="x", stages=["y"], sidecar_columns=[]).sidecar_columns == []
    both = [str(img2dataset / "*.tar"), str(img2dataset / "*.parquet")]
    assert find_shards(both) == find_shards(str(img2dataset))
    (img2dataset / "00001.parquet").unlink()
    frame = ic.read_webdataset(str(img2dataset)).compute(scheduler="sync")
    assert frame.url.isna().tolist() == [False] * 5 + [True] * 5


def test_a_sidecar_that_disagrees_or_is_damaged_is_an_error_if_it_was_asked_for(img2dataset: Path) -> None:
    shards = find_shards(str(img2dataset))
    sidecars = find_sidecars(shards[:1], ("url", "punsafe"))
    by_itself = find_sidecars(shards[:1], "auto")
    pq.write_table(pa.table({"key": ["000010000"], "punsafe": ["high"]}), img2dataset / "00001.parquet")
    table = index_shard(shards[1], 1).table
    with pytest.raises(InputError, match="column 'punsafe' is string, and double in other shards"):
        sidecars.join(table, shards[1])
    assert by_itself.join(table, shards[1])["punsafe"].null_count == len(table)
    (img2dataset / "00001.parquet").write_bytes(b"PAR1")
    assert by_itself.join(table, shards[1])["url"].null_count == len(table)
    with pytest.raises(InputError, match=r"cannot read .*00001\.parquet, the sidecar of a shard"):
        sidecars.join(table, shards[1])


def test_sidecars_of_strangers_are_joined_as_text(img2dataset: Path, tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff\xfe", b"ok"], pa.binary()).buffers())
    columns = [pa.array([b"000000000", b"000000001"]), bad, pa.array([1, 2]), pa.array(["a", "b"])]
    names = ["key", "url", "source_status", "status"]
    pq.write_table(pa.Table.from_arrays(columns, names), img2dataset / "00000.parquet")
    (img2dataset / "00001.parquet").unlink()
    frame = ic.read_webdataset(str(img2dataset)).compute(scheduler="sync").set_index("key")
    assert frame.url.iloc[:2].tolist() == ["\\xff\\xfe", "ok"]
    assert (frame.source_status.iloc[0], frame.source_source_status.iloc[0]) == (1, "a")


# Names with dots


def test_photos_with_dots_in_their_names_are_photos_of_their_own(photos, encode, client, tmp_path, read_tar) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["2023.06.01 beach.jpg", "2023.06.02 beach.jpg", "a.b.jpg", "a_b.jpg", "c.jpg", "c.jpeg", "c.png"]
    data = {n: encode(photos[i], "PNG" if n.endswith("png") else "JPEG") for i, n in enumerate(names)}
    data |= {"2023.06.01 beach.txt": b"first", "c.txt": b"c", "a.b.jpg.txt": b"another stem"}
    for name, content in data.items():
        (folder / name).write_bytes(content)
    result = tiny_pipeline(str(folder), text_columns=("txt",)).run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute()
    assert result.counts == {"no_image": 1, "ok": 7}
    assert sorted(catalog.key) == sorted(
        ["2023_06_01 beach", "2023_06_02 beach", "a_b", "a_b", "a_b_jpg", "c", "c", "c"]
    )
    assert catalog.set_index("key").txt["2023_06_01 beach"] == "first"
    assert sorted(catalog.files.map(len)) == [1] * 6 + [2] * 2
    members = output_members(result, read_tar)
    assert members["2023_06_01 beach.jpg"] == data["2023.06.01 beach.jpg"]
    assert members["2023_06_01 beach.txt"] == b"first"
    assert sorted(members.values()) == sorted(v for k, v in data.items() if k != "a.b.jpg.txt")


def test_a_folder_of_images_and_tables_is_not_guessed_at(photos, encode, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photos[0]))
    (tmp_path / "meta.parquet").write_bytes(b"junk")
    (tmp_path / "x.tar").symlink_to("nowhere")
    assert [s.files for s in find_shards(str(tmp_path))] == [("a.jpg", "meta.parquet", "x.tar")]
    pq.write_table(pa.table({"jpg": [encode(photos[1])]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match=r"holds 1 images and 2 tables, of which .*b\.parquet holds images too: name"):
        find_shards(str(tmp_path))


def test_cells_that_python_cannot_hold_spoil_nothing_else(photos, encode, tmp_path: Path) -> None:
    def broken(value: bytes) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), 2, pa.array([value, b"ok"], pa.binary()).buffers())

    far = pa.array([2**62, 0]).cast(pa.timestamp("us"))
    columns = {
        "key": broken(b"k\xff"), "jpg": pa.array([encode(p) for p in photos[:2]]), "n": pa.array([1, 2]),
        "text": broken(b"c\xfe"), "far": far, "tz": pa.array([0, 1]).cast(pa.timestamp("s", "No/Where")),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    index = index_shard(str(tmp_path / "t.parquet"), 0, columns=MemberColumns(("json",))).table
    assert column(index, schema.KEY) == ["k\\xff", "ok"]
    assert column(index, schema.STATUS) == ["ok", "ok"]
    rows = [json.loads(j) for j in column(index, "json")]
    assert [r["n"] for r in rows] == [1, 2]
    assert (rows[0]["text"], rows[0]["far"]) == ("c\\xfe", 2**62)


def test_inspect_shows_inputs_of_every_kind(folder: Path, img2dataset: Path, photos, encode, tmp_path: Path) -> None:
    path = write_table(huggingface_table([photos[i % 60] for i in range(70)], encode), tmp_path / "t.parquet")
    report = inspect_shards([str(folder), str(img2dataset), str(path)])
    samples = {s.url: (s.samples, s.ok, s.nbytes > 0) for s in report.shards}
    assert samples[str(path)] == (70, 68, True)
    assert samples[f"{folder}/%FF.jpg ..."] == (17, 15, True)
    problems = next(s.problems for s in report.shards if s.url.startswith(str(folder)))
    assert problems == {"special file": 1, "hidden file": 1, "not UTF-8": 1}


# Elsewhere


def test_remote_inputs_of_every_kind_give_the_bytes_of_local_ones(
    folder: Path, img2dataset: Path, photos, encode, client: Client, tmp_path: Path
) -> None:
    """The workers of the fixture are threads of this process, so they see its memory:// files."""
    for name in ("pipe.jpg", "gone.jpg"):
        (folder / name).unlink()
    write_table(huggingface_table([photos[i % 60] for i in range(70)], encode), tmp_path / "t.parquet")
    (tmp_path / "z.tar.gz").write_bytes(gzip.compress((img2dataset / "00001.tar").read_bytes()))
    local = tmp_path / "in"
    local.mkdir()
    for path in (folder, img2dataset, tmp_path / "t.parquet", tmp_path / "z.tar.gz"):
        path.rename(local / path.name)
    files = fsspec.filesystem("memory")
    try:
        files.put(f"{local}/", "/in", recursive=True)
        names = ["photos", "laion", "t.parquet", "z.tar.gz"]
        runs = {}
        for kind, base in (("local", str(local)), ("memory", "memory://in")):
            inputs = [f"{base}/{name}" for name in names]
            result = tiny_pipeline(inputs).run(str(tmp_path / kind), client=client)
            catalog = result.catalog.compute().drop(columns=["shard", "embedding"]).astype(str)
            tars = {n: c for n, c in checksums(tmp_path / kind).items() if n.endswith(".tar")}
            runs[kind] = result.counts, tars, catalog.values.tolist()
    finally:
        files.rm("/in", recursive=True)
    assert runs["local"][0] == {"decode_error": 2, "no_image": 3, "ok": 96}
    assert runs["memory"] == runs["local"]


def test_a_folder_of_images_is_what_it_was_when_the_run_began(tmp_path: Path, encode, photos) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encode(photos[i]))
    shards = find_shards(str(tmp_path))
    (shard,) = (replace(s, state=state_of(d)) for s, d in zip(shards, describe_shards(shards), strict=True))
    check_unchanged(shard)
    before = (tmp_path / "1.jpg").stat()
    (tmp_path / "1.jpg").write_bytes(encode(photos[5]))
    with pytest.raises(InputError, match="changed while the run was going on"):
        check_unchanged(shard)
    (tmp_path / "1.jpg").write_bytes(encode(photos[1]))
    os.utime(tmp_path / "1.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    check_unchanged(shard)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageReaderStage(text_columns=None),
        lambda: ImageReaderStage(text_columns=5),
        lambda: ImageReaderStage(num_gpus_per_worker=None),
        lambda: ImageReaderStage(num_gpus_per_worker="1"),
        lambda: ImageEmbeddingStage(model=3),
        lambda: ImageEmbeddingStage(model=None),
        lambda: ImageEmbeddingStage(pretrained=None),
        lambda: ImageEmbeddingStage(model_dir=5),
        lambda: ExactDedupStage(keep_by=None),
        lambda: PerceptualDedupStage(keep_by=5),
        lambda: SemanticDedupStage(eps_list=0.1),
        lambda: SemanticDedupStage(eps_list=None),
        lambda: Rule("x", ">=", "abc", "low"),
        lambda: Rule("x", ">=", float("nan"), "low"),
        lambda: Rule("x", ">=", True, "low"),
    ],
)
def test_parameters_of_another_type_are_told_by_name(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="should be|path of a file"):
        make()


def test_a_glob_passes_over_statistics_of_img2dataset(img2dataset: Path) -> None:
    (img2dataset / "00000_stats.json").write_text("{}")
    found = [shard.url for shard in find_shards(f"{img2dataset}/*")]
    assert found == [str(img2dataset / "00000.tar"), str(img2dataset / "00001.tar")]
    with pytest.raises(InputError, match="unknown kind"):
        find_shards(str(img2dataset / "00000_stats.json"))
