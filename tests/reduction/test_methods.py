"""The registry: every method chooses what it says it does, whatever stands next to an example in its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import model, plan
from helpers.prompts import mamba_aux, prompts

from hybridvlm.config import Reduction, ScoreOptions
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux
from hybridvlm.reduction import (
    METHODS,
    average_pool,
    builtin,
    describe_methods,
    evs_keep_count,
    evs_mask,
    evs_score,
    get_method,
    input_selection,
    make_plan,
    mamba_score,
    merge_fn,
    parse_method,
    score_fn,
)

INSIDE = [
    *("str", "str-attention", "str-mamba", "str-lookahead", "random", "uniform", "saliency"),
    *("fastv", "pyramiddrop", "timeviper-td", "oneshot-mamba", "oneshot-attention"),
]
EXPECTED = ["none", *INSIDE[:3], "str-calibrated", *INSIDE[3:], "random-input", "uniform-input", "evs", "avgpool"]


def attention_aux(tokens, seed=0, heads=4, kv=2, width=8):
    r = np.random.default_rng(seed)
    b, length = tokens.segment.shape
    place = jnp.argsort(~tokens.query, axis=1, stable=True)[:, :6]
    mask = jnp.take_along_axis(tokens.query, place, axis=1)
    segment = jnp.where(mask, jnp.take_along_axis(tokens.segment, place, axis=1), 0)
    q, k = r.normal(size=(b, 6, heads, width)), r.normal(size=(b, length, kv, width))
    return AttentionAux(jnp.asarray(q, jnp.float32), mask, segment, place, jnp.asarray(k, jnp.float32))


def test_the_registry_holds_every_method_with_a_line_about_it():
    # analyses register controls of their own
    own = [name for name, method in METHODS.items() if method.function.__module__ == builtin.__name__]
    assert own == EXPECTED
    lines = describe_methods().splitlines()
    assert len(lines) == len(METHODS) and all(len(line) <= 120 for line in lines)
    assert all(len(METHODS[name].summary) > 20 for name in EXPECTED)
    with pytest.raises(ValueError, match=r"unknown reduction method 'fastvv'; did you mean 'fastv'\?"):
        get_method("fastvv")


def test_parse_method():
    assert parse_method("str") == (("str", None),)
    assert parse_method("evs:0.5 + str:0.25") == (("evs", 0.5), ("str", 0.25))


@pytest.mark.parametrize("name", INSIDE)
def test_every_decoder_method_scores_visual_tokens_after_its_layers(name):
    p = plan(name, 0.5)
    tokens = prompts([[(2, 12, 4)], [(0, 8, 3)]], 20)
    score = score_fn(p)
    for layer in {p.pattern[i]: i for i in p.drops}.values():
        aux = attention_aux(tokens) if p.pattern[layer] == "*" else mamba_aux(tokens)
        if ahead := score.ahead(layer):
            aux = LookaheadAux(aux, tuple(attention_aux(tokens, other) for other in ahead))
        out = score(layer, aux, tokens)
        assert out.shape == (2, 20) and out.dtype == jnp.float32
        for values, visual in zip(np.asarray(out), np.asarray(tokens.visual), strict=True):
            assert np.isfinite(values).all() and len(np.unique(values[visual])) == visual.sum()


@pytest.mark.parametrize("name", ["random", "uniform", "saliency", "str"])
def test_an_example_is_scored_alike_alone_in_a_batch_and_in_a_longer_bucket(name):
    p = plan(name, 0.5)
    tokens, alone = prompts([[(1, 5, 2)], [(2, 12, 4)]], 24), prompts([[(2, 12, 4)]], 18)
    alone = alone.replace(x=tokens.x[1:, :18])
    batched, single = mamba_aux(tokens), mamba_aux(alone)
    single = jax.tree.map(lambda a, s: a[1:, : s.shape[1]], batched, single)
    score = score_fn(p)
    a, b = score(0, batched, tokens)[1:, :18], score(0, single, alone)
    visual = np.asarray(alone.visual)
    np.testing.assert_allclose(np.asarray(a)[visual], np.asarray(b)[visual], rtol=1e-5)


def test_score_options_of_the_reduction_are_used():
    config, tokens = model(), prompts([[(2, 12, 4)]], 20)
    aux = mamba_aux(tokens)
    options = ScoreOptions(dt=True, sign="abs", queries="max")
    reduction = Reduction("str", 0.5, score=options)
    p = make_plan(reduction, config, visual_tokens=1024, text_tokens=8, frames=64)
    np.testing.assert_array_equal(score_fn(p)(0, aux, tokens), mamba_score(aux, tokens, options))
    assert not np.allclose(score_fn(p)(0, aux, tokens), score_fn(plan("str", 0.5))(0, aux, tokens))


def test_packed_examples_are_scored_by_their_own_question():
    p = plan("str", 0.5)
    tokens = prompts([[(1, 6, 2), (1, 6, 2)]], 20)
    aux = mamba_aux(tokens)
    base = np.asarray(score_fn(p, segments=2)(0, aux, tokens))
    moved = score_fn(p, segments=2)(0, type(aux)(aux.b, aux.c.at[:, 16:18].multiply(-1), aux.dt, aux.log_decay), tokens)
    np.testing.assert_allclose(moved[0, 1:7], base[0, 1:7])
    np.testing.assert_allclose(moved[0, 10:16], -base[0, 10:16], rtol=1e-5)


def test_where_the_rivals_drop():
    pattern = plan().pattern
    attention = tuple(i for i, kind in enumerate(pattern) if kind == "*")
    assert plan("fastv", 0.5).drops == (6,) and plan("oneshot-attention", 0.5).drops == (1,)
    assert plan("fastv", 0.5, config=model("*-*-M-*-")).drops == (2,)
    assert plan("oneshot-mamba", 0.5).drops == (0,)
    pyramid = plan("pyramiddrop", 0.5, m=256)
    assert pyramid.drops == attention
    shares = [4096, *(pyramid.relative[site + 1] for site in attention)]
    ratios = np.divide(shares[1:], shares[:-1])
    assert np.ptp(ratios) < 0.005 and ratios[0] < 1
    viper = plan("timeviper-td", 0.6, m=256)
    assert viper.drops == (3, 6, 13)
    steps = np.diff([4096, *(viper.relative[site + 1] for site in viper.drops)])
    assert np.ptp(steps) <= 2 and steps[0] < 0


def test_timeviper_drops_evenly_first_and_by_attention_then():
    p = plan("timeviper-td", 0.6)
    tokens = prompts([[(2, 12, 4)]], 20)
    score = score_fn(p)
    even = score_fn(plan("uniform", 0.6))(3, mamba_aux(tokens), tokens)
    np.testing.assert_array_equal(score(3, mamba_aux(tokens), tokens), even)
    a, b = score(6, attention_aux(tokens, 0), tokens), score(6, attention_aux(tokens, 1), tokens)
    assert not np.allclose(a, b)


def test_input_scores_do_not_know_the_bucket():
    visual = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16, 4)), jnp.float32)
    count = jnp.array([8, 5])
    for name in ("random-input", "uniform-input", "evs"):
        select = input_selection(plan(name, 0.5))
        long, short = select(visual, count).score, select(visual[1:, :5], count[1:]).score
        assert long.shape == (2, 128) and long.dtype == jnp.float32
        np.testing.assert_allclose(long[1:, :80], short, atol=1e-6)
    with pytest.raises(ValueError, match="drops nothing before layer 0"):
        input_selection(plan("str", 0.5))
    with pytest.raises(ValueError, match="merges nothing"):
        merge_fn(plan("evs", 0.5))


def test_evs_masks_match_the_reference(golden):
    _, io = golden("pixel_shuffle_evs")
    frames, rows, cols = io["evs_thw"]
    embeddings = jnp.asarray(io["evs_embeds"]).reshape(frames, rows, cols, -1)
    assert len(io["evs_rates"]) == 7
    for rate, expected in zip(io["evs_rates"], io["evs_masks"], strict=True):
        mask = evs_mask(embeddings, float(rate))
        assert mask.sum() == evs_keep_count(int(frames), int(rows * cols), float(rate))
        np.testing.assert_array_equal(mask, expected)
    with pytest.raises(ValueError, match="rate_pruned"):
        evs_mask(embeddings, 1.0)


def test_evs_keeps_what_changed():
    frames = np.ones((6, 2, 2, 8), np.float32)
    frames[3:, 1, 0] = np.arange(8)
    mask = np.asarray(evs_mask(jnp.asarray(frames), 1 - 5 / 24)).reshape(6, 2, 2)
    assert mask[0].all() and mask[3, 1, 0] and mask.sum() == 5
    assert evs_keep_count(3, 256, 0.7) == 256 and evs_keep_count(10, 16, 0.7) == 48 and evs_keep_count(0, 16, 0.7) == 0


def test_evs_scores_of_zeros_and_of_still_frames():
    """1 - cosine as torch has it: 1 for zeros, whatever they follow; 0 for what stayed as it was, and not rounding noise."""
    rng = np.random.default_rng(0)
    cell = rng.normal(size=(1, 4, 300)).astype(np.float32)
    tokens = np.concatenate([cell, cell, 0 * cell, 0 * cell, cell, -cell, 1e-9 * cell, 1e-9 * cell])
    scores = np.asarray(evs_score(jnp.asarray(tokens)[None])).reshape(8, 4)
    assert (scores[0] == 255).all() and (scores[1] == 0).all() and (scores[2:5] == 1).all()
    np.testing.assert_allclose(scores[5], 2, atol=1e-6)
    torch = pytest.importorskip("torch", reason="needs the [parity] extra")
    now, before = torch.tensor(tokens[1:]), torch.tensor(tokens[:-1])
    theirs = 1 - torch.nn.functional.cosine_similarity(now, before, dim=-1).numpy()
    np.testing.assert_allclose(scores[1:], theirs, atol=1e-6)


def test_average_pool_against_a_loop():
    visual = np.random.default_rng(0).normal(size=(2, 7, 12, 3)).astype(np.float32)
    count = np.array([7, 4])
    pooled, blocks = average_pool(jnp.asarray(visual), jnp.asarray(count), (2, 2, 3), (4, 3))
    assert pooled.shape == (2, 4, 2, 3) and blocks.tolist() == [4, 2]
    for row in range(2):
        for f in range(blocks[row]):
            part = visual[row, 2 * f : min(2 * f + 2, count[row])].reshape(-1, 2, 2, 1, 3, 3)
            np.testing.assert_allclose(pooled[row, f], part.mean((0, 2, 4)).reshape(2, 3), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="do not tile"):
        average_pool(jnp.asarray(visual), jnp.asarray(count), (1, 3, 1), (4, 3))
    p = plan("avgpool", 0.25)
    merged, _ = merge_fn(p)(jnp.ones((1, 64, 16, 4)), jnp.array([64]))
    assert merged.shape[1] * merged.shape[2] == p.decoder_tokens
