"""Scores against an oracle that writes the implicit attention matrix out, token by token."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.prompts import G, H, K, P, mamba_aux, prompts
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hybridvlm.config import ScoreOptions
from hybridvlm.ops.layer_aux import AttentionAux, MambaAux
from hybridvlm.reduction import attention_score, mamba_score, saliency_score
from hybridvlm.reduction.scores import random_score, spread_score

# Entries of a smaller relative spread are equal; up to NEAR, rounding in fp32 decides what their z-score is.
EQUAL, NEAR = 1e-7, 3e-3


def oracle(aux, tokens, options, spreads=None):
    """[B,L] float64: every entry of the implicit attention matrix, one by one, then the five steps in order.

    Args:
        spreads: list that takes, for every query row and group of a z-score, the spread as a share of the largest entry.
    """
    b, c, dt, decay = (np.asarray(a, np.float64) for a in (aux.b, aux.c, aux.dt, aux.log_decay))
    segment, visual, query = (np.asarray(a) for a in (tokens.segment, tokens.visual, tokens.query))
    mean_or_max = {"mean": np.mean, "max": np.max}
    out = np.zeros(segment.shape)
    for row in range(len(out)):
        for number in range(1, segment[row].max() + 1):
            keys = np.flatnonzero(visual[row] & (segment[row] == number))
            asks = np.flatnonzero(query[row] & (segment[row] == number))
            asks = asks[-1:] if options.queries == "last" else asks
            if not len(keys) or not len(asks):
                continue
            entry = np.zeros((len(asks), len(keys), G))
            for (i, t), (j, s) in itertools.product(enumerate(asks), enumerate(keys)):
                factor = np.exp(decay[row, s + 1 : t + 1].sum(0)) if options.decay else np.ones(H)
                factor = factor * dt[row, s] if options.dt else factor
                by_group = mean_or_max[options.heads](factor.reshape(G, H // G), axis=1)
                entry[i, j] = (c[row, t] * b[row, s]).sum(-1) * by_group
            if options.sign == "relu":
                entry = np.maximum(entry, 0)
            elif options.sign == "abs":
                entry = np.abs(entry)
            if options.norm == "l1":
                entry /= np.abs(entry).sum(1, keepdims=True) + 1e-300
            elif options.norm == "softmax":
                entry = np.exp(entry - entry.max(1, keepdims=True))
                entry /= entry.sum(1, keepdims=True)
            elif options.norm == "zscore":
                share = entry.std(1, keepdims=True) / np.maximum(np.abs(entry).max(1, keepdims=True), 1e-300)
                z = (entry - entry.mean(1, keepdims=True)) / np.sqrt(entry.var(1, keepdims=True) + 1e-12)
                entry = np.where(share > EQUAL, z, 0.0)
                if spreads is not None:
                    spreads += share.ravel().tolist()
            reduced = mean_or_max.get(options.queries, np.mean)(entry, axis=0)
            out[row, keys] = mean_or_max[options.groups](reduced, axis=-1)
    return out


ROWS = [[(2, 9, 3), (1, 5, 2)], [(0, 12, 4)], [(3, 4, 20)], [(2, 0, 3), (0, 6, 1), (1, 3, 0)]]


OPTIONS = [
    ScoreOptions(),
    ScoreOptions(queries="last", groups="max"),
    ScoreOptions(dt=True, heads="max"),
    ScoreOptions(dt=True, sign="relu", queries="max"),
    ScoreOptions(decay=True),
    ScoreOptions(decay=True, dt=True, heads="max", norm="zscore", queries="last"),
    ScoreOptions(sign="abs", norm="l1", groups="max"),
    ScoreOptions(norm="softmax", queries="max"),
    ScoreOptions(norm="zscore"),
]
scored = jax.jit(lambda aux, tokens, options: mamba_score(aux, tokens, options, segments=3), static_argnums=2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mamba_score_is_the_implicit_attention_matrix(options):
    tokens = prompts(ROWS, 29)
    aux = mamba_aux(tokens)
    expected = oracle(aux, tokens, options)
    score = scored(aux, tokens, options)
    np.testing.assert_allclose(score, expected, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(expected).max()))


@settings(max_examples=8, deadline=None)
@given(
    options=st.builds(
        ScoreOptions,
        decay=st.booleans(),
        dt=st.booleans(),
        sign=st.sampled_from(("raw", "relu", "abs")),
        norm=st.sampled_from(("none", "l1", "softmax", "zscore")),
        groups=st.sampled_from(("mean", "max")),
        heads=st.sampled_from(("mean", "max")),
        queries=st.sampled_from(("mean", "max", "last")),
    ),
    rows=st.lists(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=3), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_mamba_score_on_random_prompts(options, rows, seed):
    tokens = prompts(rows, 29)
    aux, spreads = mamba_aux(tokens, seed), []
    expected = oracle(aux, tokens, options, spreads)
    assume(not any(EQUAL < share < NEAR for share in spreads))
    score = scored(aux, tokens, options)
    np.testing.assert_allclose(score, expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_the_zscore_of_keys_that_score_alike_is_zero(scale, noise):
    """Where nothing but rounding tells keys apart, it does not decide which of them stay."""
    tokens = prompts([[(0, 17, 3)]], 20)
    aux = mamba_aux(tokens)
    factor = 1 + noise * jnp.asarray(np.random.default_rng(0).normal(size=aux.b.shape), jnp.float32)
    alike = dataclasses.replace(aux, b=scale * jnp.broadcast_to(aux.b[:, :1], aux.b.shape) * factor)
    options = ScoreOptions(norm="zscore")
    assert not np.asarray(scored(alike, tokens, options)).any()
    apart = dataclasses.replace(alike, b=alike.b * jnp.where(jnp.arange(20) < 9, 1.0, 1.001)[None, :, None, None])
    assert np.abs(np.asarray(scored(apart, tokens, options))[0, :17]).min() > 0.5
    slope = jax.grad(lambda b: (scored(dataclasses.replace(alike, b=b), tokens, options) ** 2).sum())(alike.b)
    assert np.isfinite(slope).all()


def test_the_linear_path_and_the_blocks_agree_and_the_linear_one_has_no_square():
    tokens = prompts([[(5, 300, 40)]], 400)
    aux = mamba_aux(tokens)
    linear = mamba_score(aux, tokens, ScoreOptions(dt=True))
    decayless = MambaAux(aux.b, aux.c, aux.dt, jnp.zeros_like(aux.log_decay))
    blocks = mamba_score(decayless, tokens, ScoreOptions(decay=True, dt=True), query_rows=64)
    np.testing.assert_allclose(linear, blocks, atol=1e-5)
    text = str(jax.make_jaxpr(lambda a, t: mamba_score(a, t))(aux, tokens))
    assert "400,400" not in text and "40,400" not in text and "scan" not in text


def test_a_long_decay_stays_exact_near_the_question():
    tokens = prompts([[(0, 4000, 2)]], 4002)
    aux = mamba_aux(tokens)
    options = ScoreOptions(decay=True)
    near = slice(3900, 4002)
    part = jax.tree.map(lambda a: a[:, near], (aux, tokens))
    score = mamba_score(aux, tokens, options, query_rows=8)[:, near]
    np.testing.assert_allclose(score, oracle(*part, options), rtol=1e-4, atol=1e-6)


def test_mamba_score_has_gradients():
    tokens = prompts(ROWS, 29)
    aux = mamba_aux(tokens)
    for options in (ScoreOptions(), ScoreOptions(decay=True, dt=True, norm="softmax", queries="max")):
        grads = jax.jit(jax.grad(lambda a, o=options: (mamba_score(a, tokens, o, segments=3) ** 2).sum()))(aux)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads)) and np.abs(grads.b).max() > 0


@pytest.mark.parametrize("heads", ["mean", "max"])
@pytest.mark.parametrize("queries", ["mean", "max", "last"])
def test_attention_score_is_the_softmax_weight(heads, queries):
    tokens = prompts(ROWS, 29)
    r = np.random.default_rng(1)
    q, k = r.normal(size=(4, 29, H, P)).astype(np.float32), r.normal(size=(4, 29, K, P)).astype(np.float32)
    segment, visual, query = (np.asarray(a) for a in (tokens.segment, tokens.visual, tokens.query))
    capacity = 20
    place = np.argsort(~query, axis=1, kind="stable")[:, :capacity]
    mask = np.take_along_axis(query, place, 1)
    aux = AttentionAux(
        q=jnp.asarray(np.take_along_axis(q, place[..., None, None], 1)),
        q_mask=jnp.asarray(mask),
        q_segment=jnp.asarray(np.where(mask, np.take_along_axis(segment, place, 1), 0)),
        q_index=jnp.asarray(place.astype(np.int32)),
        k=jnp.asarray(k),
    )
    expected = np.zeros(segment.shape)
    for row in range(4):
        for number in range(1, segment[row].max() + 1):
            asks = np.flatnonzero(query[row] & (segment[row] == number))
            asks = asks[-1:] if queries == "last" else asks
            weight = np.zeros((len(asks), H, 29))
            for (i, t), h in itertools.product(enumerate(asks), range(H)):
                seen = np.flatnonzero((segment[row] == number) & (np.arange(29) <= t))
                logits = k[row, seen, h // (H // K)].astype(np.float64) @ q[row, t, h] / np.sqrt(P)
                weight[i, h, seen] = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            if len(asks):
                by_row = weight.max(1) if heads == "max" else weight.mean(1)
                score = by_row.max(0) if queries == "max" else by_row.mean(0)
                mine = visual[row] & (segment[row] == number)
                expected[row, mine] = score[mine]
    score = attention_score(aux, tokens, ScoreOptions(heads=heads, queries=queries))
    np.testing.assert_allclose(score, expected, atol=1e-5)


def test_saliency_is_the_distance_from_the_mean_of_the_segment():
    tokens = prompts(ROWS, 29)
    score = np.asarray(saliency_score(tokens, 3))
    x, segment, visual = (np.asarray(a) for a in (tokens.x, tokens.segment, tokens.visual))
    for row, number in ((0, 1), (0, 2), (3, 2)):
        mine = visual[row] & (segment[row] == number)
        far = np.linalg.norm(x[row, mine] - x[row, mine].mean(0), axis=-1)
        np.testing.assert_allclose(score[row, mine], far, rtol=1e-5)
    assert (score[~visual] == 0).all()


def test_spread_scores_leave_no_hole_and_favour_no_column():
    index = jnp.arange(1024)
    for kept in (64, 128, 256, 512):
        chosen = np.sort(np.argsort(-np.asarray(spread_score(index)), kind="stable")[:kept])
        assert np.diff(chosen).max() <= 3 * 1024 / kept
        columns = np.bincount(chosen % 4, minlength=4)
        assert columns.min() >= 0.8 * kept / 4


def test_random_scores_depend_on_seed_layer_and_index_alone():
    index = jnp.arange(4096)
    score = np.asarray(random_score(index, 3, 5))
    assert (np.asarray(random_score(index[100:200], 3, 5)) == score[100:200]).all()
    assert abs(score.mean() - 0.5) < 0.02 and abs(score.std() - 12**-0.5) < 0.01
    for other in (random_score(index, 4, 5), random_score(index, 3, 6), random_score(index + 1, 3, 5)):
        assert abs(np.corrcoef(score, np.asarray(other))[0, 1]) < 0.06
    assert abs(np.corrcoef(score[:-1], score[1:])[0, 1]) < 0.06
