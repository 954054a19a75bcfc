"""What docs/security.md promises, where no other test holds it."""

from __future__ import annotations

import ast
import dataclasses
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from distributed import Client
from test_cli import run  # noqa: F401 - a fixture
from test_pipeline import tiny_pipeline

import imgcurate
from imgcurate import Pipeline, config
from imgcurate.backend import get_backend
from imgcurate.cluster import open_client
from imgcurate.errors import ConfigError, WeightsError
from imgcurate.liveness import known_workers
from imgcurate.models.encoders import EncoderSpec, OpenClipEncoder
from imgcurate.models.head_files import _read_pth
from imgcurate.probe import _PILLOW_FORMATS

PACKAGE = Path(imgcurate.__file__).parent

# What runs code that a file holds, or writes where a file says.
FORBIDDEN = frozenset(
    """
    eval exec compile __import__ os.system os.popen os.exec pickle.load pickle.loads pickle.Unpickler dill.load
    cloudpickle.load cloudpickle.loads marshal.load marshal.loads shelve.open joblib.load pd.read_pickle
    yaml.load yaml.full_load yaml.unsafe_load yaml.Loader yaml.FullLoader yaml.UnsafeLoader torch.package
    tar.extract tar.extractall shutil.unpack_archive zip.extract zip.extractall tempfile.mktemp
    """.split()
)
FORBIDDEN_METHODS = frozenset({"extract", "extractall", "read_pickle"})
FORBIDDEN_IMPORTS = frozenset({"subprocess", "marshal", "shelve", "dill", "joblib", "ctypes", "xmlrpc", "telnetlib"})


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Yield (file, dotted name, call) of all calls in the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield str(path.relative_to(PACKAGE)), ast.unparse(node.func), node


def test_no_call_runs_code_from_a_file_or_unpacks_one() -> None:
    found = {
        (file, name) for file, name, _ in calls() if name in FORBIDDEN or name.rpartition(".")[2] in FORBIDDEN_METHODS
    }
    assert not found
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            # The one program that is ever started is this Python, to decode apart what killed its worker; the one
            # library opened by hand is this process's own C library, to set how it keeps memory.
            allowed = {"isolation.py": {"subprocess"}, "memory.py": {"ctypes"}}.get(path.name, set())
            assert not {n.split(".")[0] for n in names} & FORBIDDEN_IMPORTS - allowed, path
    opened = [ast.unparse(call) for _, name, call in calls() if name.startswith("ctypes.")]
    assert opened == ["ctypes.CDLL(None)"]


def test_weights_are_loaded_as_data() -> None:
    loads = [(file, name, {k.arg: ast.unparse(k.value) for k in call.keywords}) for file, name, call in calls()
             if name.rpartition(".")[2] in ("load", "load_checkpoint") and name.split(".")[0] in ("torch", "np",
             "load_checkpoint", "numpy")]  # fmt: skip
    assert {(file, name) for file, name, _ in loads} == {
        ("models/clip_weights.py", "torch.jit.load"), ("models/clip_weights.py", "load_checkpoint"),
        ("models/head_files.py", "torch.load"),
    }  # fmt: skip
    assert all(k["weights_only"] == "True" for _, name, k in loads if name != "torch.jit.load")


def test_modules_are_imported_by_name_only_where_a_config_says_so() -> None:
    dynamic = {(file, ast.unparse(c.args[0])) for file, name, c in calls() if name.endswith("import_module")}
    assert {file for file, argument in dynamic if not argument.startswith(("'", '"'))} <= {
        "stages/registry.py", "__init__.py", "backend.py", "lazy.py",
    }  # fmt: skip


def test_config_files_are_read_by_a_safe_loader(tmp_path: Path) -> None:
    assert issubclass(config._UniqueKeyLoader, yaml.SafeLoader)
    path = tmp_path / "x.yaml"
    path.write_text(f"inputs: !!python/object/apply:os.mkdir ['{tmp_path}/made']\nstages: [ImageWriterStage]\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load_config(path)
    assert not (tmp_path / "made").exists()


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_weights_that_are_a_program_are_refused(kind: str, tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "bad.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"x": Evil(made)}, protocol=2))
    else:
        torch.save({"x": Evil(made)}, path)
        assert zipfile.is_zipfile(path)
    with pytest.raises(WeightsError):
        _read_pth(path)
    with pytest.raises(WeightsError):
        OpenClipEncoder(EncoderSpec("ViT-S-32", str(path)), get_backend("cpu"))
    assert not made.exists()


def test_a_plain_config_imports_nothing_from_the_working_folder(
    run: Callable[..., tuple[int, list[str], str]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "not_elsewhere.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for stage, imported in (("ImageWriterStage", False), ("not_elsewhere.Stage", True)):
        (tmp_path / "x.yaml").write_text(f"inputs: none.tar\nstages: [{stage}]\n")
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
        assert run("run", "x.yaml", "-o", "OUT")[0] == 2
        assert (str(tmp_path) in sys.path) == imported
        assert (tmp_path / "ran").exists() == imported


def test_what_imgcurate_starts_listens_on_loopback_alone() -> None:
    with open_client(device="cpu", n_workers=1) as client:
        addresses = [client.scheduler.address, *known_workers(client)]
        assert len(addresses) == 2
        assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
        assert client.dashboard_link.startswith("http://127.0.0.1:")


def test_storage_options_are_not_written_down(shards: Path, tmp_path: Path, client: Client) -> None:
    source, *stages = tiny_pipeline(str(shards / "00000.tar")).stages
    pipeline = Pipeline([dataclasses.replace(source, storage_options={"secret": "open sesame"}), *stages])
    pipeline.run(str(tmp_path / "OUT"), client=client)
    written = [p for p in (tmp_path / "OUT").rglob("*") if p.is_file()]
    assert written
    assert not [p for p in written if b"sesame" in p.read_bytes()]


def test_new_files_have_the_permissions_that_the_umask_leaves(shards: Path, tmp_path: Path, client: Client) -> None:
    old = os.umask(0o077)
    try:
        tiny_pipeline(str(shards / "00000.tar")).run(str(tmp_path / "OUT"), client=client)
    finally:
        os.umask(old)
    assert not [p for p in (tmp_path / "OUT").rglob("*") if p.stat().st_mode & 0o077]


def test_no_image_format_runs_a_program() -> None:
    # Pillow's EPS, PDF and WMF readers start programs or system decoders; the rest of them is no image of a photo.
    assert not {"EPS", "PDF", "WMF", "MPEG", "HDF5", "GRIB", "BUFR", "FITS", "PSD"} & set(_PILLOW_FORMATS)
