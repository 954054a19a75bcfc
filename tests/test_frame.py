"""Frames: lazy, one task per partition, and the functions that go with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from distributed import Client

from imgcurate import embed, read_webdataset, score_aesthetic, score_nsfw, semantic_dedup, write_webdataset
from imgcurate.cluster import open_client
from imgcurate.errors import ConfigError, EncoderMismatchError, InputError
from imgcurate.stages import ImageEmbeddingStage, ImageReaderStage
from imgcurate.stages.executor import apply_stages


def test_a_partition_per_group_of_shards(shards: Path) -> None:
    pattern = str(shards / "{00000..00003}.tar")
    frames = {n: read_webdataset(pattern, files_per_partition=n) for n in (1, 3, 9)}
    assert {n: f.npartitions for n, f in frames.items()} == {1: 4, 3: 2, 9: 1}
    computed = [f.compute().reset_index(drop=True) for f in frames.values()]
    assert computed[0].equals(computed[1])
    assert computed[0].equals(computed[2])
    first = computed[0]
    assert len(first) == first.uid.nunique() == 72
    assert (first.uid.to_numpy()[:18] >> 32 == 0).all()
    assert first.dtypes.equals(frames[1].dtypes)


def test_nothing_is_read_before_the_frame_is_computed(tmp_path: Path) -> None:
    path = tmp_path / "later.tar"
    ddf = read_webdataset(str(path))
    path.write_bytes(b"\0" * 10240)
    assert len(ddf) == 0
    with pytest.raises(InputError, match="nothing matches"):
        read_webdataset(str(tmp_path / "*.tgz"))
    with pytest.raises(ConfigError, match="files_per_partition=0 should be >= 1"):
        read_webdataset(str(path), files_per_partition=0)


def test_texts_are_columns_when_asked_for(shards: Path) -> None:
    frame = read_webdataset(str(shards / "*.tar"), text_columns=("txt", "json")).compute()
    row = frame[frame.key == "photo/007"].iloc[0]
    assert (row.txt, row.json) == ("caption 7", '{"i": 7}')
    assert frame.json.isna().sum() == 12
    members = frame[frame.key == "photo/007"].members.iloc[0]
    assert list(members) == ["jpg", "txt", "json"]


def test_reading_embedding_and_masking_is_one_task_per_partition(shards: Path) -> None:
    ddf = embed(read_webdataset(str(shards / "*.tar")), model="tiny-image")
    ddf = ddf[(ddf.status == "ok") & (ddf.width >= 112)][["uid", "embedding"]]
    assert len(ddf.optimize().__dask_graph__()) == ddf.npartitions == 4
    frame = ddf.compute(scheduler="threads")
    x = np.stack(frame.embedding.to_numpy())
    assert x.shape == (len(frame), 768)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)


def test_batch_size_and_partitions_do_not_change_embeddings(shards: Path) -> None:
    def run(batch_size: int, files_per_partition: int) -> np.ndarray:
        ddf = read_webdataset(str(shards / "*.tar"), files_per_partition=files_per_partition)
        return np.stack(embed(ddf, model="tiny-image", batch_size=batch_size).embedding.compute().to_numpy())

    np.testing.assert_array_equal(run(7, 1), run(64, 4))


def test_from_shards_to_shards(shards: Path, tmp_path: Path, client: Client, read_tar) -> None:
    ddf = embed(read_webdataset(str(shards / "*.tar")), model="tiny-image")
    ddf = ddf[ddf.width >= 112]
    ddf = semantic_dedup(ddf, eps=0.05, scratch_dir=str(tmp_path / "scratch"))
    written = write_webdataset(ddf, str(tmp_path / "out"), images_per_tar=30)
    kept = ddf[ddf.status == "ok"].key.compute()
    assert sum(s["samples"] for s in written) == len(kept)
    names = {n for s in written for n in read_tar(tmp_path / "out" / s["name"])}
    assert {n.split(".")[0] for n in names} == set(kept)
    assert sorted(p.name for p in (tmp_path / "out").iterdir())[:2] == ["00000.parquet", "00000.tar"]
    with pytest.raises(ConfigError, match="holds shards already"):
        write_webdataset(ddf, str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="needs the column 'spans'"):
        write_webdataset(ddf.drop(columns="spans"), str(tmp_path / "other"))


@pytest.fixture(params=["no cluster", "a cluster"])
def _maybe_a_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    with open_client(device="cpu", n_workers=2) if request.param == "a cluster" else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("_maybe_a_cluster")
def test_frames_are_shuffled_merged_stored_and_read_again(shards: Path, tmp_path: Path, monkeypatch, read_tar) -> None:
    monkeypatch.chdir(tmp_path)
    ddf = read_webdataset(str(shards / "*.tar"))
    keys = list(ddf.key.compute())
    assert len(ddf.drop_duplicates(subset="key").compute()) == len(set(keys))
    assert sorted(ddf.shuffle("key", npartitions=3).key.compute()) == sorted(keys)
    labels = pd.DataFrame({"key": keys[::3], "label": range(len(keys[::3]))})
    merged = ddf.merge(dd.from_pandas(labels, npartitions=2).astype({"key": ddf.dtypes["key"]}), on="key")
    assert sorted(merged.label.compute()) == list(range(len(labels)))
    # Relative folders are those of this process, wherever workers run.
    (written,) = write_webdataset(merged, "merged")
    assert {n.split(".")[0] for n in read_tar(tmp_path / "merged" / written["name"])} == set(keys[::3])
    embed(ddf, model="tiny-image").to_parquet("embedded")
    assert pd.read_parquet("embedded").dtypes["members"] == ddf.dtypes["members"]
    again = dd.read_parquet("embedded")
    deduped = semantic_dedup(again, eps=0.05, scratch_dir="scratch").compute()
    direct = semantic_dedup(embed(ddf, model="tiny-image"), eps=0.05).compute()
    for column in ("uid", "status", "duplicate_of"):
        assert list(deduped[column].fillna(-1)) == list(direct[column].fillna(-1))


def test_frames_that_cannot_work_are_refused(shards: Path, tmp_path: Path) -> None:
    ddf = embed(read_webdataset(str(shards / "00000.tar")), model="tiny-image")
    with pytest.raises(ConfigError, match="uid 0 stands in several rows"):
        semantic_dedup(dd.concat([ddf, ddf]))
    with pytest.raises(ConfigError, match="takes a Dask DataFrame, not DataFrame: leave out compute"):
        write_webdataset(ddf.compute(), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="takes a Dask DataFrame"):
        semantic_dedup(ddf.compute())
    wrong = ddf.assign(embedding="text")
    with pytest.raises(ConfigError, match="does not hold what it should"):
        semantic_dedup(wrong)


def test_a_head_refuses_embeddings_of_another_model(shards: Path) -> None:
    ddf = embed(read_webdataset(str(shards / "00000.tar")), model="tiny-image")
    with pytest.raises(EncoderMismatchError, match="tiny-image"):
        score_aesthetic(ddf).compute()
    with pytest.raises(EncoderMismatchError, match="tiny-image"):
        score_nsfw(ddf).compute()


def test_stages_on_a_frame_need_their_columns(shards: Path) -> None:
    ddf = read_webdataset(str(shards / "00000.tar"))
    with pytest.raises(ConfigError, match="ImageEmbeddingStage needs the column 'image'"):
        apply_stages(ddf, [ImageEmbeddingStage("tiny-image")])
    with pytest.raises(ConfigError, match="needs the column 'status'"):
        apply_stages(ddf.drop(columns="status"), [ImageEmbeddingStage("tiny-image")], reader=ImageReaderStage())
