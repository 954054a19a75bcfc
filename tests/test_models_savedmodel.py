"""Reading SavedModels: against bundles that are written here byte by byte, and against the real ones."""

from __future__ import annotations

import contextlib
import random
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from imgcurate.errors import WeightsError
from imgcurate.models.savedmodel import (
    crc32c,
    masked_crc32c,
    read_graph_constants,
    read_saved_model,
    read_tensor_bundle,
)

TYPES = {"float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int64": 9, "bool": 10, "float16": 19}
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value) if value else b""


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def shape_message(shape: Sequence[int]) -> bytes:
    return message(2, b"".join(message(2, number(1, n)) for n in shape))


def block(pairs: Sequence[tuple[bytes, bytes]], restart_every: int = 3) -> bytes:
    """Return a block with prefix-compressed keys, without its trailer."""
    out, restarts, last = bytearray(), [], b""
    for i, (key, value) in enumerate(pairs):
        shared = 0
        if i % restart_every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    restarts = restarts or [0]
    return bytes(out) + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))


def table(pairs: Sequence[tuple[bytes, bytes]], per_block: int = 4, kind: int = 0) -> bytes:
    """Return a LevelDB table of several blocks."""
    out = bytearray()

    def add(data: bytes) -> bytes:
        handle = varint(len(out)) + varint(len(data))
        out.extend(data + bytes([kind]) + struct.pack("<I", masked_crc32c(data + bytes([kind]))))
        return handle

    chunks = [pairs[i : i + per_block] for i in range(0, len(pairs), per_block)]
    index = [(chunk[-1][0] + b"~", add(block(chunk))) for chunk in chunks]
    handles = add(block([])) + add(block(index, restart_every=1))
    out += handles.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)
    return bytes(out)


def bundle(
    tensors: Mapping[str, np.ndarray], n_shards: int = 2, header: bytes | None = None, extra: bytes = b""
) -> tuple[bytes, list[bytes]]:
    """Return the index and the data files of a tensor bundle."""
    shards = [bytearray() for _ in range(n_shards)]
    pairs = [(b"", number(1, n_shards) if header is None else header)]
    for i, (name, array) in enumerate(sorted(tensors.items())):
        data = array.tobytes()
        shard = i % n_shards
        entry = number(1, TYPES[str(array.dtype)]) + shape_message(array.shape) + number(3, shard)
        entry += number(4, len(shards[shard])) + number(5, len(data))
        entry += varint(6 << 3 | 5) + struct.pack("<I", masked_crc32c(data)) + extra
        shards[shard] += data
        pairs.append((name.encode() + SUFFIX.encode(), entry))
    pairs.append((b"zz_text", number(1, 7) + shape_message(()) + number(5, 3)))
    return table(pairs), [bytes(s) for s in shards]


def graph(constants: Mapping[str, np.ndarray | Sequence[bytes]]) -> bytes:
    """Return a saved_model.pb whose graph has these constants and nodes of other kinds between them."""
    nodes = b""
    for name, value in constants.items():
        if isinstance(value, np.ndarray):
            tensor = number(1, TYPES[str(value.dtype)]) + shape_message(value.shape) + message(4, value.tobytes())
        else:
            tensor = number(1, 7) + shape_message((len(value),)) + b"".join(message(8, t) for t in value)
        dtype_attr = message(5, message(1, b"dtype") + message(2, number(6, 1)))
        value_attr = message(5, message(1, b"value") + message(2, message(8, tensor)))
        nodes += message(1, message(1, name.encode()) + message(2, b"Const") + dtype_attr + value_attr)
        nodes += message(1, message(1, b"not/" + name.encode()) + message(2, b"Placeholder") + value_attr)
    return number(1, 1) + message(2, message(1, b"meta info") + message(2, nodes + message(2, b"library")))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    many = {f"layer_with_weights-{i}/kernel": rng.normal(size=(3, i)).astype(np.float32) for i in range(12)}
    return many | {
        "layer_with_weights-1/count": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
        "half": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
        "mask": np.array([True, False]),
        "bytes": np.arange(300).astype(np.uint8),
    }


