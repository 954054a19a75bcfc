"""Real photos, real weights and golden vectors, where their folder is there."""

from __future__ import annotations

import importlib.util
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from distributed import Client, LocalCluster
from PIL import Image

from imgcurate import (
    FilePartitioningStage,
    ImageAestheticFilterStage,
    ImageBatch,
    ImageEmbeddingStage,
    ImageNSFWFilterStage,
    ImageReaderStage,
    ImageWriterStage,
    Pipeline,
    PixelView,
    ProcessingStage,
    SemanticDedupStage,
)
from imgcurate.errors import EncoderMismatchError


@pytest.fixture(scope="module")
def clothing(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the 480 clothing photos with captions into four tars."""
    photos = sorted((data_dir / "photos" / "clothing").rglob("*.jpg"))
    assert len(photos) == 480
    folder = tmp_path_factory.mktemp("clothing")
    for k in range(4):
        with tarfile.open(folder / f"{k:05d}.tar", "w") as tar:
            for i, path in list(enumerate(photos))[k::4]:
                caption = f"a photo of {path.stem.split('_')[0]}, number {i}".encode()
                for ext, data in (("jpg", path.read_bytes()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:06d}.{ext}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def members(tars: Sequence[Path | str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar}
    return found


def run(clothing: Path, out: Path, n_workers: int, files_per_partition: int):
    pipeline = Pipeline(
        [
            FilePartitioningStage(str(clothing / "*.tar"), files_per_partition),
            ImageReaderStage(dali_batch_size=32),
            ImageEmbeddingStage(model="tiny-image"),
            SemanticDedupStage(eps=0.1, n_clusters=6),
            ImageWriterStage(images_per_tar=200),
        ]
    )
    with (
        LocalCluster(n_workers=n_workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as c,
    ):
        return pipeline.run(str(out), client=c)


def test_480_photos_come_out_as_they_went_in_whatever_the_cluster(clothing: Path, tmp_path: Path) -> None:
    result = run(clothing, tmp_path / "a", n_workers=1, files_per_partition=4)
    catalog = result.catalog.compute()
    assert result.samples == len(catalog) == 480
    assert (catalog.width > 0).all()
    assert result.counts == catalog.status.value_counts().to_dict()
    before, after = members(sorted(clothing.glob("*.tar"))), members(result.shards)
    assert len(after) == 2 * result.kept > 800
    assert all(before[name] == data for name, data in after.items())
    samples = list(webdataset.WebDataset(result.shards, shardshuffle=False).decode("pil"))
    assert len(samples) == result.kept
    assert all(isinstance(s["jpg"], Image.Image) and s["txt"].startswith("a photo of") for s in samples)
    other = run(clothing, tmp_path / "b", n_workers=2, files_per_partition=1)
    assert other.counts == result.counts
    for first, second in zip(result.shards, other.shards, strict=True):
        assert Path(first).read_bytes() == Path(second).read_bytes()
        assert Path(first).with_suffix(".parquet").read_bytes() == Path(second).with_suffix(".parquet").read_bytes()


class Golden(ProcessingStage):
    """Gives each sample the golden vector that its number names."""

    name = "golden"
    needs = ("image",)
    adds = {"embedding": ImageEmbeddingStage.adds["embedding"], "encoder": "string"}
    views = (PixelView(8, 8),)
    encoder = "ViT-L-14/openai"

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    def process(self, batch: ImageBatch) -> ImageBatch:
        index = batch["key"].str[-3:].astype(int).to_numpy()
        batch["embedding"] = self._vectors[index]
        batch["encoder"] = np.full(len(batch), self.encoder, dtype=object)
        return batch


def test_real_heads_score_and_filter_in_a_pipeline(
    data_dir: Path, tmp_path: Path, client: Client, photos, encode, write_tar
) -> None:
    golden = np.load(data_dir / "weights" / "golden" / "laion_rating_l14_10.npz")
    vectors, raw, nsfw = golden["embedding"], golden["aesthetic_v2"], golden["nsfw_l14"]
    write_tar(tmp_path / "in.tar", [(f"{i:03d}", {"jpg": encode(photos[i])}) for i in range(10)])
    middle = float(np.sort(raw)[4:6].mean() / 10)
    pipeline = Pipeline(
        [
            FilePartitioningStage(str(tmp_path / "in.tar")),
            ImageReaderStage(),
            Golden(vectors),
            ImageAestheticFilterStage(middle, str(data_dir / "weights" / "aesthetic")),
            ImageNSFWFilterStage(0.5, str(data_dir / "weights" / "nsfw")),
            ImageWriterStage(),
        ]
    )
    result = pipeline.run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute().sort_values("key")
    np.testing.assert_allclose(catalog.aesthetic_score_raw, raw, atol=1e-4)
    np.testing.assert_allclose(catalog.aesthetic_score, np.clip(raw / 10, 0, 1), atol=1e-5)
    np.testing.assert_allclose(catalog.nsfw_score, nsfw, atol=1e-4)
    low = raw / 10 < middle
    assert (catalog.status[low] == "aesthetic").all()
    assert (catalog.status[~low] == np.where(nsfw[~low] < 0.5, "ok", "nsfw")).all()
    assert low.sum() == 5


class MobileNet(ProcessingStage):
    """A user's own encoder: MobileNetV2 trained on ImageNet, features before the classifier."""

    name = "mobilenet"
    needs = ("image",)
    adds = {"embedding": ImageEmbeddingStage.adds["embedding"], "encoder": "string"}
    views = (PixelView(224, 224),)
    encoder = "mobilenet_v2/imagenet"

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def setup(self, worker) -> None:
        folder = Path(self.folder)
        spec = importlib.util.spec_from_file_location("mobilenetv2_folded", folder / "mobilenetv2_folded.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._model = module.MobileNetV2(folder / "mobilenetv2_100_folded.safetensors", worker.device)

    def process(self, batch: ImageBatch) -> ImageBatch:
        x = batch.pixels(self.views[0]).permute(0, 3, 1, 2).float() / 127.5 - 1
        batch["embedding"] = torch.nn.functional.normalize(self._model.embed(x), dim=1)
        batch["encoder"] = np.full(len(batch), self.encoder, dtype=object)
        return batch


def test_an_encoder_of_ones_own_finds_near_duplicates(
    data_dir: Path, tmp_path: Path, client: Client, write_tar
) -> None:
    originals = [Image.open(p).convert("RGB") for p in sorted((data_dir / "photos" / "kodak").glob("*.png"))[:12]]

    def jpeg(image: Image.Image, quality: int) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=quality)
        return out.getvalue()

    samples = [(f"{i:02d}/a", {"jpg": jpeg(image, 95)}) for i, image in enumerate(originals)]
    samples += [(f"{i:02d}/recompressed", {"jpg": jpeg(image, 30)}) for i, image in enumerate(originals)]
    for i, image in enumerate(originals):
        w, h = image.size
        cropped = image.crop((w // 20, h // 20, w - w // 20, h - h // 20))
        samples.append((f"{i:02d}/cropped", {"jpg": jpeg(cropped, 90)}))
    write_tar(tmp_path / "0.tar", samples[:20])
    write_tar(tmp_path / "1.tar", samples[20:])
    pipeline = Pipeline(
        [
            FilePartitioningStage(str(tmp_path / "*.tar")),
            ImageReaderStage(),
            MobileNet(str(data_dir / "weights" / "mobilenetv2")),
            SemanticDedupStage(eps=0.15),
            ImageWriterStage(),
        ]
    )
    result = pipeline.run(str(tmp_path / "OUT"), client=client)
    catalog = result.catalog.compute().set_index("uid")
    assert set(catalog.encoder) == {"mobilenet_v2/imagenet"}
    removed = catalog[catalog.status == "duplicate"]
    assert (removed.key.str[:2] == catalog.loc[removed.duplicate_of].key.str[:2].to_numpy()).all()
    assert len(removed) >= 23
    with pytest.raises(EncoderMismatchError, match="mobilenet_v2/imagenet"):
        Pipeline([*pipeline.stages[:3], ImageAestheticFilterStage()]).plan()
