"""Rivals that merge: examples worked out by hand or by the released code, then traps on random videos."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import model, plan

from hybridvlm.config import VisionConfig
from hybridvlm.ops.fold import fold
from hybridvlm.reduction import input_selection
from hybridvlm.reduction.cluster import anchored_weights, clusters, dpc_knn, frame_likeness, mean_weights, segments_of
from hybridvlm.reduction.rivals import fastvid, flashvid, framefusion, holitom, prunevid, utrc
from hybridvlm.reduction.rivals.tome import tome_roots
from hybridvlm.reduction.rivals.visionzip import visionzip_frame

MERGES = ("tome", "visionzip", "fastvid", "holitom-outer", "flashvid-outer", "prunevid-outer")
FOLD, DPC = jax.jit(fold), jax.jit(dpc_knn, static_argnums=2)
CLUSTERS = jax.jit(clusters, static_argnums=2)
REFINE = jax.jit(prunevid.refine)
HOLITOM = jax.jit(holitom.holitom_video)
WINDOWS = jax.jit(holitom.still_windows)
f32 = functools.partial(jnp.asarray, dtype=jnp.float32)


def folded(x, into, weight):
    """Tokens [n,D] folded by into [n] and weight [n]."""
    return np.asarray(FOLD(f32(x)[None], jnp.asarray(into)[None, None], jnp.asarray(weight)[None, None])[0])


def kept(score, count):
    return sorted(np.argsort(-np.asarray(score), kind="stable")[:count].tolist())


def test_density_peaks():
    x = f32([0, 0.1, 0.3, 1, 1.2])[:, None]
    score, _ = DPC(x, jnp.ones(5, bool), 3)
    np.testing.assert_allclose(score, [0.0967, 1.1802, 0.1915, 0.5866, 0.1507], atol=1e-4)
    into, centre = CLUSTERS(x, jnp.ones(5, bool), 3, 2)
    assert np.flatnonzero(centre).tolist() == [1, 3] and into.tolist() == [1, 1, 1, 3, 3]
    np.testing.assert_allclose(folded(x, into, mean_weights(into))[[1, 3], 0], [0.1333, 1.1], atol=1e-4)
    np.testing.assert_allclose(folded(x, into, anchored_weights(into, 0.6))[[1, 3], 0], [0.12, 1.08], atol=1e-6)


def test_density_peaks_of_equal_tokens_take_the_first_and_never_a_masked_one():
    into, centre = CLUSTERS(jnp.ones((5, 3)) * 0.3, jnp.arange(5) > 0, 7, 2)
    assert np.flatnonzero(centre).tolist() == [1, 2] and into.tolist() == [5, 1, 2, 1, 1]


TOME = [(1, 0), (0.9, 0.1), (0, 1), (0.1, 1), (1, 1), (-1, 0)]


@pytest.mark.parametrize(("first", "merged"), [(1, (0.95, 0.05)), (3, (0.975, 0.025))])
def test_tome(first, merged):
    root, size = jax.jit(lambda x, size: tome_roots(x, 4, size))(f32(TOME), f32([first, 1, 1, 1, 1, 1]))
    assert root.tolist() == [1, 1, 3, 3, 4, 5] and size.tolist() == [0, first + 1, 0, 2, 1, 1]
    weight = f32([first, 1, 1, 1, 1, 1]) / size[root]
    out = folded(TOME, root, weight)
    np.testing.assert_allclose(out[[1, 3, 4, 5]], [merged, (0.05, 1), (1, 1), (-1, 0)], atol=1e-6)


@pytest.mark.parametrize(("released", "expected"), [(True, [(6, 0), (0, 8)]), (False, [(3, 0), (0, 4)])])
def test_visionzip(released, expected):
    keys = f32([(0, 0), (1, 0), (0.9, 0.1), (0, 1), (0, 0), (0.2, 1)])
    x = f32([(9, 9), (2, 0), (4, 0), (0, 2), (9, 9), (0, 6)])
    into, weight, score = visionzip_frame(keys, f32([0.3, 0.05, 0.2, 0.1, 0.25, 0.1]), 2, 2, released)
    assert kept(score, 4) == [0, 1, 3, 4]
    np.testing.assert_allclose(folded(x, into, weight)[[1, 3]], expected, atol=1e-5)


def test_scenes_and_anchor_frames_of_fastvid():
    t = f32([0.95, 0.85, 0.99, 0.92, 0.97, 0])
    cut = fastvid.scenes(t, jnp.ones(6, bool), 3, 0.9)
    assert np.flatnonzero(cut).tolist() == [1, 3] and segments_of(cut).tolist() == [0, 0, 1, 1, 2, 2]
    is_anchor, ordinal, how_many = fastvid.anchor_frames(jnp.array([0, 0, 0, 0, 0, 1]), jnp.ones(6, bool))
    assert np.flatnonzero(is_anchor).tolist() == [0, 4, 5] and ordinal[jnp.array([0, 4, 5])].tolist() == [0, 1, 0]
    assert how_many.tolist() == [2] * 5 + [1]


def test_the_counts_of_a_scene_of_fastvid():
    """Twenty tokens, five kept of each of five frames: three salient, ten anchors, five in frame 0 and five in frame 4."""
    rng = np.random.default_rng(0)
    video = f32(np.ones((5, 20, 6)) + 0.1 * rng.normal(size=(5, 20, 6)))
    one_scene = jax.jit(lambda *row: fastvid.fastvid_video(*row, 5, count=1))
    score, into, weight = one_scene(video, jnp.ones(5, bool), f32(rng.uniform(size=(5, 20))))
    assert np.bincount(np.array(kept(score, 25)) // 20, minlength=5).tolist() == [8, 3, 3, 3, 8]
    total = np.zeros(101)
    np.add.at(total, np.asarray(into).ravel(), np.asarray(weight).ravel())
    anchors = np.unique(np.asarray(into))[:-1]
    assert len(anchors) == 10
    np.testing.assert_allclose(total[anchors], 1, atol=1e-5)


def test_the_longest_still_windows_of_holitom():
    still = jnp.array([(0, 0), (1, 1), (1, 0), (0, 0)], bool)  # row t: whether a cell is as in frame t - 1
    ends, _ = WINDOWS(still, jnp.int32(4))
    assert np.flatnonzero(ends).tolist() == [1, 2, 3]
    # the same by trying every partition
    rng = np.random.default_rng(0)
    for _ in range(5):
        still = rng.random((6, 4)) < 0.7
        still[0] = False
        ends, _ = WINDOWS(jnp.asarray(still), jnp.int32(6))

        def spared(cuts, still=still):
            edges = [0, *cuts, 6]
            return sum((b - a - 1) * still[a + 1 : b].all(0).sum() for a, b in itertools.pairwise(edges) if b - a > 1)

        best = max(spared([i for i in range(1, 6) if bits >> i & 1]) for bits in range(64))
        assert spared((np.flatnonzero(ends)[:-1] + 1).tolist()) == best


@pytest.mark.parametrize(("keep", "counts"), [(2, [1, 0, 1, 0]), (4, [2, 0, 1, 1])])
def test_holitom_hands_its_parts_out_exactly(keep, counts):
    cells = {"a": (1, 0, 0, 0), "b": (0, 1, 0, 0), "c": (0, 0, 1, 0), "d": (0, 0, 0, 1), "e": (-1, 0, 0, 0)}
    video = f32(
        [[cells["a"], cells["b"]], [cells["a"], cells["b"]], [cells["a"], cells["c"]], [cells["e"], cells["d"]]]
    )
    video = video.at[1].mul(3)
    score, into, weight = HOLITOM(video, jnp.ones(4, bool), f32([[1, 2]] * 4), jnp.int32(keep))
    assert np.bincount(np.array(kept(score, keep)) // 2, minlength=4).tolist() == counts
    out = folded(video.reshape(8, 4), into[0], weight[0])
    if keep == 4:  # two still cells, averaged over two frames
        np.testing.assert_allclose(out[:2], 2 * np.asarray(video[0]), atol=1e-6)


def test_the_inner_merge_of_holitom_is_a_mean():
    x = f32([(1, 0), (0, 1), (4, 0), (8, 0)])
    into = jax.jit(holitom.into_most_alike)(x, jnp.ones(4, bool), f32([2, 1, 0, 0]), jnp.int32(2))
    assert into.tolist() == [0, 1, 0, 0]
    np.testing.assert_allclose(folded(x, into, mean_weights(into))[0], [13 / 3, 0], rtol=1e-6)
    # where a budget leaves nothing, nothing is written over the text
    into = holitom.into_most_alike(x, jnp.arange(4) > 0, f32([0, 1, 2, 3]), jnp.int32(0))
    assert into[1:].tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ([0, 0, 1, 0, 2, 2], [0, 0, 0, 0, 2, 2]),
        ([0, 1, 0, 1], [0, 0, 0, 0]),
        ([0, 0, 1, 1, 0, 0, 0, 2], [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_prunevid_refines_labels_to_stretches(label, expected):
    assert REFINE(jnp.array(label), jnp.ones(len(label), bool)).tolist() == expected
    padded = REFINE(jnp.array([*label, 0, 0]), jnp.arange(len(label) + 2) < len(label))
    assert padded[: len(label)].tolist() == expected


def test_prunevid_averages_what_stands_still():
    a = np.radians([0, 0, 0])
    b = a + np.arccos([1, 0.5, 0.9])
    turn = np.stack([np.stack([np.cos(t), np.sin(t)], -1) for t in (a, b)])
    score, into, weight = jax.jit(prunevid.prunevid_video)(f32(turn), jnp.ones(2, bool), jnp.int32(4))
    assert kept(score, 4) == [0, 1, 2, 4]
    out = folded(turn.reshape(6, 2), into[0], weight[0])
    np.testing.assert_allclose(out[[0, 2]], turn[:, [0, 2]].mean(0), atol=1e-6)


def test_scenes_of_flashvid():
    frames = f32([(1, 0), (0.99, 0.1), (0, 1), (0, 1), (1, 1), (1, 1)])[:, None]
    cut = fastvid.scenes(frame_likeness(frames), jnp.ones(6, bool), 4, 0.9)
    assert np.bincount(segments_of(cut)).tolist() == [1, 1, 2, 2]


def test_trees_of_flashvid_are_means_of_all_their_tokens():
    """A chain 1, 2, 3 gives 2 (the released divisor: 3); a root with two children gives their mean, too."""
    parent = jnp.array([[0, 0], [0, 0], [0, 0]])
    chain = flashvid.tree_roots(parent, jnp.array([[False, False], [True, False], [True, False]]))
    assert chain.tolist() == [[0, 1], [0, 3], [0, 5]]
    into = jnp.where(chain == 0, 0, 6).reshape(-1)
    assert folded(f32([1, 0, 2, 0, 3, 0])[:, None], into, mean_weights(into))[0, 0] == pytest.approx(2)
    flat = flashvid.tree_roots(parent[:2], jnp.array([[False, False], [True, True]]))
    into = jnp.where(flat == 0, 0, 4).reshape(-1)
    assert folded(f32([1, 0, 2, 4])[:, None], into, mean_weights(into))[0, 0] == pytest.approx(7 / 3)


def test_framefusion_merges_runs_of_a_cell():
    x = f32([(2, 0), (4, 0), (0, 1), (0, 3), (7, 7)])
    visual = jnp.arange(5) < 4
    into, score = jax.jit(framefusion.merge_repeats)(x, visual, jnp.zeros(5, int), jnp.ones(5, int), jnp.full(5, 2))
    assert kept(score[:4], 2) == [0, 2] and into.tolist() == [0, 0, 2, 2, 5]
    out = folded(x, into, mean_weights(into))
    np.testing.assert_allclose(out[[0, 2, 4]], [(3, 0), (0, 2), (7, 7)])


def test_utrc_drops_one_pair_and_merges_the_other():
    x = f32([(1, 0), (0, 1), (0.9, 0.2), (0.1, 1), (1, 0.1), (0.6, 0.8)])
    into, score = jax.jit(utrc.utrc_row)(x, jnp.ones(6, bool), jnp.int32(4), f32([0.9, 0.8, 0.1, 0.2, 0.7, 0.3]))
    assert kept(score, 4) == [0, 1, 4, 5] and into.tolist() == [0, 1, 4, 6, 4, 5]
    np.testing.assert_allclose(folded(x, into, mean_weights(into))[[1, 4]], [(0, 1), (0.95, 0.15)], atol=1e-6)


CONFIG = model(vision=VisionConfig(image_size=(64, 64), patch_size=8, width=16, layers=2, heads=2, mlp_width=16))


def video(dtype=jnp.float32):
    """Two videos of slow scenes, 8 and 5 frames in a bucket of 8; what is padded is full of rubbish."""
    rng = np.random.default_rng(0)
    scene = rng.normal(size=(2, 2, 16, 6)).repeat(4, axis=1)
    x = (scene + 0.4 * rng.normal(size=(2, 8, 16, 6))).astype(np.float32)
    x[1, 5:] *= 50
    x[0, 2] = x[0, 1]
    x[0, 3, 3] = 0
    return jnp.asarray(x, dtype), jnp.array([8, 5]), f32(rng.uniform(size=(2, 8, 16)))


@functools.cache
def selector(name, rate, frames):
    p = plan(name, rate, config=CONFIG, frames=frames, m=16)
    return p, jax.jit(input_selection(p))


def checked(x, p, chosen, row, tokens):
    """What the anchors of one example hold, [kept,D]; its weights add up to one, and nothing that is kept went elsewhere."""
    n = p.keep(0, tokens)
    stays = kept(chosen.score[row, :tokens], n)
    total = np.zeros(chosen.score.shape[1] + 1)
    if chosen.into is None:
        return stays, np.asarray(x[row].reshape(-1, x.shape[-1]))[stays]
    into, weight = np.asarray(chosen.into[row]), np.asarray(chosen.weight[row])
    np.add.at(total, into.ravel(), weight.ravel())
    written = np.unique(into)
    written = written[written < total.size - 1]
    np.testing.assert_allclose(total[written][written < tokens], 1, atol=1e-4)
    return stays, np.asarray(FOLD(x, chosen.into, chosen.weight) if x.ndim == 3 else 0)[row][stays]


SLOW = [n if n == "holitom-outer" else pytest.param(n, marks=pytest.mark.slow) for n in MERGES]


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_an_example_merges_the_same_alone_in_a_batch_and_in_a_longer_bucket(name, dtype):
    x, count, attention = video(dtype)
    p, run = selector(name, 0.4, 8)
    q, short = selector(name, 0.4, 5)
    both = run(x, count, attention)
    alone = short(x[1:, :5], count[1:], attention[1:, :5])
    flat, part = x.reshape(2, 128, 6), x[1:, :5].reshape(1, 80, 6)
    stays, values = checked(flat, p, both, 1, 80)
    again, same = checked(part, q, alone, 0, 80)
    assert stays == again
    np.testing.assert_allclose(
        values.astype(np.float32), same.astype(np.float32), atol=1e-5 if dtype == jnp.float32 else 0.05
    )
    assert np.isfinite(checked(flat, p, both, 0, 128)[1].astype(np.float32)).all()


@pytest.mark.parametrize("name", SLOW)
def test_equal_frames_zeros_and_one_frame(name):
    x, _, attention = video()
    p, run = selector(name, 0.4, 8)
    for same in (jnp.broadcast_to(x[:, :1], x.shape), 0 * x):
        chosen = run(same, jnp.array([8, 1]), jnp.ones_like(attention))
        flat = same.reshape(2, 128, 6)
        stays, values = checked(flat, p, chosen, 0, 128)
        assert len(stays) == p.keep(0, 128) and np.isfinite(values).all()
        # means of equal cells are those cells, to rounding
        if name in ("holitom-outer", "prunevid-outer") and same.any():
            assert max(stays) < 16 or name == "prunevid-outer" or p.keep(0, 128) > 16
        assert np.isfinite(checked(flat, p, chosen, 1, 16)[1]).all()


@pytest.mark.parametrize("name", MERGES)
def test_keeping_everything_changes_nothing(name):
    p = plan(name, 1.0, config=CONFIG, frames=8, m=16)
    assert not p.drops_input and p.keep(0, 128) == 128
