"""What a task does with one partition of a run: make its part of the catalog, count, finish, take back.

Every function is called on a worker, and returns a small result: :data:`COUNTS`, the rows by status, and
:data:`FILE`, size and checksum of the part.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import Backend
from imgcurate.catalog import Catalog
from imgcurate.dedup.verdicts import Ledger
from imgcurate.execution import COUNTS, RESULT_META, number_frame, reason_of, result_frame
from imgcurate.export import kept_counts
from imgcurate.heartbeat import teller
from imgcurate.memory import is_device_error
from imgcurate.metrics import counted
from imgcurate.stages.executor import Program, frame_types
from imgcurate.success import file_digest

__all__ = [
    "FILE",
    "count_part",
    "deltas",
    "failed_parts",
    "finish_part",
    "made_parts",
    "reset_part",
    "salvaged_parts",
    "write_decided",
]

FILE: Final = "file"


def made_parts(
    ddf: dd.DataFrame, numbers: Sequence[int], catalog: Catalog, program: Program | None, topic: str = ""
) -> dd.DataFrame:
    """Return the frame that runs a program over partitions and writes them as parts of a catalog.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        The rows, a partition for each of `numbers`.
    numbers : sequence of int
        The parts.
    catalog : Catalog
        Where they go.
    program : Program, optional
        What is done first. While images are decoded the parts are marked: those whose worker died in a
        former attempt are decoded in a process of its own.
    """
    types = frame_types(ddf)
    in_schema = pa.schema([pa.field(c, types[c]) for c in ddf.columns])
    out = program.output_schema(list(ddf.columns), types) if program else schema.arrow_schema(ddf.columns, types)
    return dd.map_partitions(
        _make_part, ddf, number_frame(numbers), catalog, program, in_schema, out, topic,
        meta=RESULT_META, align_dataframes=False, enforce_metadata=False,
    )  # fmt: skip


def _make_part(
    frame: Any, numbers: pd.DataFrame, catalog: Catalog, program: Program | None, in_schema: pa.Schema, out: pa.Schema,
    topic: str,
) -> pd.DataFrame:  # fmt: skip
    with counted("make") as work:
        result = _made_part(_number(numbers), _table(frame, in_schema), catalog, program, out, topic)
        work.counts = result[COUNTS]
    return result_frame(_number(numbers), result)


def _made_part(
    number: int, table: pa.Table, catalog: Catalog, program: Program | None, out: pa.Schema, topic: str
) -> dict[str, Any]:
    marks = program is not None and program.decodes
    begun_before = marks and catalog.attempts.begin(number)
    try:
        if program is not None:
            tell = teller(topic, number, len(table))
            table = program.run(table, isolated=begun_before, tell=tell)
            # Samples that no stage saw are done too.
            tell(len(table))
        table = table.select(out.names).cast(out)
        catalog.write_part(number, table)
    finally:
        # What was raised was not the doing of an image, which would have killed this process.
        if marks:
            catalog.attempts.end(number)
    digest = file_digest(catalog.part_url(number), catalog.storage_options)
    return {COUNTS: kept_counts(table), FILE: asdict(digest)}


def _table(frame: Any, in_schema: pa.Schema) -> pa.Table:
    return Backend("cpu" if isinstance(frame, pd.DataFrame) else "gpu").frame_to_arrow(frame, in_schema)


def _number(numbers: pd.DataFrame) -> int:
    return int(numbers["number"].iloc[0])


def deltas(ddf: dd.DataFrame, numbers: Sequence[int], catalog: Catalog, out: pa.Schema) -> dd.DataFrame:
    """Return the frame that writes some columns of partitions as the deltas of a catalog's last phase."""
    return dd.map_partitions(
        _write_delta, ddf, number_frame(numbers), catalog, out,
        meta=RESULT_META, align_dataframes=False, enforce_metadata=False,
    )  # fmt: skip


def _write_delta(frame: Any, numbers: pd.DataFrame, catalog: Catalog, out: pa.Schema) -> pd.DataFrame:
    number, table = _number(numbers), _table(frame, out)
    with counted("decide") as work:
        catalog.write_delta(number, table)
        work.counts = kept_counts(table)
    return result_frame(number, {COUNTS: work.counts})


def write_decided(number: int, ledger: Ledger, catalog: Catalog, out: pa.Schema) -> dict[str, Any]:
    """Write what a dedup job decided about a part as a delta of the catalog's last phase."""
    with counted("decide") as work:
        table = ledger.table(number, out.names).cast(out)
        catalog.write_delta(number, table)
        work.counts = kept_counts(table)
    return {COUNTS: work.counts}


