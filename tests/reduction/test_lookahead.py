"""The score by attention layers to come, against a reference that writes their softmax out row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.plans import model, plan

import hybridvlm as hv
from hybridvlm.config import ModelConfig, Reduction, Schedule, ScoreOptions
from hybridvlm.models import vamba
from hybridvlm.nn import decoder
from hybridvlm.nn.decoder import Decoder
from hybridvlm.nn.scan import layer_params
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux, MambaAux
from hybridvlm.ops.rope import apply_rope
from hybridvlm.ops.tokens import Tokens, text_tokens
from hybridvlm.reduction import METHODS, attention_score, make_plan, mamba_score, score_fn
from hybridvlm.reduction.methods import attention_ahead
from hybridvlm.train.straight_through import straight_through

# a scan of two M-, then Mamba layers with two attention layers ahead, one, and none
CONFIG = ModelConfig(
    pattern="M-M-M*M*M",
    width=16,
    vocab_size=20,
    mamba_heads=2,
    mamba_head_dim=8,
    ssm_groups=1,
    ssm_state=4,
    attention_heads=4,
    kv_heads=2,
    head_dim=6,
    mlp_width=24,
    chunk_size=8,
)
# M-RoPE, norms of queries and keys, biases, as in Qwen
TURNED = dataclasses.replace(
    CONFIG, pattern="*-*-*", head_dim=8, rope_theta=1e4, rope_sections=(2, 1, 1), qk_norm=True, attention_bias=True
)
TEXT = 4


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


def parameters(config):
    """Random, those too that start as ones or zeros: moved away, or a test could not see them."""
    tokens = text_tokens(jnp.zeros((1, 3, config.width)), jnp.ones((1, 3), jnp.int32))
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0.2, 0.4, s.shape), jnp.float32), shapes)


def packed(config):
    """Two samples in a row and padding; a row of one sample that leaves more of it."""
    rng, length = np.random.default_rng(1), 26
    segment, visual, query = (np.zeros((2, length), t) for t in (np.int32, bool, bool))
    for row, samples in enumerate([[(2, 6, 4), (1, 5, 3)], [(0, 9, 2)]]):
        at = 0
        for number, (before, seen, after) in enumerate(samples, start=1):
            segment[row, at : at + before + seen + after] = number
            visual[row, at + before : at + before + seen] = True
            query[row, at + before + seen : at + before + seen + after] = True
            at += before + seen + after
    index = np.tile(np.arange(length, dtype=np.int32), (2, 1))
    position = rng.integers(0, 30, (2, length, 3)).astype(np.int32) if config.rope_theta else index
    x = rng.normal(size=(2, length, config.width)).astype(np.float32) * (segment > 0)[..., None]
    fields = (x, position, segment, visual, query, index, np.where(visual, 0, -1).astype(np.int32))
    return Tokens(*map(jnp.asarray, fields))


def reduced(config, **score):
    """A plan that keeps everything, and what it ranks by."""
    reduction = Reduction("str-lookahead", 1.0, score=ScoreOptions(**score))
    return score_fn(make_plan(reduction, config, visual_tokens=11, text_tokens=12, frames=1), segments=2)


OPTIONS = ({}, {"ahead": 2, "heads": "max", "queries": "last"}, {"ahead": 0, "queries": "max"})


@pytest.fixture(scope="module", params=[CONFIG, TURNED], ids=["no rope", "m-rope"])
def passed(request):
    """A pass that collects scores for several options, and the layers' own ones last."""
    config = request.param
    scored = (4, 5, 6, 8) if "M" in config.pattern else (0, 4)
    fns = [reduced(config, **option) for option in OPTIONS]

    def every(layer, aux, tokens):
        own = getattr(aux, "own", aux)
        assert isinstance(own, MambaAux if config.pattern[layer] == "M" else AttentionAux)
        score = mamba_score(own, tokens, segments=2) if config.pattern[layer] == "M" else attention_score(own, tokens)
        counts = [len(fn.ahead(layer)) for fn in fns]
        told = [LookaheadAux(own, aux.ahead[:count]) if count else own for count in counts]
        return [fn(layer, one, tokens) for fn, one in zip(fns, told, strict=True)] + [score]

    every.ahead = fns[-1].ahead
    params, tokens = parameters(config), packed(config)
    options = {"score_fn": every, "collect": scored, "hidden_states": scored, "segments": 2, "query_capacity": 8}
    return config, params, tokens, jax.jit(lambda p, t: decoder.prefill(p, config, t, **options))(params, tokens)


