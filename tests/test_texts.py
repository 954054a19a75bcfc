"""Captions and prompts: values as open_clip gives them, what is kept by them, runs decided anew with them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from distributed import Client
from typer.testing import CliRunner

import imgcurate as ic
from imgcurate.backend import get_backend
from imgcurate.cli import app
from imgcurate.errors import ConfigError, EncoderMismatchError, InputError, WeightsError
from imgcurate.models import clip_weights
from imgcurate.models.encoders import EncoderSpec
from imgcurate.models.texts import TextEncoder, captions_of, load_text_encoder, prompt_embeddings
from imgcurate.models.towers import prepare_text
from imgcurate.options import caption_options, zero_shot_options
from imgcurate.stages import (
    FilePartitioningStage,
    ImageCaptionFilterStage,
    ImageEmbeddingStage,
    ImageReaderStage,
    ImageWriterStage,
    ImageZeroShotFilterStage,
    SemanticDedupStage,
)

CPU = get_backend("cpu")
CLIP, SIGMOID = "test-clip", "test-sigmoid"
MODEL = {"model": CLIP, "pretrained": "random"}
LABELS = {"photo": "a photo", "text": ["a page of text", "a scan of a letter"], "other": "something else"}
TEXTS = ["a red dress", "Ein Hündchen, das schläft", "", "word " * 200]


@pytest.fixture(scope="module", autouse=True)
def _models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make two tiny architectures known to open_clip, one of them trained with a bias."""
    folder = tmp_path_factory.mktemp("configs")
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
    (folder / f"{CLIP}.json").write_text(json.dumps(config))
    (folder / f"{SIGMOID}.json").write_text(json.dumps({**config, "init_logit_bias": -3.0, "custom_text": True}))
    open_clip.add_model_config(folder)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    yield
    logging.getLogger().setLevel(level)
    load_text_encoder.__globals__["_load_text_encoder"].cache_clear()


def theirs(model: str = CLIP) -> Any:
    return clip_weights.load(clip_weights.find(model, "random")).eval()


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory, photos, encode, write_tar) -> Path:
    """Return a tar of 24 photos, of which two have no caption and one is broken."""
    samples = []
    for i, photo in enumerate(photos[:24]):
        members = {"jpg": encode(photo), "json": json.dumps({"meta": {"alt": f"alt {i}"}}).encode()}
        if i not in (3, 17):
            members["txt"] = f"a caption with the number {i}".encode()
        samples.append((f"{i:03d}", members))
    samples.insert(5, ("broken", {"jpg": b"no image", "txt": b"a caption of nothing"}))
    return write_tar(tmp_path_factory.mktemp("shards") / "00000.tar", samples)


def run(shard: Path, out: Path, client: Client, *stages: Any, columns: tuple[str, ...] = ("txt", "json")) -> Any:
    return ic.Pipeline([
        FilePartitioningStage(str(shard)),
        ImageReaderStage(text_columns=columns),
        ImageEmbeddingStage(**MODEL, precision="fp32"),
        *stages,
        SemanticDedupStage(eps=1e-4),
        ImageWriterStage(),
    ]).run(str(out), client=client)  # fmt: skip


def rows_of(result: Any) -> pd.DataFrame:
    return result.catalog.compute().sort_values("uid").reset_index(drop=True)


