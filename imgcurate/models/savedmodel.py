"""Read the numbers out of a TensorFlow SavedModel, without TensorFlow and without running any of it.

A SavedModel in a zip has its trained variables in a *tensor bundle* (``variables.index``, a LevelDB
table of protobuf entries, and ``variables.data-*``, the bytes that they point into) and its lookup
tables among the constants of the graph in ``saved_model.pb``. Both are parsed from memory: no member
is extracted and no name in the archive becomes a path. Every length is checked before it is used and
every block and tensor against its CRC-32C.

References
----------
LevelDB table format: https://github.com/google/leveldb/blob/main/doc/table_format.md.
``tensor_bundle.proto``, ``saved_model.proto``, ``node_def.proto``, ``tensor.proto`` of TensorFlow 2.8.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from imgcurate.errors import WeightsError

__all__ = [
    "SavedModel",
    "crc32c",
    "masked_crc32c",
    "read_graph_constants",
    "read_saved_model",
    "read_tensor_bundle",
]

Array = npt.NDArray[np.generic]
Constant = Array | tuple[bytes, ...]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_STRING: Final = 7
# TensorFlow's DataType numbers.
_DTYPES: Final[Mapping[int, str]] = {
    1: "<f4", 2: "<f8", 3: "<i4", 4: "|u1", 5: "<i2", 6: "|i1", 9: "<i8", 10: "|b1",
    17: "<u2", 19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip
_MAGIC: Final = 0xDB4775248B80FB57
_FOOTER_BYTES: Final = 48
_TRAILER_BYTES: Final = 5
_MAX_MEMBER_BYTES: Final = 1 << 28
_VALUE_SUFFIX: Final = "/.ATTRIBUTES/VARIABLE_VALUE"


@dataclass(frozen=True, slots=True)
class SavedModel:
    """What a SavedModel holds in numbers.

    Attributes
    ----------
    variables : mapping of str to ndarray
        Numeric variables by checkpoint key, ``/.ATTRIBUTES/VARIABLE_VALUE`` removed.
    constants : mapping of str to ndarray or tuple of bytes
        Constants of the main graph by node name, in the order of the graph; texts are bytes.
    """

    variables: Mapping[str, Array]
    constants: Mapping[str, Constant]


def read_saved_model(path: Path) -> SavedModel:
    """Read a zipped SavedModel.

    Parameters
    ----------
    path : Path
        A zip with exactly one SavedModel, at any depth.

    Raises
    ------
    WeightsError
        If it is no such zip, is damaged, or uses a feature that is not known here.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            index = _member(archive, "/variables/variables.index")
            n_shards = sum("/variables/variables.data-" in f"/{n}" for n in archive.namelist())
            shards = [_member(archive, f"/variables/variables.data-{i:05d}-of-{n_shards:05d}") for i in range(n_shards)]
            graph = _member(archive, "/saved_model.pb")
        return SavedModel(read_tensor_bundle(index, shards), read_graph_constants(graph))
    except WeightsError as exc:
        raise WeightsError(f"{path}: {exc}") from exc
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as exc:
        # RuntimeError: the member is encrypted; NotImplementedError: its compression is not known.
        raise WeightsError(f"{path} cannot be read as a zip: {exc}") from exc


def _member(archive: zipfile.ZipFile, suffix: str) -> bytes:
    found = [i for i in archive.infolist() if f"/{i.filename}".endswith(suffix)]
    if len(found) != 1:
        raise WeightsError(f"expected exactly one member '...{suffix}', found {len(found)}")
    if found[0].file_size > _MAX_MEMBER_BYTES:
        raise WeightsError(
            f"member {found[0].filename!r} has {found[0].file_size:,} bytes, expected at most {_MAX_MEMBER_BYTES:,}"
        )
    return archive.read(found[0])


def read_tensor_bundle(index: bytes, shards: Sequence[bytes]) -> dict[str, Array]:
    """Read the numeric tensors of a TensorFlow tensor bundle.

    Parameters
    ----------
    index : bytes
        The file ``variables.index``.
    shards : sequence of bytes
        The files ``variables.data-*``, in order.

    Returns
    -------
    dict of str to ndarray
        Read-only arrays by checkpoint key, ``/.ATTRIBUTES/VARIABLE_VALUE`` removed. Text tensors are
        left out.

    Raises
    ------
    WeightsError
        If a length or a checksum is wrong, or the bundle is big-endian or sliced.
    """
    tensors: dict[str, Array] = {}
    for key, value in _table(index):
        name = bytes(key).decode("utf-8", "replace")
        if not name:
            _check_header(value, len(shards))
            continue
        tensor = _bundle_entry(name, value, shards)
        if tensor is not None:
            tensors[name.removesuffix(_VALUE_SUFFIX)] = tensor
    return tensors


