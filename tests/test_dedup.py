"""Deduplication in memory, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imgcurate.backend import Backend, spread_rows
from imgcurate.dedup import DedupConfig, dedup_arrays
from imgcurate.dedup import kmeans as kmeans_module
from imgcurate.dedup import similarity as similarity_module
from imgcurate.dedup.arrays import _decide as decide_rows
from imgcurate.dedup.keep import KeepOrder, hash_uids
from imgcurate.dedup.kmeans import assign, find_probes, fit_centroids, fit_clustering
from imgcurate.dedup.passes import Rows
from imgcurate.dedup.rows import has_direction, unit_rows
from imgcurate.dedup.similarity import Vectors, greedy_keep, near_pairs, remove_chains
from imgcurate.errors import ConfigError


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def groups(n_groups: int, size: int, dim: int = 32, spread: float = 0.05, seed: int = 0) -> np.ndarray:
    """Return rows in groups around random centres, shuffled: cosines of about 0.92 to 0.95 within a group."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(n_groups, dim)))
    rows = np.repeat(centres, size, axis=0) + spread * rng.normal(size=(n_groups * size, dim))
    return unit(rows[rng.permutation(len(rows))])


def greedy_by_hand(x: np.ndarray, order: np.ndarray, threshold: float) -> np.ndarray:
    """Go through rows in order, comparing each with all kept before; return who is kept for whom."""
    products = x.astype(np.float64) @ x.astype(np.float64).T
    keeper = np.full(len(x), -1)
    kept: list[int] = []
    for i in order:
        near = [k for k in kept if products[i, k] >= threshold]
        if near:
            keeper[i] = max(near, key=lambda k: products[i, k])
        else:
            kept.append(i)
    return keeper


@pytest.mark.parametrize("n", [0, 1, 2, 700])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95])
def test_greedy_keep_is_the_greedy_rule(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, n: int, threshold: float
) -> None:
    monkeypatch.setattr(similarity_module, "_BLOCK_ROWS", 64)
    monkeypatch.setattr(similarity_module, "_SLICE_ROWS", 48)
    x = groups(100, 7)[:n]
    keeper, similarity = greedy_keep(x, threshold, backend)
    expected = greedy_by_hand(x, np.arange(n), threshold)
    np.testing.assert_array_equal(keeper, expected)
    goes = keeper >= 0
    products = (x[goes].astype(np.float64) * x[keeper[goes]]).sum(axis=1)
    np.testing.assert_allclose(similarity[goes], products, atol=1e-12)
    assert np.isnan(similarity[~goes]).all()
    assert n < 700 or 0 < goes.sum() < n


def test_greedy_keep_with_many_equal_rows(backend: Backend) -> None:
    x = np.repeat(groups(3, 1), 3000, axis=0)
    keeper, similarity = greedy_keep(x, 1 - 1e-6, backend)
    np.testing.assert_array_equal(np.flatnonzero(keeper < 0), [0, 3000, 6000])
    np.testing.assert_array_equal(keeper[keeper >= 0] // 3000, np.repeat([0, 1, 2], 2999))
    np.testing.assert_allclose(similarity[keeper >= 0], 1, atol=1e-6)


def test_rows_that_lie_on_the_device_are_compared_alike(backend: Backend) -> None:
    rng = np.random.default_rng(5)
    x = unit(rng.standard_normal((3000, 24)).astype(np.float32))
    x[1500:2500] = unit(x[:1000] + 0.05 * rng.standard_normal((1000, 24)).astype(np.float32))
    index = rng.permutation(3000)[:2200]
    there = Vectors(x, index, backend.product_operand(x))
    for made, expected in (
        (greedy_keep(there, 0.95, backend), greedy_keep(x[index], 0.95, backend)),
        (remove_chains(there, 0.95, backend), remove_chains(x[index], 0.95, backend)),
        (near_pairs(there, there, 0.95, backend), near_pairs(x[index], x[index], 0.95, backend)),
        (near_pairs(Vectors(x, None, there.on_device), x, 0.95, backend), near_pairs(x, x, 0.95, backend)),
    ):
        assert len(made) == len(expected)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(made, expected, strict=True))


