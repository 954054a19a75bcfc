"""Images that kill the process that decodes them: found, reported, and all others kept.

The crashes are real: a Pillow plugin, which every Python process on the path loads at its start, takes
the process's life when it decodes a file that says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from distributed import Client
from test_pipeline import tiny_pipeline

from imgcurate.backend import Backend, get_backend
from imgcurate.batches import PixelView
from imgcurate.catalog import Attempts
from imgcurate.decode import Decoded, Decoder
from imgcurate.errors import ImgcurateError
from imgcurate.isolation import IsolatedDecoder, memory_limit

VIEWS = (PixelView(32, 32), PixelView(16, 24, "longest"))
OPTIONS = {"batch_size": 8, "num_threads": 1, "facts": ("content_hash", "channels", "pixel_hash")}
PLUGIN = """
import numpy, os, signal, time
from PIL import GifImagePlugin, Image, ImageFile

class Killer(ImageFile.ImageFile):
    format = "PCX"

    def _open(self):
        self._mode, self._size = "RGB", (8, 8)

    def load(self):
        if self._im is not None:
            return super().load()
        what = self.fp.read()[7:].strip().decode()
        if what == "sleep":
            time.sleep(600)
        elif what == "memory":
            self.hoard = [numpy.zeros(1 << 28, 'u1') for _ in range(64)]
        elif what == "exit":
            os._exit(7)
        elif what == "later":
            GifImagePlugin.GifImageFile.load = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)
            self.im = Image.core.fill("RGB", (8, 8), (0, 0, 0))
        else:
            os.kill(os.getpid(), getattr(signal, what))