def vectors(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([np.asarray(v, dtype=np.float64) for v in rows["embedding"]])


@pytest.mark.parametrize("model", [CLIP, SIGMOID])
def test_texts_are_embedded_as_by_open_clip(model: str) -> None:
    encoder = TextEncoder(EncoderSpec(model, "random", precision="fp32", batch_size=3), CPU)
    tokens = open_clip.get_tokenizer(model)(TEXTS)
    with torch.inference_mode():
        expected = theirs(model).encode_text(tokens, normalize=True)
    torch.testing.assert_close(encoder(TEXTS), expected, atol=1e-6, rtol=1e-5)
    assert encoder.identity == f"{model}/random"
    assert (encoder.logit_bias is None) == (model == CLIP)
    assert encoder.logit_scale == pytest.approx(float(theirs(model).logit_scale.detach().exp()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("CLIP", {}),
        ("CLIP", {"quick_gelu": True}),
        ("CustomTextCLIP", {}),
        ("CustomTextCLIP", {"text_cfg": {"pool_type": "eos", "eos_id": 49407}}),
        ("CustomTextCLIP", {"text_cfg": {"no_causal_mask": True}}),
        ("CustomTextCLIP", {"text_cfg": {"pool_type": "last", "proj_bias": True}}),
    ],
)
def test_towers_of_texts_compute_what_open_clips_do(kind: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    config = {k: v for k, v in open_clip.get_model_config(CLIP).items() if k != "custom_text"}
    config["text_cfg"] = {**config["text_cfg"], **changes.get("text_cfg", {})}
    torch.manual_seed(2)
    model = getattr(open_clip, kind)(**{**config, **{k: v for k, v in changes.items() if k != "text_cfg"}}).eval()
    tokens = open_clip.get_tokenizer(CLIP)(TEXTS)
    with torch.inference_mode():
        expected = model.encode_text(tokens, normalize=True)
        found = torch.nn.functional.normalize(prepare_text(model, "cpu", dtype)(tokens).float(), dim=1)
    if dtype is torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    else:
        assert float((found * expected).sum(dim=1).min()) > 0.999


def test_the_embedding_of_a_text_does_not_depend_on_those_beside_it() -> None:
    texts = ["word " * (i % 25) + f"dress {i}" for i in range(40)]
    encoder = TextEncoder(EncoderSpec(CLIP, "random", precision="bf16"), CPU)
    together = encoder(texts)
    for n in (1, 3, 7):
        apart = torch.cat([encoder(texts[i : i + n]) for i in range(0, len(texts), n)])
        torch.testing.assert_close(apart, together, atol=1e-6, rtol=0)


def test_texts_in_half_the_bits_are_nearly_the_same() -> None:
    exact = TextEncoder(EncoderSpec(CLIP, "random", precision="fp32"), CPU)(TEXTS)
    coarse = TextEncoder(EncoderSpec(CLIP, "random", precision="bf16"), CPU)(TEXTS)
    assert coarse.dtype is torch.float32
    assert 0.999 < float((exact * coarse).sum(dim=1).min()) < 1 - 1e-7


def test_the_mean_of_a_labels_prompts_counts() -> None:
    prompts, scale, bias = prompt_embeddings([["a", "b"], ["c"]], EncoderSpec(CLIP, "random"))
    a, b, c = TextEncoder(EncoderSpec(CLIP, "random", precision="fp32"), CPU)(["a", "b", "c"]).double().numpy()
    mean = (a + b) / np.linalg.norm(a + b)
    np.testing.assert_allclose(prompts, [mean, c], atol=1e-6)
    assert scale > 1
    assert bias is None


@pytest.mark.parametrize(
    ("value", "field", "expected"),
    [
        ("a dog", None, "a dog"),
        (" \n", None, None),
        (None, None, None),
        (float("nan"), None, None),
        ('{"caption": "x", "n": 3}', "caption", "x"),
        ('{"caption": "x", "n": 3}', "n", None),
        ('{"a": {"b": ["first", "second"]}}', "a.b", "first"),
        ('{"a.b": "dotted", "a": {"b": "nested"}}', "a.b", "dotted"),
        ('{"a": 3}', "a.b", None),
        ("not JSON", "a", None),
        ("[" * 100_000, "a", None),
    ],
)
def test_captions_are_found(value: Any, field: str | None, expected: str | None) -> None:
    assert captions_of([value], field) == [expected]


def test_captions_are_compared_with_their_images(shard, tmp_path, client) -> None:
    scored = rows_of(run(shard, tmp_path / "ALL", client, ImageCaptionFilterStage(None, **MODEL, precision="fp32")))
    has = scored["txt"].notna() & scored["embedding"].notna()
    assert has.sum() == 22
    with torch.inference_mode():
        texts = theirs().encode_text(open_clip.get_tokenizer(CLIP)(list(scored["txt"][has])), normalize=True)
    expected = (vectors(scored[has]) * texts.double().numpy()).sum(axis=1)
    np.testing.assert_allclose(scored["caption_similarity"][has], expected, atol=1e-6)
    assert scored["caption_similarity"][~has].isna().all()
    assert set(scored["status"]) == {"ok", "decode_error"}

    threshold = float(np.median(expected))
    kept = rows_of(run(shard, tmp_path / "SOME", client, ImageCaptionFilterStage(threshold, **MODEL, precision="fp32")))
    decoded = kept["embedding"].notna()
    assert list(kept["status"][decoded] == "ok") == list(scored["caption_similarity"][decoded] >= threshold)
    assert set(kept["status"][decoded]) == {"ok", "caption"}
    without = kept[decoded & kept["txt"].isna()]
    assert set(without["reason"]) == {"caption_similarity is missing or not a number"}


def test_captions_in_json(shard, tmp_path, client) -> None:
    stage = ImageCaptionFilterStage(None, "json", "meta.alt", **MODEL, precision="fp32")
    scored = rows_of(run(shard, tmp_path / "OUT", client, stage, columns=("json",)))
    ok = scored[scored["status"] == "ok"]
    texts = [json.loads(j)["meta"]["alt"] for j in ok["json"]]
    with torch.inference_mode():
        embedded = theirs().encode_text(open_clip.get_tokenizer(CLIP)(texts), normalize=True).double().numpy()
    np.testing.assert_allclose(ok["caption_similarity"], (vectors(ok) * embedded).sum(axis=1), atol=1e-6)


def probabilities(x: np.ndarray, model: str = CLIP) -> np.ndarray:
    """Return what the labels' probabilities should be, by open_clip and NumPy."""
    tower, tokenizer = theirs(model), open_clip.get_tokenizer(model)
    directions = []
    for prompts in LABELS.values():
        with torch.inference_mode():
            embedded = tower.encode_text(
                tokenizer([prompts] if isinstance(prompts, str) else list(prompts)), normalize=True
            )
        mean = embedded.double().numpy().mean(axis=0)
        directions.append(mean / np.linalg.norm(mean))
    logits = float(tower.logit_scale.detach().exp()) * x @ np.array(directions).T
    if tower.logit_bias is not None:
        return 1 / (1 + np.exp(-(logits + float(tower.logit_bias.detach()))))
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def test_prompts_tell_what_images_show(shard, tmp_path, client) -> None:
    scored = rows_of(run(shard, tmp_path / "ALL", client, ImageZeroShotFilterStage(LABELS, **MODEL)))
    ok = scored[scored["embedding"].notna()]
    columns = [f"zero_shot_{label}" for label in LABELS]
    np.testing.assert_allclose(ok[columns], probabilities(vectors(ok)), atol=1e-5)
    np.testing.assert_allclose(ok[columns].sum(axis=1), 1, atol=1e-5)
    assert scored[columns][scored["embedding"].isna()].isna().all(axis=None)

    bound = float(ok["zero_shot_text"].median())
    some = ImageZeroShotFilterStage(LABELS, {"text": (None, bound)}, **MODEL)
    kept = rows_of(run(shard, tmp_path / "SOME", client, some))
    assert list(kept["status"] == "zero_shot") == list(scored["zero_shot_text"] > np.float32(bound))
    assert kept["reason"][kept["status"] == "zero_shot"].str.match(r"zero_shot_text 0\.\d+ > 0\.\d+").all()


def test_models_with_a_bias_judge_each_label_by_itself() -> None:
    stage = ImageZeroShotFilterStage(LABELS, model=SIGMOID, pretrained="random")
    stage.setup(ic.Worker(CPU, 1))
    x = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(3)), dim=1)
    batch = ic.ImageBatch(pd.DataFrame({"encoder": [f"{SIGMOID}/random"] * 5}), columns={"embedding": x})
    stage.process(batch)
    found = np.stack([batch[f"zero_shot_{label}"].numpy() for label in LABELS], axis=1)
    np.testing.assert_allclose(found, probabilities(x.double().numpy(), SIGMOID), atol=1e-6)