def test_near_pairs_finds_exactly_the_near_pairs(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_module, "_BLOCK_ROWS", 50)
    monkeypatch.setattr(similarity_module, "_SLICE_ROWS", 70)
    x = groups(60, 5)
    a, b = x[:130], x[130:]
    i, j, similarity = near_pairs(a, b, 0.9, backend)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == set(zip(*np.nonzero(exact >= 0.9), strict=True))
    np.testing.assert_allclose(similarity, exact[i, j], atol=1e-12)


def test_products_in_half_precision_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = groups(60, 8, seed=4)
    single = [*greedy_keep(x, 0.93, Backend("cpu")), *near_pairs(x, x[::2], 0.93, Backend("cpu"))]
    monkeypatch.setattr(Backend, "product_dtype", np.float16)
    half = [*greedy_keep(x, 0.93, Backend("cpu")), *near_pairs(x, x[::2], 0.93, Backend("cpu"))]
    for a, b in zip(single, half, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (single[0] >= 0).sum() > 100


@pytest.mark.parametrize("dim", [1, 3, 64, 512])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_product_error_bounds_what_rounding_does(dim: int, dtype: type) -> None:
    rng = np.random.default_rng(dim)
    a = unit(rng.normal(size=(300, dim)) * 10.0 ** rng.integers(-6, 1, (300, dim)))
    b = unit(a + 0.1 * rng.normal(size=(300, dim)))
    exact = (a.astype(np.float64) * b).sum(axis=1)
    rounded = (a.astype(dtype).astype(np.float32) * b.astype(dtype).astype(np.float32)).sum(axis=1).astype(dtype)
    assert np.abs(exact - rounded).max() <= similarity_module.product_error(dim, dtype)


def test_assign_gives_the_nearest_centroids_in_any_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    x, centroids = groups(50, 8), groups(9, 1, seed=1)
    labels, similarity = assign(x, centroids, 3, backend)
    exact = x.astype(np.float64) @ centroids.astype(np.float64).T
    np.testing.assert_array_equal(labels, np.argsort(-exact, axis=1)[:, :3])
    np.testing.assert_allclose(similarity, np.take_along_axis(exact, labels.astype(int), axis=1), atol=1e-6)
    monkeypatch.setattr(kmeans_module, "_BLOCK_VALUES", {"cpu": 9 * 7, "gpu": 9 * 7})
    np.testing.assert_array_equal(assign(x, centroids, 3, backend)[0], labels)


def test_probes_are_the_same_in_any_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    x = unit(np.random.default_rng(0).normal(size=(900, 32)))
    clustering = fit_clustering(x, 12, DedupConfig(), backend)
    cluster, similarity, probes = find_probes(x, clustering, DedupConfig(), backend)
    exact = x.astype(np.float64) @ clustering.centroids.astype(np.float64).T
    np.testing.assert_array_equal(cluster, exact.argmax(axis=1))
    np.testing.assert_allclose(similarity, exact.max(axis=1), atol=1e-12)
    monkeypatch.setattr(kmeans_module, "_BLOCK_VALUES", {"cpu": 12 * 7, "gpu": 12 * 7})

    def check() -> None:
        again = find_probes(x, clustering, DedupConfig(), backend)
        for now, before in zip(again, (cluster, similarity, probes), strict=True):
            np.testing.assert_array_equal(now, before)

    check()
    monkeypatch.setattr(Backend, "host_threads", 3)
    monkeypatch.setattr(kmeans_module, "_THREAD_ROWS", 101)
    check()
    # As for more centroids than have a table of their distances.
    monkeypatch.setattr(kmeans_module, "_MOST_IN_TABLE", 1)
    kmeans_module._apart.cache_clear()
    check()


def test_of_many_equally_near_centroids_the_first_are_taken(backend: Backend) -> None:
    centroids = np.eye(40, dtype=np.float32)
    x = unit(np.stack([np.ones(40), np.arange(40) >= 20, np.arange(40) == 7, np.where(np.arange(40) == 9, 2, 1)]))
    labels, similarity = assign(np.repeat(x, 3, axis=0), centroids, 3, backend)
    expected = [[0, 1, 2], [20, 21, 22], [7, 0, 1], [9, 0, 1]]
    np.testing.assert_array_equal(labels, np.repeat(expected, 3, axis=0))
    np.testing.assert_allclose(
        similarity, np.repeat(np.take_along_axis(x, np.array(expected), 1), 3, axis=0), atol=1e-6
    )


def test_more_clusters_are_probed_where_borders_are_near(backend: Backend) -> None:
    noise = unit(np.random.default_rng(0).normal(size=(4000, 256)))
    grouped = groups(20, 200, spread=0.02, dim=256)
    count = {}
    for name, x in (("noise", noise), ("grouped", grouped)):
        clustering = fit_clustering(x, 20, DedupConfig(), backend)
        probes = find_probes(x, clustering, DedupConfig(), backend)[2]
        count[name] = (probes >= 0).sum(axis=1)
        assert probes.shape == (4000, 7)
        fewer = find_probes(x, clustering, DedupConfig(max_probe=2), backend)[2]
        assert fewer.shape == (4000, 1)
        # What n_probe asks for comes first, and is there with and without more.
        np.testing.assert_array_equal(probes[:, 0], fewer[:, 0])
    assert count["noise"].max() > 2
    assert count["grouped"].max() <= 1


def test_the_spread_of_noise_has_all_dimensions_and_that_of_a_plane_two(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    noise = unit(rng.normal(size=(20_000, 64)))
    angles = rng.uniform(0, 2 * np.pi, 3000)
    plane = np.zeros((3000, 64), np.float32)
    plane[:, 0], plane[:, 1] = np.cos(angles), np.sin(angles)
    assert 60 <= fit_clustering(noise, 4, DedupConfig(), backend).dimensions <= 64
    assert fit_clustering(plane, 4, DedupConfig(), backend).dimensions == 2
    assert fit_clustering(plane[:1], 1, DedupConfig(), backend).dimensions == 1
    assert fit_clustering(np.repeat(plane[:1], 9, axis=0), 1, DedupConfig(), backend).dimensions == 1


def test_k_means_starts_from_rows_that_are_spread(backend: Backend) -> None:
    x = groups(8, 50, spread=0.01)

    def seeds(rows: np.ndarray, n: int) -> np.ndarray:
        return backend.to_host(spread_rows(backend.asarray(rows), n, 1))

    # One of each group; eight rows drawn at random would be so once in four hundred times.
    picked = seeds(x, 8)
    assert (picked @ picked.T - 2 * np.eye(8)).max() < 0.9
    assert all((x == row).all(axis=1).any() for row in picked)
    np.testing.assert_array_equal(seeds(x, 8), picked)
    np.testing.assert_array_equal(seeds(np.repeat(x[:5], 20, axis=0), 10), np.unique(x[:5], axis=0))


def test_assign_breaks_ties_by_the_lower_index(backend: Backend) -> None:
    x = groups(1, 20)
    centroids = np.concatenate([groups(2, 1, seed=3), x[:1], x[:1], x[:1]])
    labels, _ = assign(x, centroids, 2, backend)
    np.testing.assert_array_equal(labels, np.tile([2, 3], (20, 1)))


def test_fit_centroids_is_repeatable_and_finds_groups(backend: Backend) -> None:
    x = groups(8, 100, spread=0.02)
    config = DedupConfig(n_init=4)
    centroids = fit_centroids(x, 8, config, backend)
    assert centroids.shape == (8, 32)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    labels, similarity = assign(x, centroids, 1, backend)
    assert np.bincount(labels[:, 0]).tolist() == [100] * 8
    assert similarity.min() > 0.95
    again = fit_centroids(x, 8, config, backend)
    # cuML sums in the order in which blocks of threads end.
    np.testing.assert_allclose(again, centroids, rtol=0, atol=1e-6 if backend.is_gpu else 0)


def test_clusters_that_come_out_far_too_large_are_split(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    # k-means spends its centroids on the scattered rows and leaves the dense group whole.
    x = np.concatenate([groups(1, 2000, spread=0.002), groups(1000, 1, seed=2)])
    x = x[np.random.default_rng(0).permutation(len(x))]

    def largest() -> int:
        labels, _ = assign(x, fit_centroids(x, 30, DedupConfig(), backend), 1, backend)
        return int(np.bincount(labels[:, 0]).max())

    assert largest() < 4 * len(x) / 30
    monkeypatch.setattr(kmeans_module, "_SPLIT_OVER", np.inf)
    assert largest() > 6 * len(x) / 30


def test_equal_rows_make_one_cluster_and_one_stays(backend: Backend) -> None:
    x = np.tile(groups(1, 1), (300, 1))
    result = dedup_arrays(x, n_clusters=10, device=backend.name)
    assert len(result.centroids) == 1
    assert result.kept.sum() == 1
    assert set(result.duplicate_of[~result.kept]) == {int(np.flatnonzero(result.kept)[0])}


def check_result(x: np.ndarray, result, eps: float, n_probe: int) -> None:
    """Check what is promised whatever the clusters."""
    x = x.astype(np.float64)
    goes = ~result.kept
    assert result.kept[result.duplicate_of[goes]].all()
    products = (x[goes] * x[result.duplicate_of[goes]]).sum(axis=1)
    assert (products >= 1 - eps - 1e-9).all()
    np.testing.assert_allclose(result.similarity[goes], products, atol=1e-6)
    assert np.isnan(result.similarity[result.kept]).all()
    probes = np.argsort(-(x @ result.centroids.T.astype(np.float64)), axis=1)[:, :n_probe]
    kept = np.flatnonzero(result.kept)
    all_products = x[kept] @ x[kept].T
    for a, b in zip(*np.nonzero(np.triu(all_products, 1) >= 1 - eps + 1e-9), strict=True):
        i, j = kept[a], kept[b]
        assert probes[i, 0] not in probes[j]
        assert probes[j, 0] not in probes[i]


@pytest.mark.parametrize("n_clusters", [1, 4, 25])
@pytest.mark.parametrize("n_probe", [1, 2, 3])
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.3])
def test_removed_rows_name_kept_ones_and_kept_rows_are_not_near(n_clusters: int, n_probe: int, eps: float) -> None:
    x = groups(60, 10, spread=0.07)
    result = dedup_arrays(x, eps=eps, n_clusters=n_clusters, n_probe=n_probe, device="cpu")
    check_result(x, result, eps, n_probe)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 120), dim=st.integers(2, 6), n_clusters=st.integers(1, 12), n_probe=st.integers(1, 4),
    eps=st.floats(0.0, 0.4), seed=st.integers(0, 2**31), policy=st.sampled_from(["hard", "easy", "random"]),
)  # fmt: skip
def test_promises_hold_for_any_rows(
    n: int, dim: int, n_clusters: int, n_probe: int, eps: float, seed: int, policy: str
) -> None:
    # In few dimensions nearly every row is near some other, across borders and in chains.
    x = unit(np.random.default_rng(seed).normal(size=(n, dim)))
    result = dedup_arrays(
        x, eps=eps, n_clusters=n_clusters, n_probe=n_probe, which_to_keep=policy, random_state=seed, device="cpu"
    )
    check_result(x, result, eps, n_probe)


