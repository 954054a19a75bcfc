"""Run per-batch stages, fused, over one partition: the body of every ``map_partitions`` call."""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import cloudpickle
import dask.dataframe as dd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from imgcurate import schema
from imgcurate.backend import (
    Backend,
    array_from_list_column,
    cpu_count,
    get_backend,
    list_array,
)
from imgcurate.batches import ImageBatch, on_host
from imgcurate.errors import ConfigError, WeightsError
from imgcurate.heartbeat import Tell
from imgcurate.lazy import torch
from imgcurate.memory import keep_freed_memory
from imgcurate.stages.base import IMAGE, ProcessingStage, Worker, columns_added
from imgcurate.stages.fitting import BatchLimit, process_batch
from imgcurate.stages.narrowing import Narrowing, first_that_skips
from imgcurate.stages.reading import ImageReaderStage, read_pixels
from imgcurate.stages.rules import AnyRule

__all__ = ["Program", "apply_stages", "frame_types", "make_program"]

_BATCH_ROWS = 4096
_COMPARED: Final = (
    pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_string, pa.types.is_large_string,
)  # fmt: skip


@dataclass(frozen=True)
class Program:
    """Per-batch stages to run one after the other on each batch of a partition.

    Attributes
    ----------
    stages : tuple of ProcessingStage
        What to run, in order.
    reader : ImageReaderStage or None
        How to decode; None if no stage looks at pixels.
    device : {"auto", "cpu", "gpu"}
        Where.
    storage_options : mapping, optional
        For reading the shards.
    """

    stages: tuple[ProcessingStage, ...]
    reader: ImageReaderStage | None = None
    device: str = "auto"
    storage_options: Mapping[str, Any] | None = None
    token: str = field(init=False)

    def __post_init__(self) -> None:
        content = cloudpickle.dumps((self.stages, self.reader, self.device))
        object.__setattr__(self, "token", hashlib.sha256(content).hexdigest())

    @property
    def decodes(self) -> bool:
        """Whether any stage looks at images."""
        return self.reader is not None and any(IMAGE in stage.needs for stage in self.stages)

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Arrow types of all columns that the stages add."""
        return {name: type_ for stage in self.stages for name, type_ in columns_added(stage).items()}

    def output_schema(self, columns: Sequence[str], types: Mapping[str, pa.DataType]) -> pa.Schema:
        """Return the schema of the result for input `columns`."""
        added = self.types
        return schema.arrow_schema([*columns, *(c for c in added if c not in columns)], {**types, **added})

    def run(self, table: pa.Table, *, isolated: bool = False, tell: Tell | None = None) -> pa.Table:
        """Run the stages over one partition.

        Parameters
        ----------
        table : pa.Table
            Index columns and what earlier stages added.
        isolated : bool
            Decode in a process of its own, which an image may kill.
        tell : callable, optional
            Called after each batch with the number of its samples.

        Returns
        -------
        pa.Table
            The same rows with the stages' columns; ``status`` and ``reason`` of rows that left are set.
        """
        stages, _, worker = _prepared(self)
        results = _Results(table, self.types)
        known = {f.name: f.type for f in table.schema}
        first = first_that_skips(stages) if self.decodes else len(stages)
        size = worker.backend.batch_size(self.reader.dali_batch_size) if self.reader is not None else _BATCH_ROWS
        left = Narrowing(stages[:first], {**known, **self.types}, size)
        with contextlib.closing(worker.backend.holder()) as holder:
            for positions, batch in self._batches(table, stages, worker, results, isolated):
                pixels = batch.all_pixels()
                current, dropped = self._through(0, first, positions, batch, results)
                if first < len(stages):
                    for some, rest in left.add(positions, current, dropped):
                        self._through(first, len(stages), some, rest, results)
                if tell is not None:
                    tell(len(positions))
                holder.hold(pixels)
            for some, rest in left.rest():
                self._through(first, len(stages), some, rest, results)
        results.check_finite(stages)
        results.apply_rules(stages)
        return results.table(self.output_schema(table.column_names, known))

    def _through(
        self, start: int, stop: int, positions: npt.NDArray[np.int64], batch: ImageBatch, results: _Results
    ) -> tuple[ImageBatch, list[Any]]:
        """Bring a batch through some stages; return what they made of it, and the masks of what they dropped."""
        stages, limits, worker = _prepared(self)
        dropped: list[Any] = []
        for k in range(start, stop):
            batch = process_batch(stages[k], batch, limits[k], worker.backend)
            _check_columns(stages[k], batch, self.types)
            dropped += [mask for mask, _, _ in batch.drops]
            results.take_drops(k, stages[k], positions, batch)
            if IMAGE in stages[k].removes:
                batch.remove_pixels()
        results.take_columns(positions, batch, [name for stage in stages[start:stop] for name in stage.adds])
        return batch, dropped

    def _batches(
        self, table: pa.Table, stages: Sequence[ProcessingStage], worker: Worker, results: _Results, isolated: bool
    ) -> Iterator[tuple[npt.NDArray[np.int64], ImageBatch]]:
        views = tuple(dict.fromkeys(view for stage in stages for view in stage.views))
        lists = [f.name for f in table.schema if pa.types.is_list(f.type)]
        rows = worker_frame(table.drop_columns(lists))
        facts = tuple(dict.fromkeys(fact for stage in stages for fact in stage.facts))
        encoded = any(stage.encoded for stage in stages)
        if encoded and not views:
            # Of what the decoder makes nothing else is asked for.
            facts = facts or (schema.CONTENT_HASH,)
        if self.reader is None or not (views or facts):
            yield from _column_batches(table, rows, stages, worker)
            return
        for positions, decoded in read_pixels(
            table, views, self.reader, worker.backend,
            num_threads=worker.num_threads, storage_options=self.storage_options, facts=facts, encoded=encoded,
            isolated=isolated,
        ):  # fmt: skip
            results.take_decoded(positions, decoded)
            good = positions[decoded.ok]
            if len(good):
                sizes = {schema.WIDTH: decoded.widths[decoded.ok], schema.HEIGHT: decoded.heights[decoded.ok]}
                known = rows.iloc[good].assign(**sizes, **decoded.facts)
                files = decoded.encoded if encoded else None
                yield good, ImageBatch(known, decoded.images, device=worker.device, encoded=files)


def _check_columns(stage: ProcessingStage, batch: ImageBatch, types: Mapping[str, pa.DataType]) -> None:
    for column in batch.made:
        if column not in types and column not in batch.given:
            raise ConfigError(f"stage {stage.name} sets the column {column!r}, which it does not declare in 'adds'")
    for column in stage.adds:
        if column not in batch.columns and column != IMAGE:
            raise ConfigError(f"stage {stage.name} declares the column {column!r} in 'adds', and does not set it")
        shape = tuple(getattr(batch[column], "shape", ())) if column in batch.made else ()
        wrong = len(shape) > (2 if pa.types.is_list(types[column]) else 1) or (
            column == schema.EMBEDDING and column in batch.made and (len(shape) != 2 or not shape[1])
        )
        if wrong:
            raise ConfigError(
                f"stage {stage.name}: the column {column!r} is declared as {types[column]}, one for each sample, and "
                f"was given values of shape {shape}"
            )


def _column_batches(
    table: pa.Table, rows: pd.DataFrame, stages: Sequence[ProcessingStage], worker: Worker
) -> Iterator[tuple[npt.NDArray[np.int64], ImageBatch]]:
    made = {c for stage in stages for c in stage.adds}
    needed = {c for stage in stages for c in stage.needs if c != IMAGE and c not in made}
    valid = np.ones(len(table), dtype=bool)
    for column in needed - {c for stage in stages for c in stage.nullable}:
        valid &= pc.is_valid(table[column]).to_numpy(zero_copy_only=False)
    index = np.flatnonzero(valid)
    for start in range(0, len(index), _BATCH_ROWS):
        positions = index[start : start + _BATCH_ROWS]
        columns = {}
        for column in needed:
            if pa.types.is_list(table.schema.field(column).type):
                values = array_from_list_column(table[column].take(pa.array(positions)))
                columns[column] = torch.from_numpy(np.array(values)).to(worker.device)
        yield positions, ImageBatch(rows.iloc[positions], columns=columns, device=worker.device)


def worker_frame(table: pa.Table) -> pd.DataFrame:
    """Return an Arrow table as the pandas frame that batches are cut from."""
    frame: pd.DataFrame = Backend("cpu").frame_from_arrow(table)
    return frame


class _Results:
    """Gather what the batches of a partition gave, and make the partition's table of it."""

    def __init__(self, table: pa.Table, types: Mapping[str, pa.DataType]) -> None:
        self._table = table
        self._types = types
        self._status = np.array(table[schema.STATUS].to_pylist(), dtype=object)
        self._reason = np.array(table[schema.REASON].to_pylist(), dtype=object)
        self._sizes = {
            name: table[name].to_numpy(zero_copy_only=False).copy() for name in (schema.WIDTH, schema.HEIGHT)
        }
        self._drops: list[tuple[int, npt.NDArray[np.int64], Any, Any, str]] = []
        self._parts: dict[str, list[tuple[npt.NDArray[np.int64], Any]]] = {}
        self._gathered: dict[str, tuple[npt.NDArray[np.bool_], Any]] = {}

    def take_decoded(self, positions: npt.NDArray[np.int64], decoded: Any) -> None:
        self._sizes[schema.WIDTH][positions] = decoded.widths
        self._sizes[schema.HEIGHT][positions] = decoded.heights
        for i in np.flatnonzero(~decoded.ok):
            self._status[positions[i]] = decoded.statuses[i]
            self._reason[positions[i]] = decoded.reasons[i]

    def take_drops(self, k: int, stage: ProcessingStage, positions: npt.NDArray[np.int64], batch: ImageBatch) -> None:
        for mask, reason, status in batch.drops:
            self._drops.append((k, positions, _leaving(mask), reason, status or stage.name))
        batch.drops = []

    def take_columns(self, positions: npt.NDArray[np.int64], batch: ImageBatch, names: Sequence[str]) -> None:
        for name in names:
            if name != IMAGE:
                self._parts.setdefault(name, []).append((positions, _leaving(batch[name])))

    def check_finite(self, stages: Sequence[ProcessingStage]) -> None:
        """Refuse NaN and infinity where they are a fault of the stage."""
        for stage, name in ((each, name) for each in stages for name in each.finite):
            values = self._values(name)[1].astype(float, copy=False)
            wrong = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum()) if values.size else 0
            if wrong:
                raise WeightsError(
                    f"stage {stage.name}: {wrong:,} of {len(values):,} values of {name!r} are not finite: the weights "
                    "are damaged, or do not bear the precision: try fp32"
                )

    def apply_rules(self, stages: Sequence[ProcessingStage]) -> None:
        """Set status and reason: drops and rules in the order of the stages; the first one counts."""
        for k, stage in enumerate(stages):
            for at, positions, mask, reason, status in self._drops:
                if at == k:
                    self._drop(positions, on_host(mask).astype(bool), reason, status)
            for rule in stage.rules:
                valid, values = self._compared(stage, rule)
                left = np.full(len(valid), not rule.keeps_missing)
                left[valid] = ~np.asarray(rule.keeps(values), dtype=bool)
                # What left before needs no second reason.
                index = np.flatnonzero(left & (self._status == schema.STATUS_OK))
                position_of = np.cumsum(valid) - 1
                found = (np.asarray(values[position_of[i]]).item() if valid[i] else math.nan for i in index)
                reasons = [rule.reason(value) for value in found]
                self._drop(index, np.ones(len(index), dtype=bool), reasons, rule.status)

    def _drop(self, positions: npt.NDArray[np.int64], mask: npt.NDArray[np.bool_], reason: Any, status: str) -> None:
        for i in np.flatnonzero(mask):
            row = positions[i]
            if self._status[row] == schema.STATUS_OK:
                self._status[row] = status
                self._reason[row] = reason if isinstance(reason, str) else str(reason[i])

    def _values(self, name: str) -> tuple[npt.NDArray[np.bool_], Any]:
        """Return which rows have a value of a column, and these values, in the order of the rows."""
        if name not in self._gathered:
            parts = self._parts.get(name, [])
            valid = np.zeros(len(self._table), dtype=bool)
            if name in self._sizes:
                self._gathered[name] = self._sizes[name] > 0, self._sizes[name][self._sizes[name] > 0]
            elif name not in self._types:
                column = self._table[name]
                valid = pc.is_valid(column).to_numpy(zero_copy_only=False)
                self._gathered[name] = valid, column.drop_null().to_numpy(zero_copy_only=False)
            else:
                for positions, _ in parts:
                    valid[positions] = True
                values = [on_host(v) for _, v in parts]
                self._gathered[name] = valid, np.concatenate(values) if values else np.empty(0)
        return self._gathered[name]

    def _compared(self, stage: ProcessingStage, rule: AnyRule) -> tuple[npt.NDArray[np.bool_], Any]:
        """Return the values of a column as the catalog holds them, by which a rule can be applied again."""
        name = rule.column
        valid, values = self._values(name)
        type_ = self._types.get(name)
        if type_ is not None and len(values) and any(is_(type_) for is_ in _COMPARED):
            column = self._column(name, type_)
            valid = pc.is_valid(column).to_numpy(zero_copy_only=False)
            values = column.drop_null().to_numpy(zero_copy_only=False)
        try:
            # A type that is not declared is that of what was read: known to the plan, not to functions on frames.
            rule.check_type(type_ if type_ is not None else self._table.schema.field(name).type)
        except ConfigError as exc:
            raise ConfigError(f"stage {stage.name}: {exc}") from exc
        return valid, values

    def table(self, out: pa.Schema) -> pa.Table:
        """Return the partition's table in the schema `out`."""
        columns: dict[str, Any] = {name: self._table[name] for name in self._table.column_names}
        for name, type_ in self._types.items():
            if name != IMAGE:
                columns[name] = self._column(name, type_)
        columns |= {name: pa.array(values) for name, values in self._sizes.items()}
        columns[schema.STATUS] = pa.array(self._status, pa.string())
        columns[schema.REASON] = pa.array(self._reason, pa.string())
        return pa.table({f.name: columns[f.name] for f in out}).cast(out)

    def _column(self, name: str, type_: pa.DataType) -> pa.Array:
        valid, values = self._values(name)
        try:
            if not len(values):
                return pa.nulls(len(valid), type_)
            if pa.types.is_list(type_) and getattr(values, "ndim", 1) == 2:
                return list_array(values.astype(type_.value_type.to_pandas_dtype(), copy=False), valid)
            taken = np.where(valid, np.cumsum(valid) - 1, 0)
            full = pa.array(values, from_pandas=True).cast(type_)
            return pc.if_else(pa.array(valid), full.take(pa.array(taken)), pa.scalar(None, type_))
        except (pa.ArrowInvalid, pa.ArrowTypeError, ValueError) as exc:
            raise ConfigError(f"column {name!r} was declared as {type_} and does not hold such values: {exc}") from exc


