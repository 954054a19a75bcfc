"""Batches that do not fit in memory: halved, joined, remembered."""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from imgcurate import read_webdataset
from imgcurate.backend import Backend
from imgcurate.batches import ImageBatch, PixelView
from imgcurate.errors import ConfigError, ImgcurateError
from imgcurate.memory import Holder, is_device_error, is_out_of_memory
from imgcurate.models.encoders import EncoderSpec, OpenClipEncoder
from imgcurate.stages import ImageReaderStage
from imgcurate.stages.base import ProcessingStage
from imgcurate.stages.executor import Program, frame_types
from imgcurate.stages.fitting import BatchLimit, process_batch

CPU = Backend("cpu")
VIEW = PixelView(8, 8)


class OutOfMemoryError(MemoryError):
    """Named and derived as CuPy's."""


def raise_torch() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def raise_cupy() -> None:
    raise OutOfMemoryError("Out of memory allocating 512 bytes")


def raise_from() -> None:
    try:
        raise_torch()
    except RuntimeError as exc:
        raise ValueError("the model failed") from exc


RAISES = {
    "torch": raise_torch,
    "cupy": raise_cupy,
    "python": lambda: bytearray(1 << 60),
    "numpy": lambda: np.empty(1 << 60, dtype=np.uint8),
    "torch on the CPU": lambda: torch.empty(1 << 60, dtype=torch.uint8),
    "as a cause": raise_from,
}


class Measure(ProcessingStage):
    """Sets columns of every kind and drops in several ways; more than `fits` images do not fit."""

    name = "measure"
    needs = ("image",)
    adds = {
        "brightness": "float32", "corner": pa.list_(pa.float32()), "word": "string", "rank": "int64", "key2": "string",
    }  # fmt: skip
    views = (VIEW,)

    def __init__(self, label: str, fits: int | None = None, remove: bool = False) -> None:
        self.label, self.fits, self.remove = label, fits, remove
        self._calls: list[int] = []

    @property
    def removes(self) -> tuple[str, ...]:
        return ("image",) if self.remove else ()

    def process(self, batch: ImageBatch) -> ImageBatch:
        self._calls.append(len(batch))
        if self.fits is not None and len(batch) > self.fits:
            batch["brightness"] = np.full(len(batch), -1.0)
            batch.drop(np.ones(len(batch), dtype=bool), "left by an attempt that failed")
            batch.remove_pixels()
            raise_torch()
        pixels = batch.pixels(VIEW).float()
        brightness = pixels.mean(dim=(1, 2, 3))
        batch["brightness"] = brightness
        batch["corner"] = pixels[:, 0, 0].numpy()
        words = ["bright" if b > 120 else "dim" for b in brightness.tolist()]
        batch["word"] = np.array(words, dtype=object)
        batch["rank"] = [int(b) for b in brightness.tolist()]
        batch["key2"] = batch["key"]
        if bool((brightness > 150).any()):
            batch.drop(brightness > 150, [f"brightness {b:.3f}" for b in brightness.tolist()], status="too_bright")
        batch.drop(brightness > 130, "bright")
        batch.drop((brightness < 60).numpy(), "dark", status="too_dark")
        return batch


class Later(ProcessingStage):
    """Needs what :class:`Measure` made."""

    name = "later"
    needs = ("corner", "word")
    adds = {"length": "float64", "has_pixels": "bool"}

    def __init__(self, label: str, fits: int | None = None) -> None:
        self.label, self.fits = label, fits

    def process(self, batch: ImageBatch) -> ImageBatch:
        if self.fits is not None and len(batch) > self.fits:
            raise_torch()
        batch["length"] = torch.linalg.vector_norm(batch["corner"].double(), dim=1)
        batch.drop(batch["word"] == "dim", "dim")
        try:
            has = bool(len(batch.pixels(VIEW)))
        except ConfigError:
            has = False
        batch["has_pixels"] = np.full(len(batch), has)
        return batch


@pytest.fixture(scope="module")
def table(shards: Path) -> pa.Table:
    ddf = read_webdataset(str(shards / "*.tar"), files_per_partition=4)
    types = frame_types(ddf)
    return CPU.frame_to_arrow(ddf.compute(scheduler="sync"), pa.schema([pa.field(c, types[c]) for c in ddf.columns]))