def test_frames_have_the_same_scores(shard, tmp_path, client) -> None:
    stages = [ImageCaptionFilterStage(None, **MODEL, precision="fp32"), ImageZeroShotFilterStage(LABELS, **MODEL)]
    expected = rows_of(run(shard, tmp_path / "OUT", client, *stages))
    ddf = ic.embed(ic.read_webdataset(str(shard), text_columns=("txt",)), **MODEL)
    ddf = ic.score_zero_shot(ic.score_captions(ddf, **MODEL), LABELS, **MODEL)
    found = ddf.compute().sort_values("uid").reset_index(drop=True)
    # Here the model computes in what is fastest.
    for column in ("caption_similarity", *(f"zero_shot_{label}" for label in LABELS)):
        np.testing.assert_allclose(found[column], expected[column], atol=0.02)
    assert set(found["status"]) == {"ok", "decode_error"}


SCORES = ["caption_similarity", *(f"zero_shot_{label}" for label in LABELS)]


def assert_same(result: Any, expected: Any) -> None:
    mine, other = rows_of(result), rows_of(expected)
    assert result.counts == expected.counts
    for column in ("uid", "status", "reason", "duplicate_of", "phase"):
        assert mine[column].equals(other[column]), column
    for column in {*SCORES} & {*other.columns}:
        np.testing.assert_allclose(mine[column], other[column], atol=1e-6)
    assert [Path(s).read_bytes() for s in result.shards] == [Path(s).read_bytes() for s in expected.shards]
    assert ic.verify_run(result.output_dir).ok