def test_one_cluster_is_the_exact_greedy_rule() -> None:
    x = groups(80, 6, spread=0.06)
    uid = np.arange(len(x))
    centre = unit(x.mean(axis=0, keepdims=True, dtype=np.float64))
    to_centre = x.astype(np.float64) @ centre[0].astype(np.float64)
    orders = {
        "hard": np.lexsort((uid, to_centre)),
        "easy": np.lexsort((uid, -to_centre)),
        "random": np.lexsort((uid, hash_uids(uid, 7))),
    }
    for policy, order in orders.items():
        result = dedup_arrays(x, eps=0.1, n_clusters=1, which_to_keep=policy, random_state=7, device="cpu")
        np.testing.assert_array_equal(result.duplicate_of, greedy_by_hand(x, order, 0.9), err_msg=policy)


def test_more_probes_find_more_of_what_brute_force_finds() -> None:
    x = groups(400, 5, dim=24, spread=0.05, seed=4)
    exact = dedup_arrays(x, eps=0.1, n_clusters=1, device="cpu").kept.sum()
    kept = [dedup_arrays(x, eps=0.1, n_clusters=60, n_probe=p, device="cpu").kept.sum() for p in (1, 2, 4, 60)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[1] > exact * 0.98
    assert kept[3] < exact * 1.02


def test_chains_are_not_followed() -> None:
    angles = np.deg2rad([0, 10, 20, 30, 40])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    near = 1 - np.cos(np.deg2rad(12))
    result = dedup_arrays(x, eps=near, keep_by=["place"], columns={"place": np.arange(5)}, device="cpu")
    np.testing.assert_array_equal(result.duplicate_of, [-1, 0, -1, 2, -1])


@pytest.mark.parametrize(
    ("keep_by", "kept"),
    [(["-width*height"], 2), (["width*height"], 0), (["-score"], 1), (["-uid"], 3), (["flag", "-width * height"], 1)],
)
def test_keep_by_prefers_by_columns(keep_by: list[str], kept: int) -> None:
    x = np.tile(groups(1, 1), (4, 1))
    columns = {
        "width": np.array([10, 20, 40, 30]), "height": np.array([10, 20, 20, 20]),
        "score": np.array([0.1, 0.9, np.nan, 0.3]), "flag": np.array([1, 0, 1, 1]),
    }  # fmt: skip
    result = dedup_arrays(x, keep_by=keep_by, columns=columns, device="cpu")
    assert np.flatnonzero(result.kept).tolist() == [kept]


def test_keep_order_puts_missing_values_last() -> None:
    keys = KeepOrder("hard", ("-a", "b")).keys(
        np.arange(3), np.zeros(3), {"a": np.array([np.nan, 1, 2]), "b": np.array([0, np.nan, 5])}
    )
    assert keys[:, 0].tolist() == [np.inf, -1, -2]
    assert keys[:, 1].tolist() == [0, np.inf, 5]


def test_rows_without_a_direction_are_never_duplicates() -> None:
    x = np.concatenate([np.zeros((3, 8)), np.full((2, 8), np.nan), np.tile(np.arange(8.0), (2, 1)), [[np.inf] * 8]])
    result = dedup_arrays(x, device="cpu")
    assert result.cluster.tolist() == [-1, -1, -1, -1, -1, 0, 0, -1]
    assert result.duplicate_of.tolist() == [-1, -1, -1, -1, -1, -1, 5, -1]


def test_fewer_rows_with_a_direction_than_clusters() -> None:
    x = np.zeros((5, 4))
    x[0], x[1] = [1, 0, 0, 0], [2, 0, 0, 0]
    assert dedup_arrays(x, n_clusters=3, device="cpu").kept.sum() == 4


@pytest.mark.parametrize("degrees", [17, 30])
def test_a_massive_group_may_be_orphaned(degrees: int) -> None:
    # Row 0 at 0 degrees takes row 1 at 15 across a border, so that the many copies, which went for row 1, are
    # orphans: at 17 degrees they go for row 0, at 30 for one of their own. All pairs of them would fill no memory.
    n = 40_000
    angle = np.radians(np.concatenate([[0, 15], np.full(n, degrees)]))
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    uid = np.arange(n + 2)
    cluster = np.where(uid == 0, 1, 0).astype(np.int32)
    rows = Rows(uid, uid[:, None].astype(float), cluster, 1 - cluster[:, None], np.full(n + 2, "", object), x)
    decisions = decide_rows(rows, DedupConfig(eps=0.05), Backend("cpu"))
    keeper = dict(zip(decisions.uid.tolist(), decisions.keeper.tolist(), strict=True))
    assert (keeper[0], keeper[1]) == (-1, 0)
    if degrees == 17:
        assert set(decisions.keeper[2:].tolist()) == {0}
    else:
        assert keeper[2] == -1
        assert set(decisions.keeper[3:].tolist()) == {2}


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e-20, 1.0, 1e20, 1e30, 1e200])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_has_direction_says_what_unit_rows_finds(scale: float, dtype: type) -> None:
    rng = np.random.default_rng(3)
    with np.errstate(over="ignore", under="ignore"):
        x = (rng.normal(size=(50, 8)) * scale).astype(dtype)
    x[3], x[7, 2], x[9, 0] = 0, np.nan, np.inf
    assert has_direction(x).tolist() == unit_rows(x)[1].tolist()