def run(table: pa.Table, *stages: ProcessingStage) -> pa.Table:
    return Program(stages, ImageReaderStage(dali_batch_size=16), "cpu").run(table)


@pytest.mark.parametrize("remove", [False, True])
def test_batches_that_do_not_fit_give_the_same_table(table: pa.Table, remove: bool) -> None:
    whole = run(table, Measure("whole", remove=remove), Later("whole"))
    halved = run(table, Measure("halved", fits=5, remove=remove), Later("halved", fits=3))
    assert halved.equals(whole)
    assert set(whole["status"].to_pylist()) >= {"ok", "measure", "too_bright", "too_dark", "later"}
    assert set(whole["has_pixels"].to_pylist()) == {not remove}


def test_the_size_that_fits_is_remembered(table: pa.Table, caplog: pytest.LogCaptureFixture) -> None:
    stage = Measure("remembered", fits=5)
    with caplog.at_level(logging.WARNING, "imgcurate.stages.fitting"):
        run(table, stage)
    assert len(table) == 72
    # Five batches, dealt out evenly.
    rest = [*[4, 4, 4, 3] * 4, 4, 4, 4]
    assert stage._calls == [15, 8, *rest]
    said = "stage measure: a batch of 15 images does not fit in memory; batches have at most 4 images from now on"
    assert [r.getMessage() for r in caplog.records] == [said]
    stage._calls.clear()
    run(table, stage)
    assert stage._calls == rest
    assert len(caplog.records) == 1


@pytest.mark.parametrize("kind", RAISES)
def test_out_of_memory_of_every_library_is_known(kind: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each library has its own
        RAISES[kind]()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error", [ValueError("memory"), RuntimeError("a bug"), OSError("no space left"), SystemExit(1)]
)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_other_errors_are_not_tried_again(table: pa.Table) -> None:
    class Broken(Measure):
        def process(self, batch: ImageBatch) -> ImageBatch:
            self._calls.append(len(batch))
            raise ValueError("a bug")

    stage = Broken("broken")
    with pytest.raises(ImgcurateError, match=r"stage Broken: ValueError: a bug \(.*00000.tar, key 'photo/000'"):
        run(table, stage)
    assert stage._calls == [15]


def test_a_single_image_that_does_not_fit_is_an_error(table: pa.Table) -> None:
    with pytest.raises(ImgcurateError, match=r"stage measure: out of memory with a single image \(in .*fewer workers"):
        run(table, Measure("nothing fits", fits=0))


def batch_of(n: int, **columns: object) -> ImageBatch:
    rows = pd.DataFrame({"shard": "a.tar", "key": [f"{i:03d}" for i in range(n)]})
    images = {VIEW: torch.arange(n * 8 * 8 * 3).reshape(n, 8, 8, 3).to(torch.uint8)}
    return ImageBatch(rows, images, columns)


class Setter(ProcessingStage):
    """Sets whatever is made of the numbers of its samples; three fit."""

    name = "setter"

    def __init__(self, make: object, fits: int = 3) -> None:
        self.make, self.fits = make, fits

    def process(self, batch: ImageBatch) -> ImageBatch:
        if len(batch) > self.fits:
            raise MemoryError
        batch["made"] = self.make([int(key) for key in batch["key"]])
        return batch


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda i: list(map(str, i)), list),
        (lambda i: tuple(map(float, i)), list),
        (lambda i: np.array(i, dtype=np.int16), np.ndarray),
        (lambda i: np.array([None if k % 2 else "x" * k for k in i], dtype=object), np.ndarray),
        (lambda i: np.array([[k, k + 1] for k in i], dtype=np.float32), torch.Tensor),
        (lambda i: torch.tensor(i), torch.Tensor),
        (lambda i: pd.Series(i, dtype="Int64"), pd.Series),
        (lambda i: pa.array(list(map(str, i))), pa.ChunkedArray),
    ],
)
def test_columns_of_all_kinds_are_joined(make, kind: type) -> None:
    batch = batch_of(8)
    whole = process_batch(Setter(make, fits=8), batch, BatchLimit(), CPU)["made"]
    joined = process_batch(Setter(make), batch, BatchLimit(), CPU)["made"]
    assert isinstance(joined, kind)
    assert getattr(joined, "dtype", None) == getattr(whole, "dtype", None)
    assert [str(v) for v in joined] == [str(v) for v in whole]
    assert batch.made == ()


