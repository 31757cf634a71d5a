"""The law of every method: a sample keeps the same tokens alone, in a batch, in a longer bucket and packed in a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.config import ModelConfig, Reduction, Schedule
from hybridvlm.nn import decoder
from hybridvlm.nn.decoder import Decoder
from hybridvlm.ops.segments import index_in_segment
from hybridvlm.ops.tokens import Tokens, text_tokens
from hybridvlm.reduction import METHODS, evs_mask, get_method, make_plan, score_fn

CONFIG = ModelConfig(
    pattern="M*-M*",
    width=16,
    vocab_size=20,
    mamba_heads=2,
    mamba_head_dim=8,
    ssm_groups=1,
    ssm_state=4,
    attention_heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=24,
    chunk_size=8,
)
INSIDE = [name for name, method in METHODS.items() if method.phase == "decoder"]
# (tokens of a video, of the question after it): one sample begins with its video, so that its first token may drop
SAMPLES = ((24, 4), (16, 3), (20, 5))
LENGTH = sum(map(sum, SAMPLES)) + 5


@pytest.fixture(scope="module")
def params():
    return jax.jit(Decoder(CONFIG).init)(
        jax.random.key(0), text_tokens(jnp.zeros((1, 3, 16)), jnp.ones((1, 3), jnp.int32))
    )["params"]


def row(samples, length):
    """Samples of SAMPLES, by number, packed in a row."""
    x, segment, visual, query = (
        np.zeros((length, *w), t) for w, t in (((16,), np.float32), ((), np.int32), ((), bool), ((), bool))
    )
    at = 0
    for number, sample in enumerate(samples, start=1):
        m, t = SAMPLES[sample]
        own = slice(at, at + m + t)
        x[own] = np.random.default_rng(sample).normal(size=(m + t, 16))
        segment[own], visual[at : at + m], query[at + m : at + m + t] = number, True, True
        at += m + t
    place = np.arange(length, dtype=np.int32)
    frame = np.where(visual, place // 4, -1).astype(np.int32)
    return [x, place, segment, visual, query, place, frame]


def rows(*groups, length=LENGTH):
    return Tokens(*(jnp.asarray(np.stack(field)) for field in zip(*(row(g, length) for g in groups), strict=True)))


def kept(params, plan, tokens, segments):
    """For every drop, row and segment: the places in their own sample of the visual tokens that stay, and the final states."""
    out = jax.jit(decoder.prefill, static_argnums=1, static_argnames=("plan", "score_fn", "segments", "caches"))(
        params, CONFIG, tokens, plan=plan, score_fn=score_fn(plan, segments=segments), segments=segments, caches=False
    )
    own, segment = np.asarray(index_in_segment(tokens.segment)), np.asarray(tokens.segment)
    found = []
    for index, visual in jax.device_get(out.survivors):
        for b in range(len(index)):
            at = index[b][visual[b]]
            found += [(b, s, own[b][at[segment[b][at] == s]].tolist()) for s in range(1, segments + 1)]
    last = jax.device_get(out.tokens)
    states = [
        last.x[b][(last.segment[b] == s) & ~last.visual[b]] for b in range(len(segment)) for s in range(1, segments + 1)
    ]
    return {(b, s): [places for row, seg, places in found if (row, seg) == (b, s)] for b, s, _ in found}, states


# a method takes 15 s to compile; what each scores is compared in the same ways in test_methods.py
QUICK = ("str",)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in INSIDE if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_alone_in_a_batch_in_a_longer_bucket_and_packed(params, name):
    weights = tuple(1.0 if kind in "M*" else 0.0 for kind in CONFIG.pattern)
    # two drops: every further one is another length of every layer after it to compile
    schedule = Schedule(stages=2, layer_weights=weights if name == "str-calibrated" else ())
    plan = make_plan(
        Reduction(name, 0.5, schedule=schedule), CONFIG, visual_tokens=60, text_tokens=LENGTH - 60, frames=15
    )
    assert plan.drops
    with jax.default_matmul_precision("highest"):
        packed, packed_states = kept(params, plan, rows((0, 1, 2)), 3)
        batch, batch_states = kept(params, plan, rows((0,), (1,), (2,)), 1)
        longer, _ = kept(params, plan, rows((0,), (1,), (2,), length=LENGTH + 9), 1)
    for sample in range(3):
        assert packed[0, sample + 1] == batch[sample, 1] == longer[sample, 1], name
        scale = np.abs(batch_states[sample]).max()
        np.testing.assert_allclose(packed_states[sample] / scale, batch_states[sample] / scale, atol=1e-5)
    assert any(len(places) < SAMPLES[0][0] for places in batch[0, 1])


def test_index_in_segment_counts_every_segment_from_zero():
    segment = jnp.asarray([[1, 1, 2, 2, 2, 0, 0], [3, 5, 5, 5, 5, 5, 0], [0, 0, 0, 0, 0, 0, 0]])
    own = np.asarray(index_in_segment(segment))
    assert own[0, :5].tolist() == [0, 1, 0, 1, 2] and own[1, :6].tolist() == [0, 0, 1, 2, 3, 4]


def still_film(changes, frames=6, cells=9, width=37):
    """Embeddings [T,3,3,width] of frames that repeat, but for the cells that change at a frame."""
    r = np.random.default_rng(4)
    film = np.repeat(r.normal(size=(1, cells, width)).astype(np.float32) * 3, frames, axis=0)
    for frame, cell in changes:
        film[frame:, cell] = r.normal(size=width)
    return film.reshape(frames, 3, 3, width)


@pytest.mark.parametrize("changes", [[], [(2, 4), (5, 0)], [(1, cell) for cell in range(9)]])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.77])
def test_evs_keeps_the_earlier_of_what_never_changed(changes, rate):
    mask = np.asarray(evs_mask(jnp.asarray(still_film(changes)), rate)).reshape(6, 9)
    count = max(9, int(54 * (1 - rate)))
    order = [(0, cell) for cell in range(9)]
    moved = [change for change in changes if change not in order]
    still = [(f, c) for f in range(1, 6) for c in range(9) if (f, c) not in moved]
    want = np.zeros((6, 9), bool)
    assert len(order) + len(moved) <= count or len(moved) == 9
    ranked = order + (moved if len(moved) < 9 or count >= 18 else [])
    for place in (ranked + still)[:count]:
        want[place] = True
    if len(ranked) > 9 or not moved:
        np.testing.assert_array_equal(mask, want)
    assert mask.sum() == count and mask[0].all()


def test_the_registry_is_covered():
    assert {"uniform", "random", "timeviper-td", "str"} <= set(INSIDE) and get_method("str").phase == "decoder"
