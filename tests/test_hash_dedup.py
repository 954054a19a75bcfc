"""Exact and perceptual deduplication against brute force, alone and one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st

from imgcurate import (
    ExactDedupStage,
    FilePartitioningStage,
    ImageEmbeddingStage,
    ImageQualityFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    PerceptualDedupStage,
    Pipeline,
    SemanticDedupStage,
    exact_dedup,
    perceptual_dedup,
    schema,
    semantic_dedup,
)
from imgcurate.backend import Backend, list_array
from imgcurate.catalog import Catalog, Manifest
from imgcurate.dedup.hashes import HashDedup
from imgcurate.dedup.near_hashes import band_masks, near_pairs_of
from imgcurate.dedup.verdicts import Verdicts
from imgcurate.errors import ConfigError
from imgcurate.stages.dedup_frames import run_here


def distance(a: int, b: int) -> int:
    return ((a ^ b) & (2**64 - 1)).bit_count()


def rows_of(hashes: list[int | None], seed: int = 0, left: Mapping[int, str] | None = None) -> pa.Table:
    """Return catalog rows with these hashes as ``phash``, and as ``content_hash``."""
    n = len(hashes)
    rng = np.random.default_rng(seed)
    texts = [None if h is None else f"{h & (2**64 - 1):016x}{7 * h & (2**64 - 1):016x}" for h in hashes]
    status = [(left or {}).get(i, "ok") for i in range(n)]
    return pa.table(
        {
            "uid": pa.array([(i // 100 << 32) + i % 100 for i in range(n)], pa.int64()),
            "shard": pa.array([f"in/{i // 100:05d}.tar" for i in range(n)], pa.string()),
            "key": pa.array([f"k{i % 100}" for i in range(n)], pa.string()),
            "status": pa.array(status, pa.string()),
            "reason": pa.array(["" if s == "ok" else "because" for s in status], pa.string()),
            "width": pa.array(rng.integers(1, 5, n), pa.int32()),
            "height": pa.array(rng.integers(1, 3, n), pa.int32()),
            "nbytes": pa.array(rng.integers(1, 3, n), pa.int64()),
            "content_hash": pa.array(texts, pa.string()),
            "phash": pa.array(hashes, pa.int64()),
        }
    )


def greedy(rows: pa.Table, max_distance: int) -> set[int]:
    """Return the uids that stay: in keep order, those without a row kept before that is near."""
    frame = rows.to_pandas()
    frame["phash"] = pd.Series(rows["phash"].to_pylist(), dtype=object)
    frame = frame[(frame.status == "ok") & frame.phash.notna()]
    frame = frame.assign(pixels=-frame.width * frame.height, bytes=-frame.nbytes)
    kept: dict[int, int] = {}
    for row in frame.sort_values(["pixels", "bytes", "uid"]).itertuples():
        if all(distance(int(row.phash), h) > max_distance for h in kept.values()):
            kept[row.uid] = int(row.phash)
    return set(kept)


def pairs_of(verdicts: Verdicts) -> dict[int, tuple[int, str]]:
    decided = zip(verdicts.keeper.tolist(), verdicts.reason.tolist(), strict=True)
    return dict(zip(verdicts.uid.tolist(), decided, strict=True))


def decide(folder: Path, parts: list[pa.Table], kind: str, max_distance: int, **options) -> dict[int, tuple[int, str]]:
    catalog = Catalog(str(folder / "run"), len(parts))
    catalog.make_folders()
    for i, part in enumerate(parts):
        catalog.write_part(i, part)
    job = HashDedup(catalog, kind, max_distance, ("-width*height", "-nbytes"), str(folder / "scratch"), **options)
    job.run(run_here)
    found = {}
    for i in range(len(parts)):
        verdicts, _ = job.outcome(i)
        assert verdicts.uid.tolist() == parts[i]["uid"].to_pylist()
        found |= pairs_of(verdicts)
    return found


def cut(rows: pa.Table, size: int) -> list[pa.Table]:
    return [rows.slice(i, size) for i in range(0, max(1, len(rows)), size)]


def check(rows: pa.Table, found: Mapping[int, tuple[int, str]], max_distance: int) -> None:
    by_uid = {r["uid"]: r for r in rows.to_pylist()}
    takes_part = {u for u, r in by_uid.items() if r["status"] == "ok" and r["phash"] is not None}
    stays = {u for u in takes_part if found[u][0] < 0}
    assert stays == greedy(rows, max_distance)
    assert all(found[u] == (-1, "") for u in set(by_uid) - takes_part)
    for uid in takes_part - stays:
        keeper, reason = found[uid]
        assert keeper in stays
        apart = distance(by_uid[uid]["phash"], by_uid[keeper]["phash"])
        assert apart <= max_distance
        kept = by_uid[keeper]
        assert reason == f"duplicate of {kept['shard'][3:8]}/{kept['key']}, Hamming distance {apart}"


def planted(n: int, seed: int = 0) -> list[int | None]:
    """Return hashes: groups of some bits around a few centres, equal ones, and some that are none."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(-(2**63), 2**63, max(1, n // 12))
    out: list[int | None] = []
    for _ in range(n):
        value = int(centres[rng.integers(len(centres))])
        for bit in rng.choice(64, rng.integers(0, 5), replace=False):
            value ^= 1 << int(bit)
        out.append(None if rng.random() < 0.05 else (value + 2**63) % 2**64 - 2**63)
    return out


