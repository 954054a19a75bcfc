"""What a task does with one partition of a run: make its part of the catalog, count, finish, take back.

Every function is called on a worker, and returns a small result: :data:`COUNTS`, the rows by status, and
:data:`FILE`, size and checksum of the part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import Backend, lazy_frame
from imgcurate.catalog import Catalog
from imgcurate.execution import COUNTS, RESULT_META, number_frame, result_frame, unique_key
from imgcurate.export import kept_counts
from imgcurate.stages.executor import Program, frame_types
from imgcurate.success import file_digest

__all__ = ["FILE", "Bundle", "count_part", "deltas", "failed_parts", "finish_part", "made_parts", "reset_part"]


FILE: Final = "file"

Bundle = Sequence[tuple[int, int]]
"""Parts that one task makes: (number of the part, number of its first input shard) each, in order."""


def made_parts(ddf: dd.DataFrame, bundles: Sequence[Bundle], catalog: Catalog, program: Program | None) -> dd.DataFrame:
    """Return the frame that runs a program over partitions and writes the parts of a catalog: a task for each bundle.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        The rows, a partition for each of `bundles`.
    bundles : sequence of Bundle
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
        _make_parts, ddf, _bundle_frame(bundles), catalog, program, in_schema, out,
        meta=RESULT_META, align_dataframes=False, enforce_metadata=False,
    )  # fmt: skip


def _bundle_frame(bundles: Sequence[Bundle]) -> dd.DataFrame:
    meta = pd.DataFrame({"number": pd.Series(dtype="int64"), "first": pd.Series(dtype="int64")})
    return lazy_frame(_one_bundle, list(bundles), meta=meta, label="bundle", once=unique_key())


def _one_bundle(bundle: Bundle, once: str) -> pd.DataFrame:
    del once
    numbers, firsts = zip(*bundle, strict=True)
    return pd.DataFrame({"number": np.array(numbers), "first": np.array(firsts)})


def _make_parts(
    frame: Any, bundle: pd.DataFrame, catalog: Catalog, program: Program | None, in_schema: pa.Schema, out: pa.Schema
) -> pd.DataFrame:
    numbers, firsts = bundle["number"].tolist(), bundle["first"].to_numpy()
    table = _table(frame, in_schema)
    marked = numbers if program is not None and program.decodes else []
    begun_before = [catalog.attempts.begin(number) for number in marked]
    results = []
    try:
        if program is not None:
            table = program.run(table, isolated=any(begun_before))
        table = table.select(out.names).cast(out)
        shards = table[schema.UID].to_numpy() >> schema.UID_SHARD_BITS
        starts = [*np.searchsorted(shards, firsts[1:]).tolist(), len(table)]
        for number, start, stop in zip(numbers, [0, *starts], starts, strict=False):
            results.append(_write_part(number, table.slice(start, stop - start), catalog))
    finally:
        # What was raised was not the doing of an image, which would have killed this process.
        for number in marked:
            catalog.attempts.end(number)
    return pd.concat(results)


def _write_part(number: int, table: pa.Table, catalog: Catalog) -> pd.DataFrame:
    catalog.write_part(number, table)
    digest = file_digest(catalog.part_url(number), catalog.storage_options)
    return result_frame(number, {COUNTS: kept_counts(table), FILE: asdict(digest)})


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
    catalog.write_delta(number, table)
    return result_frame(number, {COUNTS: kept_counts(table)})


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
    was_ok = pc.equal(table[schema.STATUS], schema.STATUS_OK)
    columns = {f.name: table[f.name] if f.name in in_schema.names else pa.nulls(len(table), f.type) for f in out}
    columns[schema.STATUS] = pc.if_else(was_ok, schema.STATUS_FAILED, table[schema.STATUS])
    columns[schema.REASON] = pc.if_else(was_ok, f"the partition failed: {reasons[number]}", table[schema.REASON])
    table = pa.table(columns).cast(out)
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
