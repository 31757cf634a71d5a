"""Rivals that drop before layer 0: examples worked out by hand or by the released code, then traps on random videos."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import plan

from hybridvlm.reduction import BudgetError, input_selection
from hybridvlm.reduction.rivals.divprune import diverse_order
from hybridvlm.reduction.rivals.dycoke import dycoke_score
from hybridvlm.reduction.rivals.frames import frames_score
from hybridvlm.reduction.rivals.vidcom2 import vidcom2_score

FRAMES = jax.jit(frames_score, static_argnums=2)
DROPS = ("vidcom2", "divprune", "divprune-frame", "dycoke")


def kept(score, count):
    """The positions of the `count` largest, ties to the earlier."""
    return sorted(np.argsort(-np.asarray(score), kind="stable")[:count].tolist())


def angles(*degrees):
    a = np.radians(degrees)
    return jnp.asarray(np.stack([np.cos(a), np.sin(a)], -1), jnp.float32)


VIDCOM2 = jnp.asarray(
    [[[1, 0, 9, 0], [1, 0.1, -9, 3], [0.6, 0.8, 5, -8]], [[0, 1, -7, 7], [0.8, 0.6, 8, -5], [-0.6, 0.8, -6, 2]]]
)[None]


@pytest.mark.parametrize(("count", "expected"), [(2, [4, 5]), (3, [0, 4, 5]), (4, [0, 1, 4, 5]), (5, [0, 1, 3, 4, 5])])
def test_vidcom2(count, expected):
    """Channels 0 and 1, kept (1, 2) of two frames; other counts take the worst away or bring the best back."""
    score = jax.jit(vidcom2_score)(VIDCOM2, jnp.array([2]), 0.5)[0]
    assert kept(score, count) == expected


def test_divprune():
    order = jax.jit(diverse_order, static_argnums=2)
    rank = order(angles(0, 10, 90, 180, 200), jnp.ones(5, bool), 3)
    assert np.argsort(np.asarray(rank), kind="stable")[:3].tolist() == [2, 4, 0]
    weighted = order(angles(0, 10, 90, 180, 200), jnp.ones(5, bool), 3, jnp.array([1.0, 4, 1, 1, 1]))
    assert np.argsort(np.asarray(weighted), kind="stable")[:3].tolist() == [2, 1, 4]


def test_dycoke():
    """Four frames of two cells, one kept of each further frame: f0 both, f1 {1}, f2 {1}, f3 {0}."""
    likeness = {1: (0.9, 0.2), 2: (0.7, 0.3), 3: (0.1, 0.8)}
    base = angles(0, 0)
    turned = {f: angles(*(np.degrees(np.arccos(c)) for c in cos)) for f, cos in likeness.items() if f != 3}
    third = np.degrees(np.arccos(likeness[2])) + np.degrees(np.arccos(likeness[3]))
    video = jnp.stack([base, turned[1], turned[2], angles(*third)])[None]
    score = jax.jit(dycoke_score)(video, jnp.array([4]), jnp.array([1]))[0]
    assert kept(score, 5) == [0, 1, 3, 5, 6]


def test_dycoke_says_what_it_cannot():
    with pytest.raises(BudgetError, match=r"at least every fourth frame whole: of 64 frames it can keep 0\.25 or more"):
        plan("dycoke", 0.2)
    p = plan("dycoke", 0.475)
    assert p.keep(0, 64 * 16) == 16 * 16 + 48 * 5 and p.keep(0, 6 * 16) == 2 * 16 + 4 * 5
    assert plan("dycoke", 0.25).keep(0, 1024) == 256


@pytest.mark.parametrize(("count", "wanted"), [(8, 2), (7, 3), (5, 5), (1, 1), (64, 16)])
def test_frames_are_whole_and_evenly_spread(count, wanted):
    chosen = np.flatnonzero(np.asarray(FRAMES(jnp.array([count]), jnp.array([wanted]), 64)[0]))
    assert len(chosen) == wanted and chosen.max() < count
    assert np.ptp(np.diff(chosen)) <= 1 if wanted > 2 else True


def test_frames_spare_the_tower():
    from helpers.plans import model

    from hybridvlm.config import VisionConfig

    config = model(vision=VisionConfig(image_size=(128, 128), width=64, layers=2, heads=4, mlp_width=64))
    fewer, evs = (plan(name, 0.25, config=config) for name in ("frames", "evs"))
    assert fewer.cost.vision * 4 == fewer.dense_cost.vision == evs.cost.vision
    assert fewer.total_flop_ratio < evs.total_flop_ratio and fewer.retention_input == 0.25
    matched = plan("frames", fewer.total_flop_ratio, "total-flops", config=config)
    assert matched.retention_input == pytest.approx(0.25, abs=0.02)


def test_frames_of_a_batch_are_those_of_each_video_alone_in_any_bucket():
    keep = plan("frames", 0.4, frames=8).pixel_selection
    values = jnp.zeros((2, 8, 16, 0), jnp.uint8)
    both = np.asarray(jax.jit(keep.choose)(values, jnp.array([8, 5])))
    assert both.any(2).sum(1).tolist() == [3, 2] and not (both.any(2) & ~both.all(2)).any() and not both[1, 5:].any()
    short = plan("frames", 0.4, frames=5).pixel_selection
    assert short == keep
    np.testing.assert_array_equal(short.choose(values[1:, :5], jnp.array([5]))[0], both[1, :5])


def videos(seed=0, dtype=jnp.float32):
    """Two videos, of 8 and 5 frames in a bucket of 8, what is padded full of rubbish."""
    x = np.random.default_rng(seed).normal(size=(2, 8, 16, 6)).astype(np.float32)
    x[1, 5:] *= 50
    x[0, 2] = x[0, 1]
    x[0, 3, 3] = 0
    return jnp.asarray(x, dtype), jnp.array([8, 5])


def selection(name, rate, visual, count, attention=None):
    p = plan(name, rate, frames=visual.shape[1], m=visual.shape[2])
    run = (
        jax.jit(input_selection(p)) if attention is None else jax.jit(lambda v, c: input_selection(p)(v, c, attention))
    )
    return p, run(visual, count)


@pytest.mark.parametrize(
    "name", [n if n in ("vidcom2", "divprune") else pytest.param(n, marks=pytest.mark.slow) for n in DROPS]
)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_an_example_keeps_the_same_alone_in_a_batch_and_in_a_longer_bucket(name, dtype):
    visual, count = videos(dtype=dtype)
    p, both = selection(name, 0.4, visual, count)
    short, alone = selection(name, 0.4, visual[1:, :5], count[1:])
    n = p.keep(0, 5 * 16)
    assert n == short.keep(0, 5 * 16)
    assert kept(both.score[1, :80], n) == kept(alone.score[0], n)
    assert both.score.dtype == jnp.float32 and np.isfinite(both.score[:, :80]).all()


@pytest.mark.parametrize("name", ["vidcom2", *(pytest.param(n, marks=pytest.mark.slow) for n in DROPS[1:])])
def test_one_frame_equal_frames_and_zeros(name):
    """All ties: the earliest win, and nothing is NaN."""
    one = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 16, 6)), jnp.float32)
    frames = 1.0 if name == "dycoke" else 0.5
    assert np.isfinite(selection(name, frames, one, jnp.array([1]))[1].score).all()
    same = jnp.broadcast_to(one, (1, 8, 16, 6))
    p, chosen = selection(name, 0.4, same, jnp.array([8]))
    assert np.isfinite(chosen.score).all()
    again = selection(name, 0.4, same * 1.0, jnp.array([8]))[1]
    assert kept(chosen.score[0], p.keep(0, 128)) == kept(again.score[0], p.keep(0, 128))
    assert set(kept(chosen.score[0], p.keep(0, 128))) & set(range(16))
    assert np.isfinite(selection(name, 0.4, 0 * same, jnp.array([8]))[1].score).all()


def test_the_towers_attention_is_refused_where_there_is_none():
    from helpers.plans import model

    from hybridvlm.config import VisionConfig

    stem = VisionConfig(kind="stem", image_size=(16, 16), patch_size=8, width=4, downsample=1, max_frames=4)
    with pytest.raises(BudgetError, match=r"visionzip ranks by the attention .* it takes .*vidcom2"):
        plan("visionzip", 0.5, config=model(vision=stem), frames=4, m=4)