Image.init()
Image.register_open("PCX", Killer, lambda head: head.startswith(b"KILLER:"))
"""


def killer(how: str) -> bytes:
    return b"KILLER:" + how.encode()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that makes every Python process with it on its path load the plugin."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "sitecustomize.py").write_text(PLUGIN)
    return folder


@pytest.fixture(scope="module")
def isolated(plugin: Path) -> Iterator[IsolatedDecoder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(plugin))
        with IsolatedDecoder(VIEWS, get_backend("cpu"), max_pixels=20_000_000, **OPTIONS) as decoder:
            decoder.decode([])
            yield decoder


@pytest.fixture
def blobs(photos, encode) -> list[bytes]:
    return [
        encode(photos[0]), encode(photos[1], "PNG"), b"", encode(photos[2], "GIF"), encode(photos[3])[:600],
        encode(photos[4].convert("RGBA"), "PNG"), b"<html>",
    ]  # fmt: skip


def test_isolated_pixels_are_those_of_the_decoder(backend: Backend, blobs) -> None:
    expected = Decoder(VIEWS, get_backend("cpu"), **OPTIONS).decode(blobs)
    with IsolatedDecoder(VIEWS, backend, **OPTIONS) as decoder:
        for part in (blobs, [], blobs[:1], [b""]):
            got = decoder.decode(part)
            assert got.reasons == expected.reasons[: len(part)] or part == [b""]
        got = decoder.decode(blobs)
    assert (got.reasons, got.statuses) == (expected.reasons, expected.statuses)
    np.testing.assert_array_equal(got.ok, expected.ok)
    np.testing.assert_array_equal(got.widths, expected.widths)
    assert_same_facts(got, expected)
    for view in VIEWS:
        assert torch.equal(got.images[view].cpu(), expected.images[view])
        assert got.images[view].device.type == torch.device(backend.torch_device).type


@pytest.mark.parametrize("places", [(0,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)])
def test_a_culprit_is_found_wherever_it_stands(places: tuple[int, ...], isolated, photos, encode) -> None:
    blobs = [encode(p) for p in photos[:4]]
    expected = Decoder(VIEWS, get_backend("cpu"), **OPTIONS).decode([b for i, b in enumerate(blobs) if i not in places])
    for i in places:
        blobs[i] = killer("SIGSEGV")
    got = isolated.decode(blobs)
    assert np.flatnonzero(~got.ok).tolist() == list(places)
    assert {got.reasons[i] for i in places} == {"the decoder died on it (SIGSEGV)"}
    assert [s == "decoder_crash" for s in got.statuses] == [i in places for i in range(4)]
    assert_same_facts(got, expected)
    for view in VIEWS:
        assert torch.equal(got.images[view], expected.images[view])


def assert_same_facts(got: Decoded, expected: Decoded) -> None:
    assert list(got.facts) == list(expected.facts) == list(OPTIONS["facts"])
    for name, values in expected.facts.items():
        assert len(values) == expected.ok.sum()
        assert (got.facts[name].dtype.kind, got.facts[name].tolist()) == (values.dtype.kind, values.tolist())


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("SIGABRT", "the decoder died on it (SIGABRT)"),
        ("SIGKILL", "the decoder died on it (SIGKILL, perhaps out of memory)"),
        ("exit", "the decoder died on it (exit code 7)"),
        ("memory", "PCX that needs more memory than there is"),
    ],
)
def test_the_reason_says_how_the_decoder_ended(how: str, reason: str, isolated, photos, encode) -> None:
    got = isolated.decode([encode(photos[0]), killer(how), encode(photos[1])])
    assert got.ok.tolist() == [True, False, True]
    assert (got.statuses[1], got.reasons[1]) == ("decoder_crash", reason)


def test_a_decoder_that_hangs_is_given_up(isolated, monkeypatch: pytest.MonkeyPatch, photos, encode) -> None:
    monkeypatch.setattr(isolated, "_batch_limit_s", 5)
    monkeypatch.setattr(isolated, "_image_limit_s", 8)
    got = isolated.decode([encode(photos[0]), killer("sleep")])
    assert (got.statuses, got.reasons[1]) == (["ok", "decoder_crash"], "the decoder took more than 8 s on it")


def test_the_next_image_is_not_blamed_for_a_death_to_come(isolated, photos, encode) -> None:
    good = encode(photos[0], "GIF")
    got = isolated.decode([killer("later"), good, good, killer("SIGSEGV")])
    assert got.ok.tolist() == [True, True, True, False]


def test_no_image_is_blamed_for_the_death_of_the_keeper(isolated, photos, encode) -> None:
    isolated.decode([b""])
    isolated._keeper.kill()
    got = isolated.decode([encode(photos[0]), encode(photos[1])])
    assert got.ok.all()


def test_nothing_is_left_running(plugin: Path, photos, encode) -> None:
    with IsolatedDecoder(VIEWS, get_backend("cpu"), **OPTIONS) as decoder:
        decoder.decode([encode(photos[0])])
        family = [p := psutil.Process(decoder._keeper.pid), *p.children()]
        assert len(family) == 2
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_decoder_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        IsolatedDecoder(VIEWS, get_backend("cpu"), **OPTIONS) as decoder,
        pytest.raises(ImgcurateError, match="does not start: ImportError: no torch here"),
    ):
        decoder.decode([b""])


def test_memory_limit_leaves_room_for_the_largest_image() -> None:
    assert memory_limit(1) <= 2 * 1024**3
    assert memory_limit(100_000_000) >= min(memory_limit(1), 100_000_000 * 4 * 4)


def test_attempts_tell_of_one_that_did_not_end(tmp_path: Path) -> None:
    attempts = Attempts(str(tmp_path))
    assert not attempts.begin(3)
    assert attempts.begin(3)
    assert not attempts.begin(4)
    attempts.end(3)
    attempts.end(5)
    assert not attempts.begin(3)


def curate(plugin: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(plugin), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-m", "imgcurate.cli", "curate", *map(str, arguments), "--encoder", "tiny-image", "-q"],
        capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_a_run_survives_images_that_kill_its_workers(
    plugin: Path, tmp_path: Path, client: Client, photos, encode, write_tar
) -> None:
    good = [encode(p) for p in photos[:20]]
    clean = tiny_pipeline(str(write_tar(tmp_path / "clean.tar", [(f"0/{i}", {"jpg": good[i]}) for i in range(10)])))
    expected = clean.run(str(tmp_path / "clean"), client=client).catalog.compute().set_index("key")
    culprits = {(0, 0), (0, 3), (0, 4), (0, 9), *((2, i) for i in range(2))}
    for k, size in enumerate((10, 10, 2)):
        samples = []
        for i in range(size):
            at = (k, i) in culprits
            samples.append((f"{k}/{i}", {"pcx": killer("SIGSEGV")} if at else {"jpg": good[10 * k + i]}))
        write_tar(tmp_path / "in" / f"{k}.tar", samples)
    out = tmp_path / "OUT"
    done = curate(plugin, tmp_path / "in" / "*.tar", "-o", out, "--no-dedup", "--batch-size", "4", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "22 samples in = 16 kept + 6 decoder_crash\n"
    rows = pq.read_table(out / "catalog", columns=["key", "status", "reason", "embedding"]).to_pandas()
    crashed = rows[rows.status == "decoder_crash"]
    assert set(crashed.key) == {f"{k}/{i}" for k, i in culprits}
    assert set(crashed.reason) == {"the decoder died on it (SIGSEGV)"}
    assert len(rows) == rows.key.nunique() == 22
    assert not (out / "checkpoint").exists()
    kept = rows[rows.key.isin(expected.index) & (rows.status == "ok")].set_index("key")
    assert len(kept) == 6
    for key in kept.index:
        np.testing.assert_allclose(kept.embedding[key], expected.embedding[key], atol=1e-5)