@pytest.mark.parametrize("x", [np.empty((0, 16)), np.zeros((4, 16)), np.ones((1, 16))])
def test_nothing_to_compare(x: np.ndarray) -> None:
    result = dedup_arrays(x, n_clusters=5, device="cpu")
    assert result.kept.all()
    assert len(result.kept) == len(x)


def test_length_and_type_of_rows_do_not_matter() -> None:
    x = groups(30, 4)
    scaled = x.astype(np.float64) * np.random.default_rng(0).uniform(0.1, 50, size=(len(x), 1))
    first, second = dedup_arrays(x, device="cpu"), dedup_arrays(scaled, device="cpu")
    np.testing.assert_array_equal(first.kept, second.kept)
    rows, valid = unit_rows(scaled)
    assert rows.dtype == np.float32
    assert valid.all()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"eps": 1.5}, r"eps=1.5 should be a number in \[0, 1\]"),
        ({"eps": "x"}, "eps='x' should be a number in"),
        ({"eps_list": 0.1}, "eps_list=0.1 and keep_by"),
        ({"keep_by": "width"}, "keep_by='width' should be sequences"),
        ({"n_clusters": 0}, "n_clusters=0 should be 'auto' or a whole number >= 1"),
        ({"n_clusters": None}, "n_clusters=None should be"),
        ({"n_clusters": 2.5}, "n_clusters=2.5 should be"),
        ({"n_clusters": True}, "n_clusters=True should be"),
        ({"n_probe": 2.5}, "n_probe=2.5 should be a whole number"),
        ({"random_state": 1.5}, "random_state=1.5 should be a whole number"),
        ({"n_clusters": "many"}, "n_clusters='many' should be"),
        ({"n_probe": 0}, "n_probe=0 should be a whole number >= 1"),
        ({"which_to_keep": "best"}, "which_to_keep='best' is none of hard, easy, random"),
        ({"keep_by": ["-width/height"]}, "keep_by: '-width/height' is not understood"),
        ({"keep_by": ["sharpness"]}, "keep_by needs the column 'sharpness'"),
        ({"fit_data_fraction": 0}, r"fit_data_fraction=0 should be in \(0, 1\]"),
        ({"init": "best"}, "init='best' is none of"),
        ({"random_state": -1}, "random_state=-1"),
        ({"uid": np.zeros(2)}, "uid should hold 2 different values"),
    ],
)
def test_wrong_parameters_are_refused(parameters: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dedup_arrays(np.ones((2, 4)), device="cpu", **parameters)


def test_auto_takes_one_cluster_for_few_rows_and_the_root_of_many() -> None:
    config = DedupConfig()
    assert [config.clusters_for(n) for n in (1, 2999, 1_000_000, 10**9)] == [1, 1, 500, 31623]
    assert config.fit_rows(1000) == 1000
    assert config.fit_rows(10**9) == 64 * 31623
    assert DedupConfig(n_clusters=50).clusters_for(10) == 10
    assert DedupConfig(fit_data_fraction=0.1).fit_rows(1000) == 100


def semdedup_by_hand(x: np.ndarray, labels: np.ndarray, to_centroid: np.ndarray, eps: float, hard: bool) -> np.ndarray:
    """Transcribe the published rule: per cluster, sort, and take the largest value above each diagonal entry."""
    removed = np.zeros(len(x), dtype=bool)
    for cluster in np.unique(labels):
        rows = np.flatnonzero(labels == cluster)
        rows = rows[np.lexsort((rows, to_centroid[rows] if hard else -to_centroid[rows]))]
        similarity = x[rows].astype(np.float64) @ x[rows].astype(np.float64).T
        upper = np.triu(similarity, k=1)
        largest = upper.max(axis=0) if len(rows) else np.empty(0)
        removed[rows[largest > 1 - eps]] = True
    return removed


@pytest.mark.parametrize("policy", ["hard", "easy"])
@pytest.mark.parametrize("n_clusters", [1, 9])
def test_mode_semdedup_is_the_published_rule(policy: str, n_clusters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_module, "_BLOCK_ROWS", 64)
    x = groups(60, 10, dim=12, spread=0.12, seed=6)
    result = dedup_arrays(
        x, eps=0.15, n_clusters=n_clusters, which_to_keep=policy, mode="semdedup", n_probe=4, device="cpu"
    )
    to_centroid = (x.astype(np.float64) * result.centroids[result.cluster]).sum(axis=1)
    expected = semdedup_by_hand(x, result.cluster, to_centroid, 0.15, policy == "hard")
    np.testing.assert_array_equal(~result.kept, expected)
    ours = dedup_arrays(x, eps=0.15, n_clusters=n_clusters, which_to_keep=policy, n_probe=1, device="cpu")
    # Chains make it remove more, in part for rows that are gone.
    assert expected.sum() > (~ours.kept).sum()
    gone = result.duplicate_of[~result.kept]
    assert not result.kept[gone].all()


def test_greedy_keep_never_drops_fixed_rows(backend: Backend) -> None:
    x = np.tile(groups(1, 1), (6, 1))
    keeper, _ = greedy_keep(x, 0.9, backend, n_fixed=2)
    assert keeper.tolist() == [-1, -1, 0, 0, 0, 0]
    other = np.concatenate([groups(1, 1, seed=9), x])
    keeper, _ = greedy_keep(other, 0.9, backend, n_fixed=1, only_fixed=True)
    assert keeper.tolist() == [-1] * 7


@pytest.mark.parametrize("n_clusters", [8, 30])
def test_near_pairs_are_found_across_borders_in_noise(n_clusters: int) -> None:
    # Rows without any clusters, of which a fifth are near others: nowhere is a border that keeps them apart.
    rng = np.random.default_rng(1)
    base = unit(rng.normal(size=(3200, 128)))
    copies = unit(base[:800] + unit(rng.normal(size=(800, 128))) * rng.uniform(0.05, 0.3, (800, 1)))
    x = np.concatenate([base, copies])[rng.permutation(4000)]

    def recall(**parameters: int) -> float:
        # Centroids lie nearer to the rows that they were fitted on: these are few, as in a large set.
        config = DedupConfig(eps=0.05, n_clusters=n_clusters, fit_data_fraction=0.1, **parameters)
        kept = dedup_arrays(x, config=config, device="cpu").kept
        i, j = np.nonzero(np.triu(x @ x.T >= 0.95, 1))
        return 1 - float((kept[i] & kept[j]).mean())

    assert recall() >= 0.995
    assert recall(n_probe=1) < recall(max_probe=2) < recall()
