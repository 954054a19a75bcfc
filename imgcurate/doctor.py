"""What this machine and environment can do, what hinders them, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import pyarrow as pa
from packaging.requirements import Requirement

from imgcurate.backend import Backend, cpu_count, why_no_gpu
from imgcurate.storage import free_bytes, is_local

__all__ = ["Finding", "examine"]

_GIB: Final = 1024**3
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_LEAST_MEMORY: Final = 4 * _GIB
_LEAST_DISK: Final = 5 * _GIB
_LEAST_FILES: Final = 1024
_DALI_BUILDS: Final = ("nvidia-dali-cuda110", "nvidia-dali-cuda120", "nvidia-dali-cuda130")
_RAPIDS: Final = ("cudf", "dask_cudf", "cuml", "cupy", "rmm", "dask_cuda")
_EXTRAS: Final = {
    "pillow_heif": ("HEIC images", "heif"), "s3fs": ("s3:// inputs", "s3"), "gcsfs": ("gs:// inputs", "gcs"),
    "aiohttp": ("http:// inputs", "http"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    what : str
        Its name.
    state : {"ok", "note", "warning", "problem"}
        ``note``: something optional is not there. ``problem``: runs will fail.
    found : str
        What was found.
    cure : str
        What mends it; '' if nothing has to be.
    """

    what: str
    state: Literal["ok", "note", "warning", "problem"]
    found: str
    cure: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it as plain data."""
        return asdict(self)


def examine(folder: str = ".", model_dir: str | None = None) -> list[Finding]:
    """Look at the machine, the packages, the GPU, the weights and the disks.

    Parameters
    ----------
    folder : str
        Where output would go, a path or URL.
    model_dir : str, optional
        Where weights are looked for; nothing is downloaded.
    """
    found: list[Finding] = []
    for check in (_python, _processor, _memory, _open_files, _packages, _dali, _decoding, _gpu, _extras):
        found += _checked(check.__name__.strip("_"), check)
    found += _checked("weights", lambda: _weights(model_dir))
    found += _checked("disks", lambda: _disks(folder))
    return found


def _checked(what: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Return what a check finds; one that breaks is a finding itself."""
    found = []
    try:
        for finding in check():
            found.append(finding)  # noqa: PERF402 - what came before an error counts
    except Exception as exc:  # noqa: BLE001 - whatever is broken here is what is asked about
        found.append(Finding(what, "problem", f"{type(exc).__name__}: {exc}", "report this, with all of this output"))
    return found


def _python() -> Iterator[Finding]:
    version = importlib.metadata.version("imgcurate")
    yield Finding("imgcurate", "ok", f"{version}, Python {platform.python_version()}, {platform.platform()}")


def _processor() -> Iterator[Finding]:
    import torch

    fast = [
        name
        for name, there in (
            ("AMX", torch.cpu._is_amx_tile_supported()),
            ("AVX-512 bf16", torch.cpu._is_avx512_bf16_supported()),
            ("AVX2", torch.cpu._is_avx2_supported()),
        )
        if there
    ]
    words = ", ".join(fast) or "none of AVX2, AVX-512, AMX"
    yield Finding("processor", "ok", f"{cpu_count()} of {os.cpu_count()} cores usable, {words}")


def _memory() -> Iterator[Finding]:
    from distributed.system import MEMORY_LIMIT

    cure = "" if MEMORY_LIMIT >= _LEAST_MEMORY else "a worker needs 4 GiB; take fewer workers or a larger machine"
    yield Finding("memory", "warning" if cure else "ok", f"{MEMORY_LIMIT / _GIB:.1f} GiB", cure)