@pytest.fixture(scope="module")
def plain(shard, tmp_path_factory, client) -> Any:
    """Return a run that embeds, and has captions as columns."""
    return run(shard, tmp_path_factory.mktemp("plain") / "OUT", client)


def test_scores_are_added_to_a_run_without_its_images(shard, plain, tmp_path, client) -> None:
    likely = probabilities(vectors(rows_of(plain).dropna(subset=["embedding"])))
    bound = float(np.median(likely[:, 1]))
    direct = run(
        shard, tmp_path / "DIRECT", client,
        ImageCaptionFilterStage(-0.02, **MODEL, precision="fp32"),
        ImageZeroShotFilterStage(LABELS, {"text": (None, bound)}, **MODEL),
    )  # fmt: skip
    assert {"ok", "caption", "zero_shot"} <= set(direct.counts)
    # The model is that of the run.
    changes = {
        "ImageCaptionFilterStage": {"score_threshold": -0.02, "precision": "fp32"},
        "ImageZeroShotFilterStage": {"labels": LABELS, "ranges": {"text": (None, bound)}},
    }
    added = ic.refilter(plain.output_dir, str(tmp_path / "ADDED"), changes, client=client)
    assert_same(added, direct)

    # Other thresholds, which need no model, and then other prompts, which do.
    direct = run(
        shard, tmp_path / "DIRECT2", client,
        ImageCaptionFilterStage(-0.1, **MODEL, precision="fp32"),
        ImageZeroShotFilterStage(LABELS, {"photo": (0.3, None)}, **MODEL),
    )  # fmt: skip
    changes = {
        "ImageCaptionFilterStage": {"score_threshold": -0.1},
        "ImageZeroShotFilterStage": {"ranges": {"photo": (0.3, None)}},
    }
    again = ic.refilter(added.output_dir, str(tmp_path / "AGAIN"), changes, client=client)
    assert_same(again, direct)
    others = {"cat": "a cat", "dog": "a dog"}
    changes = {"ImageZeroShotFilterStage": {"labels": others, "ranges": {}}}
    other = ic.refilter(again.output_dir, str(tmp_path / "OTHER"), changes, client=client)
    direct = run(
        shard, tmp_path / "DIRECT3", client,
        ImageCaptionFilterStage(-0.1, **MODEL, precision="fp32"),
        ImageZeroShotFilterStage(others, **MODEL),
    )  # fmt: skip
    assert_same(other, direct)
    assert {c for c in rows_of(other).columns if c.startswith("zero_shot")} == {"zero_shot_cat", "zero_shot_dog"}


