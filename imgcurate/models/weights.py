"""Published weight files: find them on disk, else download them, and verify them in either case.

A file is looked for in the model folder and in its sub folders ``aesthetic``, ``aesthetic_v1`` and
``nsfw``. What is downloaded takes its final name only after its SHA-256 was found right, so a file
under its final name is whole; one that is wrong there was put there by hand and is never touched.

Environment variables
---------------------
IMGCURATE_MODEL_DIR
    The model folder, where none is named.
IMGCURATE_WEIGHTS_URL_BASE
    A mirror: files are fetched from ``<base>/<file name>`` instead of where they were published.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import logging
import os
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from imgcurate import storage
from imgcurate.errors import ConfigError, WeightsError

__all__ = [
    "AESTHETIC_V1_B16",
    "AESTHETIC_V1_B32",
    "AESTHETIC_V1_L14",
    "AESTHETIC_V2",
    "NSFW_B32",
    "NSFW_L14",
    "PUBLISHED",
    "WeightFile",
    "absolute_path",
    "default_model_dir",
    "ensure_weights",
    "file_sha256",
    "find_file",
    "find_weights",
    "resolve_model_dir",
]

logger = logging.getLogger(__name__)

MODEL_DIR_VARIABLE: Final = "IMGCURATE_MODEL_DIR"
URL_BASE_VARIABLE: Final = "IMGCURATE_WEIGHTS_URL_BASE"
_SUB_FOLDERS: Final = ("", "aesthetic", "aesthetic_v1", "nsfw")
_ATTEMPTS: Final = 3
_FIRST_DELAY_S: Final = 0.5
_TIMEOUT_S: Final = 30.0
_CHUNK_BYTES: Final = 1 << 18
_TRANSIENT_STATUS: Final = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A file of weights as its authors published it.

    Attributes
    ----------
    name : str
        File name on disk.
    url : str
        Where it is published (http or https).
    sha256 : str
        Checksum of its bytes, 64 lower-case hexadecimal digits.
    nbytes : int or None
        Its length in bytes, if known.
    licence : str
        SPDX identifier.
    source : str
        Repository of its authors.
    """

    name: str
    url: str
    sha256: str
    nbytes: int | None
    licence: str
    source: str


_HUB: Final = "https://github.com"
_V2, _V1, _NSFW = (
    "christophschuhmann/improved-aesthetic-predictor",
    "LAION-AI/aesthetic-predictor",
    "LAION-AI/CLIP-based-NSFW-Detector",
)

PUBLISHED: Final[Mapping[str, WeightFile]] = {
    name: WeightFile(
        name, f"{_HUB}/{source}/raw/main/{urllib.parse.quote(name)}", sha256, nbytes, licence, source
    )
    for name, nbytes, licence, source, sha256 in (
        ("sac+logos+ava1-l14-linearMSE.pth", 3_714_759, "Apache-2.0", _V2,
         "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"),
        ("sa_0_4_vit_l_14_linear.pth", 4_071, "MIT", _V1,
         "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba"),
        ("sa_0_4_vit_b_32_linear.pth", 3_047, "MIT", _V1,
         "c7b14cead230694acc7b9447974d3cad78003c72da032e402a303b6c2429e85f"),
        ("sa_0_4_vit_b_16_linear.pth", 3_047, "MIT", _V1,
         "8ad3923d7ecf019df20ecd2ab5542a3075fbba0278d239c0371345f3d7fcbde0"),
        ("clip_autokeras_binary_nsfw.zip", 1_094_585, "MIT", _NSFW,
         "905520bb0336accc73ee282c605d926aef90cf14248889d44b9cee50eef71f8a"),
        ("clip_autokeras_nsfw_b32.zip", 231_831, "MIT", _NSFW,
         "78715ab9d64485167e8c9ade3b8e6761a17a16c24d114bd47431ac1dab46462b"),
    )
}  # fmt: skip
AESTHETIC_V2: Final = PUBLISHED["sac+logos+ava1-l14-linearMSE.pth"]
AESTHETIC_V1_L14: Final = PUBLISHED["sa_0_4_vit_l_14_linear.pth"]
AESTHETIC_V1_B32: Final = PUBLISHED["sa_0_4_vit_b_32_linear.pth"]
AESTHETIC_V1_B16: Final = PUBLISHED["sa_0_4_vit_b_16_linear.pth"]
NSFW_L14: Final = PUBLISHED["clip_autokeras_binary_nsfw.zip"]
NSFW_B32: Final = PUBLISHED["clip_autokeras_nsfw_b32.zip"]