def test_crc32c_of_known_vectors() -> None:
    # RFC 3720, appendix B.4, and the check value of the CRC catalogue.
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert masked_crc32c(memoryview(b"foo")) != crc32c(b"foo")


@pytest.mark.parametrize("n_shards", [1, 2, 3])
def test_read_tensor_bundle_returns_what_was_written(tensors: dict[str, np.ndarray], n_shards: int) -> None:
    index, shards = bundle(tensors, n_shards)
    found = read_tensor_bundle(index, shards)
    assert sorted(found) == sorted(tensors)
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)


def test_read_tensor_bundle_of_nothing() -> None:
    assert read_tensor_bundle(*bundle({}, 1)) == {}


def test_read_tensor_bundle_finds_damaged_values(tensors: dict[str, np.ndarray]) -> None:
    index, shards = bundle(tensors)
    damaged = bytearray(shards[0])
    damaged[10] ^= 1
    with pytest.raises(WeightsError, match=r"variable '.*' is damaged: CRC-32C [0-9a-f]{8}, expected"):
        read_tensor_bundle(index, [bytes(damaged), shards[1]])
    with pytest.raises(WeightsError, match="no such place"):
        read_tensor_bundle(index, [shards[0][:50], shards[1]])
    with pytest.raises(WeightsError, match="made of 2 data files, found 1"):
        read_tensor_bundle(index, shards[:1])


def test_read_tensor_bundle_finds_a_damaged_index(tensors: dict[str, np.ndarray]) -> None:
    index, shards = bundle(tensors)
    unnoticed = 0
    for position in range(len(index)):
        damaged = bytearray(index)
        damaged[position] ^= 1 << position % 8
        try:
            found = read_tensor_bundle(bytes(damaged), shards)
        except WeightsError:
            continue
        unnoticed += 1
        assert all(found[name].tobytes() == tensors[name].tobytes() for name in tensors)
    # The metaindex block (8 bytes and 5 of trailer) and the footer's padding are not read.
    assert unnoticed <= 13 + 48
    for length in range(0, len(index), 7):
        with pytest.raises(WeightsError):
            read_tensor_bundle(index[:length], shards)