HASHES = st.lists(
    st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, 3, 7, 15, 31, 63, -1, -2, -(2**63)])),
    max_size=24,
)


@settings(max_examples=25, deadline=None)
@given(HASHES, st.integers(0, 16), st.integers(1, 12), st.sampled_from([1024, 2**27]))
def test_any_hashes_give_what_brute_force_gives(tmp_path_factory, hashes, max_distance, size, bucket_bytes) -> None:
    rows = rows_of(hashes, left={3: "nsfw"})
    folder = tmp_path_factory.mktemp("any")
    found = decide(folder, cut(rows, size), "phash", max_distance, bucket_bytes=bucket_bytes)
    check(rows, found, max_distance)


@pytest.mark.parametrize("max_distance", [0, 1, 4, 6, 10])
def test_planted_groups_give_what_brute_force_gives(tmp_path: Path, max_distance: int) -> None:
    rows = rows_of(planted(500), left={5: "decode_error", 77: "aesthetic"})
    found = decide(tmp_path, cut(rows, 90), "phash", max_distance, bucket_bytes=4000)
    check(rows, found, max_distance)
    assert sum(keeper >= 0 for keeper, _ in found.values()) > 20


@pytest.mark.parametrize("max_distance", [1, 2, 4, 8])
def test_every_choice_of_bands_finds_each_near_pair_once(max_distance: int) -> None:
    hashes = np.unique(np.array([h for h in planted(900, seed=3) if h is not None]).view(np.uint64))
    apart = np.bitwise_count(hashes[:, None] ^ hashes)
    expected = set(zip(*(x.tolist() for x in np.nonzero(np.triu(apart <= max_distance, 1))), strict=True))
    assert len(expected) > 50
    sizes = set()
    # The number of rows decides which bands are taken, and must decide nothing else.
    for n_rows in (10, 10**5, 10**7, 10**9):
        masks = band_masks(n_rows, max_distance, split=n_rows > 10)
        sizes.add(len(masks))
        found = []
        for number in range(len(masks)):
            i, j, bits = near_pairs_of(hashes, masks, number, max_distance)
            assert (bits == apart[i, j]).all()
            found += [(min(a, b), max(a, b)) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
        assert len(found) == len(set(found))
        assert set(found) == expected
    assert len(sizes) > 1


def test_partitions_and_their_order_do_not_matter(tmp_path: Path) -> None:
    rows = rows_of(planted(300, seed=1))
    shuffled = rows.take(pa.array(np.random.default_rng(0).permutation(300)))
    layouts = {
        "one": [rows], "many": cut(rows, 23), "shuffled": cut(shuffled, 110),
        "with empty ones": [rows.slice(0, 0), rows.slice(0, 150), rows.slice(0, 0), rows.slice(150)],
    }  # fmt: skip
    found = {
        (name, size): decide(tmp_path / f"{name}{size}", parts, "phash", 4, bucket_bytes=size)
        for name, parts in layouts.items()
        for size in (2**27, 3000)
    }
    assert len({tuple(sorted(f.items())) for f in found.values()}) == 1


def test_equal_bytes_are_found_and_the_preferred_one_stays(tmp_path: Path) -> None:
    rows = rows_of([h // 3 * 3 if h is not None else None for h in planted(400, seed=2)], left={9: "nsfw"})
    found = decide(tmp_path, cut(rows, 70), "content", 0, bucket_bytes=5000)
    frame = rows.to_pandas()
    frame = frame[(frame.status == "ok") & frame.content_hash.notna()]
    order = frame.assign(p=-frame.width * frame.height, b=-frame.nbytes).sort_values(["p", "b", "uid"])
    best = order.groupby("content_hash").uid.first()
    names = {r["uid"]: f"{r['shard'][3:8]}/{r['key']}" for r in rows.to_pylist()}
    expected = {int(u): (-1, "") for u in rows["uid"].to_pylist()}
    for row in frame.itertuples():
        keeper = int(best[row.content_hash])
        if keeper != row.uid:
            expected[row.uid] = (keeper, f"duplicate of {names[keeper]}, same bytes")
    assert found == expected
    assert sum(keeper >= 0 for keeper, _ in found.values()) >= 50


def test_many_equal_hashes_are_not_compared_with_each_other(tmp_path: Path) -> None:
    # Compared with each other, 200,000 rows would be 20 billion pairs.
    n = 200_000
    rows = rows_of([5, 7] * (n // 2 - 1) + [5, -1])
    parts = cut(rows, 50_000)
    found = decide(tmp_path, parts, "phash", 4)
    keepers = {keeper for keeper, _ in found.values()}
    assert len(keepers) == 2
    catalog = Catalog(str(tmp_path / "run"), 4)
    job = HashDedup(catalog, "phash", 4, ("-width*height", "-nbytes"), str(tmp_path / "scratch"))
    assert sum(len(job._files.read(f"rows/{p:05d}")) for p in range(4)) <= 12


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    parts = cut(rows_of(planted(300, seed=4)), 60)
    expected = decide(tmp_path / "whole", parts, "phash", 4, bucket_bytes=4000)

    class StoppedError(Exception):
        pass

    def stop_in(step: str):
        def run_tasks(name, function, numbers, **_):
            if name == step:
                run_here(name, function, list(numbers)[:1])
                raise StoppedError
            return run_here(name, function, numbers)

        return run_tasks

    catalog = Catalog(str(tmp_path / "whole" / "run"), len(parts))
    job = HashDedup(catalog, "phash", 4, ("-width*height", "-nbytes"), str(tmp_path / "stopped"), bucket_bytes=4000)
    for step in ("hashes", "equal", "bands", "near"):
        with pytest.raises(StoppedError):
            job.run(stop_in(step))
    job.run(run_here)
    found = {}
    for i in range(len(parts)):
        verdicts, _ = job.outcome(i)
        found |= pairs_of(verdicts)
    assert found == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactDedupStage(by="phash"), "by='phash' is none of content, pixels"),
        (lambda: ExactDedupStage(keep_by="width"), "should be a sequence"),
        (lambda: PerceptualDedupStage(keep_by=["-width+1"]), "keep_by: '-width\\+1' is not understood"),
        (lambda: PerceptualDedupStage(17), "whole number, 0 to 16"),
        (lambda: PerceptualDedupStage(-1), "0 to 16"),
        (lambda: PerceptualDedupStage(2.5), "whole number"),
        (lambda: PerceptualDedupStage(True), "whole number"),
    ],
)
def test_stages_refuse_what_they_cannot_do(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_pipeline_without_hashes_fails_before_it_starts() -> None:
    stages = [FilePartitioningStage("x.tar"), ImageReaderStage()]
    with pytest.raises(ConfigError, match="ExactDedupStage needs the column 'content_hash'"):
        Pipeline([*stages, ExactDedupStage()]).plan()
    with pytest.raises(ConfigError, match="PerceptualDedupStage needs the column 'phash'"):
        Pipeline([*stages, ImageQualityFilterStage(columns=["content_hash"]), PerceptualDedupStage()]).plan()


def frame_of(rows: pa.Table, npartitions: int) -> dd.DataFrame:
    frame: pd.DataFrame = Backend("cpu").frame_from_arrow(rows)
    return dd.from_pandas(frame, npartitions=npartitions, sort=False)


def test_functions_on_frames(client: Client) -> None:
    rows = rows_of(planted(120, seed=5))
    out = perceptual_dedup(frame_of(rows, 3), max_distance=3).compute()
    assert list(out.uid) == rows["uid"].to_pylist()
    keepers = [-1 if pd.isna(keeper) else int(keeper) for keeper in out.duplicate_of]
    found = dict(zip(out.uid, zip(keepers, out.reason, strict=True), strict=True))
    check(rows, found, 3)
    assert set(out.duplicate_by.dropna()) == {"phash"}
    assert ((out.status == "duplicate") == out.duplicate_of.notna()).all()
    assert out.similarity.isna().all()
    with pytest.raises(ConfigError, match="exact_dedup needs the column 'pixel_hash'"):
        exact_dedup(frame_of(rows, 1), by="pixels")
    wrong = rows.set_column(8, "content_hash", pa.array(["abc"] * len(rows)))
    with pytest.raises(ConfigError, match="32 hexadecimal digits, not 'abc'"):
        exact_dedup(frame_of(wrong, 1))
    with pytest.raises(ConfigError, match="keep_by: the column 'key' does not hold numbers"):
        exact_dedup(frame_of(rows, 1), keep_by=["key"])


# Five pictures: 0 and 1 have the same bytes, 2 nearly the hash of 1, 3 the same bytes as 2, and 4 is near 0 by
# its embedding. What is kept last is the widest.
CHAIN = {
    "content_hash": [f"{n:032x}" for n in (1, 1, 2, 2, 3, 4)],
    "phash": [0, 0, 3, 3, 2**40 - 1, -1],
    "width": [1, 2, 3, 4, 5, 9],
}
NEAR = np.array([0.98, np.sqrt(1 - 0.98**2), 0.0])


def chain(order: list[int], **columns) -> dd.DataFrame:
    """Return the frame of the chain, its rows in some order, a partition for each."""
    x = np.array([[1.0, 0, 0]] * 4 + [NEAR, [0, 0, 1.0]], dtype=np.float32)
    rows = rows_of([0] * 6)
    for name, values in (CHAIN | columns).items():
        rows = rows.set_column(rows.column_names.index(name), name, pa.array(values, rows[name].type))
    rows = rows.append_column("embedding", list_array(x)).take(pa.array(order))
    return dd.concat([frame_of(rows.slice(i, 1), 1) for i in range(6)])


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 3, 1, 4, 2, 0]])
def test_duplicates_follow_what_they_were_duplicates_of(order: list[int]) -> None:
    exact = exact_dedup(chain(order))
    near = perceptual_dedup(exact, max_distance=4)
    out = semantic_dedup(near, eps=0.05, n_clusters=1, keep_by=["-width"]).compute().set_index("uid").sort_index()

    first = exact.compute().set_index("uid").sort_index()
    assert first.status.tolist() == ["duplicate", "ok", "duplicate", "ok", "ok", "ok"]
    second = near.compute().set_index("uid").sort_index()
    assert second.status.tolist() == ["duplicate"] * 3 + ["ok"] * 3
    assert second.duplicate_of.tolist()[:3] == [3, 3, 3]
    assert second.duplicate_by.tolist()[:3] == ["phash", "phash", "content"]
    assert second.reason[0] == "duplicate of 00000/k1, same bytes, which is a duplicate of 00000/k3, Hamming distance 2"

    assert out.status.tolist() == ["duplicate"] * 4 + ["ok"] * 2
    assert out.duplicate_of.tolist()[:4] == [4, 4, 4, 4]
    assert out.duplicate_by.tolist()[:4] == ["embedding"] * 4
    assert out.duplicate_of[4:].isna().all()
    step = "which is a duplicate of"
    assert out.reason.tolist() == [
        f"duplicate of 00000/k1, same bytes, {step} 00000/k3, Hamming distance 2, {step} 00000/k4, cosine 0.980",
        f"duplicate of 00000/k3, Hamming distance 2, {step} 00000/k4, cosine 0.980",
        f"duplicate of 00000/k3, same bytes, {step} 00000/k4, cosine 0.980",
        "duplicate of 00000/k4, cosine 0.980",
        "",
        "",
    ]
    # Only what is equal to 3 is known to have its cosine.
    assert out.similarity.isna().tolist() == [True, True, False, False, True, True]
    assert out.similarity[2] == pytest.approx(0.98, abs=1e-6)