class _TransientError(Exception):
    """A failure of the network that may be gone at the next attempt."""


_checksums: dict[tuple[str, int, int], str] = {}


def default_model_dir() -> Path:
    """Return the folder for weights: ``$IMGCURATE_MODEL_DIR``, else ``imgcurate`` in the user's cache.

    Raises
    ------
    ConfigError
        If neither variable is set and the user has no home folder.
    """
    if named := os.environ.get(MODEL_DIR_VARIABLE):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if Path(cache).is_absolute():
        return Path(cache) / "imgcurate"
    try:
        return Path.home() / ".cache" / "imgcurate"
    except RuntimeError as exc:
        raise ConfigError(
            f"there is no home folder to keep weights in: set {MODEL_DIR_VARIABLE}, model_dir or --model-dir"
        ) from exc


def resolve_model_dir(model_dir: str | os.PathLike[str] | None) -> Path:
    """Return the local folder that `model_dir` names; None is :func:`default_model_dir`.

    Raises
    ------
    ConfigError
        If it is a remote URL.
    """
    if model_dir is None:
        return default_model_dir()
    text = os.fspath(model_dir)
    if not storage.is_local(text):
        raise ConfigError(f"model_dir={text!r} is remote: expected a folder of this machine")
    return Path(storage.local_path(text)).expanduser()


def absolute_path(path: str | os.PathLike[str] | None) -> str | None:
    """Return a local path as a worker in another working folder finds it; a URL or None as it is."""
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{path!r} should be the path of a file or folder")
    if path is None or not storage.is_local(os.fspath(path)):
        return None if path is None else os.fspath(path)
    return str(Path(storage.local_path(os.fspath(path))).expanduser().absolute())


def find_file(name: str, model_dir: Path) -> Path | None:
    """Return the path of a file in `model_dir` or its known sub folders; None if it is in none of them."""
    candidates = (model_dir / folder / name for folder in _SUB_FOLDERS)
    return next((path for path in candidates if path.is_file()), None)


def find_weights(weight: WeightFile, model_dir: Path) -> Path | None:
    """Return the path of a published file on disk, unverified; None if it is not there."""
    return find_file(weight.name, model_dir)


def ensure_weights(weight: WeightFile, model_dir: Path, *, progress: bool = True) -> Path:
    """Return the path of a verified published file, downloading it if it is not on disk.

    Parameters
    ----------
    weight : WeightFile
        What is wanted.
    model_dir : Path
        Where it is looked for, and downloaded to.
    progress : bool
        Show a progress bar if stderr is a terminal.

    Raises
    ------
    WeightsError
        If it cannot be downloaded or written, or its checksum is wrong.

    Notes
    -----
    Processes that ask for the same file at the same time download it once: the others wait for the
    lock file ``.<name>.lock`` beside it. A file is hashed once per process.
    """
    path = find_weights(weight, model_dir)
    if path is not None:
        _verify(weight, path)
        return path
    target = model_dir / weight.name
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        with _lock(model_dir / f".{weight.name}.lock"):
            if not target.is_file():
                _download(weight, target, progress)
    except (OSError, storage.StorageError) as exc:
        raise WeightsError(f"cannot keep {weight.name} in {model_dir}: {exc}. {_by_hand(weight, target)}") from exc
    _verify(weight, target)
    return target


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes; computed once per process while time and size stay.

    Raises
    ------
    WeightsError
        If the file cannot be read.
    """
    try:
        stat = Path(path).stat()
        key = (str(Path(path).absolute()), stat.st_mtime_ns, stat.st_size)
        if key not in _checksums:
            with Path(path).open("rb") as file:
                _checksums[key] = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise WeightsError(f"cannot read the weights {os.fspath(path)}: {exc.strerror or exc}") from exc
    return _checksums[key]


def _verify(weight: WeightFile, path: Path) -> None:
    found = file_sha256(path)
    if found != weight.sha256:
        raise WeightsError(
            f"{path} is not the published {weight.name}: its SHA-256 is {found}, expected {weight.sha256}. "
            f"Remove it to have it downloaded from {weight.url}, or put the right file there"
        )


def _by_hand(weight: WeightFile, target: Path) -> str:
    return (
        f"Without a network: fetch {weight.url} elsewhere and put it at {target}, "
        "or name the folder that holds it with model_dir=... / --model-dir"
    )


def _url(weight: WeightFile) -> str:
    base = os.environ.get(URL_BASE_VARIABLE)
    if not base:
        return weight.url
    if not base.startswith(("http://", "https://")):
        raise ConfigError(f"{URL_BASE_VARIABLE}={base!r}: expected an http:// or https:// URL")
    return f"{base.rstrip('/')}/{urllib.parse.quote(weight.name)}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads; the kernel frees it if the holder dies."""
    with path.open("ab") as file:
        # Some network filesystems have no locks. Then several may download: each one's file is whole.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(weight: WeightFile, target: Path, progress: bool) -> None:
    url = _url(weight)
    delay_s = _FIRST_DELAY_S
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            # An exception in the block leaves no file behind.
            with storage.atomic_write(str(target)) as out:
                _fetch(weight, url, out, target, progress)
        except _TransientError as exc:
            if attempt == _ATTEMPTS:
                raise WeightsError(
                    f"cannot download {url}: {exc} ({_ATTEMPTS} attempts). {_by_hand(weight, target)}"
                ) from exc
            logger.info("%s: %s; trying again in %.1f s", url, exc, delay_s)
            time.sleep(delay_s)
            delay_s *= 2
        else:
            return


