"""The one harness of all benchmarks: what is measured, how, and how it is written down.

A benchmark is a script that makes its inputs, states its cases and hands them to :func:`compare`::

    parser = argument_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    rows = 100 if args.smoke else args.rows
    cases = [Case("sorted", lambda: sorted(values), lambda r: {"rows": len(r)}, {"rows": rows}), ...]
    raise SystemExit(compare("sort", cases, args, baseline="sorted", parameters={"rows": rows}))

- All cases run in turn, round after round, in an order that shifts by one each round: what disturbs
  the machine for a while disturbs them all. The first round warms up and is not counted.
- A time is wall-clock time of one run, the device synchronised before the clock starts and before it
  stops. Given are the median and the quartiles.
- A ratio is the median of the rounds' own ratios to the baseline; above 1 is faster than the baseline.
- Each run's result is counted, and a count other than the expected one ends the benchmark.
- Peak memory is the resident set of the whole process, inputs included, while the case ran, and of its child
  processes, if there are any, as seen every 0.2 s.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import gc
import importlib.metadata
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

__all__ = ["Case", "CountError", "argument_parser", "compare", "environment", "write_tar"]

# A run's report is no part of what is measured.
os.environ.setdefault("IMGCURATE_REPORT", "0")

_CHILDREN_EVERY_S: Final = 0.2
_MIN_REPEATS: Final = 5
_PACKAGES: Final = "imgcurate numpy pyarrow pandas dask distributed torch".split()


class CountError(AssertionError):
    """A run whose result is not the expected one: its speed says nothing."""


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes
    ----------
    name : str
        What it is, as the table shows it.
    run : callable
        Does the work on inputs that are ready, and returns its result.
    count : callable
        Counts a result, outside the clock: {unit: number}. Rates are given in the first unit.
    expected : mapping of str to int
        What `count` has to return.
    min_ratio : float, optional
        The ratio to the baseline that is claimed; the benchmark fails below it, but for ``--smoke``.
    """

    name: str
    run: Callable[[], Any]
    count: Callable[[Any], Mapping[str, int]]
    expected: Mapping[str, int]
    min_ratio: float | None = None


@dataclass
class _Measured:
    seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0


def argument_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows ``--smoke``, ``--repeats`` and ``--json``; `doc` is the script's docstring."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, one repeat: does it run?")
    parser.add_argument("--repeats", type=_repeats, default=7, help="counted rounds, 5 at least (default: 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured to FILE")
    return parser