def read_graph_constants(saved_model: bytes) -> dict[str, Constant]:
    """Read the constants of the main graph of a ``saved_model.pb``.

    Returns
    -------
    dict of str to ndarray or tuple of bytes
        By node name, in the order of the graph; texts as bytes. Numeric constants that are stored
        value by value (TensorFlow does so with scalars alone) are left out.

    Raises
    ------
    WeightsError
        If the file is no valid protobuf, or a constant's length does not fit its shape.
    """
    constants: dict[str, Constant] = {}
    for meta_graph in _submessages(memoryview(saved_model), 2):
        for graph in _submessages(meta_graph, 2):
            for node in _submessages(graph, 1):
                fields = list(_fields(node))
                name, op = (next((_text(v) for n, v in fields if n == number), "") for number in (1, 2))
                if op != "Const":
                    continue
                for number, attribute in fields:
                    tensor = _value_tensor(attribute) if number == 5 else None
                    constant = None if tensor is None else _tensor_proto(name, tensor)
                    if constant is not None:
                        constants[name] = constant
    return constants


def _value_tensor(attribute: int | memoryview) -> memoryview | None:
    """Return the tensor of a node's attribute if it is the one named ``value``."""
    entry = {} if isinstance(attribute, int) else dict(_fields(attribute))
    value = entry.get(2)
    if _text(entry.get(1, 0)) != "value" or not isinstance(value, memoryview):
        return None
    return next(_submessages(value, 8), None)


def _tensor_proto(name: str, message: memoryview) -> Constant | None:
    fields = list(_fields(message))
    dtype = next((v for n, v in fields if n == 1), 0)
    shape = next((_shape(v) for n, v in fields if n == 2 and isinstance(v, memoryview)), ())
    if dtype == _STRING:
        texts = tuple(bytes(v) for n, v in fields if n == 8 and isinstance(v, memoryview))
        if len(texts) != math.prod(shape):
            raise WeightsError(f"constant {name!r} has {len(texts)} texts, expected {math.prod(shape)}")
        return texts
    content = next((v for n, v in fields if n == 4 and isinstance(v, memoryview)), None)
    if content is None or not isinstance(dtype, int) or dtype not in _DTYPES:
        return None
    return _array(f"constant {name!r}", content, _DTYPES[dtype], shape)


def _check_header(value: memoryview, n_shards: int) -> None:
    header = dict(_fields(value))
    if header.get(1, 0) != n_shards:
        raise WeightsError(f"the tensor bundle is made of {header.get(1, 0)} data files, found {n_shards}")
    if header.get(2, 0) != 0:
        raise WeightsError("the tensor bundle is big-endian, expected little-endian")


def _bundle_entry(name: str, value: memoryview, shards: Sequence[bytes]) -> Array | None:
    entry = dict(_fields(value))
    dtype, shard, offset, size, crc = (_int(entry.get(n, 0)) for n in (1, 3, 4, 5, 6))
    if dtype == _STRING:
        return None
    if dtype not in _DTYPES or 7 in entry:
        raise WeightsError(f"variable {name!r} is sliced or of TensorFlow type {dtype}, which is not known here")
    if shard >= len(shards) or offset + size > len(shards[shard]):
        raise WeightsError(
            f"variable {name!r} lies at bytes {offset}-{offset + size} of data file {shard}: no such place"
        )
    data = memoryview(shards[shard])[offset : offset + size]
    shape = _shape(entry[2]) if isinstance(entry.get(2), memoryview) else ()
    array = _array(f"variable {name!r}", data, _DTYPES[dtype], shape)
    if masked_crc32c(data) != crc:
        raise WeightsError(f"variable {name!r} is damaged: CRC-32C {masked_crc32c(data):08x}, expected {crc:08x}")
    return array