def _fetch(weight: WeightFile, url: str, out: IO[bytes], target: Path, progress: bool) -> None:
    """Copy the body of `url` to `out` and verify it."""
    digest = hashlib.sha256()
    received = 0
    with _open(url, weight, target) as response:
        length = response.headers.get("Content-Length", "")
        expected = int(length) if length.isdecimal() else None
        with _progress(weight, url, expected or weight.nbytes, progress) as advance:
            while chunk := _read(response):
                received += len(chunk)
                if weight.nbytes is not None and received > weight.nbytes:
                    raise WeightsError(
                        f"{url} is longer than the {weight.nbytes:,} bytes that {weight.name} has. "
                        f"{_by_hand(weight, target)}"
                    )
                out.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
    if expected is not None and received != expected:
        raise _TransientError(f"the body ended after {received:,} of {expected:,} bytes")
    if digest.hexdigest() != weight.sha256:
        raise WeightsError(
            f"what came from {url} is not the published {weight.name}: the SHA-256 of its {received:,} bytes "
            f"is {digest.hexdigest()}, expected {weight.sha256}. {_by_hand(weight, target)}"
        )


def _open(url: str, weight: WeightFile, target: Path) -> http.client.HTTPResponse:
    request = urllib.request.Request(url, headers={"User-Agent": "imgcurate"})  # noqa: S310 - http(s), see _url
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code in _TRANSIENT_STATUS:
            raise _TransientError(f"the server answered {exc.code} {exc.reason}") from exc
        raise WeightsError(
            f"cannot download {url}: the server answered {exc.code} {exc.reason}. {_by_hand(weight, target)}"
        ) from exc
    except (OSError, http.client.HTTPException) as exc:
        cause = exc.reason if isinstance(exc, urllib.error.URLError) else exc
        if _is_transient(cause):
            raise _TransientError(str(cause) or type(cause).__name__) from exc
        raise WeightsError(f"cannot download {url}: {cause}. {_by_hand(weight, target)}") from exc
    return response


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        raise _TransientError(f"the connection broke: {str(exc) or type(exc).__name__}") from exc


def _is_transient(cause: object) -> bool:
    if isinstance(cause, ConnectionRefusedError):
        return False
    return isinstance(cause, (ConnectionError, TimeoutError, http.client.HTTPException))


@contextlib.contextmanager
def _progress(weight: WeightFile, url: str, nbytes: int | None, show: bool) -> Iterator[Callable[[int], Any]]:
    """Give a function to call with the number of bytes that came."""
    logger.info("downloading %s from %s (%s)", weight.name, url, f"{nbytes:,} bytes" if nbytes else "size unknown")
    if not (show and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(weight.name, total=nbytes)
        yield lambda n: bar.advance(task, n)