def test_a_cosine_holds_over_a_step_between_equal_images() -> None:
    # 3 goes for 4 by its embedding, then 4 for 5 by its bytes.
    frame = chain([0, 1, 2, 3, 4, 5], content_hash=[f"{n:032x}" for n in (1, 2, 3, 4, 9, 9)])
    first = semantic_dedup(frame, eps=0.05, n_clusters=1, keep_by=["-width"])
    out = exact_dedup(first, keep_by=["-width"]).compute().set_index("uid").sort_index()
    assert out.status.tolist() == ["duplicate"] * 5 + ["ok"]
    assert out.duplicate_of.tolist()[:5] == [5] * 5
    assert out.duplicate_by.tolist()[:5] == ["embedding"] * 4 + ["content"]
    np.testing.assert_allclose(out.similarity[:4].astype(float), 0.98, atol=1e-6)
    assert pd.isna(out.similarity[4])
    assert out.cluster.notna().all()
    again = perceptual_dedup(exact_dedup(first), max_distance=16).compute()
    assert (again.similarity.isna() | (again.duplicate_by == "embedding")).all()


def test_duplicates_follow_into_a_reference_run(tmp_path: Path) -> None:
    reference = Catalog(str(tmp_path / "old"), 1)
    reference.make_folders()
    reference.write_part(0, chain([5, 4, 3, 2, 1, 0]).partitions[1].compute().pipe(to_arrow))
    Manifest("0" * 64, {}, 1, state="done").save(str(tmp_path / "old"))
    frame = chain([0, 1, 2, 3, 4, 5]).loc[lambda f: f.uid < 2]
    out = semantic_dedup(exact_dedup(frame), eps=0.05, n_clusters=1, reference=[reference.folder])
    out = out.compute().reset_index(drop=True)
    assert out.status.tolist() == ["duplicate", "duplicate"]
    assert out.duplicate_of.tolist() == [4, 4]
    assert out.duplicate_in.tolist() == [reference.folder] * 2
    found = f"duplicate of {reference.folder}: 00000/k4, cosine 0.980"
    assert out.reason.tolist() == [f"duplicate of 00000/k1, same bytes, which is a {found}", found]
    np.testing.assert_allclose(out.similarity.astype(float), 0.98, atol=1e-6)
    # A stage after it leaves alone what belongs to another run, whose uids may be those of this one.
    again = exact_dedup(out.pipe(dd.from_pandas, npartitions=1)).compute()
    pd.testing.assert_frame_equal(again[list(out.columns)], out)