def _leaving(values: Any) -> Any:
    """Return values of a batch on their way to the host: there once the device has done what is queued now.

    At the end of a partition it would be asked for them behind all that other tasks have queued by then, once for each
    batch and column.
    """
    if not getattr(values, "is_cuda", False):
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values.detach(), non_blocking=True)


_lock = threading.Lock()
_Prepared: TypeAlias = tuple[tuple[ProcessingStage, ...], tuple[BatchLimit, ...], Worker]
_programs: dict[str, _Prepared] = {}


def _prepared(program: Program) -> _Prepared:
    """Return the program's stages, set up once in this process, with what is known of the batches that fit."""
    with _lock:
        if program.token not in _programs:
            keep_freed_memory()
            # What decodes nothing has no use for torch, which takes seconds to import.
            threads = min(torch.get_num_threads(), cpu_count()) if program.reader is not None else cpu_count()
            worker = Worker(get_backend(program.device), num_threads=threads)
            for stage in program.stages:
                stage.setup(worker)
            limits = tuple(BatchLimit() for _ in program.stages)
            _programs[program.token] = (program.stages, limits, worker)
            while len(_programs) > 4:
                _programs.pop(next(iter(_programs)))
        return _programs[program.token]


def apply_stages(
    ddf: dd.DataFrame,
    stages: Sequence[ProcessingStage],
    *,
    reader: ImageReaderStage | None = None,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> dd.DataFrame:
    """Run per-batch stages over a frame, lazily: one ``map_partitions`` call for all of them.

    Parameters
    ----------
    ddf : dask.dataframe.DataFrame
        From :func:`read_webdataset` or a function of this family.
    stages : sequence of ProcessingStage
        What to run.
    reader : ImageReaderStage, optional
        How to decode, if a stage looks at pixels. A sample that kills the decoder kills its worker again and
        again; a pipeline's run survives it.
    device : {"auto", "cpu", "gpu"}
        Where.
    storage_options : mapping, optional
        For reading the shards.

    Raises
    ------
    ConfigError
        If a column that a stage needs is missing.
    """
    program = make_program(ddf, stages, reader=reader, device=device, storage_options=storage_options)
    types = frame_types(ddf)
    meta = get_backend(device).meta(program.output_schema(list(ddf.columns), types))
    in_schema = pa.schema([pa.field(c, types[c]) for c in ddf.columns])
    return ddf.map_partitions(_run_frame, program, in_schema, meta=meta)


def make_program(
    ddf: dd.DataFrame,
    stages: Sequence[ProcessingStage],
    *,
    reader: ImageReaderStage | None = None,
    device: str = "auto",
    storage_options: Mapping[str, Any] | None = None,
) -> Program:
    """Return the program of some stages for the partitions of a frame; see :func:`apply_stages`.

    Raises
    ------
    ConfigError
        If a column that a stage needs is missing.
    """
    have = {IMAGE, *ddf.columns} if reader is not None else set(ddf.columns)
    for stage in stages:
        missing = [c for c in (*stage.needs, schema.STATUS, schema.REASON) if c not in have]
        if missing:
            hint = ": give reader=ImageReaderStage()" if missing[0] == IMAGE else ""
            raise ConfigError(
                f"stage {stage.name} needs the column {missing[0]!r}, and the frame has {', '.join(ddf.columns)}{hint}"
            )
        have |= set(stage.adds)
    return Program(tuple(stages), reader, device, storage_options)


def _run_frame(frame: Any, program: Program, in_schema: pa.Schema) -> Any:
    backend = Backend("cpu" if isinstance(frame, pd.DataFrame) else "gpu")
    return backend.frame_from_arrow(program.run(backend.frame_to_arrow(frame, in_schema)))


def frame_types(ddf: dd.DataFrame) -> dict[str, pa.DataType]:
    """Return the Arrow types of a frame's columns: imgcurate's own, and what its dtypes tell."""
    types = {}
    for name in ddf.columns:
        if name in schema.COLUMNS:
            types[name] = schema.arrow_type(name)
            continue
        dtype = ddf._meta[name].dtype
        if isinstance(dtype, pd.ArrowDtype):
            types[name] = dtype.pyarrow_dtype
        elif callable(getattr(dtype, "to_arrow", None)):
            # cudf's types of lists, decimals and structs.
            types[name] = dtype.to_arrow()
        elif isinstance(dtype, pd.StringDtype) or dtype.kind == "O":
            types[name] = pa.string()
        else:
            types[name] = pa.from_numpy_dtype(getattr(dtype, "numpy_dtype", dtype))
    return types