def salvaged_parts(
    ddf: dd.DataFrame,
    numbers: Sequence[int],
    catalog: Catalog,
    program: Program | None,
    out: pa.Schema,
    reasons: Mapping[int, str],
) -> dd.DataFrame:
    """Return the frame that writes partitions which failed, shard by shard: only those that fail alone have failed.

    A shard whose worker died is not tried again. The `reasons` are those of the partitions, and hold where a partition
    is one shard.
    """
    types = frame_types(ddf)
    in_schema = pa.schema([pa.field(c, types[c]) for c in ddf.columns])
    return dd.map_partitions(
        _salvage_part, ddf, number_frame(numbers), catalog, program, in_schema, out, {n: reasons[n] for n in numbers},
        meta=RESULT_META, align_dataframes=False, enforce_metadata=False,
    )  # fmt: skip


def _salvage_part(
    frame: Any,
    numbers: pd.DataFrame,
    catalog: Catalog,
    program: Program | None,
    in_schema: pa.Schema,
    out: pa.Schema,
    reasons: Mapping[int, str],
) -> pd.DataFrame:
    number, table = _number(numbers), _table(frame, in_schema)
    shards = _shards(table)
    if len(shards) == 1 or program is None:
        return _write_failed_rows(number, _failed(table, out, f"the partition failed: {reasons[number]}"), catalog)
    isolated = program.decodes and catalog.attempts.begin(number)
    made = []
    for k, rows in enumerate(shards):
        if catalog.attempts.begin(number, k):
            made.append(_failed(rows, out, "the shard failed: its workers died"))
            continue
        try:
            done = program.run(rows, isolated=isolated).select(out.names).cast(out)
        except Exception as exc:
            if is_device_error(exc):
                # What comes after it would fail as well, and none of these rows is at fault.
                raise
            done = _failed(rows, out, f"the shard failed: {reason_of(exc)}")
        catalog.attempts.end(number, k)
        made.append(done)
    return _write_failed_rows(number, pa.concat_tables(made), catalog)


def _shards(table: pa.Table) -> list[pa.Table]:
    """Return the rows of each shard of a partition, which stand together."""
    encoded = table[schema.SHARD].combine_chunks().dictionary_encode().indices.to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(encoded)) + 1).tolist(), len(table)]
    return [table.slice(start, stop - start) for start, stop in itertools.pairwise(starts)]


def failed_parts(
    ddf: dd.DataFrame, numbers: Sequence[int], catalog: Catalog, out: pa.Schema, reasons: Mapping[int, str]
) -> dd.DataFrame:
    """Return the frame that writes the rows of partitions that failed, with the reason in place of what stages add."""
    types = frame_types(ddf)
    in_schema = pa.schema([pa.field(c, types[c]) for c in ddf.columns])
    return dd.map_partitions(
        _write_failed, ddf, number_frame(numbers), catalog, in_schema, out, {n: reasons[n] for n in numbers},
        meta=RESULT_META, align_dataframes=False, enforce_metadata=False,
    )  # fmt: skip


def _write_failed(
    frame: Any,
    numbers: pd.DataFrame,
    catalog: Catalog,
    in_schema: pa.Schema,
    out: pa.Schema,
    reasons: Mapping[int, str],
) -> pd.DataFrame:
    number, table = _number(numbers), _table(frame, in_schema)
    return _write_failed_rows(number, _failed(table, out, f"the partition failed: {reasons[number]}"), catalog)


def _failed(table: pa.Table, out: pa.Schema, reason: str) -> pa.Table:
    """Return rows as they are after the first phase if they failed; those that had left before keep their reason."""
    was_ok = pc.equal(table[schema.STATUS], schema.STATUS_OK)
    columns = {f.name: table[f.name] if f.name in table.column_names else pa.nulls(len(table), f.type) for f in out}
    columns[schema.STATUS] = pc.if_else(was_ok, schema.STATUS_FAILED, table[schema.STATUS])
    columns[schema.REASON] = pc.if_else(was_ok, reason, table[schema.REASON])
    return pa.table(columns).cast(out)


def _write_failed_rows(number: int, table: pa.Table, catalog: Catalog) -> pd.DataFrame:
    catalog.write_part(number, table)
    catalog.attempts.end(number)
    return result_frame(number, {COUNTS: kept_counts(table)})


def count_part(number: int, catalog: Catalog) -> dict[str, Any]:
    """Return the rows of a part by status."""
    return {COUNTS: kept_counts(catalog.read(number, [schema.STATUS]))}


def finish_part(number: int, catalog: Catalog) -> dict[str, Any]:
    """Merge what the phases decided into a part, and return what the file is."""
    catalog.merge(number)
    return {FILE: asdict(file_digest(catalog.part_url(number), catalog.storage_options))}


def reset_part(number: int, catalog: Catalog, columns: Sequence[str]) -> dict[str, Any]:
    """Bring a part to the state after the first phase; remove it if it has failed."""
    if count_part(number, replace(catalog, phases=()))[COUNTS].get(schema.STATUS_FAILED):
        catalog.remove_part(number)
    else:
        catalog.reset(number, columns)
    return {}