def queries_and_keys(p, c, x, position):
    """Of all tokens, in float64 but for the rotation: q [B,L,H,P] and k [B,L,K,P]."""
    p, x = {name: np.asarray(a, np.float64) for name, a in p.items()}, np.asarray(x, np.float64)
    normed = lambda a, weight: a / np.sqrt(np.mean(a * a, -1, keepdims=True) + c.norm_eps) * weight  # noqa: E731
    found = []
    for name in "qk":
        a = (normed(x, p["norm"]) @ p[f"{name}_proj"] + p.get(f"{name}_bias", 0)).reshape(*x.shape[:2], -1, c.head_dim)
        if c.qk_norm:
            a = normed(a, p[f"{name}_norm"])
        if c.rope_theta:
            a = apply_rope(jnp.asarray(a, jnp.float32), position, c.rope_theta, sections=c.rope_sections)
        found.append(a)
    return found


def one_score(q, k, row, tokens, options):
    """One row's scores in float64, from what the layer says of all its tokens: q [L,H,P], k [L,K,P]."""
    q, k = np.asarray(q[row], np.float64), np.asarray(k[row], np.float64)
    segment, visual, query = (np.asarray(a[row]) for a in (tokens.segment, tokens.visual, tokens.query))
    score, (length, heads, width) = np.zeros(len(segment)), q.shape
    for number in range(1, segment.max() + 1):
        asks = np.flatnonzero(query & (segment == number))
        asks = asks[-1:] if options.get("queries") == "last" else asks
        weight = np.zeros((len(asks), heads, length))
        for i, t in enumerate(asks):
            seen = np.flatnonzero((segment == number) & (np.arange(length) <= t))
            for h in range(heads):
                e = np.exp(k[seen, h // (heads // k.shape[1])] @ q[t, h] / np.sqrt(width))
                weight[i, h, seen] = e / e.sum()
        by_row = weight.max(1) if options.get("heads") == "max" else weight.mean(1)
        reduced = by_row.max(0) if options.get("queries") == "max" else by_row.mean(0)
        mine = visual & (segment == number)
        score[mine] = reduced[mine]
    return score


def test_it_is_the_softmax_of_the_layers_to_come_over_the_tokens_as_they_are(passed):
    config, params, tokens, out = passed
    looked = 0
    for layer, x in out.hidden_states.items():
        for number, option in enumerate(OPTIONS):
            coming = attention_ahead(config.pattern, layer, option.get("ahead", 1))
            want = np.zeros(tokens.segment.shape)
            for other in coming:
                q, k = queries_and_keys(layer_params(params, config, other), config, x, tokens.position)
                want += np.stack([one_score(q, k, row, tokens, option) for row in range(2)]) / len(coming)
            if coming:
                np.testing.assert_allclose(out.scores[layer][number], want, atol=1e-5, err_msg=f"{layer} {option}")
            looked += len(coming)
    # Mamba layers 4 and 6 have two and one attention layers ahead; attention layer 0 of three has two
    assert looked == {"M-M-M*M*M": (1 + 2 + 2) + 3, "*-*-*": 1 + 2 + 2}[config.pattern]


def test_an_attention_layer_of_a_hybrid_and_layers_after_the_last_one_have_their_own_score(passed):
    config, _, _, out = passed
    own = [layer for layer in out.hidden_states if not attention_ahead(config.pattern, layer, 1)]
    assert own == ([5, 8] if "M" in config.pattern else [4])
    for layer in own:
        first, *_, score = out.scores[layer]
        np.testing.assert_array_equal(first, score)


def test_what_is_ahead():
    assert attention_ahead("M-M*-M*", 0, 1) == (3,) and attention_ahead("M-M*-M*", 0, 0) == (3, 6)
    assert attention_ahead("M-M*-M*", 3, 1) == () and attention_ahead("M-M*-M*M", 7, 2) == ()
    assert attention_ahead("*-*-*-", 0, 1) == (2,) and attention_ahead("*-*-*-", 4, 1) == ()
    with pytest.raises(ValueError, match=r"ahead must be at least 0 .*, got -1"):
        ScoreOptions(ahead=-1)


def test_its_operations_are_keys_queries_and_two_products():
    config = model()
    near, far = (
        plan("str-lookahead", text=8),
        make_plan(
            Reduction("str-lookahead", 0.25, schedule=Schedule(stages=0), score=ScoreOptions(ahead=2)),
            config,
            visual_tokens=1024,
            text_tokens=8,
            frames=64,
        ),
    )
    assert near.relative == far.relative == plan("str", text=8).relative and near.depends_on_query
    one = two = 0
    for layer in near.drops:
        length = near.row_length(layer)
        count = config.pattern[layer + 1 :].count("*")
        if config.pattern[layer] == "M" and count:
            look = length * 2 * 64 * 32 + 8 * 2 * 64 * 64 + 2 * (length * 8 * 2 * 64)
            one, two = one + look, two + look * min(count, 2)
        else:
            own = 4 * length * 2 * 16 if config.pattern[layer] == "M" else 2 * length * 8 * 64
            one, two = one + own, two + own
    assert (near.cost.scoring, far.cost.scoring) == (one, two) and two > one


def test_a_layer_that_is_not_ahead_is_refused():
    tokens = packed(CONFIG)

    def score(layer, aux, tokens):
        return tokens.index.astype(jnp.float32)

    score.ahead = lambda layer: (2,)
    with pytest.raises(ValueError, match=r"ahead\(4\): expected attention layers of M-M-M\*M\*M, got \(2,\)"):
        jax.eval_shape(lambda p: decoder.prefill(p, CONFIG, tokens, score_fn=score, collect=(4,)), parameters(CONFIG))


def test_a_method_of_ones_own_may_read_what_is_ahead():
    found = {}
    try:

        @hv.register_method("both", reads="next attention")
        def both(layer, aux, tokens, plan, segments):
            """c.b and what comes"""
            found[layer] = (
                type(aux).__name__,
                type(getattr(aux, "own", None)).__name__,
                len(getattr(aux, "ahead", ())),
            )
            return tokens.index.astype(jnp.float32)

        p = make_plan(
            Reduction("both", 0.6, score=ScoreOptions(ahead=2)), CONFIG, visual_tokens=11, text_tokens=15, frames=1
        )
        assert p.cost.scoring > 0 and p.depends_on_query
        jax.eval_shape(
            lambda x: decoder.prefill(x, CONFIG, packed(CONFIG), score_fn=score_fn(p), collect=(0, 5, 6, 8)),
            parameters(CONFIG),
        )
    finally:
        METHODS.pop("both", None)
    look, nothing = "LookaheadAux", ("NoneType", 0)
    assert found[0] == (look, "MambaAux", 2) and found[6] == (look, "MambaAux", 1)
    assert found[5] == ("AttentionAux", *nothing) and found[8] == ("MambaAux", *nothing)


def test_a_model_of_two_streams_refuses_it():
    assert "str-lookahead" not in vamba.METHODS and "str-attention" in vamba.METHODS


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "layer"])
def test_straight_through_teaches_the_projections_that_looked(remat):
    """The next attention layer learns from what it made the drop keep; without the estimator the score has no gradient."""
    config = dataclasses.replace(CONFIG, pattern="M-M*")
    tokens, params = packed(config), parameters(config)
    schedule = Schedule("list", values=(1, 1, 1, 0.5))
    p = make_plan(
        Reduction("str-lookahead", 1.0, schedule=schedule), config, visual_tokens=11, text_tokens=15, frames=1
    )
    assert p.drops == (2,)

    def loss(params, through):
        out = decoder.prefill(
            params, config, tokens, plan=p, score_fn=score_fn(p, segments=2), segments=2, query_capacity=8,
            caches=False, remat=remat, straight_through=straight_through(0.5) if through else None,
        )  # fmt: skip
        return jnp.sum(jnp.square(out.tokens.x * (out.tokens.segment > 0)[..., None]))

    # the layer's own pass depends on its projections too: what the estimator adds is the difference
    plain, taught = (jax.jit(jax.grad(lambda x, t=t: loss(x, t)))(params)["attention"] for t in (False, True))
    added = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), taught, plain)
    assert added["q_proj"] > 1e-4 and added["k_proj"] > 1e-4 and added["norm"] > 1e-4
    assert added["v_proj"] < 1e-4 * float(jnp.abs(plain["v_proj"]).max())