def compare(
    name: str,
    cases: Sequence[Case],
    args: argparse.Namespace,
    *,
    baseline: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    packages: Sequence[str] = (),
    synchronize: Callable[[], None] = lambda: None,
) -> int:
    """Measure the cases, print the table and write the JSON file.

    Parameters
    ----------
    name : str
        The benchmark's name.
    cases : sequence of Case
        What to measure.
    args : argparse.Namespace
        Parsed by :func:`argument_parser`.
    baseline : str, optional
        The name of the case that the others are compared with.
    parameters : mapping, optional
        The sizes that were used, as JSON values.
    packages : sequence of str
        Distributions whose versions are recorded beside the usual ones.
    synchronize : callable
        Waits for the device; called before the clock starts and before it stops.

    Returns
    -------
    int
        The exit code: 1 if a claimed ratio was not reached.

    Raises
    ------
    CountError
        If a run gives another count than the expected one.
    """
    repeats = 1 if args.smoke else args.repeats
    measured = _measure(cases, repeats, 0 if args.smoke else 1, synchronize)
    reference = np.array(measured[baseline].seconds) if baseline is not None else None
    results = [_result(case, measured[case.name], reference) for case in cases]
    report = {
        "benchmark": name,
        "smoke": args.smoke,
        "repeats": repeats,
        "baseline": baseline,
        "parameters": dict(parameters or {}),
        "environment": environment(packages),
        "results": results,
    }
    print(_table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    failed = [r for r in results if not args.smoke and r["min_ratio"] is not None and r["ratio"] < r["min_ratio"]]
    for r in failed:
        print(f"FAILED: {r['name']} is {r['ratio']:.2f} times as fast as {baseline}, expected {r['min_ratio']} or more")
    return int(bool(failed))


def environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Return date, commit, versions and device, as JSON values."""
    versions = {"python": platform.python_version()}
    for package in [*_PACKAGES, *packages]:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    gpus = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"),
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus.splitlines(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _measure(
    cases: Sequence[Case], repeats: int, warm_up: int, synchronize: Callable[[], None]
) -> dict[str, _Measured]:
    measured = {case.name: _Measured() for case in cases}
    if len(measured) < len(cases):
        raise ValueError(f"two cases of one name: {[c.name for c in cases]}")
    for i in range(warm_up + repeats):
        shift = i % len(cases)
        for case in [*cases[shift:], *cases[:shift]]:
            gc.collect()
            _reset_peak()
            with _watched_children() as children:
                synchronize()
                start = time.perf_counter()
                result = case.run()
                synchronize()
                seconds = time.perf_counter() - start
            peak = _peak_rss_bytes() + max(children)
            if (counted := dict(case.count(result))) != dict(case.expected):
                raise CountError(f"{case.name} gave {counted}, expected {dict(case.expected)}")
            del result
            if i >= warm_up:
                measured[case.name].seconds.append(seconds)
                measured[case.name].peak_rss_bytes = max(measured[case.name].peak_rss_bytes, peak)
    return measured


def _result(case: Case, measured: _Measured, reference: np.ndarray | None) -> dict[str, Any]:
    seconds = np.array(measured.seconds)
    low, median, high = np.percentile(seconds, (25, 50, 75)).tolist()
    result: dict[str, Any] = {
        "name": case.name,
        "counted": dict(case.expected),
        "seconds": measured.seconds,
        "median_s": median,
        "quartiles_s": [low, high],
        "min_s": float(seconds.min()),
        "per_second": {unit: n / median for unit, n in case.expected.items()},
        "peak_rss_bytes": measured.peak_rss_bytes,
        "min_ratio": case.min_ratio,
    }
    if reference is not None:
        low, median, high = np.percentile(reference / seconds, (25, 50, 75)).tolist()
        result |= {"ratio": median, "ratio_quartiles": [low, high]}
    return result


def _table(report: Mapping[str, Any]) -> str:
    env, baseline = report["environment"], report["baseline"]
    sizes = ", ".join(f"{k}={v}" for k, v in report["parameters"].items())
    rows = [["case", "counted", "median", "quartiles", "per second", f"times as fast as {baseline}", "peak RSS"]]
    for r in report["results"]:
        unit, rate = next(iter(r["per_second"].items()))
        low, high = r["quartiles_s"]
        ratio = f"{r['ratio']:.2f} ({r['ratio_quartiles'][0]:.2f}-{r['ratio_quartiles'][1]:.2f})" if baseline else ""
        rows.append([
            r["name"], ", ".join(f"{n:,} {u}" for u, n in r["counted"].items()), f"{r['median_s'] * 1e3:,.1f} ms",
            f"{low * 1e3:,.1f}-{high * 1e3:,.1f} ms", f"{rate:,.0f} {unit}", ratio,
            f"{r['peak_rss_bytes'] / 2**20:,.0f} MiB",
        ])  # fmt: skip
    if baseline is None:
        rows = [row[:5] + row[6:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    device = "; ".join(env["gpus"]) or f"{env['cpu']}, {env['cpus']} CPUs"
    about = f"{report['benchmark']}: {sizes}; {report['repeats']} repeats{', smoke' if report['smoke'] else ''}"
    return "\n".join([about, f"{env['date']}, commit {env['commit']}, {device}, load {env['load_average']}", *lines])


def _repeats(text: str) -> int:
    if int(text) < _MIN_REPEATS:
        raise argparse.ArgumentTypeError(f"{text} repeats, expected {_MIN_REPEATS} or more")
    return int(text)


def _reset_peak() -> None:
    """Let the kernel forget the peak; where it does not, the peak is that of the process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a ustar archive of (name, data)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@contextlib.contextmanager
def _watched_children() -> Iterator[list[int]]:
    """Yield a list that gets the resident bytes of all child processes together, several times a second."""
    done, seen = threading.Event(), [0]

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(_CHILDREN_EVERY_S):
            total = 0
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
            seen.append(total)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _peak_rss_bytes() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    """Return what a command prints, nothing if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
