"""The documentation: pages build, links lead somewhere, commands parse, code runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import nbformat
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from nbclient import NotebookClient

from imgcurate.cli import app
from imgcurate.templates import stages_markdown

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
)
NOT_RUN = "<!-- not run"


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Yield (where, code) of each block of a language that is not marked as not run."""
    for page in PAGES:
        if page.name == "README.md" and language == "python":
            continue  # tests/test_readme.py runs these
        for match in re.finditer(rf"^([^\n]*)\n```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            if not match[1].startswith(NOT_RUN):
                yield f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 2}", match[2]


def commands() -> Iterator[tuple[str, list[str]]]:
    for where, text in blocks("bash"):
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            words = shlex.split(line, comments=True)
            if "imgcurate" in words[:1]:
                yield where, words[1:]


COMMANDS = list(commands())


def test_there_are_commands_and_code() -> None:
    assert len(COMMANDS) > 30
    assert len(list(blocks("python"))) >= 1


@pytest.mark.parametrize(("where", "words"), COMMANDS, ids=[f"{w}-{' '.join(c)[:40]}" for w, c in COMMANDS])
def test_commands_parse(where: str, words: list[str]) -> None:
    words = [w for w in words if w not in ("...", "$tls")]
    group = typer.main.get_command(app)
    context = click.Context(group, info_name="imgcurate")
    name, command, rest = group.resolve_command(context, words)
    assert command is not None, where
    command.make_context(name, rest, parent=context)


@pytest.mark.parametrize(("where", "code"), list(blocks("python")), ids=lambda value: value[:30])
def test_code_runs(where: str, code: str, tmp_path: Path, shards: Path) -> None:
    """Run a block as it is printed, in a folder that has what the pages name."""
    (tmp_path / "shards").symlink_to(shards)
    (tmp_path / "embeddings").mkdir()
    x = np.random.default_rng(0).standard_normal((60, 8)).astype(np.float32)
    table = {"id": range(60), "embedding": list(x), "width": [9] * 60, "height": [9] * 60}
    pq.write_table(pa.table(table), tmp_path / "embeddings" / "0.parquet")
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, f"{where}: {done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


def test_page_of_stages_is_that_of_the_docstrings() -> None:
    assert (ROOT / "docs" / "stages.md").read_text() == stages_markdown(), "scripts/docs makes it anew"


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", "scripts/mkdocs.yml", "-d"]
    command.append(str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    site = "".join(p.read_text() for p in tmp_path.rglob("*.html"))
    # Nothing is fetched from elsewhere.
    assert not re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="https?://[^"]+\.(?:js|css|png|woff2?)"', site)


@pytest.mark.filterwarnings("ignore")
def test_tutorial_runs_on_real_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = "\n".join(
        str(output.get("text", "") or output.get("data", {}).get("text/html", "") or output.get("data", {}))
        for cell in notebook.cells for output in cell.get("outputs", [])
    )  # fmt: skip
    assert "192 samples, 169 planted near-duplicates" in shown
    assert "<td>kept</td>" in shown
    assert "report.html" in shown
    assert "all as in their source" in shown
    assert not [o for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "error"]