def test_read_tensor_bundle_refuses_what_it_does_not_know(tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(WeightsError, match="big-endian"):
        read_tensor_bundle(*bundle(tensors, header=number(1, 2) + number(2, 1)))
    with pytest.raises(WeightsError, match="sliced"):
        read_tensor_bundle(*bundle(tensors, extra=message(7, b"")))
    with pytest.raises(WeightsError, match="compressed"):
        read_tensor_bundle(table([(b"", number(1, 1))], kind=1), [b""])
    entry = number(1, 99) + shape_message(())
    with pytest.raises(WeightsError, match="TensorFlow type 99"):
        read_tensor_bundle(table([(b"", number(1, 1)), (b"x", entry)]), [b""])


@pytest.mark.parametrize(
    ("shape", "words"),
    [((5,), "has 8 bytes, expected 20"), ((2**62, 2**62, 0), "expected 0"), ((2**63,), "expected")],
)
def test_read_tensor_bundle_checks_the_shape(shape: tuple[int, ...], words: str) -> None:
    entry = number(1, 1) + shape_message(shape) + number(5, 8)
    entry += varint(6 << 3 | 5) + struct.pack("<I", masked_crc32c(bytes(8)))
    with pytest.raises(WeightsError, match=words):
        read_tensor_bundle(table([(b"", number(1, 1)), (b"x", entry)]), [bytes(8)])


def test_read_tensor_bundle_refuses_an_impossible_empty_shape() -> None:
    entry = number(1, 1) + shape_message((2**62, 2**62, 0))
    entry += varint(6 << 3 | 5) + struct.pack("<I", masked_crc32c(b""))
    with pytest.raises(WeightsError, match="impossible shape"):
        read_tensor_bundle(table([(b"", number(1, 1)), (b"x", entry)]), [b""])


def test_read_graph_constants_keeps_the_order_of_the_graph() -> None:
    constants = {
        "Const_9": (b"0.5", b"", b"-1.5"),
        "Const_10": np.arange(3, dtype=np.int64),
        "a": np.ones((2, 2), np.float32),
    }
    found = read_graph_constants(graph(constants))
    assert list(found) == list(constants)
    assert found["Const_9"] == constants["Const_9"]
    np.testing.assert_array_equal(found["Const_10"], constants["Const_10"])
    np.testing.assert_array_equal(found["a"], constants["a"])


def test_read_graph_constants_of_damaged_bytes_raises_nothing_else() -> None:
    data = graph({"texts": (b"0.5", b"-1.5"), "numbers": np.arange(3, dtype=np.int64)})
    rng = random.Random(0)
    for _ in range(3000):
        damaged = bytearray(data[: rng.randrange(1, len(data) + 1)])
        for _ in range(rng.randrange(3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(WeightsError):
            read_graph_constants(bytes(damaged))


def write_zip(path: Path, members: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("top", ["", "model/", "/abs/", "../../up/"])
def test_read_saved_model_reads_a_zip_in_memory(
    tmp_path: Path, tensors: dict[str, np.ndarray], top: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, shards = bundle(tensors)
    members = {
        f"{top}saved_model.pb": graph({"c": (b"x",)}),
        f"{top}variables/variables.index": index,
        f"{top}variables/variables.data-00000-of-00002": shards[0],
        f"{top}variables/variables.data-00001-of-00002": shards[1],
    }
    work = tmp_path / "work"
    work.mkdir()
    path = write_zip(work / "m.zip", members)
    monkeypatch.chdir(work)
    model = read_saved_model(path)
    assert sorted(model.variables) == sorted(tensors)
    assert model.constants == {"c": (b"x",)}
    assert [p.name for p in tmp_path.rglob("*")] == ["work", "m.zip"]


def test_read_saved_model_of_bad_files(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    index, shards = bundle(tensors, 1)
    members = {
        "saved_model.pb": graph({}),
        "variables/variables.index": index,
        "variables/variables.data-00000-of-00001": shards[0],
    }
    with pytest.raises(WeightsError, match=r"gone\.zip"):
        read_saved_model(tmp_path / "gone.zip")
    for missing in ("saved_model.pb", "variables/variables.index"):
        path = write_zip(tmp_path / "m.zip", {k: v for k, v in members.items() if k != missing})
        with pytest.raises(WeightsError, match=rf"m\.zip: expected exactly one member '\.\.\./{missing}', found 0"):
            read_saved_model(path)
    path = write_zip(tmp_path / "m.zip", members | {"b/saved_model.pb": b""})
    with pytest.raises(WeightsError, match="found 2"):
        read_saved_model(path)
    good = write_zip(tmp_path / "m.zip", members).read_bytes()
    for length in (0, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(WeightsError, match="cannot be read as a zip"):
            read_saved_model(path)
    damaged = bytearray(good)
    damaged[len(good) // 3] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(WeightsError):
        read_saved_model(path)


def test_read_saved_model_refuses_a_member_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgcurate.models.savedmodel._MAX_MEMBER_BYTES", 1000)
    path = write_zip(tmp_path / "bomb.zip", {"variables/variables.index": bytes(1001)})
    with pytest.raises(WeightsError, match="has 1,001 bytes, expected at most 1,000"):
        read_saved_model(path)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("clip_autokeras_binary_nsfw.zip", [(768, 64), (64, 512), (512, 256), (256, 1)]),
        ("clip_autokeras_nsfw_b32.zip", [(512, 32), (32, 32), (32, 1)]),
    ],
)
def test_read_saved_model_of_the_published_files(data_dir: Path, name: str, kernels: list[tuple[int, int]]) -> None:
    model = read_saved_model(data_dir / "weights" / "nsfw" / name)
    found = [v.shape for k, v in sorted(model.variables.items()) if k.endswith("kernel")]
    assert found == kernels
    assert all(np.isfinite(v).all() for v in model.variables.values())
