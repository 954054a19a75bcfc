"""Embed shards with clip-retrieval's ``clip_inference``, in an environment of its own.

    python -m venv V && V/bin/pip install -r benchmarks/peers/requirements-clip-retrieval.txt
    V/bin/python embed_clip_retrieval.py MODEL BATCH_SIZE WORKERS THREADS SHARD...

Its loader keeps the model from one call to the next, so only the first one loads it. Weights are random, written to a
file, since it takes them from one. On a CPU it encodes in float32.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from serve import check, serve

import numpy as np  # isort: skip
import open_clip  # isort: skip
import torch  # isort: skip
from all_clip import load_clip  # isort: skip
from clip_retrieval.clip_inference.main import main as clip_inference  # isort: skip


def main(model: str, batch_size: int, workers: int, threads: int, shards: list[str]) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "random.pt"
        torch.save(open_clip.create_model(model, pretrained=None).state_dict(), weights)
        name = f"open_clip:{model}/{weights}"
        load_clip(clip_model=name, use_jit=False, warmup_batch_size=1, clip_cache_path=None)

        pattern = f"{{{','.join(shards)}}}" if len(shards) > 1 else shards[0]

        def work() -> int:
            with tempfile.TemporaryDirectory() as out:
                clip_inference(
                    pattern, out, input_format="webdataset", batch_size=batch_size, num_prepro_workers=workers,
                    enable_text=False, enable_metadata=False, clip_model=name, use_jit=False, enable_wandb=False,
                    write_batch_size=10**6, distribution_strategy="sequential", output_partition_count=1,
                )  # fmt: skip
                return sum(check(np.load(path)) for path in Path(out).glob("img_emb/*.npy"))

        serve(work)


if __name__ == "__main__":
    arch, size, n_workers, n_threads, *paths = sys.argv[1:]
    main(arch, int(size), int(n_workers), int(n_threads), paths)