def test_what_lacks_a_value_is_not_kept_however_it_is_decided(shard, tmp_path, client) -> None:
    direct = run(shard, tmp_path / "RUN", client, ImageCaptionFilterStage(-1.0, **MODEL))
    assert direct.counts["caption"] == 2
    anew = ic.refilter(direct.output_dir, str(tmp_path / "ANEW"), {"ImageWriterStage": {"images_per_tar": 5}})
    assert anew.counts == direct.counts
    all_of_them = {"ImageCaptionFilterStage": {"score_threshold": None}}
    assert "caption" not in ic.refilter(direct.output_dir, str(tmp_path / "ALL"), all_of_them).counts


class Doubled(ic.ProcessingStage):
    """A stage of one's own that makes something of another's score."""

    name = "doubled"
    needs = ("embedding", "caption_similarity")
    adds = {"doubled": "float32"}
    rules = (ic.Rule("doubled", ">=", -2, "doubled"),)

    def process(self, batch: ic.ImageBatch) -> ic.ImageBatch:
        batch["doubled"] = 2 * batch["caption_similarity"]
        return batch


def test_what_a_stage_made_of_a_column_does_not_outlive_it(shard, tmp_path, client) -> None:
    caption = ImageCaptionFilterStage(None, **MODEL, precision="fp32")
    result = run(shard, tmp_path / "OUT", client, caption, Doubled())
    # No caption, no double.
    assert result.counts == {"ok": 22, "doubled": 2, "decode_error": 1}
    for change in (None, {"text_column": "json", "json_field": "meta.alt"}):
        with pytest.raises(ConfigError, match="Doubled was made of the column 'caption_similarity'"):
            ic.refilter(result.output_dir, str(tmp_path / "ANEW"), {"ImageCaptionFilterStage": change})
    changes = {"ImageCaptionFilterStage": {"score_threshold": 0.0}}
    anew = ic.refilter(result.output_dir, str(tmp_path / "ANEW"), changes, client=client)
    assert_same(anew, run(shard, tmp_path / "DIRECT", client, replace(caption, score_threshold=0.0), Doubled()))


def test_of_two_stages_of_a_name_none_is_changed(shard, tmp_path, client) -> None:
    two = [ic.ColumnFilterStage({"nbytes": (10, None)}), ic.ColumnFilterStage({"width": (None, 500)})]
    result = run(shard, tmp_path / "OUT", client, *two)
    with pytest.raises(ConfigError, match="has 2 stages ColumnFilterStage: which of them"):
        ic.refilter(result.output_dir, str(tmp_path / "ANEW"), {"ColumnFilterStage": {"ranges": {"nbytes": (0, 1)}}})
    assert ic.refilter(result.output_dir, str(tmp_path / "SAME"), client=client).counts == result.counts
    with pytest.raises(ConfigError, match="ImageZeroShotFilterStage needs the parameter 'labels'"):
        ic.refilter(result.output_dir, str(tmp_path / "X"), {"ImageZeroShotFilterStage": {"ranges": {}}})


