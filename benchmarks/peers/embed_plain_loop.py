"""Embed shards with webdataset, a DataLoader and open_clip, as a good engineer writes it.

    python embed_plain_loop.py MODEL BATCH_SIZE WORKERS THREADS DTYPE SHARD...

WORKERS processes read, decode and resize with Pillow; this one encodes, with THREADS threads, in DTYPE (``bfloat16``,
``float32``), and writes keys and embeddings to a Parquet file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from serve import check, serve

import open_clip  # isort: skip
import pyarrow as pa  # isort: skip
import pyarrow.parquet as pq  # isort: skip
import torch  # isort: skip
import webdataset  # isort: skip


def main(model: str, batch_size: int, workers: int, threads: int, dtype: torch.dtype, shards: list[str]) -> None:
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=None)
    tower = made.visual.to(device, dtype).eval()

    @torch.inference_mode()
    def work() -> int:
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=False, handler=webdataset.warn_and_continue, empty_check=False)
            .decode("pil", handler=webdataset.warn_and_continue)
            .to_tuple("__key__", "jpg")
            .map_tuple(None, preprocess)
            .batched(batch_size)
        )
        loader = webdataset.WebLoader(
            dataset, batch_size=None, num_workers=workers, prefetch_factor=4, pin_memory=device == "cuda"
        )
        keys: list[str] = []
        parts = []
        for names, images in loader:
            keys += names
            features = tower(images.to(device, dtype, non_blocking=True))
            parts.append(torch.nn.functional.normalize(features.float(), dim=-1))
        embeddings = torch.cat(parts).cpu().numpy()
        column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
        with tempfile.TemporaryDirectory() as folder:
            pq.write_table(pa.table({"key": keys, "embedding": column}), Path(folder) / "embeddings.parquet")
        return check(embeddings)

    serve(work)


if __name__ == "__main__":
    name, size, n_workers, n_threads, type_, *paths = sys.argv[1:]
    main(name, int(size), int(n_workers), int(n_threads), getattr(torch, type_), paths)