def _array(what: str, data: memoryview, dtype: str, shape: tuple[int, ...]) -> Array:
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != expected:
        raise WeightsError(f"{what} has {len(data)} bytes, expected {expected} for shape {shape} of {dtype}")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape)
    except ValueError as exc:
        raise WeightsError(f"{what} has the impossible shape {shape}") from exc


def _shape(message: object) -> tuple[int, ...]:
    if not isinstance(message, memoryview):
        raise WeightsError("a shape is not a message")
    return tuple(_int(dict(_fields(dim)).get(1, 0)) for dim in _submessages(message, 2))


def _table(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the (key, value) pairs of a LevelDB table."""
    view = memoryview(data)
    if len(data) < _FOOTER_BYTES or struct.unpack_from("<Q", data, len(data) - 8)[0] != _MAGIC:
        raise WeightsError("variables.index does not end like a tensor bundle's index")
    footer = view[-_FOOTER_BYTES:]
    _, pos = _varint(footer, 0)
    _, pos = _varint(footer, pos)
    for _, handle in _block(view, footer[pos:]):
        yield from _block(view, handle)


def _block(data: memoryview, handle: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield the (key, value) pairs of the block at `handle`, which is its offset and size."""
    offset, pos = _varint(handle, 0)
    size, _ = _varint(handle, pos)
    if size < 4 or offset + size + _TRAILER_BYTES > len(data):
        raise WeightsError(f"variables.index is cut: a block of {size} bytes at {offset} in {len(data)} bytes")
    kind, crc = struct.unpack_from("<BI", data, offset + size)
    if kind != 0:
        raise WeightsError(f"variables.index is compressed (type {kind}), expected uncompressed blocks")
    if masked_crc32c(data[offset : offset + size + 1]) != crc:
        raise WeightsError(f"variables.index is damaged: wrong CRC-32C of the block at byte {offset}")
    block = data[offset : offset + size]
    end = size - 4 - 4 * struct.unpack_from("<I", block, size - 4)[0]
    if end < 0:
        raise WeightsError(f"variables.index is damaged: too many restarts in the block at byte {offset}")
    block = block[:end]
    key, pos = b"", 0
    while pos < end:
        # A key shares its first bytes with the one before it.
        shared, pos = _varint(block, pos)
        unshared, pos = _varint(block, pos)
        length, pos = _varint(block, pos)
        if shared > len(key) or pos + unshared + length > end:
            raise WeightsError(f"variables.index is damaged: an entry leaves the block at byte {offset}")
        key = key[:shared] + bytes(block[pos : pos + unshared])
        pos += unshared + length
        yield key, block[pos - length : pos]


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a protobuf message, nested messages and texts as memoryviews."""
    pos = 0
    while pos < len(message):
        tag, pos = _varint(message, pos)
        kind = tag & 7
        if kind == _VARINT:
            value, pos = _varint(message, pos)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, pos = _varint(message, pos)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise WeightsError(f"damaged protobuf: wire type {kind} at byte {pos}")
        data = message[pos : pos + size]
        if len(data) != size:
            raise WeightsError(f"damaged protobuf: field {tag >> 3} wants {size} bytes, {len(data)} are left")
        pos += size
        yield tag >> 3, data if kind == _BYTES else int.from_bytes(data, "little")


def _submessages(message: memoryview, number: int) -> Iterator[memoryview]:
    for n, value in _fields(message):
        if n == number and isinstance(value, memoryview):
            yield value


def _varint(data: memoryview, pos: int) -> tuple[int, int]:
    """Return a base-128 number and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if pos >= len(data):
            raise WeightsError(f"a number is cut at byte {pos}")
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
    raise WeightsError(f"a number has more than 64 bits before byte {pos}")


def _int(value: int | memoryview) -> int:
    if isinstance(value, int):
        return value
    raise WeightsError("damaged protobuf: a text where a number was expected")


def _text(value: int | memoryview) -> str:
    return "" if isinstance(value, int) else bytes(value).decode("utf-8", "replace")


def _crc_table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc32c(data: bytes | memoryview) -> int:
    """Return the CRC-32C (Castagnoli) of `data`; about 0.1 s per megabyte."""
    crc, table = 0xFFFFFFFF, _CRC_TABLE
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """Return the CRC-32C as LevelDB stores it: rotated by 15 bits, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
