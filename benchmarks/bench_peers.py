"""imgcurate against its peers: the same photos, the same architecture with random weights, the same cores.

    python benchmarks/bench_peers.py --photos DIR --clip-retrieval-python V1/bin/python \\
        --nemo-curator-python V2/bin/python --json peers.json

Each peer is a driver in `peers/`, run by the Python of its own environment; a peer whose Python is not named is left
out. The *plain loop* is webdataset, a DataLoader and open_clip, as a good engineer writes it; it runs here, in the
type that imgcurate takes by itself and in float32, with several numbers of processes that decode, and the best of
them counts. The others have a process that decodes for each core. The peers embed, and that is all; imgcurate writes
the catalog and the shards too. Models are loaded before the clock starts, and who waits does nothing.

Claimed, on a CPU: 1.5 times the best of the peers.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from bench_decode import generated, photos
from bench_pipeline import run, write_shards
from harness import Case, argument_parser, compare

from imgcurate import ImageEmbeddingStage, ImageReaderStage
from imgcurate.backend import cpu_count, get_backend
from imgcurate.cluster import open_client
from imgcurate.models.encoders import EncoderSpec, load_encoder

CLAIM = 1.5
OURS = "imgcurate"
DRIVERS = Path(__file__).parent / "peers"
# As it is before Dask sets threads and memory for its workers.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}


class Driver:
    """A peer that has loaded its model and waits."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._answer("ready")

    def __call__(self) -> dict[str, int]:
        """Let it embed all, and return how many images these were."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return {"images": int(self._answer())}

    def _answer(self, expected: str | None = None) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if not answer or (expected is not None and answer != expected):
            raise RuntimeError(f"{self._process.args} ended: see above")
        return answer


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="JPEGs to take (default: made here)")
    parser.add_argument("--images", type=int, default=480, help="images (default: 480)")
    parser.add_argument("--model", default="ViT-B-32", help="open_clip architecture (default: ViT-B-32)")
    parser.add_argument("--samples", type=int, default=240, help="images per shard (default: 240)")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--clip-retrieval-python", metavar="PYTHON", help="of an environment with clip-retrieval")
    parser.add_argument("--nemo-curator-python", metavar="PYTHON", help="of an environment with NeMo Curator")
    args = parser.parse_args()
    backend = get_backend(args.device)
    n, model = (16, "ViT-S-32-alt") if args.smoke else (args.images, args.model)
    size, cores = 8 if args.smoke else backend.batch_size("auto"), cpu_count()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shards = write_shards(folder / "in", photos(args.photos, n) if args.photos else generated(n), args.samples)
        encoder = load_encoder(EncoderSpec(model, "random", batch_size=size), backend)
        dtype = str(encoder.dtype).removeprefix("torch.")
        del encoder
        embed = ImageEmbeddingStage(model, "random", model_inference_batch_size=size)
        client = stack.enter_context(open_client(device=backend.name, dashboard_address=None, tasks_per_gpu=2))
        ours = partial(run, shards[0].parent, folder / "OUT", embed, ImageReaderStage(size), client)
        cases = [Case(OURS, ours, dict, {"images": n})]
        for name, command in drivers(args, model, size, cores, dtype):
            driver = stack.enter_context(started([*command, *map(str, shards)]))
            cases.append(Case(name, driver, dict, {"images": n}))
        code = compare(
            "peers", cases, args, baseline=OURS, packages=["open_clip_torch", "webdataset", "nvidia-dali-cuda120"],
            synchronize=torch.cuda.synchronize if backend.is_gpu else lambda: None,
            parameters={"images": n, "model": model, "batch_size": size, "device": backend.name, "cores": cores,
                        "dtype": dtype, "source": "photos" if args.photos else "made"},
        )  # fmt: skip
    return code or judge(args.json, smoke=args.smoke, on_gpu=backend.is_gpu)


def drivers(args: object, model: str, size: int, cores: int, dtype: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the peers that can run, by name, with their commands but for the shards."""
    plain = [sys.executable, str(DRIVERS / "embed_plain_loop.py"), model, str(size)]
    smoke = args.smoke  # type: ignore[attr-defined]
    workers = [1] if smoke else sorted({1, max(1, cores // 2), cores})
    for type_ in dict.fromkeys([dtype, "float32"]):
        for n in workers:
            yield f"plain loop, {type_}, {n} to decode", [*plain, str(n), str(cores), type_]
    others = {"clip-retrieval": args.clip_retrieval_python, "NeMo Curator": args.nemo_curator_python}  # type: ignore[attr-defined]
    for name, python in others.items():
        if python is not None:
            script = DRIVERS / f"embed_{name.lower().replace('-', '_').replace(' ', '_')}.py"
            yield name, [python, str(script), model, str(size), str(workers[-1]), str(cores)]


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[Driver]:
    """Start a driver, and wait until it is ready; it ends with this context."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        try:
            yield Driver(process)
        finally:
            process.terminate()


def judge(path: Path | None, *, smoke: bool, on_gpu: bool) -> int:
    """Print how much faster than the best peer imgcurate is, and add it to the report."""
    if path is None:
        return 0
    report = json.loads(path.read_text())
    seconds = {case["name"]: case["median_s"] for case in report["results"]}
    ours = seconds.pop(OURS)
    best = min(seconds, key=seconds.__getitem__)
    report["times_the_best_peer"] = seconds[best] / ours
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{seconds[best] / ours:.2f} times as fast as the best peer: {best}")
    return int(seconds[best] / ours < CLAIM and not smoke and not on_gpu)


if __name__ == "__main__":
    raise SystemExit(main())
