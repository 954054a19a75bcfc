"""Columns: types, order and uids."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest

from imgcurate import schema
from imgcurate.backend import Backend, array_from_list_column, get_backend, list_array, why_no_gpu
from imgcurate.errors import ConfigError, DeviceError


def every_column() -> pa.Table:
    out = schema.arrow_schema(schema.COLUMNS)
    values = {pa.string(): "x", pa.int64(): 2**40, pa.int32(): 7, pa.float32(): 0.5}
    lists = {pa.list_(pa.string()): ["jpg", "txt"], pa.list_(pa.int64()): [0, 2**40], pa.list_(pa.float32()): [0.5, 1]}
    row = [({**values, **lists})[f.type] for f in out]
    return pa.table([pa.array([v, v], f.type) for v, f in zip(row, out, strict=True)], schema=out)


def test_frame_and_arrow_round_trip(backend: Backend) -> None:
    table = every_column()
    frame = backend.frame_from_arrow(table)
    assert backend.frame_to_arrow(frame, table.schema).equals(table)
    assert list(frame.dtypes) == list(backend.meta(table.schema).dtypes)


@pytest.mark.parametrize("name", [schema.EMBEDDING, schema.DUPLICATE_OF, schema.CLUSTER, schema.SIMILARITY])
def test_nulls_survive_the_round_trip(backend: Backend, name: str) -> None:
    out = schema.arrow_schema([name])
    column = every_column()[name].slice(0, 1)
    table = pa.table({name: pa.chunked_array([column.combine_chunks(), pa.nulls(1, out[0].type)])}, schema=out)
    back = backend.frame_to_arrow(backend.frame_from_arrow(table), out)
    assert back[name].null_count == 1
    assert back[name][0] == table[name][0]


def test_large_uids_with_nulls_stay_exact() -> None:
    value = 2**62 + 1
    table = pa.table({schema.DUPLICATE_OF: pa.array([value, None], pa.int64())})
    assert get_backend("cpu").frame_from_arrow(table)[schema.DUPLICATE_OF][0] == value


def test_make_uid_orders_by_shard_then_position() -> None:
    uids = [schema.make_uid(s, p) for s in (0, 1, 99_999) for p in (0, 1, 2**32 - 1)]
    assert uids == sorted(uids)
    assert [schema.split_uid(u) for u in uids[3:6]] == [(1, 0), (1, 1), (1, 2**32 - 1)]


def test_arrow_schema_keeps_the_canonical_order() -> None:
    names = schema.arrow_schema(["mine", "status", "uid"], {"mine": pa.int8()}).names
    assert names == ["uid", "status", "mine"]
    with pytest.raises(ConfigError, match="unknown column 'mine'"):
        schema.arrow_schema(["mine"])


def test_custom_integers_and_booleans_may_be_null() -> None:
    assert schema.pandas_dtype("n", pa.int16()) == pd.Int16Dtype()
    assert schema.pandas_dtype("n", pa.uint8()) == pd.UInt8Dtype()
    assert schema.pandas_dtype("b", pa.bool_()) == pd.BooleanDtype()


def test_list_column_to_array_and_back() -> None:
    import numpy as np

    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    column = list_array(x, np.array([True, False, True, True, True]))
    assert column.to_pylist()[:3] == [[0, 1, 2], None, [3, 4, 5]]
    assert (array_from_list_column(column.drop_null()) == x).all()
    assert (array_from_list_column(column.drop_null().slice(1, 2)) == x[1:3]).all()
    with pytest.raises(ConfigError, match="1 of 5 rows have no embedding"):
        array_from_list_column(column)
    with pytest.raises(ConfigError, match="differ in length"):
        array_from_list_column(pa.array([[1.0], [1.0, 2.0]]))


def test_get_backend_says_why_there_is_no_gpu() -> None:
    with pytest.raises(ConfigError, match="device='tpu' is none of auto, cpu, gpu"):
        get_backend("tpu")
    if why_no_gpu():
        assert get_backend("auto").name == "cpu"
        with pytest.raises(DeviceError, match="device='gpu' is not usable here: .*Use device='cpu'"):
            get_backend("gpu")
