"""Fixtures that several test modules use."""

from __future__ import annotations

import io
import itertools
import os
import signal
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from distributed import Client, LocalCluster
from PIL import Image

from imgcurate.backend import Backend, get_backend, why_no_gpu

# A machine that does much else is slow now and then.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

# These take minutes, for they start processes and kill them; begun first, they end while the others run.
_LONG = (
    "failed_partitions nodes readme benchmarks chaos scripts failures hardening isolation s3 cluster partitions "
    "encoders cli report growth preflight dedup_embeddings"
).split()

# A report takes seconds; tests that look at one ask for it.
os.environ["IMGCURATE_REPORT"] = "0"

# A shell ignores Ctrl-C for what it starts in the background, and so would all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

Samples = Sequence[tuple[str, Mapping[str, bytes]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first."""
    places = {f"test_{name}": i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of real photographs and weights; skip the test where it is missing."""
    named = os.environ.get("IMGCURATE_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: name the folder with IMGCURATE_TEST_DATA")
    return folder


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    """Leave the environment as it was: nannies set in it how quiet their workers are to be."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Return each backend in turn; the GPU's is skipped where there is none."""
    if request.param == "gpu" and (reason := why_no_gpu()):
        pytest.skip(reason)
    return get_backend(request.param)


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Yield a client of two workers that are threads of this process."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Return 60 distinct pieces of real photos, 96 to 160 pixels a side."""
    from imgcurate.demo import _photos

    pieces: list[Image.Image] = []
    thumbnails: list[np.ndarray] = []
    for k, (_, photo) in itertools.product(range(8), _photos()):
        side = 96 + 16 * (k % 5)
        x = (photo.width - side) * (k % 3) // 2
        y = (photo.height - side) * (k // 3) // 2 + k % 3
        piece = photo.crop((x, y, x + side, y + side - 16))
        thumbnail = np.asarray(piece.resize((16, 16)), dtype=float).reshape(-1)
        thumbnail -= thumbnail.mean()
        contrast = thumbnail.std()
        thumbnail /= np.linalg.norm(thumbnail)
        if contrast > 25 and all(thumbnail @ t < 0.8 for t in thumbnails):
            pieces.append(piece)
            thumbnails.append(thumbnail)
    return pieces[:60]


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """Return a function that encodes a picture."""

    def encode_(image: Image.Image | np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
        image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        out = io.BytesIO()
        image.save(out, kind, **({"quality": 92} if kind == "JPEG" and not options else options))
        return out.getvalue()

    return encode_


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Samples], Path]:
    """Return a function that writes samples, (key, {ext: bytes}) each, as a tar."""

    def write(path: Path, samples: Samples) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for key, members in samples:
                for ext, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{ext}")
                    info.size, info.mtime = len(data), 1_700_000_000
                    tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def read_tar() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads a tar as {member name: bytes}."""

    def read(path: Path) -> dict[str, bytes]:
        with tarfile.open(path) as tar:
            return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}

    return read


@pytest.fixture(scope="session")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    photos: list[Image.Image],
    encode: Callable[..., bytes],
    write_tar: Callable[[Path, Samples], Path],
) -> Path:
    """Return a folder of four shards: 60 photos, 12 recompressed copies of them, captions and JSON."""
    folder = tmp_path_factory.mktemp("shards")
    samples = [
        (f"photo/{i:03d}", {"jpg": encode(p), "txt": f"caption {i}".encode(), "json": b'{"i": %d}' % i})
        for i, p in enumerate(photos)
    ]
    samples += [(f"copy/{i:03d}", {"jpg": encode(photos[i], quality=40), "txt": b"copy"}) for i in range(12)]
    for k in range(4):
        write_tar(folder / f"{k:05d}.tar", samples[k::4])
    return folder
