"""Runs that must not lose, mix or hang: what hostile input, other processes and mistakes can do."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import dask
import held
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from distributed import Client
from PIL import Image
from test_pipeline import Dark, checksums, tiny_pipeline

from imgcurate import PixelView, ProcessingStage, Rule, decode
from imgcurate.backend import get_backend
from imgcurate.batches import ImageBatch
from imgcurate.catalog import Manifest
from imgcurate.cluster import open_client
from imgcurate.decode import Decoder
from imgcurate.errors import ClusterError, ConfigError, ImgcurateError, InputError
from imgcurate.probe import probe
from imgcurate.storage import StorageError, exclusive, open_source


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"\0" * (1 + 3 * width) * height)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_an_elongated_image_is_a_row_with_a_reason() -> None:
    view = PixelView(224, 224)
    decoder = Decoder((view,), get_backend("cpu"), batch_size=4, num_threads=1)
    decoded = decoder.decode([png_header(600_000, 1), png_header(40, 30), png_header(1, 51)])
    assert decoded.ok.tolist() == [False, True, False]
    assert decoded.reasons[0] == "600000x1: aspect ratio 600000, over the limit of 50 (max_aspect_ratio)"
    assert decoded.images[view].shape == (1, 224, 224, 3)


def test_large_images_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, photos, encode) -> None:
    view = PixelView(32, 32)
    blobs = [encode(p) for p in photos[:7]]
    decoder = Decoder((view,), get_backend("cpu"), batch_size=8, num_threads=1)
    whole = decoder.decode(blobs)
    monkeypatch.setitem(decode._MAX_GROUP_PIXELS, "cpu", 20_000)
    parts = decoder.decode(blobs)
    assert parts.ok.all()
    assert (parts.images[view] == whole.images[view]).all()
    np.testing.assert_array_equal(parts.widths, whole.widths)


def test_formats_that_run_programs_are_no_images() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n"
    assert probe(eps).route == "none"
    assert probe(eps).reason.startswith("not an image")


def test_a_member_of_many_bytes_is_not_read(tmp_path: Path, client: Client, photos, encode, write_tar) -> None:
    jpeg = encode(photos[0])
    write_tar(tmp_path / "0.tar", [("big", {"jpg": jpeg + b"\0" * 100_000}), ("small", {"jpg": jpeg})])
    result = tiny_pipeline(str(tmp_path / "0.tar"), max_image_bytes=50_000).run(str(tmp_path / "OUT"), client=client)
    assert result.counts == {"decode_error": 1, "ok": 1}
    reason = result.catalog.compute().set_index("key").reason["big"]
    assert reason == f"{len(jpeg) + 100_000:,} bytes, over the limit of 50,000 (max_image_bytes)"


def test_limits_of_the_command_line_are_told_in_the_catalog(tmp_path: Path, encode, write_tar) -> None:
    sizes = {"good": (60, 50), "small": (60, 39), "large": (300, 300), "long": (400, 41)}
    samples = [(key, {"png": encode(Image.new("RGB", size, (9, 9, 200)), "PNG")}) for key, size in sizes.items()]
    write_tar(tmp_path / "0.tar", samples)
    arguments = ["--min-size", "40", "--max-pixels", "80000", "--max-aspect-ratio", "8", "--encoder", "tiny-image"]
    process = start("curate", tmp_path / "0.tar", "-o", tmp_path / "OUT", *arguments, "--workers", "1", "-q")
    out, err = process.communicate(timeout=120)
    assert out == "4 samples in = 1 kept + 2 decode_error + 1 too_small\n", err
    rows = pq.read_table(tmp_path / "OUT" / "catalog").to_pandas().set_index("key")
    assert rows.reason.to_dict() == {
        "good": "",
        "small": "60x39: shorter side under the limit of 40 (min_size)",
        "large": "300x300 = 90000 px, over the limit of 80000 px (max_pixels)",
        "long": "400x41: aspect ratio 9.7561, over the limit of 8 (max_aspect_ratio)",
    }
    assert (rows.width["small"], rows.height["small"]) == (60, 39)


def test_overwrite_never_deletes_its_own_input(shards: Path, tmp_path: Path, client: Client) -> None:
    out = tmp_path / "OUT"
    first = tiny_pipeline(str(shards / "*.tar")).run(str(out), client=client)
    before = checksums(out)
    with pytest.raises(InputError, match="the inputs lie in the output folder"):
        tiny_pipeline(str(out / "shards" / "*.tar")).run(str(out), client=client, overwrite=True)
    assert checksums(out) == before
    # A pattern that also finds the output leaves it out.
    everything = [str(shards / "*.tar"), str(tmp_path / "**" / "*.tar")]
    again = tiny_pipeline(everything).run(str(out), client=client)
    assert again.samples == first.samples


def test_output_of_an_earlier_run_among_the_inputs_is_told(
    shards: Path, tmp_path: Path, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    tiny_pipeline(str(folder)).run(str(folder / "OUT"), client=client)
    assert not caplog.records
    tiny_pipeline(str(folder)).run(str(folder / "OUT2"), client=client)
    assert "3 of 7 inputs are the output of an earlier run" in caplog.text
    assert str(folder / "OUT" / "shards") in caplog.text
    caplog.clear()
    tiny_pipeline(str(folder / "OUT" / "shards")).run(str(tmp_path / "OUT3"), client=client)
    assert not caplog.records


def test_overwrite_takes_nothing_from_a_folder_without_a_manifest(shards: Path, tmp_path: Path, client: Client) -> None:
    out = tmp_path / "OUT"
    tiny_pipeline(str(shards / "00000.tar")).run(str(out), client=client)
    (out / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="holds no run of imgcurate"):
        tiny_pipeline(str(shards / "00001.tar")).run(str(out), client=client, overwrite=True)


def test_an_overwrite_that_was_killed_is_not_taken_for_the_old_run(
    shards: Path, tmp_path: Path, client: Client
) -> None:
    out = tmp_path / "OUT"
    first = tiny_pipeline(str(shards / "00000.tar")).run(str(out), client=client)
    manifest = Manifest.load(str(out))
    manifest.state = "clearing"
    manifest.save(str(out))
    (out / "catalog" / "part-00000.parquet").unlink()
    again = tiny_pipeline(str(shards / "00000.tar")).run(str(out), client=client)
    assert again == first
    assert len(pq.read_table(out / "catalog")) == 18


class Brighter(Dark):
    rules = (Rule("brightness", ">=", 200, "dark"),)


Brighter.__name__, Brighter.__qualname__, Brighter.name = "Dark", "Dark", "dark"


class Scaled(ProcessingStage):
    name = "scaled"
    needs = ("image",)
    adds = {"scaled": "float32"}
    views = (PixelView(8, 8),)

    def __init__(self, factor: object) -> None:
        self.factor = factor

    def process(self, batch: ImageBatch) -> ImageBatch:
        batch["scaled"] = np.full(
            len(batch), float(len(self.factor) if isinstance(self.factor, set) else np.sum(self.factor))
        )
        return batch


def test_a_changed_stage_of_ones_own_is_another_run(shards: Path, tmp_path: Path, client: Client) -> None:
    source = str(shards / "00000.tar")
    tiny_pipeline(source, Dark()).run(str(tmp_path / "a"), client=client)
    with pytest.raises(
        ConfigError, match=r"holds another run \(test_pipeline\.Dark\.rules\[0\]\.threshold: 100 there, 200 asked"
    ):
        tiny_pipeline(source, Brighter()).run(str(tmp_path / "a"), client=client)
    changes = [(np.float32(1), np.float32(2)), (np.ones(3), np.zeros(3)), ({"a", "b"}, {"a", "c"})]
    for i, (one, other) in enumerate(changes):
        out = str(tmp_path / f"b{i}")
        tiny_pipeline(source, Scaled(one)).run(out, client=client)
        assert tiny_pipeline(source, Scaled(one)).run(out, client=client).samples == 18
        with pytest.raises(ConfigError, match="holds another run"):
            tiny_pipeline(source, Scaled(other)).run(out, client=client)


class Swap(ProcessingStage):
    """Puts another file in the place of an input while it is read."""

    name = "swap"
    needs = ("image",)
    adds = {"one": "float32"}
    views = (PixelView(8, 8),)

    def __init__(self, path: str, content: str) -> None:
        self._path, self._content = path, content

    def process(self, batch: ImageBatch) -> ImageBatch:
        if Path(self._content).exists():
            os.replace(self._content, self._path)
        batch["one"] = np.ones(len(batch))
        return batch


@pytest.mark.parametrize("kind", ["larger", "garbage", "shorter"])
def test_inputs_that_change_under_a_run_fail_it(
    kind: str, tmp_path: Path, client: Client, photos, encode, write_tar
) -> None:
    samples = [(f"{i:02d}", {"jpg": encode(photos[i])}) for i in range(20)]
    path = write_tar(tmp_path / "in" / "0.tar", samples)
    other = tmp_path / "other"
    write_tar(other, [(f"x{i}", {"jpg": encode(p)}) for i, p in enumerate(photos[:40])])
    if kind != "larger":
        size = path.stat().st_size
        other.write_bytes(b"\xaa" * (size if kind == "garbage" else size // 2))
    pipeline = tiny_pipeline(str(path), Swap(str(path), str(other)))
    with pytest.raises(ImgcurateError, match="changed"):
        pipeline.run(str(tmp_path / "OUT"), client=client)
    assert Manifest.load(str(tmp_path / "OUT")).state in ("running", "growing")


def test_what_killed_processes_left_is_cleared_away(shards: Path, tmp_path: Path, client: Client) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    (out / ".manifest.json.abc.tmp").touch()
    result = tiny_pipeline(str(shards / "00000.tar")).run(str(out), client=client)
    assert result.samples == 18
    assert not list(out.rglob("*.tmp"))


def test_two_runs_do_not_share_a_folder(shards: Path, tmp_path: Path, client: Client) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    with exclusive(str(out)), pytest.raises(StorageError, match="another run is writing to"):
        tiny_pipeline(str(shards / "00000.tar")).run(str(out), client=client)
    assert tiny_pipeline(str(shards / "00000.tar")).run(str(out), client=client).samples == 18


class Raises(ProcessingStage):
    name = "raises"
    needs = ("image",)
    adds = {"one": "float32"}
    views = (PixelView(8, 8),)

    def process(self, batch: ImageBatch) -> ImageBatch:
        raise ValueError("boom " + "x" * 5)


def test_an_error_names_the_stage_and_the_place(shards: Path, tmp_path: Path, client: Client) -> None:
    pipeline = tiny_pipeline(str(shards / "00000.tar"), Raises())
    words = r"boom xxxxx \(process\(\), line \d+ of .*py; in .*00000.tar, key 'photo/000'"
    with pytest.raises(ImgcurateError, match=words):
        pipeline.run(str(tmp_path / "OUT"), client=client)


@pytest.mark.parametrize(
    ("mask", "status", "message"),
    [(np.arange(3), None, "should hold booleans, not int64"), (np.ones(3, bool), "ok", "with the status 'ok'")],
)
def test_drop_refuses_what_it_could_misunderstand(mask: np.ndarray, status: str | None, message: str, shards) -> None:
    from imgcurate import read_webdataset

    rows = read_webdataset(str(shards / "00000.tar")).compute().iloc[:3]
    with pytest.raises(ConfigError, match=message):
        ImageBatch(rows).drop(mask, "because", status=status)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(StorageError, match="it is no regular file"):
        open_source(str(tmp_path / "pipe.tar"))


def test_a_missing_scheduler_file_is_not_waited_for(tmp_path: Path) -> None:
    with (
        pytest.raises(ClusterError, match="there is no scheduler file"),
        open_client(scheduler=str(tmp_path / "s.json")),
    ):
        pass


def test_a_scheduler_without_workers_is_an_error(shards: Path, tmp_path: Path) -> None:
    from distributed import LocalCluster

    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as empty,
        pytest.raises(ClusterError, match="has no workers"),
    ):
        tiny_pipeline(str(shards / "00000.tar")).run(str(tmp_path / "OUT"), client=empty, device="cpu")


def start(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "imgcurate.cli", *map(str, arguments)], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_while_workers_start(tmp_path: Path, shards: Path, number: int, workers: int) -> None:
    process = start("curate", shards / "*.tar", "-o", tmp_path / "OUT", "--encoder", "tiny-image", "--workers", "2")
    children = psutil.Process(process.pid).children

    def spawned() -> list[psutil.Process]:
        return [c for c in children() if "spawn_main" in " ".join(c.cmdline())]

    wait_for(lambda: len(spawned()) >= workers, process)
    started = spawned()
    # A terminal's Ctrl-C goes to all.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-1] == "imgcurate: stopped: run the same command again to go on"
    assert "Traceback" not in err
    assert started
    assert not psutil.wait_procs(started, timeout=30)[1]


def test_the_third_ctrl_c_ends_the_process(tmp_path: Path) -> None:
    script = tmp_path / "stops.py"
    script.write_text(
        "import os, signal, time\nfrom imgcurate.console import running\n"
        "with running(quiet=True):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\n"
        "    finally:\n        print('ends', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        print('goes on', flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout == "ends\ngoes on\n"
    assert done.stderr == "imgcurate: stopping; once more ends it at once\n"


def test_ctrl_c_says_how_to_go_on_and_a_kill_loses_nothing(
    tmp_path: Path, shards: Path, photos, encode, write_tar
) -> None:
    jpegs = [encode(p) for p in photos]
    for k in range(8):
        write_tar(tmp_path / "in" / f"{k:05d}.tar", [(f"{k}/{i}", {"jpg": j}) for i, j in enumerate(jpegs)])
    hold = tmp_path / "hold"
    begin = functools.partial(start, env=held.environment(hold, out := tmp_path / "stopped"))
    arguments = ["run", held.write_run(tmp_path, tmp_path / "in"), "--workers", "2", "-q", "-o"]
    hold.unlink()
    whole = begin(*arguments, tmp_path / "whole")
    assert whole.communicate(timeout=120)[1] == ""

    held.environment(hold, out)
    process = begin(*arguments, out)
    wait_for(lambda: len(list(out.glob("catalog/part-*.parquet"))) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "imgcurate: stopped: run the same command again to go on"
    assert "Traceback" not in err
    assert 2 <= len(list(out.glob("catalog/part-*.parquet"))) < 8

    hold.unlink()
    process = begin(*arguments, out)
    wait_for(lambda: (out / "checkpoint" / "1-SemanticDedupStage").exists(), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    final = begin(*arguments, out)
    line, err = final.communicate(timeout=120)
    assert re.fullmatch(r"480 samples in = 60 kept \+ 420 duplicate\n", line), err
    assert checksums(out) == checksums(tmp_path / "whole")
    names = sorted(p.relative_to(out) for p in out.rglob("*"))
    assert names == sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*"))


def test_pillow_is_not_asked_for_what_it_reads_by_accident() -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PDF")
    assert probe(out.getvalue()).reason == "not an image: application/pdf"


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path, shards: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from imgcurate import *\n"
        f"stages = [FilePartitioningStage({str(shards / '00000.tar')!r}), ImageReaderStage(), ImageWriterStage()]\n"
        "Pipeline(stages).run('OUT', device='cpu')\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith('what starts them must stand under: if __name__ == "__main__":')
    script.write_text(script.read_text().replace("Pipeline(", "if __name__ == '__main__':\n    Pipeline("))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Undeclared(Raises):
    def process(self, batch: ImageBatch) -> ImageBatch:
        batch["one"] = np.ones(len(batch))
        batch["two"] = np.ones(len(batch))
        return batch


def test_a_column_that_is_not_declared_is_not_dropped_silently(shards: Path, tmp_path: Path, client: Client) -> None:
    pipeline = tiny_pipeline(str(shards / "00000.tar"), Undeclared())
    with pytest.raises(ConfigError, match="sets the column 'two', which it does not declare in 'adds'"):
        pipeline.run(str(tmp_path / "OUT"), client=client)
    # Nothing was finished, so another pipeline may have the folder.
    assert tiny_pipeline(str(shards / "00000.tar")).run(str(tmp_path / "OUT"), client=client).samples == 18


def test_a_server_that_does_not_know_ranges_is_understood(tmp_path: Path, shards: Path) -> None:
    import http.server
    import threading

    from imgcurate.shards import index_shard

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/00000.tar"
        found = index_shard(url, 0).table
        server.shutdown()
    expected = index_shard(str(shards / "00000.tar"), 0).table
    assert found.drop_columns("shard").equals(expected.drop_columns("shard"))


def distributed_level() -> int:
    return logging.getLogger("distributed").level


def test_workers_log_as_their_client_was_told_to() -> None:
    with dask.config.set(logging={"distributed": "critical"}), open_client(device="cpu", n_workers=1) as client:
        assert set(client.run(distributed_level).values()) == {logging.CRITICAL}