def test_a_score_of_images_is_not_added(plain, tmp_path) -> None:
    with pytest.raises(ConfigError, match="needs the column 'content_hash'"):
        ic.refilter(plain.output_dir, str(tmp_path / "OUT"), {"ExactDedupStage": {}})
    with pytest.raises(EncoderMismatchError, match="ViT-L-14/openai"):
        ic.refilter(plain.output_dir, str(tmp_path / "OUT"), {"ImageAestheticFilterStage": {}})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ImageCaptionFilterStage(1.2), r"score_threshold=1.2 should be a number in \[-1, 1\]"),
        (lambda: ImageCaptionFilterStage(True), "score_threshold=True"),
        (lambda: ImageCaptionFilterStage(text_column=""), "text_column='' should be the name of a column"),
        (lambda: ImageCaptionFilterStage(json_field=5), "json_field=5 should be a key"),
        (lambda: ImageCaptionFilterStage(json_field=""), "json_field='' should be a key"),
        (lambda: ImageCaptionFilterStage(precision="fp8"), "fp8' is for images alone"),
        (lambda: ImageCaptionFilterStage(model="tiny-image"), "tiny-image knows no texts"),
        (lambda: ImageZeroShotFilterStage(LABELS, model="tiny-image"), "tiny-image knows no texts"),
        (lambda: ImageZeroShotFilterStage({"a": "b"}), "two labels at least"),
        (lambda: ImageZeroShotFilterStage(["a", "b"]), "should be a mapping"),
        (lambda: ImageZeroShotFilterStage({"a": "b", "a b": "c"}), "'a b' should be a name of letters"),
        (lambda: ImageZeroShotFilterStage({"a": "b", "c": []}), "c should have a prompt"),
        (lambda: ImageZeroShotFilterStage({"a": "b", "c": " "}), "c should have a prompt"),
        (lambda: ImageZeroShotFilterStage(LABELS, {"txet": (None, 1)}), "no label 'txet'.*did you mean"),
        (lambda: ImageZeroShotFilterStage(LABELS, {"text": 3}), "text should be a pair"),
        (lambda: ImageZeroShotFilterStage(LABELS, {"text": (0.5, 0.2)}), "would keep nothing"),
    ],
)
def test_parameters_that_cannot_work_are_refused(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_another_model_and_a_missing_column_are_refused_before_the_run(shard) -> None:
    def plan(*stages: Any) -> None:
        ic.Pipeline([FilePartitioningStage(str(shard)), ImageReaderStage(), *stages]).plan()

    images = ImageEmbeddingStage(**MODEL)
    with pytest.raises(EncoderMismatchError, match="test-clip/random and the texts by test-sigmoid/random"):
        plan(images, ImageZeroShotFilterStage(LABELS, model=SIGMOID, pretrained="random"))
    with pytest.raises(ConfigError, match="needs the column 'txt'.*text_columns"):
        plan(images, ImageCaptionFilterStage(**MODEL))
    for column in ("width", "members"):
        with pytest.raises(ConfigError, match=f"the column '{column}' does not hold text"):
            plan(images, ImageCaptionFilterStage(text_column=column, **MODEL))
    with pytest.raises(ConfigError, match="has a rule on 'width', which nobody knows"):
        plan(ic.ColumnFilterStage({"width": (100, None)}))
    plan(ic.ColumnFilterStage({"width": (100, None)}), images)
    with pytest.raises(ConfigError, match="needs the column 'embedding'"):
        plan(ImageZeroShotFilterStage(LABELS, **MODEL))


def test_embeddings_of_another_model_are_refused_in_frames(shard) -> None:
    ddf = ic.embed(ic.read_webdataset(str(shard)), **MODEL)
    with pytest.raises(EncoderMismatchError, match="cannot be compared"):
        ic.score_zero_shot(ddf, LABELS, model=SIGMOID, pretrained="random").compute(scheduler="sync")


def test_a_tokenizer_that_is_out_of_reach_is_told(monkeypatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub\nand so on")

    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    with pytest.raises(WeightsError, match="the tokenizer of test-clip could not be loaded: We couldn't connect"):
        TextEncoder(EncoderSpec(CLIP, "random"), CPU)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: caption_options(None, "json:"), "--caption json: should be"),
        (lambda: caption_options(None, ":x"), "--caption :x should be"),
        (lambda: zero_shot_options(["photo"], []), "--zero-shot photo should be LABEL=PROMPT"),
        (lambda: zero_shot_options(["a=b"], ["a=x"]), "--zero-shot-range a=x should be LABEL=MIN:MAX"),
        (lambda: zero_shot_options(["a=b"], ["a=:"]), "names no bound"),
    ],
)
def test_options_that_cannot_be_understood(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options()


def test_a_command_scores_captions_and_prompts(shard, tmp_path) -> None:
    weights = tmp_path / "weights.pt"
    torch.manual_seed(1)
    torch.save(open_clip.create_model("ViT-S-32-alt", load_weights=False).state_dict(), weights)
    model = ["--encoder", "ViT-S-32-alt", "--pretrained", str(weights), "--workers", "1", "--quiet", "--no-dedup"]
    options = ["--caption", "json:meta.alt", "--zero-shot", "a=a photo", "--zero-shot", "b=a drawing"]
    out = tmp_path / "OUT"
    done = CliRunner().invoke(app, ["curate", str(shard), "-o", str(out), *model, *options])
    assert done.exit_code == 0, done.output
    rows = pd.read_parquet(out / "catalog")
    decoded = rows[rows["embedding"].notna()]
    assert decoded["caption_similarity"].between(-1, 1).all()
    np.testing.assert_allclose(decoded["zero_shot_a"] + decoded["zero_shot_b"], 1, atol=1e-5)
    limits = ["--min-caption-similarity", "0.01", "--zero-shot-range", "a=0.4:0.6"]
    done = CliRunner().invoke(app, ["refilter", str(out), "-o", str(tmp_path / "OUT2"), *limits, "--workers", "1"])
    assert done.exit_code == 0, done.output
    anew = pd.read_parquet(tmp_path / "OUT2" / "catalog")
    keeps = (decoded["caption_similarity"] >= 0.01) & decoded["zero_shot_a"].between(0.4, 0.6)
    assert sorted(anew["uid"][anew["status"] == "ok"]) == sorted(decoded["uid"][keeps])


def test_the_folder_of_weights_is_remembered(shard, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching and deciding anew need the run's model, and find its weights where the run did."""
    folder, other = tmp_path / "models", tmp_path / "others"
    folder.mkdir()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IMGCURATE_MODEL_DIR", str(tmp_path / "empty"))
    torch.manual_seed(1)
    state = open_clip.create_model("ViT-B-32", load_weights=False).state_dict()
    torch.save(state, folder / "ViT-B-32-laion2b_e16.pt")
    out, run = tmp_path / "OUT", CliRunner()
    model = ["--encoder", "ViT-B-32", "--pretrained", "laion2b_e16", "--model-dir", str(folder)]
    done = run.invoke(
        app, ["curate", str(shard), "-o", str(out), *model, "--workers", "1", "--no-dedup", "--no-report"]
    )
    assert done.exit_code == 0, done.output
    assert len(ic.search(str(out), "a dog", n=3)) == 3
    prompts = ["--zero-shot", "a=a dog", "--zero-shot", "b=a cat", "--workers", "1", "--no-report"]
    done = run.invoke(app, ["refilter", str(out), "-o", str(tmp_path / "ANEW"), *prompts])
    assert done.exit_code == 0, done.output
    folder.rename(other)
    done = run.invoke(app, ["refilter", str(out), "-o", str(tmp_path / "ANEW2"), *prompts])
    assert isinstance(done.exception, WeightsError)
    done = run.invoke(app, ["refilter", str(out), "-o", str(tmp_path / "ANEW2"), *prompts, "--model-dir", str(other)])
    assert done.exit_code == 0, done.output
    assert len(ic.search(str(tmp_path / "ANEW2"), "a dog", n=3)) == 3


def test_a_text_finds_the_nearest_embeddings(plain, shard, tmp_path) -> None:
    rows = rows_of(plain)
    there = rows[rows["embedding"].notna()].reset_index(drop=True)
    with torch.inference_mode():
        query = (
            theirs().encode_text(open_clip.get_tokenizer(CLIP)(["a red <dress>"]), normalize=True)[0].double().numpy()
        )
    cosines = vectors(there) @ query
    best = np.argsort(-cosines, kind="stable")[:5]
    page = tmp_path / "hits.html"
    found = ic.search(plain.output_dir, "a red <dress>", n=5, page=str(page))
    assert list(found["uid"]) == list(there["uid"][best])
    np.testing.assert_allclose(found["similarity"], cosines[best], atol=1e-6)
    assert list(found["txt"].fillna("")) == list(there["txt"][best].fillna(""))
    html = page.read_text()
    assert "a red &lt;dress&gt;" in html
    assert "<dress>" not in html
    assert html.count("data:image/webp") == 5
    assert len(ic.search(plain.output_dir, "a red dress", n=100)) == 24


def test_a_picture_finds_itself_also_among_what_left(shard, tmp_path, client, encode, photos) -> None:
    result = run(shard, tmp_path / "OUT", client, ImageCaptionFilterStage(1.0, **MODEL))
    assert result.counts == {"caption": 24, "decode_error": 1}
    (tmp_path / "x.jpg").write_bytes(encode(photos[7]))
    assert not len(ic.search(result.output_dir, image=str(tmp_path / "x.jpg")))
    found = ic.search(result.output_dir, image=str(tmp_path / "x.jpg"), n=2, dropped=True)
    assert found["key"][0] == "007"
    # Here in float32, by Pillow's decoder.
    assert found["similarity"][0] > 0.999 > found["similarity"][1]
    # An empty text is none.
    assert ic.search(result.output_dir, " ", image=str(tmp_path / "x.jpg"), n=2, dropped=True).equals(found)
    both = ic.search(result.output_dir, "a caption", image=str(tmp_path / "x.jpg"), n=24, dropped=True)
    alone = ic.search(result.output_dir, "a caption", n=24, dropped=True).set_index("uid")["similarity"]
    picture = ic.search(result.output_dir, image=str(tmp_path / "x.jpg"), n=24, dropped=True).set_index("uid")[
        "similarity"
    ]
    together = both.set_index("uid")["similarity"]
    ratio = (alone + picture).loc[together.index] / together
    assert ratio.std() < 1e-4 * abs(ratio.mean())


def test_what_cannot_be_found_is_told(plain, shard, tmp_path, client, encode, photos) -> None:
    with pytest.raises(ConfigError, match="give a text"):
        ic.search(plain.output_dir, "  ")
    for wrong in ({"text": 5}, {"image": 5}, {"text": "x", "page": 5}):
        with pytest.raises(ConfigError, match="5 should be a string"):
            ic.search(plain.output_dir, **wrong)
    with pytest.raises(ConfigError, match="n=0 should be"):
        ic.search(plain.output_dir, "x", n=0)
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    with pytest.raises(InputError, match=r"page.jpg: damaged image, or a kind"):
        ic.search(plain.output_dir, image=str(tmp_path / "page.jpg"))
    stages = [FilePartitioningStage(str(shard)), ImageReaderStage(), ImageEmbeddingStage(model="tiny-image")]
    thumbnails = ic.Pipeline(stages).run(str(tmp_path / "TINY"), client=client)
    with pytest.raises(ConfigError, match="tiny-image knows no texts"):
        ic.search(thumbnails.output_dir, "a dress")
    (tmp_path / "x.jpg").write_bytes(encode(photos[7]))
    assert ic.search(thumbnails.output_dir, image=str(tmp_path / "x.jpg"), n=1)["key"][0] == "007"
    bare = ic.Pipeline([*stages[:2], ic.ImageQualityFilterStage()]).run(str(tmp_path / "BARE"), client=client)
    with pytest.raises(InputError, match="has no embeddings"):
        ic.search(bare.output_dir, "a dress")
