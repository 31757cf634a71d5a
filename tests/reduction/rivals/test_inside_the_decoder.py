"""Rivals that drop inside the decoder: examples worked out by hand, sites, and what a pattern makes impossible."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import model, plan
from helpers.prompts import prompts

from hybridvlm.config import Reduction
from hybridvlm.config_files import load_model_config
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.reduction import BudgetError, get_method, make_plan, parse_method, score_fn
from hybridvlm.reduction.rivals.dart import dart_score
from hybridvlm.reduction.rivals.sparsevlm import RATER, prepare, raters

NANO_9B = "".join("*" if i in (14, 21, 30, 39) else "-" if i % 2 else "M" for i in range(56))


def test_sites_are_the_attention_layers_nearest_to_the_released_depths():
    config = load_model_config("nemotron_nano_12b_v2_vl")
    assert [i for i, kind in enumerate(config.pattern) if kind == "*"] == [7, 16, 25, 34, 43, 52]
    for depth, twelve, nine in (
        (0.07, 7, 14),
        (0.25, 16, 14),
        (0.31, 16, 14),
        (0.5, 34, 30),
        (0.64, 43, 39),
        (0.75, 43, 39),
    ):
        sites = get_method(f"oneshot@{depth}").sites
        assert sites(config.pattern, None) == (twelve,)
        if depth != 0.31:
            assert sites(NANO_9B, None) == (nine,)
    assert get_method("sparsevlm").sites(config.pattern, None) == (7, 16, 25)
    assert get_method("sparsevlm").sites(NANO_9B, None) == (14, 30)
    assert get_method("dart").sites(config.pattern, None) == (7,)


@pytest.mark.parametrize("name", ["fastv", "dart", "oneshot"])
def test_a_mean_share_below_the_first_attention_layer_is_refused_with_what_can_be_met(name):
    config = model(NANO_9B)
    with pytest.raises(BudgetError, match=rf"{name} can meet mean budgets from 0.268\d* to 1 .*first after layer 14"):
        plan(name, 0.25, config=config)
    assert plan(name, 0.35, config=config).retention_mean == pytest.approx(0.35, abs=1e-3)


def test_depths_are_read_and_refused():
    assert parse_method("vidcom2:0.5+oneshot@0.7:0.5") == (("vidcom2", 0.5), ("oneshot@0.7", 0.5))
    with pytest.raises(ValueError, match=r"from 0 to 1, got '1\.5'"):
        get_method("oneshot@1.5")
    with pytest.raises(ValueError, match=r"str has no depth to choose; those with one are oneshot"):
        get_method("str@0.5")


def row(visual, text):
    """Tokens of one prompt, all of it visible to its question."""
    tokens = prompts([[(0, len(visual), len(text))]], len(visual) + len(text))
    return tokens.replace(x=jnp.asarray([*visual, *text], jnp.float32)[None])


def test_sparsevlm_rates_by_the_words_that_the_picture_is_about():
    tokens = row([(1, 0), (0, 1), (1, 1)], [(2, 0), (0, 0), (0, 1)])
    rates = jax.jit(lambda t: prepare(t, SHORT, 1))(tokens)[RATER][0]
    assert rates.tolist() == [False] * 3 + [True, False, False]
    x, visual = tokens.x[0], tokens.visual[0]
    spread = jax.nn.softmax(x[:3] @ x[3:].T, axis=-1).mean(0)
    np.testing.assert_allclose(spread, [0.5547, 0.1362, 0.3091], atol=1e-4)
    assert raters(x * 0, visual, ~visual, 4).any() == False  # noqa: E712


def test_sparsevlm_looks_at_no_products_of_visual_tokens_with_each_other():
    """At the 131,072 tokens of 512 frames they alone would take 64 GiB."""
    shapes = jax.ShapeDtypeStruct((1 << 17, 8), jnp.float32), *[jax.ShapeDtypeStruct((1 << 17,), bool)] * 2
    memory = jax.jit(raters, static_argnums=3).lower(*shapes, 64).compile().memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < 1 << 29


def test_sparsevlm_scores_by_the_raters_rows():
    weights = np.array([[0.5, 0.1, 0.4], [0.3, 0.3, 0.3], [0.2, 0.6, 0.2]])
    tokens = row(np.zeros((3, 2)), np.zeros((3, 2)))
    rates = jnp.array([[False] * 3 + [True, False, False]])
    tokens = tokens.replace(extra={RATER: rates})
    # one head whose logits are the weights' logarithms: keys are unit vectors, text has the rest
    q = np.zeros((1, 3, 1, 8))
    q[0, :, 0, :3] = np.log(weights) * np.sqrt(8)
    q[0, :, 0, 3] = np.log(np.maximum(1 - weights.sum(1), 1e-9)) * np.sqrt(8)
    k = np.zeros((1, 6, 1, 8))
    k[0, :4, 0, :4] = np.eye(4)
    k[0, 4:, 0, 4] = 1.0
    q[0, :, 0, 4] = -1e4
    aux = AttentionAux(
        *(jnp.asarray(a) for a in (np.float32(q), [[True] * 3], [[1] * 3])),
        jnp.array([[3, 4, 5]]),
        jnp.asarray(np.float32(k)),
    )
    score = jax.jit(lambda a, t: get_method("sparsevlm").function(0, a, t, None, 1))(aux, tokens)[0]
    np.testing.assert_allclose(score[:3], weights[0], atol=1e-4)


SHORT = types.SimpleNamespace(text_tokens=4)
DART = dict(
    x=jnp.asarray([(1, 0), (0.8, 0.6), (0, 1), (-0.6, 0.8), (-1, 0), (0.6, -0.8), (1, 1), (0, -1)], jnp.float32),
    norms=jnp.asarray([1.0, 2, 5, 1, 3, 2, 4, 1]),
    visual=jnp.arange(8) < 6,
    query=jnp.arange(8) >= 6,
)


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, [2]), (2, [2, 5]), (3, [2, 4, 5]), (5, [0, 2, 3, 4, 5]), (6, range(6))]
)
def test_dart(keep, expected):
    """One visual pivot and one of the question; t = 1 and 2 tokens each, and what an uneven rest does."""
    score = jax.jit(lambda n: dart_score(**DART, keep=n, pivots=(1, 1)))(keep)
    kept = sorted(np.argsort(-np.asarray(score[:6]), kind="stable")[:keep].tolist())
    if keep == 2:  # nothing for the first pivot: the last one takes the rest
        assert 2 in kept and len(kept) == 2
    else:
        assert kept == list(expected)


def test_dart_of_packed_rows_and_in_a_longer_bucket():
    p = plan("dart", 0.5)
    layer = p.drops[0]
    packed, alone = prompts([[(1, 20, 5), (2, 18, 3)]], 60), prompts([[(2, 18, 3)]], 23)
    k = jnp.asarray(np.random.default_rng(1).normal(size=(1, 60, 2, 4)), jnp.float32)
    alone = alone.replace(x=packed.x[:, 26:49])
    aux = AttentionAux(*(jnp.zeros((1, 1, 2, 4)), jnp.zeros((1, 1), bool), *[jnp.zeros((1, 1), int)] * 2), k)
    both = jax.jit(lambda a, t: score_fn(p, segments=2)(layer, a, t))(aux, packed)[0, 26:49]
    own = dataclasses.replace(aux, k=k[:, 26:49])
    single = jax.jit(lambda a, t: score_fn(p)(layer, a, t))(own, alone)[0]
    assert (both == single).all() and (single > 0).sum() == p.keep_of_entering(layer + 1, 18)


def test_the_released_staircase_is_the_middle_of_the_curve():
    from hybridvlm.reduction.rivals.sparsevlm import released_staircase

    curve = released_staircase(None, 32)
    assert [round(576 * curve(0, n, 0.5)) for n in (1, 2, 3)] == [300, 200, 110]
    config = model("M*-M-M*-M-M-M*-M-M-M-M-M-")
    p = make_plan(Reduction("sparsevlm", 0.5), config, visual_tokens=1024, text_tokens=32, frames=64)
    assert len(p.drops) == 3 and p.retention_mean == pytest.approx(0.5, abs=1e-3)
