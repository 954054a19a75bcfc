"""Views of decoded images: torch's filters and DALI's operators, against open_clip's own preprocessing."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imgcurate.batches import PixelView
from imgcurate.resize import make_views, view_operators

SIZES = [
    (400, 533),
    (533, 401),
    (224, 224),
    (225, 224),
    (100, 77),
    (31, 33),
    (1, 1),
    (1, 40),
    (999, 20),
    (641, 427),
    (7, 3),
]


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return an image with few high frequencies, in which a shift of a pixel shows."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def of_open_clip(image: np.ndarray, view: PixelView) -> np.ndarray:
    cfg = open_clip.transform.PreprocessCfg(
        size=(view.height, view.width), mean=(0, 0, 0), std=(1, 1, 1), resize_mode=view.resize,
        interpolation=view.interpolation, fill_color=view.fill,
    )  # fmt: skip
    made = open_clip.transform.image_transform_v2(cfg, is_train=False)(Image.fromarray(image))
    return made.mul(255).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_are_those_of_open_clip(resize: str, interpolation: str) -> None:
    view = PixelView(224, 224, resize, interpolation, fill=9)
    for height, width in SIZES:
        image = smooth(height, width)
        ours = make_views([image], [view])[0][0].numpy().astype(int)
        difference = np.abs(ours - of_open_clip(image, view))
        assert difference.max() <= 2, (height, width)
        assert difference.mean() < 0.1, (height, width)


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from(["shortest", "longest"]))
@settings(max_examples=60, deadline=None)
def test_views_lie_where_those_of_open_clip_lie(height: int, width: int, resize: str) -> None:
    if max(height, width) > 50 * min(height, width):
        return
    view = PixelView(32, 32, resize, "bilinear", fill=255)
    image = smooth(height, width) // 2
    ours = make_views([image], [view])[0][0].numpy().astype(int)
    assert np.abs(ours - of_open_clip(image, view)).max() <= 2


def test_lanczos_is_that_of_pillow() -> None:
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    ours = make_views([image], [PixelView(64, 50, "squash", "lanczos")])[0][0].numpy().astype(int)
    theirs = np.asarray(Image.fromarray(image).resize((50, 64), Image.Resampling.LANCZOS))
    assert np.abs(ours - theirs).max() <= 2


@pytest.mark.parametrize(
    "box", [(0, 0, 90.5, 120.25), (0.5, 0, 91, 121), (0, 0.75, 91, 121), (0.5, 0.75, 91, 121), (0, 0, 91, 121)]
)
def test_a_part_of_an_image_is_resized_as_pillow_does(box) -> None:
    image = smooth(91, 121)
    view = PixelView(40, 30, "squash")
    ours = make_views([image], [view], sizes=[(181, 242)], boxes=[box])[0][0].numpy().astype(int)
    top, left, bottom, right = box
    theirs = np.asarray(Image.fromarray(image).resize((30, 40), Image.Resampling.BICUBIC, (left, top, right, bottom)))
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(ours - theirs).mean() < 0.1


def test_views_do_not_depend_on_the_number_of_threads() -> None:
    images = [smooth(50 + 7 * i, 90 - 3 * i, i) for i in range(9)]
    views = [PixelView(32, 32), PixelView(24, 40, "longest", fill=200)]
    one, four = (make_views(images, views, num_threads=n) for n in (1, 4))
    assert [v.shape for v in one] == [(9, 32, 32, 3), (9, 24, 40, 3)]
    assert all((a == b).all() for a, b in zip(one, four, strict=True))


def test_what_is_read_only_or_not_contiguous_is_resized() -> None:
    image = smooth(60, 80)
    view = PixelView(20, 20)
    turned = image[:, ::-1]
    image.flags.writeable = False
    expected = make_views([np.array(turned)], [view])[0]
    assert (make_views([turned], [view])[0] == expected).all()


@pytest.mark.parametrize("resize", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_dali_makes_the_same_views(resize: str, interpolation: str) -> None:
    """What a GPU runs, on the CPU."""
    from nvidia.dali import Pipeline, fn, types

    view = PixelView(48, 40, resize, interpolation, fill=77)
    # Where an image is enlarged, DALI's filters go on beyond its border in another way.
    sizes = [size for size in SIZES if min(size) >= 20]
    images = [smooth(h, w, i) for i, (h, w) in enumerate(sizes)]
    graph = Pipeline(len(sizes), 1, None, prefetch_queue_depth=1, exec_dynamic=True)
    with graph:
        source = fn.external_source(name="source", device="cpu", layout="HWC")
        graph.set_outputs(view_operators(source, view, fn.cast(source.shape(device="cpu"), dtype=types.FLOAT)))
    graph.build()
    theirs = np.asarray(graph.run(source=images)[0].as_tensor()).astype(int)
    ours = make_views(images, [view])[0].numpy()
    assert (np.abs(ours - theirs).reshape(len(sizes), -1).mean(axis=1) < 0.3).all()
    # Padding lies in the same place.
    assert ((ours == 77).all(axis=-1) == (theirs == 77).all(axis=-1)).mean() > 0.999


@pytest.mark.parametrize("size", [(301, 457), (457, 301), (333, 500), (90, 77), (1000, 211)])
def test_views_that_are_not_square_are_those_of_open_clip(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (12, 17, 3), dtype=np.uint8)).resize(size, 3))
    transform = open_clip.image_transform(
        (96, 130), is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode="shortest"
    )
    expected = (transform(Image.fromarray(image)) * 255).round().permute(1, 2, 0).numpy()
    ours = make_views([image], [PixelView(96, 130)])[0][0].numpy().astype(float)
    assert np.abs(ours - expected).max() <= 3
