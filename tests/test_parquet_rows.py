"""Ranges of rows of Parquet files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from imgcurate.dedup import parquet_rows
from imgcurate.dedup.parquet_rows import row_batches
from imgcurate.errors import InputError

ROWS = 100_000


@pytest.fixture(autouse=True)
def no_idle_readers() -> Iterator[None]:
    yield
    while parquet_rows._idle:
        parquet_rows._idle.pop().close()


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """Return the first rows that files were opened for."""
    firsts: list[int] = []
    original = parquet_rows._Reader

    def counted(key, first, options) -> object:
        firsts.append(first)
        return original(key, first, options)

    monkeypatch.setattr(parquet_rows, "_Reader", counted)
    return firsts


def write(path: Path, row_group_size: int) -> str:
    table = pa.table({"a": np.arange(ROWS), "b": [str(i) for i in range(ROWS)]})
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


def read(url: str, first: int, n_rows: int, columns=("a",)) -> list[int]:
    batches = list(row_batches(url, columns, first, n_rows))
    assert all(batch.schema.names == list(columns) for batch in batches)
    return [value for batch in batches for value in batch["a"].to_pylist()]


@pytest.mark.parametrize("row_group_size", [ROWS, 30_000, 9_000, 100])
def test_any_range_in_any_order(tmp_path, row_group_size: int) -> None:
    url = write(tmp_path / "a.parquet", row_group_size)
    rng = np.random.default_rng(0)
    for first in rng.integers(0, ROWS, 12).tolist():
        n_rows = int(rng.integers(0, 25_000))
        assert read(url, first, n_rows) == list(range(first, min(first + n_rows, ROWS)))
    assert read(url, ROWS, 5) == []
    assert read(url, 5, 3, ("b", "a")) == [5, 6, 7]


def test_a_large_row_group_is_decoded_once_by_who_reads_on(tmp_path, opened) -> None:
    url = write(tmp_path / "a.parquet", ROWS)
    for first in range(0, ROWS, 10_001):
        assert read(url, first, 10_001)[0] == first
    assert opened == [0]
    # Another process may have read what lies between.
    assert read(url, 0, 10) == list(range(10))
    assert read(url, 50_000, 10) == list(range(50_000, 50_010))
    assert opened == [0, 0]
    # Nothing goes back.
    assert read(url, 20_000, 10) == list(range(20_000, 20_010))
    assert opened == [0, 0, 20_000]


def test_whole_row_groups_are_read_from_where_they_begin(tmp_path, opened) -> None:
    url = write(tmp_path / "a.parquet", 10_000)
    for first in (0, 20_000, 10_000):
        assert read(url, first, 10_000)[-1] == first + 9_999
    assert opened == [0, 20_000, 10_000]
    assert not parquet_rows._idle
    assert read(url, 5_000, 2_000)[0] == 5_000
    assert read(url, 45_000, 10)[0] == 45_000
    # The group before is not decoded to get to the next one.
    assert opened[-1] == 45_000


def test_a_file_that_changed_is_opened_anew(tmp_path, opened) -> None:
    url = write(tmp_path / "a.parquet", ROWS)
    read(url, 0, 10)
    pq.write_table(pa.table({"a": np.arange(ROWS)[::-1]}), url)
    os.utime(url, (1, 1))
    assert read(url, 10, 2) == [ROWS - 11, ROWS - 12]
    assert opened == [0, 10]


def test_files_are_closed_when_the_reader_stops_early(tmp_path) -> None:
    url = write(tmp_path / "a.parquet", ROWS)
    before = len(os.listdir("/proc/self/fd"))
    for batch in row_batches(url, ["a"], 0, 20_000):
        assert len(batch)
        break
    assert not parquet_rows._idle
    for first in range(0, 40_000, 1_000):
        read(url, first, 7)
        read(url, 0, 5)
    assert len(parquet_rows._idle) <= 8
    while parquet_rows._idle:
        parquet_rows._idle.pop().close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_damaged_is_an_input_error(tmp_path) -> None:
    url = write(tmp_path / "a.parquet", ROWS)
    data = bytearray(Path(url).read_bytes())
    data[2000:4000] = b"\xff" * 2000
    Path(url).write_bytes(data)
    with pytest.raises(InputError, match="as Parquet"):
        read(url, 0, ROWS)
    Path(url).write_bytes(b"PAR1")
    with pytest.raises(InputError, match="as Parquet"):
        read(url, 0, ROWS)
