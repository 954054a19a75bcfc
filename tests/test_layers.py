"""The structure of the package: who may import whom, and what is public."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import imgcurate

PACKAGE = Path(imgcurate.__file__).parent

# Each module may import those above it, not those below.
ORDER = (
    "errors schema extensions lazy memory backend filesystems spool objects remote storage patterns streams "
    "tar_blocks tar folders tables archives samples members shards sidecars inputs partitions frame signatures probe "
    "pillow facts batches resize decode isolation quality models catalog success value_lists dedup heartbeat liveness "
    "execution progress timeline metrics export stages plan cluster preflight results report outputs origins parts "
    "runner pipeline undoing refiltering standalone verification config options templates doctor estimate "
    "exchange_files searching inspection demo console preparing commands cli __main__"
).split()
GPU_LIBRARIES = {"cudf", "cupy", "cuml", "dask_cudf", "dask_cuda", "rmm", "pylibcudf"}


def imports_of(path: Path) -> set[str]:
    """Return the dotted names that a file imports, at any depth, but not for type checking."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return names


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.name != "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert here in ORDER, f"{here} has no place in the order of modules"
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "imgcurate" and len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= ORDER.index(here), f"{here} imports {parts[1]}, which stands below it"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_gpu_libraries_are_imported_by_backend_and_cluster_alone(path: Path) -> None:
    if path.name in ("backend.py", "cluster.py"):
        return
    assert not {n.split(".")[0] for n in imports_of(path)} & GPU_LIBRARIES


def test_no_module_is_longer_than_500_lines() -> None:
    assert not [p.name for p in modules() if len(p.read_text().splitlines()) > 500]


def test_all_lists_what_exists() -> None:
    for info in pkgutil.walk_packages([str(PACKAGE)], "imgcurate."):
        module = importlib.import_module(info.name)
        for name in getattr(module, "__all__", []):
            assert hasattr(module, name), f"{info.name}.__all__ names {name}"


def test_public_names_resolve_and_are_documented() -> None:
    for name in imgcurate.__all__:
        assert getattr(imgcurate, name).__doc__, name


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = imgcurate.nothing


def test_torch_is_imported_where_it_is_used_alone() -> None:
    modules = [f"imgcurate.{name}" for name in ("cli", "commands", "pipeline", "refiltering", "standalone")]
    code = f"import sys, {', '.join(modules)}\nassert not {{'torch', 'open_clip', 'sklearn'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