def to_arrow(frame: pd.DataFrame) -> pa.Table:
    names = list(frame.columns)
    types = {"embedding": pa.list_(pa.float32())}
    return Backend("cpu").frame_to_arrow(frame, schema.arrow_schema(names, types))


def test_what_a_filter_drops_later_stays_a_filters_decision() -> None:
    out = exact_dedup(chain([0, 1, 2, 3, 4, 5]))

    def drop(frame: pd.DataFrame) -> pd.DataFrame:
        gone = frame.uid == 1
        return frame.assign(status=frame.status.mask(gone, "nsfw"), reason=frame.reason.mask(gone, "nsfw_score 0.9"))

    later = perceptual_dedup(out.map_partitions(drop, meta=out._meta), max_distance=4).compute().set_index("uid")
    assert (later.status[1], later.reason[1]) == ("nsfw", "nsfw_score 0.9")
    assert (later.status[0], later.duplicate_of[0], later.reason[0]) == (
        "duplicate",
        1,
        "duplicate of 00000/k1, same bytes",
    )


@pytest.fixture(scope="module")
def dirty(tmp_path_factory, photos, encode, write_tar) -> Path:
    """Return six shards: 24 photos, 8 of them twice, 8 as PNG of the same pixels, 8 recompressed, 8 halved."""
    import io

    from PIL import Image

    folder = tmp_path_factory.mktemp("dirty")
    samples = []
    for i, photo in enumerate(photos[:24]):
        blob = encode(photo)
        samples.append((f"photo/{i:02d}", {"jpg": blob, "txt": b"one"}))
        if i < 8:
            samples.append((f"bytes/{i:02d}", {"jpg": blob, "txt": b"another"}))
            decoded = Image.open(io.BytesIO(blob)).convert("RGB")
            samples.append((f"pixels/{i:02d}", {"png": encode(decoded, "PNG")}))
            samples.append((f"jpeg/{i:02d}", {"jpg": encode(photo, quality=30)}))
            half = photo.resize((photo.width // 2, photo.height // 2))
            samples.append((f"half/{i:02d}", {"jpg": encode(half)}))
    samples.append(("broken", {"jpg": b"\xff\xd8\xff nothing"}))
    samples.append(("white", {"png": encode(Image.new("RGB", (64, 64), "white"), "PNG")}))
    samples.append(("black", {"png": encode(Image.new("RGB", (64, 64), "black"), "PNG")}))
    for k in range(6):
        write_tar(folder / f"{k:05d}.tar", samples[k::6])
    return folder


def run_all(source: Path, out: Path, client: Client | None = None, files_per_partition: int = 1) -> pd.DataFrame:
    pipeline = Pipeline(
        [
            FilePartitioningStage(str(source / "*.tar"), files_per_partition),
            ImageReaderStage(dali_batch_size=5),
            ImageQualityFilterStage({"sharpness": (0, None)}, columns=["content_hash", "pixel_hash", "phash"]),
            ImageEmbeddingStage(model="tiny-image"),
            ExactDedupStage(),
            ExactDedupStage(by="pixels"),
            PerceptualDedupStage(max_distance=4),
            SemanticDedupStage(eps=0.05, n_clusters=2, keep_by=["-width*height", "-nbytes"]),
            ImageWriterStage(images_per_tar=10),
        ]
    )
    result = pipeline.run(str(out), client=client)
    assert sum(result.counts.values()) == result.samples == 59
    return result.catalog.compute().set_index("uid").sort_index()


@pytest.fixture(scope="module")
def curated(dirty: Path, tmp_path_factory) -> pd.DataFrame:
    """Return the catalog of a run on two worker processes."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        return run_all(dirty, tmp_path_factory.mktemp("processes") / "OUT", client)


def test_all_dedup_stages_in_one_pipeline(curated: pd.DataFrame) -> None:
    assert (curated.status == "ok").sum() == 26
    assert curated.status[curated.key == "broken"].tolist() == ["decode_error"]
    # Flat pictures are nobody's duplicate.
    assert (curated.status[curated.key.isin(["white", "black"])] == "ok").all()
    removed = curated[curated.status == "duplicate"]
    assert len(removed) == 32
    kept = curated.loc[removed.duplicate_of]
    assert (kept.status == "ok").all()
    assert (kept.key.str.split("/").str[1].to_numpy() == removed.key.str.split("/").str[1].to_numpy()).all()
    # Byte for byte or pixel for pixel the same, whatever the steps: the hash says so.
    exact = removed.duplicate_by.isin(["content", "pixels"])
    same = removed.pixel_hash.to_numpy() == kept.pixel_hash.to_numpy()
    assert (exact.to_numpy() == same).all()
    assert exact.sum() == 16
    assert removed[removed.duplicate_by == "content"].reason.str.endswith("same bytes").all()
    chained = removed.reason.str.contains("which is a duplicate of")
    assert chained.sum() >= 8
    names = [f"duplicate of {Path(k.shard).stem}/{k.key}, " for k in kept.itertuples()]
    assert all(name in reason for name, reason in zip(names, removed.reason, strict=True))
    assert (removed.similarity.notna() == (removed.duplicate_by == "embedding")).mean() > 0.8


def test_the_same_whatever_partitions_and_workers(curated, dirty: Path, tmp_path: Path, client: Client) -> None:
    columns = ["status", "reason", "duplicate_of", "duplicate_by", "similarity", "content_hash", "pixel_hash", "phash"]
    other = run_all(dirty, tmp_path / "OUT", client, files_per_partition=4)
    pd.testing.assert_frame_equal(curated[columns], other[columns])