def test_what_a_stage_left_alone_is_not_copied() -> None:
    batch = batch_of(8, given=torch.ones(8, 2), listed=list("abcdefgh"))
    joined = process_batch(Setter(list), batch, BatchLimit(), CPU)
    assert joined.pixels(VIEW) is batch.pixels(VIEW)
    assert joined.rows is batch.rows
    assert joined["given"] is batch["given"]
    assert joined["listed"] == list("abcdefgh")
    assert joined.given == {"given", "listed"}
    assert joined.drops == batch.drops == []


def test_a_column_that_is_set_for_some_parts_alone_is_an_error() -> None:
    class Some(Setter):
        def process(self, batch: ImageBatch) -> ImageBatch:
            return super().process(batch) if batch["key"].iloc[0] == "000" or len(batch) > self.fits else batch

    with pytest.raises(ConfigError, match="'made' was set for some images and not for others"):
        process_batch(Some(list), batch_of(8), BatchLimit(), CPU)


def test_a_stage_must_return_all_rows_also_of_parts() -> None:
    class Loses(Setter):
        def process(self, batch: ImageBatch) -> ImageBatch:
            return super().process(batch).part(0, 1)

    with pytest.raises(ConfigError, match="must return the batch with all its rows"):
        process_batch(Loses(list), batch_of(8), BatchLimit(), CPU)


def test_threads_share_what_is_known() -> None:
    limit, n = BatchLimit(), 4
    barrier = threading.Barrier(n)
    made: list[list[int]] = []

    def work() -> None:
        barrier.wait()
        made.extend(process_batch(Setter(list), batch_of(40), limit, CPU)["made"] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [list(range(40))] * 20 * n
    assert limit.images == 3


def test_a_batch_of_one_that_fits_at_the_second_try_leaves_no_limit() -> None:
    class Once(Setter):
        def process(self, batch: ImageBatch) -> ImageBatch:
            if batch.at_most is None:
                raise MemoryError
            return super().process(batch)

    limit = BatchLimit()
    assert process_batch(Once(list), batch_of(1), limit, CPU)["made"] == [0]
    assert limit.images is None


def test_the_encoder_takes_what_fits() -> None:
    encoder = OpenClipEncoder(EncoderSpec("ViT-B-32", "random", precision="fp32", batch_size=4), CPU)
    seen: list[int] = []
    encoder._visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    pixels = torch.randint(0, 256, (3, 224, 224, 3), dtype=torch.uint8)
    whole, halved = encoder(pixels), encoder(pixels, at_most=2)
    assert seen == [3, 2, 1]
    torch.testing.assert_close(halved, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, SystemExit])
def test_what_is_no_exception_does_not_end_a_worker(kind: type[BaseException]) -> None:
    class Interrupts(ProcessingStage):
        name = "interrupts"

        def process(self, batch: ImageBatch) -> ImageBatch:
            raise kind

    batch = ImageBatch(pd.DataFrame({"shard": ["a.tar"], "key": ["x"]}))
    with pytest.raises(ImgcurateError, match=f"stage interrupts: {kind.__name__}"):
        process_batch(Interrupts(), batch, BatchLimit(), CPU)


class Pixels:
    """What can be referred to weakly."""


def test_memory_is_kept_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Pixels]] = []
    alive_while_waiting: list[bool] = []

    class Event:
        """One of a device that is asked for the first value that is waited for first."""

        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: object) -> None:
            assert stream == "stream"

        def synchronize(self) -> None:
            alive_while_waiting.append(held[len(alive_while_waiting)]() is not None)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "stream")
    holder = Holder(on_gpu=True)
    for number in range(5):
        pixels = Pixels()
        held.append(weakref.ref(pixels))
        holder.hold(pixels)
        del pixels
        assert [r() is not None for r in held] == [k > number - 2 for k in range(number + 1)]
    holder.close()
    assert alive_while_waiting == [True] * 5
    assert not any(r() for r in held)


def test_errors_of_the_device_are_told_from_others() -> None:
    error = ImgcurateError("stage x")
    error.__cause__ = RuntimeError("CUDA error: an illegal memory access was encountered")
    assert is_device_error(error)
    assert not is_device_error(ImgcurateError("stage x: CUDA error"))
    assert not is_device_error(RuntimeError("no such column"))
