"""Which shards make a partition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from imgcurate import FilePartitioningStage, ImageReaderStage, ImageWriterStage, Pipeline, verify_run
from imgcurate.catalog import Manifest
from imgcurate.partitions import Partitions
from imgcurate.results import Result

MIB = 1024**2
SIZES = st.lists(st.one_of(st.none(), st.integers(0, 20 * MIB)), min_size=1, max_size=400)


@given(SIZES, st.one_of(st.none(), st.integers(1, 9)), st.data())
def test_every_input_is_in_one_part_and_no_part_has_two_increments(
    nbytes: list[int | None], files_per_partition: int | None, data: st.DataObject
) -> None:
    n = len(nbytes)
    increments = sorted({*data.draw(st.lists(st.integers(1, n), max_size=3)), n})
    parts = Partitions.divide(nbytes, files_per_partition, increments)
    assert [i for numbers in parts for i in numbers] == list(range(n))
    assert len(list(parts)) == len(parts)
    assert set(increments[:-1]) <= set(parts.starts)
    for part, numbers in enumerate(parts):
        assert (parts.part_of(np.array(numbers)) == part).all()
        assert 1 <= len(numbers) <= (files_per_partition or 64)
    assert parts.part_of(np.array([-1, n])).tolist() == [-1, -1]


@given(st.integers(1, 300), st.integers(1, 300))
def test_the_parts_of_an_increment_do_not_change_when_more_come(first: int, more: int) -> None:
    sizes: list[int | None] = [100] * (first + more)
    before = Partitions.divide(sizes[:first], None)
    after = Partitions.divide(sizes, None, [first, first + more])
    assert after.starts[: len(before)] == before.starts


@pytest.mark.parametrize("increments", [[5], [3, 2], [2, 2]])
def test_increments_that_cannot_be_are_refused(increments: list[int]) -> None:
    with pytest.raises(ValueError, match="increments="):
        Partitions.divide([1] * 4, None, increments)


def test_tiny_files_share_a_part_where_there_are_many() -> None:
    assert len(Partitions.divide([1000] * 100, None)) == 100
    assert len(Partitions.divide([1000] * 100_000, None)) == 1563
    assert len(Partitions.divide([None] * 1000, None)) == 1000
    assert len(Partitions.divide([9 * MIB] * 1000, None)) == 1000
    # Four of 2 MiB make 8 MiB.
    assert len(Partitions.divide([2 * MIB] * 1000, None)) == 250
    parts = Partitions.divide(([MIB] * 3 + [100 * MIB]) * 250, None)
    assert [len(numbers) for numbers in parts][:4] == [3, 1, 3, 1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_tar: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    for i in range(200):
        members = {"jpg": b"\xff\xd8\xff\xe0" + bytes([i]) * 40, "txt": f"caption {i}".encode()}
        write_tar(folder / f"{i:04d}.tar", [(f"{i}a", members), (f"{i}b", members)])
    return folder


def run(folder: Path, out: Path, client: Client, files_per_partition: int | None = None) -> Result:
    pipeline = Pipeline([
        FilePartitioningStage(str(folder / "*.tar"), files_per_partition),
        ImageReaderStage(),
        ImageWriterStage(images_per_tar=150),
    ])  # fmt: skip
    return pipeline.run(str(out), client=client)


def shards_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "shards").iterdir())}


def test_shared_parts_give_the_same_shards_and_rows(tiny: Path, tmp_path: Path, client: Client) -> None:
    together = run(tiny, tmp_path / "together", client)
    alone = run(tiny, tmp_path / "alone", client, files_per_partition=1)
    parts = [len(list((tmp_path / name / "catalog").iterdir())) for name in ("together", "alone")]
    assert parts == [67, 200]
    assert shards_of(tmp_path / "together") == shards_of(tmp_path / "alone")
    frames = [result.catalog.compute().reset_index(drop=True) for result in (together, alone)]
    assert frames[0].equals(frames[1])
    assert verify_run(str(tmp_path / "together"), client=client).problems == []


def test_a_run_with_shared_parts_grows(tiny: Path, tmp_path: Path, client: Client) -> None:
    names = sorted(p.name for p in tiny.iterdir())
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names[:150]:
        (folder / name).hardlink_to(tiny / name)
    run(folder, tmp_path / "OUT", client)
    for name in names[150:]:
        (folder / name).hardlink_to(tiny / name)
    grown = run(folder, tmp_path / "OUT", client)
    manifest = Manifest.load(str(tmp_path / "OUT"))
    assert manifest is not None
    assert manifest.increments == [150, 200]
    assert manifest.n_parts == 75 + 50
    assert grown.counts == {"ok": 400}
    run(folder, tmp_path / "whole", client)
    assert shards_of(tmp_path / "OUT") == shards_of(tmp_path / "whole")
    assert verify_run(str(tmp_path / "OUT"), client=client).problems == []
