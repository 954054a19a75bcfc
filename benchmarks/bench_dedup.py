"""Deduplication in memory against brute force, FAISS, SemDeDup's rule and imagededup, on the same vectors.

    pip install -r benchmarks/peers/requirements-dedup.txt      # what is missing is left out
    python benchmarks/bench_dedup.py --rows 50000
    python benchmarks/bench_dedup.py --fastdup-python V/bin/python      # see peers/fastdup_driver.py

The vectors are random unit rows, a fifth of them planted near-duplicates of others with cosines from 0.955 to
0.999; eps is 0.05. Beside the times stands what each way finds: the share of near pairs (by brute force) of which
one row goes, and how many rows went without a row that stays and is near. All use all cores. The time of
fastdup holds the start of its own Python and the file that the vectors travel in.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping

import numpy as np
from harness import Case, argument_parser, compare
from peers.dedup import BLOCK, EPS, METHODS, fastdup

NEEDS = {"faiss_exact": "faiss", "faiss_ivf": "faiss", "imagededup": "imagededup"}


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="vectors (default: 20,000)")
    parser.add_argument("--dim", type=int, default=512, help="values of a vector (default: 512)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--fastdup-python", metavar="PYTHON", help="a Python that has fastdup")
    args = parser.parse_args()
    ways = dict(METHODS)
    if args.fastdup_python:
        ways["fastdup"] = functools.partial(fastdup, args.fastdup_python)
        args.methods.append("fastdup")
    rows = 600 if args.smoke else args.rows
    x = planted(rows, args.dim)
    methods = [m for m in args.methods if importlib.util.find_spec(NEEDS.get(m, "numpy"))]
    found: dict[str, np.ndarray] = {}

    def count(name: str, kept: np.ndarray) -> dict[str, int]:
        found[name] = kept
        return {"rows": len(kept)}

    cases = [Case(m, lambda m=m: ways[m](x), lambda kept, m=m: count(m, kept), {"rows": rows}) for m in methods]
    code = compare(
        "dedup", cases, args, baseline="imgcurate" if "imgcurate" in methods else None,
        parameters={"rows": rows, "dim": args.dim, "eps": EPS}, packages=["faiss-cpu", "imagededup", "scikit-learn"],
    )  # fmt: skip
    quality = {m: judge(x, found[m]) for m in methods}
    print_quality(quality)
    ours = quality.get("imgcurate")
    return code or int(ours is not None and (ours["without"] > 0 or ours["recall"] < 0.99))


def planted(n: int, dim: int, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """Return unit rows of which a share are near-duplicates of others."""
    rng = np.random.default_rng(seed)
    copies = int(n * share)
    base = rng.normal(size=(n - copies, dim)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    source = base[rng.integers(0, n - copies, copies)]
    cosine = rng.uniform(0.955, 0.999, copies).astype(np.float32)[:, None]
    noise = rng.normal(size=(copies, dim)).astype(np.float32)
    noise -= (noise * source).sum(axis=1, keepdims=True) * source
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    x = np.concatenate([base, cosine * source + np.sqrt(1 - cosine**2) * noise])
    return np.ascontiguousarray(x[rng.permutation(n)])


def judge(x: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """Return the recall of near pairs, the rows that went, and those that went without a kept row near them."""
    pairs = missed = without = 0
    for start in range(0, len(x), BLOCK):
        near = x[start : start + BLOCK] @ x.T >= 1 - EPS - 1e-6
        without += int((~kept[start : start + BLOCK] & ~near[:, kept].any(axis=1)).sum())
        i, j = np.nonzero(near)
        i += start
        once = i < j
        pairs += int(once.sum())
        missed += int((kept[i[once]] & kept[j[once]]).sum())
    return {"recall": 1 - missed / max(1, pairs), "removed": int((~kept).sum()), "without": without}


def print_quality(quality: Mapping[str, Mapping[str, float]]) -> None:
    print("\n| | near pairs resolved | removed | of these without a kept representative |")
    print("| --- | --- | --- | --- |")
    for name, q in quality.items():
        print(f"| {name} | {q['recall']:.4f} | {q['removed']:,} | {q['without']:,} |")


if __name__ == "__main__":
    raise SystemExit(main())
