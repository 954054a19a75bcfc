"""The command line: exit codes, messages, and the contract of what is printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from imgcurate import cli

ACCOUNTING = re.compile(r"[\d,]+ samples in = [\d,]+ kept( \+ [\d,]+ [\w-]+)*")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that runs the command line: (exit code, stdout lines, stderr)."""

    def run_(*arguments: str | Path) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["imgcurate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
            sys.exit(0)
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out.splitlines(), err

    return run_


def test_demo_finds_what_was_planted(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "imgcurate.cli", "demo", "-o", str(tmp_path / "demo")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "Traceback" not in done.stderr
    match = re.fullmatch(
        r"found (\d+) of (\d+) planted near-duplicates, (\d+) distinct photos merged, (\d+) of (\d+) broken files.*",
        lines[1],
    )
    found, planted, merged, reported, broken = map(int, match.groups())
    assert planted >= 100
    assert found >= 0.95 * planted
    assert merged == 0
    assert reported == broken == 6
    assert ACCOUNTING.fullmatch(lines[-1])
    total, *counts = [int(n) for n in re.findall(r"\d+", lines[-1])]
    assert total == sum(counts)
    out = tmp_path / "demo" / "curated"
    made = ["_SUCCESS", "catalog", "dedup", "manifest.json", "pipeline.yaml", "shards"]
    assert sorted(p.name for p in out.iterdir()) == made
    with tarfile.open(out / "shards" / "00000.tar") as tar:
        assert len({m.name.split(".")[0] for m in tar}) == counts[0]


def test_curate_writes_the_documented_folder(run, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    arguments = (
        "curate", shards / "*.tar", "-o", out, "--encoder", "tiny-image", "--eps", "0.04", "--n-clusters", "3",
        "--images-per-tar", "40", "--workers", "1", "--device", "cpu", "--quiet",
    )  # fmt: skip
    code, lines, err = run(*arguments)
    assert (code, lines, err) == (0, ["72 samples in = 60 kept + 12 duplicate"], "")
    assert sorted(p.name for p in (out / "shards").iterdir()) == [
        "00000.parquet", "00000.tar", "00001.parquet", "00001.tar",
    ]  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["stages"][-2]["eps"] == 0.04
    assert len(pq.read_table(out / "catalog")) == 72
    # The same command again finds it done; another one is refused, unless told otherwise.
    assert run(*arguments)[:2] == (0, lines)
    code, _, err = run(*(a if a != "0.04" else "0.05" for a in arguments))
    assert code == 2
    assert re.fullmatch(r"imgcurate: wrong usage: .*eps: 0.04 there, 0.05 asked for.*--overwrite.*\n", err)
    code, lines, _ = run(*(a if a != "0.04" else "0.05" for a in arguments), "--overwrite", "--no-dedup")
    assert (code, lines) == (0, ["72 samples in = 72 kept"])


def test_curate_removes_what_is_near_an_evaluation_set(run, shards: Path, tmp_path: Path) -> None:
    common = ("--encoder", "tiny-image", "--workers", "1", "--quiet")
    code, _, err = run("curate", shards / "00000.tar", "-o", tmp_path / "EVAL", "--no-dedup", *common)
    assert code == 0, err
    arguments = ("curate", shards / "*.tar", "-o", tmp_path / "OUT", *common, "--text-column", "txt")
    code, _, err = run(*arguments, "--reference", tmp_path / "EVAL", "--only-reference")
    assert code == 0, err
    rows = pq.read_table(tmp_path / "OUT" / "catalog").to_pylist()
    gone = [r for r in rows if r["status"] == "duplicate"]
    assert {r["key"] for r in rows if r["shard"].endswith("00000.tar")} <= {r["key"] for r in gone}
    assert {r["duplicate_in"] for r in gone} == {str(tmp_path / "EVAL")}
    assert any(r["txt"] for r in rows)
    code, _, err = run(*arguments, "--reference", tmp_path / "EVAL", "--no-dedup")
    assert (code, err.count("--reference does nothing without semantic deduplication")) == (2, 1)


def test_refilter_adds_deduplication_as_curate_has_it(run, tmp_path: Path, photos, encode, write_tar) -> None:
    # The smaller copy of each photo comes first, and is farther from the centroid or not.
    small = {f"a{i}": {"jpg": encode(p.resize((p.width // 2, p.height // 2)))} for i, p in enumerate(photos[:12])}
    large = {f"b{i}": {"jpg": encode(p)} for i, p in enumerate(photos[:12])}
    write_tar(tmp_path / "in.tar", list({**small, **large}.items()))
    common = ("--encoder", "tiny-image", "--workers", "1", "--quiet", "--no-report")
    code, _, err = run("curate", tmp_path / "in.tar", "-o", tmp_path / "SCORED", "--no-dedup", *common)
    assert code == 0, err
    code, lines, err = run(
        "refilter", tmp_path / "SCORED", "-o", tmp_path / "ADDED", "--eps", "0.1", "--workers", "1", "-q", "--no-report"
    )
    assert code == 0, err
    code, again, err = run("curate", tmp_path / "in.tar", "-o", tmp_path / "AT_ONCE", "--eps", "0.1", *common)
    assert code == 0, err
    tables = [
        pq.read_table(tmp_path / name / "catalog", columns=["key", "status", "duplicate_of"])
        for name in ("ADDED", "AT_ONCE")
    ]
    assert lines == again
    assert tables[0].equals(tables[1])
    assert {row["key"][0] for row in tables[0].to_pylist() if row["status"] == "duplicate"} == {"a"}
    added, at_once = (tmp_path / name / "shards" / "00000.tar" for name in ("ADDED", "AT_ONCE"))
    assert added.read_bytes() == at_once.read_bytes()


def test_run_does_what_a_file_says(run, shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(
        f"inputs: {shards}/*.tar\nworkers: 1\nstages:\n  - ImageReaderStage: {{dali_batch_size: 16}}\n"
        "  - ImageEmbeddingStage: {model: tiny-image}\n  - SemanticDedupStage: {eps: 0.05, keep_by: [-nbytes]}\n"
        "  - ImageWriterStage\n"
    )
    code, lines, err = run("run", file, "-o", tmp_path / "OUT")
    assert (code, lines[-1]) == (0, "72 samples in = 60 kept + 12 duplicate")
    assert "read: 4 of 4 (72 samples, 100.0% ok" in err
    catalog = pq.read_table(tmp_path / "OUT" / "catalog").to_pandas()
    assert catalog.key[catalog.status == "duplicate"].str.startswith("copy/").all()


def test_inspect_counts_and_reports(run, shards: Path, tmp_path: Path) -> None:
    code, lines, _ = run("inspect", shards / "*.tar")
    nbytes = sum(p.stat().st_size for p in shards.glob("*.tar"))
    assert code == 0
    assert lines[-1] == f"4 shards, 72 samples (72 with an image), 204 members, {nbytes:,} bytes, 0 problems"
    assert lines[-2] == "members: 72 jpg, 72 txt, 60 json"
    (tmp_path / "page.tar").write_text("<html>" * 200)
    code, lines, _ = run("inspect", tmp_path / "page.tar")
    assert code == 0
    assert "not a tar file" in "\n".join(lines)
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    code, lines, _ = run("inspect", tmp_path / "empty.tar")
    assert lines[-3].endswith("empty image: a has 0 bytes")
    assert lines[-1].endswith("1 samples (1 with an image), 1 members, 10,240 bytes, 1 problems")
    code, lines, _ = run("inspect", "--json", shards / "00000.tar")
    assert json.loads("\n".join(lines))["samples"] == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["curate", "{tmp}/none.tar", "-o", "{tmp}/OUT", "--encoder", "tiny-image"], "no such input: .*none.tar"),
        (["curate", "{tmp}/*.tar", "-o", "{tmp}/OUT", "--encoder", "tiny-image"], "nothing matches"),
        (["curate", "{tmp}", "-o", "{tmp}/OUT", "--encoder", "tiny-image"], "holds no tar, no table and no image"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}", "--encoder", "tiny-image"], "holds no run of imgcurate"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "ViT-Q"], "ViT-Q"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "ViT-B-32", "--pretrained", "me"],
         "neither a file nor a tag of ViT-B-32"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "tiny-image", "--min-aesthetic", "0.5"],
         "aesthetic.*tiny-image"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--device", "tpu"], "device='tpu' is none of"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "none", "--max-nsfw", "0.5"],
         "stage nsfw needs the column 'embedding'"),
        (["run", "{tmp}/none.yaml", "-o", "{tmp}/OUT"], "cannot read .*none.yaml"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "none", "--reference", "{tmp}"],
         "--reference does nothing without semantic dedup"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "none", "--eps", "0.1"],
         "--eps does nothing"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "none", "--keep-by", "width"],
         "--keep-by does nothing"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "tiny-image", "--no-dedup",
          "--eps-list", "0.1"], "--eps-list does nothing"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "tiny-image", "--keep-by", "key"],
         "keep_by: the column 'key' does not hold numbers, but string"),
        (["curate", "{shards}/00000.tar", "-o", "{tmp}/OUT", "--encoder", "tiny-image", "--workers", "1000000"],
         "n_workers=1000000 processes are more"),
        (["curate", "{shards}/00000.tar", "-o", "http://127.0.0.1:1/OUT", "--encoder", "tiny-image"],
         "HTTP servers are read from"),
        (["curate", "{tmp}/{{00000..99999999999}}.tar", "-o", "{tmp}/OUT", "--encoder", "tiny-image"],
         "expands to more than 10,000,000 names"),
        (["refilter", "{tmp}", "-o", "{tmp}/OUT", "--no-dedup", "--eps", "0.1"], "--eps does nothing beside"),
        (["refilter", "{tmp}", "-o", "{tmp}/OUT", "--no-perceptual", "--perceptual", "4"], "--perceptual does nothing"),
        (["inspect", "{tmp}/none.tar"], "no such input"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_code_2(
    run, shards: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "precious.txt").touch()
    code, lines, err = run(*(a.format(tmp=tmp_path, shards=shards) for a in arguments))
    assert code == 2
    assert lines == []
    said = [line for line in err.splitlines() if not line.startswith("running on the CPU")]
    assert len(said) == 1, err
    assert re.match(f"imgcurate: wrong usage: .*{message}", said[0]), err
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize("arguments", [["curate"], ["curate", "x", "-o", "y", "--eps", "2"], ["nothing"]])
def test_what_the_parser_refuses_is_exit_code_2(run, arguments: list[str]) -> None:
    assert run(*arguments)[0] == 2


def test_a_failed_run_is_exit_code_1_and_a_traceback_only_with_debug(run, shards: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    arguments = ("curate", shards / "00000.tar", "-o", blocked / "OUT", "--encoder", "tiny-image", "--workers", "1")
    code, _, err = run(*arguments, "--quiet")
    assert code == 1
    assert re.fullmatch(r"imgcurate: failed: cannot make the folder .*: Not a directory\n", err)
    code, _, err = run("--debug", *arguments, "--quiet")
    assert code == 1
    assert "Traceback" in err


def test_help_and_version(run) -> None:
    code, lines, _ = run("--help")
    assert code == 0
    assert all(any(command in line for line in lines) for command in ("demo", "curate", "run", "inspect"))
    assert run("--version")[1] == ["imgcurate 0.1.0"]
    done = subprocess.run([sys.executable, "-m", "imgcurate", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == "imgcurate 0.1.0\n"


def test_curate_filters_by_quality_and_removes_copies(tmp_path: Path, run, photos, encode, write_tar) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    blob = encode(noise)
    pictures = {"a": blob, "b": blob, "c": encode(noise, quality=60), "d": encode(photos[0].resize((60, 60)))}
    pictures["e"] = blob[:300]
    write_tar(tmp_path / "in.tar", [(key, {"jpg": data}) for key, data in pictures.items()])
    code, out, err = run(
        "curate", tmp_path / "in.tar", "-o", tmp_path / "OUT", "--encoder", "none", "--workers", 1,
        "--quality", "width=100:", "--quality", "entropy=:8", "--exact-dedup", "--perceptual", 6, "--quiet",
    )  # fmt: skip
    assert code == 0, err
    assert out[-1] == "5 samples in = 1 kept + 1 decode_error + 2 duplicate + 1 quality"
    rows = pq.read_table(tmp_path / "OUT" / "catalog" / "part-00000.parquet").to_pylist()
    assert [r["status"] for r in rows] == ["ok", "duplicate", "duplicate", "quality", "decode_error"]
    assert [r["duplicate_by"] for r in rows] == [None, "content", "phash", None, None]
    assert rows[1]["reason"] == "duplicate of in/a, same bytes"
    assert rows[3]["reason"] == "width 60 < 100"
    assert rows[3]["sharpness"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sharpness", "names no bound|should be COLUMN=MIN:MAX"),
        ("sharpness=:", "names no bound"),
        ("sharpness=a:", "should be COLUMN=MIN:MAX"),
        ("sharpness=1:2:3", "should be COLUMN=MIN:MAX"),
        ("sharpness=nan:", "pair"),
        ("sharpnes=1:", "wrong usage: --quality: the column 'sharpnes' is unknown; did you mean 'sharpness'"),
    ],
)
def test_curate_says_what_is_wrong_with_a_range(tmp_path: Path, run, given: str, message: str) -> None:
    code, _, err = run("curate", "x.tar", "-o", tmp_path, "--encoder", "tiny-image", "--quality", given)
    assert code == 2
    assert re.search(message, err)


PRINTS = """
import imgcurate as ic


class Talks(ic.ProcessingStage):
    needs = ("image",)
    views = (ic.PixelView(8, 8),)

    def process(self, batch):
        print("HELLO")
        return batch
"""


def test_what_stages_print_does_not_come_between_the_json(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "talking.py").write_text(PRINTS)
    (tmp_path / "p.yaml").write_text(f"inputs: {shards}\nstages: [talking.Talks]\n")
    command = [sys.executable, "-m", "imgcurate", "run", "p.yaml", "-o", "OUT", "--json", "--workers", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == 72
    assert "HELLO" in done.stderr
