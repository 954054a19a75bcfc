"""How fast a shard is indexed: imgcurate against Python's tarfile, DALI's wds2idx and the webdataset library.

The shard lies on the local disk, its pages are cached, and its samples have three members each: an image of
random bytes, a caption and a JSON file. tarfile and imgcurate read headers; wds2idx (of the installed DALI
wheel) lets GNU tar list the shard twice and writes its index as text, without that program it falls back to
tarfile; webdataset reads all bytes, as it has no way to list a shard.

    python benchmarks/bench_index.py --json index.json
    python benchmarks/bench_index.py --format pax     # an extension header before every member
    python benchmarks/bench_index.py --smoke

The index of a shard in ustar or GNU format is claimed to be made 10 times as fast as tarfile lists its members.
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from harness import Case, argument_parser, compare
from wds2idx import IndexCreator
from webdataset.tariterators import group_by_keys, tar_file_expander

from imgcurate import schema
from imgcurate.members import MemberColumns
from imgcurate.shards import ShardIndex, index_shard
from imgcurate.storage import open_source
from imgcurate.tar import TarScan, scan_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
CLAIM = 10.0


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--samples", type=int, default=10_000, help="samples in the shard (default: 10,000)")
    parser.add_argument("--image-bytes", type=int, default=20_000, help="bytes of an image (default: 20,000)")
    parser.add_argument("--format", choices=FORMATS, default="ustar", help="format of the shard (default: ustar)")
    args = parser.parse_args()
    samples = 30 if args.smoke else args.samples
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        write_shard(path, samples, args.image_bytes, args.format)
        return compare(
            "index",
            cases(str(path), samples, args.format),
            args,
            baseline="tarfile",
            parameters={"samples": samples, "image_bytes": args.image_bytes, "format": args.format,
                        "shard_bytes": path.stat().st_size, "gnu_tar": shutil.which("tar") is not None},
            packages=["webdataset", "nvidia-dali-cuda120", "nvidia-dali-cuda130"],
        )  # fmt: skip


def cases(path: str, samples: int, format_: str) -> list[Case]:
    members = {"members": 3 * samples}
    both = {"samples": samples, **members}
    claim = None if format_ == "pax" else CLAIM
    index = functools.partial(index_shard, path, 0)
    return [
        Case("tarfile", lambda: list_members(path), lambda found: {"members": len(found)}, members),
        Case("scan_tar", lambda: scan(path), lambda found: {"members": len(found.members)}, members),
        Case("index_shard", index, count_index, both, min_ratio=claim),
        Case("index_shard, txt and json", lambda: index(columns=MemberColumns(("txt", "json"))), count_index, both),
        Case("wds2idx", lambda: write_index(path), count_lines, both),
        Case("webdataset, all bytes", lambda: read_with_webdataset(path), count_samples, both),
    ]


def write_shard(path: Path, samples: int, image_bytes: int, format_: str) -> None:
    image = os.urandom(image_bytes)
    with tarfile.open(path, "w", format=FORMATS[format_]) as tar:
        for i in range(samples):
            caption, record = f"a caption of number {i}".encode(), json.dumps({"number": i, "width": 640}).encode()
            for ext, data in (("jpg", image), ("txt", caption), ("json", record)):
                info = tarfile.TarInfo(f"{i:09d}.{ext}")
                # PAX keeps fractions of a second in an extension header, as it does for files from a disk.
                info.size, info.mtime = len(data), 1_700_000_000.5 if format_ == "pax" else 1_700_000_000
                tar.addfile(info, io.BytesIO(data))


def list_members(path: str) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


def scan(path: str) -> TarScan:
    source = open_source(path)
    try:
        return scan_tar(source)
    finally:
        source.close()


def write_index(path: str) -> str:
    """Return the path of the index that DALI's tool writes."""
    index = f"{path}.idx"
    with IndexCreator(path, index, verbose=False) as creator:
        creator.create_index()
    return index


def read_with_webdataset(path: str) -> list[int]:
    """Return the number of members of each sample."""
    with open(path, "rb") as stream:  # noqa: PTH123 - as webdataset opens a shard
        grouped: Iterable[dict[str, Any]] = group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))
        return [sum(not key.startswith("__") for key in sample) for sample in grouped]


def count_index(index: ShardIndex) -> dict[str, int]:
    ok = pc.sum(pc.equal(index.table[schema.STATUS], schema.STATUS_OK)).as_py()
    return {"samples": ok, "members": pc.sum(pc.list_value_length(index.table[schema.MEMBERS])).as_py()}


def count_lines(index: str) -> dict[str, int]:
    """Count in a text of one line per sample: extension, offset, size and name of each member."""
    lines = Path(index).read_text().splitlines()[1:]
    return {"samples": len(lines), "members": sum(len(line.split()) // 4 for line in lines)}


def count_samples(sizes: list[int]) -> dict[str, int]:
    return {"samples": len(sizes), "members": sum(sizes)}


if __name__ == "__main__":
    raise SystemExit(main())
