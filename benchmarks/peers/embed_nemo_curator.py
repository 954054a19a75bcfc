"""Embed shards with NeMo Curator's ``ImageEmbeddingStage``, in an environment of its own.

    python -m venv V && V/bin/pip install -r benchmarks/peers/requirements-nemo-curator.txt
    V/bin/python embed_nemo_curator.py MODEL BATCH_SIZE WORKERS THREADS SHARD...

Its reader does not start without CUDA, so a DataLoader decodes for it, in WORKERS processes, and hands it the whole
images that its reader would give. The stage is called in this process: neither Ray's start nor what it costs to send
images between processes counts. On a CPU it encodes in float32. The model is transformers' CLIP of the same size.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from serve import check, serve

import numpy as np  # isort: skip
import torch  # isort: skip
import webdataset  # isort: skip
from nemo_curator.stages.image.embedders.clip_embedder import ImageEmbeddingStage  # isort: skip
from nemo_curator.tasks.image import ImageBatch, ImageObject  # isort: skip
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer  # isort: skip

# Vision towers by open_clip's names: width, layers, heads, patch, width of the embedding.
_SIZES = {"ViT-B-32": (768, 12, 12, 32, 512), "ViT-B-16": (768, 12, 12, 16, 512), "ViT-L-14": (1024, 24, 16, 14, 768)}


def main(model: str, batch_size: int, workers: int, threads: int, shards: list[str]) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        make_model(Path(scratch) / "openai" / "clip-vit-large-patch14", model)
        stage = ImageEmbeddingStage(model_dir=scratch, model_inference_batch_size=batch_size, remove_image_data=True)
        stage.setup()

    def work() -> int:
        dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("jpg")
        loader = webdataset.WebLoader(dataset.batched(batch_size, collation_fn=list), batch_size=None,
                                      num_workers=workers, prefetch_factor=4)  # fmt: skip
        return sum(check(np.stack([i.embedding for i in batch.data])) for batch in map(stage.process, tasks(loader)))

    serve(work)


def tasks(loader: webdataset.WebLoader) -> Iterator[ImageBatch]:
    for number, batch in enumerate(loader):
        images = [
            ImageObject(image_data=np.asarray(image), image_id=f"{number}-{i}") for i, (image,) in enumerate(batch)
        ]
        yield ImageBatch(dataset_name="photos", data=images)


def make_model(folder: Path, model: str) -> None:
    """Write a CLIP model of this size, with random weights, as the stage looks for it."""
    width, layers, heads, patch, out = _SIZES[model]
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "patch_size": patch,
              "num_attention_heads": heads, "image_size": 224}  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1}, projection_dim=out)
    folder.mkdir(parents=True)
    CLIPModel(config).save_pretrained(folder)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>"]
    (folder / "vocab.json").write_text("{" + ", ".join(f'"{w}": {i}' for i, w in enumerate(words)) + "}")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    arch, size, n_workers, n_threads, *paths = sys.argv[1:]
    main(arch, int(size), int(n_workers), int(n_threads), paths)
