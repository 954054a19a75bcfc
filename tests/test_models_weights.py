"""Finding, downloading and verifying weights, against a real HTTP server on the loopback with real faults."""

from __future__ import annotations

import hashlib
import http.server
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imgcurate.errors import ConfigError, WeightsError
from imgcurate.models import weights
from imgcurate.models.weights import (
    PUBLISHED,
    WeightFile,
    default_model_dir,
    ensure_weights,
    file_sha256,
    find_weights,
    resolve_model_dir,
)

BODY = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(BODY).hexdigest()
WEIGHT = WeightFile("a+b.bin", "https://example.invalid/x/a%2Bb.bin", SHA256, len(BODY), "MIT", "nobody/nothing")

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def good(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    handler.wfile.write(BODY)


def slow(handler: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(1.0)
    good(handler)


def without_length(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(BODY)


def short(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(BODY)))
    handler.end_headers()
    handler.wfile.write(BODY[:1000])


def reset(handler: http.server.BaseHTTPRequestHandler) -> None:
    # A linger time of zero turns the close into a reset.
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def wrong(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>please log in</html>")


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(BODY)


def status(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


class Server:
    """Answers the n-th request with the n-th answer, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[Answer] = [good]
        self.paths: list[str] = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.paths.append(self.path)
                answer = owner.answers.pop(0) if len(owner.answers) > 1 else owner.answers[0]
                try:
                    answer(self)
                except OSError:
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

            def finish(self) -> None:
                try:
                    super().finish()
                except (OSError, ValueError):
                    self.close_connection = True

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.http.server_port}/mirror"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("IMGCURATE_WEIGHTS_URL_BASE", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(weights, "_FIRST_DELAY_S", 0.01)
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_published_files_have_quoted_https_urls_and_checksums() -> None:
    assert len(PUBLISHED) == 6
    for name, weight in PUBLISHED.items():
        assert weight.name == name
        assert weight.url.startswith("https://github.com/")
        assert "+" not in weight.url
        assert len(weight.sha256) == 64
        assert weight.nbytes
        assert weight.licence in {"MIT", "Apache-2.0"}
    assert weights.AESTHETIC_V2.url == (
        "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth"
    )


def test_published_checksums_are_those_of_the_real_files(data_dir: Path) -> None:
    for weight in PUBLISHED.values():
        path = find_weights(weight, data_dir / "weights")
        assert path is not None, weight.name
        assert ensure_weights(weight, data_dir / "weights") == path
        assert path.stat().st_size == weight.nbytes


def test_default_model_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("IMGCURATE_MODEL_DIR", raising=False)
    assert default_model_dir() == tmp_path / ".cache" / "imgcurate"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert default_model_dir() == tmp_path / ".cache" / "imgcurate"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_model_dir() == tmp_path / "xdg" / "imgcurate"
    monkeypatch.setenv("IMGCURATE_MODEL_DIR", "~/models")
    assert default_model_dir() == tmp_path / "models"
    assert resolve_model_dir(None) == tmp_path / "models"
    assert resolve_model_dir("~/other") == tmp_path / "other"


def test_resolve_model_dir_refuses_remote_urls() -> None:
    with pytest.raises(ConfigError, match=r"s3://bucket/m.*folder of this machine"):
        resolve_model_dir("s3://bucket/m")


def test_file_sha256_is_computed_once_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    stat = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest(), "same time and size: not read again"
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    with pytest.raises(WeightsError, match="cannot read the weights"):
        file_sha256(tmp_path / "missing")


@pytest.mark.parametrize("folder", ["", "aesthetic", "aesthetic_v1", "nsfw"])
def test_ensure_weights_takes_a_file_on_disk(tmp_path: Path, server: Server, folder: str) -> None:
    path = tmp_path / folder / WEIGHT.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(BODY)
    assert ensure_weights(WEIGHT, tmp_path) == path
    assert server.paths == []


def test_ensure_weights_refuses_and_keeps_a_wrong_file_of_the_user(tmp_path: Path, server: Server) -> None:
    path = tmp_path / WEIGHT.name
    path.write_bytes(b"mine")
    with pytest.raises(WeightsError, match=f"{hashlib.sha256(b'mine').hexdigest()}, expected {SHA256}"):
        ensure_weights(WEIGHT, tmp_path)
    assert path.read_bytes() == b"mine"
    assert server.paths == []


@pytest.mark.parametrize("answer", [good, without_length])
def test_ensure_weights_downloads(tmp_path: Path, server: Server, answer: Answer) -> None:
    server.answers = [answer]
    folder = tmp_path / "not" / "there"
    path = ensure_weights(WEIGHT, folder)
    assert path == folder / WEIGHT.name
    assert path.read_bytes() == BODY
    assert visible(folder) == [WEIGHT.name]
    assert server.paths == ["/mirror/a%2Bb.bin"]
    assert ensure_weights(WEIGHT, folder) == path
    assert len(server.paths) == 1


def test_ensure_weights_logs_one_line_where_there_is_no_terminal(
    tmp_path: Path, server: Server, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        ensure_weights(WEIGHT, tmp_path)
    assert [r.message for r in caplog.records] == [
        f"downloading a+b.bin from {server.url}/a%2Bb.bin ({len(BODY):,} bytes)"
    ]
    assert capsys.readouterr() == ("", "")


def test_ensure_weights_shows_a_bar_on_a_terminal(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ensure_weights(WEIGHT, tmp_path)
    out, err = capsys.readouterr()
    assert "a+b.bin" in err
    assert out == ""


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), short, reset])
def test_ensure_weights_tries_again_after_a_passing_fault(tmp_path: Path, server: Server, fault: Answer) -> None:
    server.answers = [fault, fault, good]
    assert ensure_weights(WEIGHT, tmp_path).read_bytes() == BODY
    assert len(server.paths) == 3
    assert visible(tmp_path) == [WEIGHT.name]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (status(500), "500"),
        (short, r"ended after 1,000 of 1,024,000 bytes"),
        (reset, "reset|closed"),
    ],
)
def test_ensure_weights_gives_up_after_three_attempts(
    tmp_path: Path, server: Server, fault: Answer, words: str
) -> None:
    server.answers = [fault]
    with pytest.raises(WeightsError, match=rf"({words}).*\(3 attempts\)") as caught:
        ensure_weights(WEIGHT, tmp_path)
    assert len(server.paths) == 3
    assert visible(tmp_path) == []
    for part in (
        f"{server.url}/a%2Bb.bin",
        str(tmp_path / WEIGHT.name),
        "model_dir=...",
        "--model-dir",
        WEIGHT.url,
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (status(404), "answered 404"),
        (wrong, f"SHA-256 of its 26 bytes is [0-9a-f]{{64}}, expected {SHA256}"),
        (endless, "is longer than the 1,024,000 bytes"),
    ],
)
def test_ensure_weights_does_not_repeat_what_cannot_help(
    tmp_path: Path, server: Server, answer: Answer, words: str
) -> None:
    server.answers = [answer]
    with pytest.raises(WeightsError, match=words):
        ensure_weights(WEIGHT, tmp_path)
    assert len(server.paths) == 1
    assert visible(tmp_path) == []


def test_ensure_weights_offline_says_where_the_file_may_be_put(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("IMGCURATE_WEIGHTS_URL_BASE", base)
        with pytest.raises(WeightsError, match="refused") as caught:
            ensure_weights(WEIGHT, tmp_path)
    for part in (f"{base}/a%2Bb.bin", str(tmp_path / WEIGHT.name), "model_dir=...", "--model-dir"):
        assert part in str(caught.value)


def test_ensure_weights_refuses_a_mirror_that_is_not_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMGCURATE_WEIGHTS_URL_BASE", f"file://{tmp_path}")
    with pytest.raises(ConfigError, match="expected an http"):
        ensure_weights(WEIGHT, tmp_path)


def test_ensure_weights_where_no_folder_can_be_made(tmp_path: Path, server: Server) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"cannot keep a\+b.bin in .*--model-dir"):
        ensure_weights(WEIGHT, tmp_path / "file" / "folder")
    assert server.paths == []


def test_ensure_weights_downloads_once_for_many_threads_and_processes(tmp_path: Path, server: Server) -> None:
    server.answers = [slow]
    script = (
        "import sys; from pathlib import Path; "
        "from imgcurate.models.weights import WeightFile, ensure_weights; "
        f"print(ensure_weights({WEIGHT!r}, Path(sys.argv[1])))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    threads = [threading.Thread(target=ensure_weights, args=(WEIGHT, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outputs = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert outputs == [str(tmp_path / WEIGHT.name)] * 3
    assert len(server.paths) == 1
    assert visible(tmp_path) == [WEIGHT.name]


def test_paths_of_weights_hold_in_other_working_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imgcurate.stages import ImageAestheticFilterStage, ImageEmbeddingStage, ImageNSFWFilterStage

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    stages = [
        ImageEmbeddingStage("ViT-B-32", "mine.safetensors", "models"),
        ImageAestheticFilterStage(model_dir="models"),
        ImageNSFWFilterStage(model_dir="file://models"),
    ]
    assert {s.model_dir for s in stages} == {str(tmp_path / "models")}
    assert stages[0]._spec.pretrained == str(tmp_path / "mine.safetensors")
    assert ImageEmbeddingStage("ViT-B-32", "openai").model_dir is None
    assert ImageAestheticFilterStage(model_dir="s3://bucket/models").model_dir == "s3://bucket/models"