def _open_files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    cure = "" if soft >= _LEAST_FILES else "ulimit -n 65536"
    yield Finding("open files", "warning" if cure else "ok", f"{soft:,} at a time", cure)


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what imgcurate asks for."""
    wrong = []
    for text in importlib.metadata.requires("imgcurate") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if not _has(wanted.name):
            wrong.append(f"{wanted.name} is missing")
            continue
        version = importlib.metadata.version(wanted.name)
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} is {version}, and should be {wanted.specifier}")
    if wrong:
        yield Finding("packages", "problem", "; ".join(wrong), "python -m pip install --upgrade imgcurate")
    else:
        yield Finding("packages", "ok", "all there, in versions that fit")


def _dali() -> Iterator[Finding]:
    builds = {name: importlib.metadata.version(name) for name in _DALI_BUILDS if _has(name)}
    shown = ", ".join(f"{name} {version}" for name, version in builds.items())
    if not builds:
        yield Finding("DALI", "problem", "not installed", "python -m pip install 'imgcurate[cpu]'")
    elif len(builds) > 1:
        cure = f"python -m pip uninstall {' '.join(builds)}, then install one of them"
        yield Finding("DALI", "problem", f"{shown}: they overwrite each other's files", cure)
    else:
        yield Finding("DALI", "ok", shown)


def _decoding() -> Iterator[Finding]:
    """Decode an image, as a worker would."""
    from PIL import Image

    from imgcurate.batches import PixelView
    from imgcurate.decode import Decoder

    out = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(out, "JPEG")
    for name in ("cpu", *(["gpu"] if why_no_gpu() is None else [])):
        decoder = Decoder((PixelView(16, 16),), Backend(name), batch_size=1, num_threads=1)  # type: ignore[arg-type]
        done = decoder.decode([out.getvalue()])
        if not bool(done.ok.all()):
            cure = "install another DALI: imgcurate[cpu], or imgcurate[gpu-cu13]"
            yield Finding(f"decoding, {name}", "problem", str(done.reasons), cure)
        else:
            yield Finding(f"decoding, {name}", "ok", "a JPEG decodes")


def _gpu() -> Iterator[Finding]:
    reason = why_no_gpu()
    listed = _driver()
    if reason is not None:
        state: Literal["note", "warning"] = "warning" if listed else "note"
        shown = f"not used: {reason}" + (f" ({listed})" if listed else "")
        yield Finding("GPU", state, shown, "docs/cluster.md and the README say what a GPU needs" if listed else "")
        return
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("GPU", "ok", f"{', '.join(names)}; {listed}")
    capability = torch.cuda.get_device_capability()
    kinds = "bf16" + (", fp8" if capability >= (8, 9) else "")
    yield Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}, compute {capability}, {kinds}")
    missing = [name for name in _RAPIDS if importlib.util.find_spec(name) is None]
    if missing:
        cure = "python -m pip install 'imgcurate[gpu-cu13]', or environment.yml with conda"
        yield Finding("RAPIDS", "problem", f"missing: {', '.join(missing)}", cure)
    else:
        frame = Backend("gpu").frame_from_arrow(pa.table({"a": [1, 1, 2]}))
        right = int(frame.groupby("a").size().sum()) == 3
        shown = f"cudf {importlib.metadata.version('cudf-cu13')}" if _has("cudf-cu13") else "cudf"
        yield Finding(
            "RAPIDS", "ok" if right else "problem", f"{shown} {'groups rows' if right else 'counts wrongly'}",
            "" if right else "install it anew",
        )  # fmt: skip


def _has(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _extras() -> Iterator[Finding]:
    for module, (what, extra) in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(what, "note", "not supported here", f"python -m pip install 'imgcurate[{extra}]'")


def _weights(model_dir: str | None) -> Iterator[Finding]:
    from imgcurate.models.clip_weights import present
    from imgcurate.models.head_files import find_head
    from imgcurate.models.heads import L14
    from imgcurate.models.weights import resolve_model_dir

    folder = resolve_model_dir(model_dir)
    clip = present("ViT-L-14", "openai", model_dir)
    needed = [("CLIP ViT-L/14", clip)]
    needed += [(name, find_head(name.lower(), L14, folder)) for name in ("aesthetic", "NSFW")]
    for name, path in needed:
        if path is not None:
            yield Finding(f"weights, {name}", "ok", str(path))
        else:
            cure = f"they are downloaded when a run needs them; without a network put them into {folder}"
            yield Finding(f"weights, {name}", "note", f"not in {folder}", cure)


def _disks(folder: str) -> Iterator[Finding]:
    places = {"output disk": folder, "temporary files": os.environ.get("TMPDIR", tempfile.gettempdir())}
    for what, place in places.items():
        if not is_local(place):
            yield Finding(what, "ok", f"{place}: not looked at")
            continue
        free = free_bytes(place) or 0
        root = Path(place).absolute()
        while not root.exists():
            root = root.parent
        if not os.access(root, os.W_OK):
            yield Finding(what, "problem", f"{root} cannot be written to", "name another folder, or give permission")
        else:
            total = shutil.disk_usage(root).total
            cure = "" if free >= _LEAST_DISK else "make room: a worker keeps some GiB of remote shards, and runs more"
            shown = f"{root}: {free / _GIB:,.1f} of {total / _GIB:,.1f} GiB free"
            yield Finding(what, "warning" if cure else "ok", shown, cure)


def _driver() -> str:
    """Return the version of NVIDIA's driver, as it tells it; nothing without one."""
    try:
        return f"driver {_DRIVER.read_text().split('Kernel Module')[-1].split()[0]}"
    except (OSError, IndexError):
        return ""
