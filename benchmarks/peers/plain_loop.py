"""Embed shards with webdataset, a DataLoader and open_clip, as a good engineer writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset

__all__ = ["PlainLoop"]


class PlainLoop:
    """The loop, with the model loaded.

    Parameters
    ----------
    tower : nn.Module
        The image tower of an open_clip model, in the type that it is to run in.
    preprocess : callable
        Makes a tensor of a PIL image: open_clip's own transform.
    batch_size : int
        Images per forward pass.
    workers : int
        Processes that read and decode.
    threads : int
        torch's threads in this process, which encodes.
    """

    def __init__(
        self, tower: Any, preprocess: Callable[[Any], torch.Tensor], batch_size: int, workers: int, threads: int
    ) -> None:
        self._tower, self._preprocess, self._batch_size = tower, preprocess, batch_size
        self._workers, self._threads = workers, threads
        self._dtype = next(tower.parameters()).dtype
        self._device = next(tower.parameters()).device

    def run(self, shards: list[str], out: Path) -> int:
        """Write keys and unit-norm embeddings of all images to a Parquet file; return how many there are."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            keys, embeddings = self._embed(shards)
        finally:
            torch.set_num_threads(before)
        values = pa.array(embeddings.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
        pq.write_table(pa.table({"key": keys, "embedding": column}), out)
        return len(keys)

    @torch.inference_mode()
    def _embed(self, shards: list[str]) -> tuple[list[str], np.ndarray]:
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=False, handler=webdataset.warn_and_continue, empty_check=False)
            .decode("pil", handler=webdataset.warn_and_continue)
            .to_tuple("__key__", "jpg")
            .map_tuple(None, self._preprocess)
            .batched(self._batch_size)
        )
        loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=self._workers, prefetch_factor=4)
        keys: list[str] = []
        parts = []
        for names, images in loader:
            keys += names
            features = self._tower(images.to(self._device, self._dtype, non_blocking=True))
            parts.append(torch.nn.functional.normalize(features.float(), dim=-1))
        return keys, torch.cat(parts).cpu().numpy()


def load(model: str, dtype: torch.dtype, device: str) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Return the image tower of a model with random weights, and its transform."""
    torch.manual_seed(0)
    made, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=None)
    return made.visual.to(device, dtype).eval(), preprocess
