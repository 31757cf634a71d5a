"""The laws of the decoder: padding, packing, splitting, repeated units, drops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import close_to_largest

from hybridvlm.config import ModelConfig, Reduction, Schedule
from hybridvlm.nn import decoder, incremental
from hybridvlm.nn.attention import attention_layer
from hybridvlm.nn.caches import empty_caches
from hybridvlm.nn.decoder import Decoder
from hybridvlm.nn.incremental import decode_layers, unstack
from hybridvlm.nn.mamba2 import mamba_layer
from hybridvlm.nn.mlp import mlp_layer
from hybridvlm.nn.scan import layer_params
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.platforms import compiling_for
from hybridvlm.ops.tokens import Tokens, text_tokens
from hybridvlm.pattern import compile_weight, repeats
from hybridvlm.reduction import make_plan, score_fn

# whole programs compile faster than their operations one by one
STATIC = ("plan", "score_fn", "collect", "decode_capacity", "segments", "query_capacity", "remat", "caches")
prefill = jax.jit(decoder.prefill, static_argnums=1, static_argnames=STATIC)
extend = jax.jit(incremental.extend, static_argnums=1)
extend_shared = jax.jit(incremental.extend_shared, static_argnums=1)
step = jax.jit(incremental.step, static_argnums=2)

CONFIG = ModelConfig(
    pattern="M-M-*M",
    width=24,
    vocab_size=40,
    mamba_heads=4,
    mamba_head_dim=8,
    ssm_groups=2,
    ssm_state=6,
    attention_heads=4,
    kv_heads=2,
    head_dim=8,
    mlp_width=32,
    chunk_size=4,
)


@pytest.fixture(scope="module", autouse=True)
def exact():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def params():
    tokens = text_tokens(jnp.zeros((1, 3, CONFIG.width)), jnp.ones((1, 3), jnp.int32))
    tree = jax.jit(Decoder(CONFIG).init)(jax.random.key(0), tokens)["params"]
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(tree))))
    # norms and D start at 1: moved away, or a test could not see them
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(next(noise), a.shape), tree)


def rows(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, CONFIG.width)), jnp.float32)


def ones(*shape):
    return jnp.ones(shape, jnp.int32)


def prompt(seed, visual, text, pad=0, segment=1):
    """A video of `visual` tokens, then a question of `text` tokens, then padding."""
    length = visual + text + pad
    real = np.arange(length) < visual + text
    is_visual = np.arange(length) < visual
    place = np.arange(length, dtype=np.int32)
    x = np.where(real[:, None], np.random.default_rng(seed).normal(size=(length, CONFIG.width)), 0)
    x[:visual] = np.random.default_rng(seed).normal(size=(visual, CONFIG.width))
    x[visual : visual + text] = np.random.default_rng(seed + 1000).normal(size=(text, CONFIG.width))
    fields = (x.astype(np.float32), place, np.where(real, segment, 0), is_visual, real & ~is_visual, place)
    return Tokens(*(jnp.asarray(f)[None] for f in fields), jnp.where(jnp.asarray(is_visual), place, -1)[None])


def join(first, second, pad):
    """Two prompts without padding as segments 1 and 2 of one row."""
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
    tail = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, pad), *((0, 0),) * (a.ndim - 2))), joined)
    return tail


def test_repeats_covers_every_layer_once():
    for pattern in ("M-M-M-M*-" * 6 + "M-M-M-M-", "M", "M*M*M*", "MM-*", CONFIG.pattern):
        runs = repeats(pattern, 0, len(pattern))
        assert "".join(pattern[a : a + unit] * times for a, unit, times in runs) == pattern
        assert [a for a, _, _ in runs] == list(np.cumsum([0] + [u * t for _, u, t in runs])[:-1])
    assert repeats("M-M-M-M*-" * 6 + "M-M-M-M-", 0, 62) == [(0, 9, 6), (54, 2, 4)]
    # the unit turned about, so that an MLP and not a Mamba layer stands alone
    assert repeats("-M-M*-M-M*-M-M*-", 0, 16) == [(0, 5, 3), (15, 1, 1)]
    assert (
        compile_weight("M-M-M-M*-" * 6, 0, 54) == compile_weight("M-M-M-M*-", 0, 9) < compile_weight("M-M*M-*-", 0, 8)
    )


def test_prefill_is_the_layers_one_after_the_other(params):
    config = dataclasses.replace(CONFIG, pattern="M-M-M*-")
    tokens = text_tokens(rows(0, 2, 9), ones(2, 9))
    tree = jax.jit(Decoder(config).init)(jax.random.key(2), tokens)["params"]
    assert any(times > 1 for _, _, times in repeats(config.pattern, 0, len(config.pattern)))
    x = tokens.x
    for layer, kind in enumerate(config.pattern):
        p = layer_params(tree, config, layer)
        if kind == "M":
            x, _, _ = mamba_layer(p, config, x, tokens.segment)
        elif kind == "*":
            x, _, _ = attention_layer(p, config, x, tokens.segment)
        else:
            x = mlp_layer(p, config, x)
    close_to_largest(prefill(tree, config, tokens).tokens.x, rms_norm(x, tree["norm_f"], config.norm_eps))


@pytest.mark.parametrize(("lengths", "pad"), [((6, 5), 3), pytest.param((1, 9), 0, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_alone_in_a_batch_and_packed_are_the_same(params, lengths, pad):
    a, b = (rows(i, 1, n) for i, n in enumerate(lengths))
    alone = [prefill(params, CONFIG, text_tokens(x, ones(*x.shape[:2]))).tokens.x for x in (a, b)]
    width = max(lengths) + pad
    batch = jnp.concatenate([jnp.pad(x, ((0, 0), (0, width - x.shape[1]), (0, 0))) for x in (a, b)])
    segment = (jnp.arange(width) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
    together = prefill(params, CONFIG, text_tokens(batch, segment)).tokens.x
    packed = jnp.pad(jnp.concatenate([a, b], axis=1), ((0, 0), (0, pad), (0, 0)))
    ids = jnp.asarray([[1] * lengths[0] + [2] * lengths[1] + [0] * pad], jnp.int32)
    in_row = prefill(params, CONFIG, text_tokens(packed, ids)).tokens.x
    for i, n in enumerate(lengths):
        close_to_largest(together[i, :n], alone[i][0])
    close_to_largest(in_row[0, : lengths[0]], alone[0][0])
    close_to_largest(in_row[0, lengths[0] : sum(lengths)], alone[1][0])


@pytest.mark.parametrize("cut", [5, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (1, 2, 3, 4, 8, 10, 11))])
@pytest.mark.slow
def test_split_anywhere_with_caches(params, cut):
    x = rows(3, 2, 12)
    whole = prefill(params, CONFIG, text_tokens(x, ones(2, 12))).tokens.x
    first = prefill(params, CONFIG, text_tokens(x[:, :cut], ones(2, cut)), decode_capacity=12 - cut)
    rest, caches = extend(params, CONFIG, x[:, cut:], ones(2, 12 - cut), first.caches)
    close_to_largest(rest, whole[:, cut:])
    again, _ = extend(params, CONFIG, x, ones(2, 12), empty_caches(CONFIG, 2, 12))
    close_to_largest(again, whole)
    assert all(int(c.length) == 12 - cut for c in caches if hasattr(c, "length"))


@pytest.mark.slow
def test_ragged_batch_decodes_as_each_alone(params):
    lengths, new = [5, 9], 4
    segment = (jnp.arange(9) < jnp.asarray(lengths)[:, None]).astype(jnp.int32)
    x, tail = rows(4, 2, 9), rows(5, 2, new)
    out = prefill(params, CONFIG, text_tokens(x * segment[..., None], segment), decode_capacity=new)
    layers, caches, got = unstack(params, CONFIG), out.caches, []
    for i in range(new):
        h, caches = step(layers, params["norm_f"], CONFIG, tail[:, i : i + 1], caches)
        got.append(h)
    for b, n in enumerate(lengths):
        whole = jnp.concatenate([x[b : b + 1, :n], tail[b : b + 1]], axis=1)
        want = prefill(params, CONFIG, text_tokens(whole, ones(1, n + new))).tokens.x[0, n:]
        close_to_largest(jnp.concatenate(got, axis=1)[b], want)


@pytest.mark.slow
def test_questions_that_share_a_video_stand_alone(params):
    video, questions = rows(6, 2, 7), rows(7, 6, 3)
    segment = jnp.asarray([[1] * 7, [1] * 5 + [0] * 2], jnp.int32)
    caches = prefill(params, CONFIG, text_tokens(video * (segment > 0)[..., None], segment)).caches
    shared = extend_shared(params, CONFIG, questions, ones(6, 3), caches)
    for row in range(6):
        n = int((segment[row // 3] > 0).sum())
        whole = jnp.concatenate([video[row // 3, :n], questions[row]])[None]
        close_to_largest(shared.x[row], prefill(params, CONFIG, text_tokens(whole, ones(1, n + 3))).tokens.x[0, n:])
    assert set(shared.residual) == set(range(len(CONFIG.pattern)))


def plan_for(visual, text, method="str", budget=0.6):
    reduction = Reduction(method, budget, schedule=Schedule(floor=0.1))
    return make_plan(reduction, CONFIG, visual_tokens=visual, text_tokens=text, frames=1)


@pytest.mark.parametrize("method", ["str", pytest.param("random", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_survivors_do_not_depend_on_bucket_batch_or_packing(params, method):
    a, b = prompt(1, 12, 3), prompt(2, 9, 2, segment=2)

    def survivors(tokens, plan, segments=1):
        fn = score_fn(plan, segments=segments)
        out = prefill(params, CONFIG, tokens, plan=plan, score_fn=fn, segments=segments, query_capacity=8)
        return out.tokens

    alone_a = survivors(a, plan_for(12, 3, method))
    alone_b = survivors(b.replace(segment=(b.segment > 0).astype(jnp.int32)), plan_for(9, 2, method))
    wide = survivors(prompt(1, 12, 3, pad=9), plan_for(20, 4, method))
    n = int((alone_a.segment > 0).sum())
    assert wide.index[0, :n].tolist() == alone_a.index[0, :n].tolist()
    assert int((wide.segment > 0).sum()) == n
    close_to_largest(wide.x[0, :n], alone_a.x[0, :n])
    packed = survivors(join(a, b, 3), plan_for(24, 5, method), segments=2)
    m = int((alone_b.segment > 0).sum())
    assert packed.index[0, : n + m].tolist() == alone_a.index[0, :n].tolist() + alone_b.index[0, :m].tolist()
    close_to_largest(packed.x[0, :n], alone_a.x[0, :n])
    close_to_largest(packed.x[0, n : n + m], alone_b.x[0, :m])


@pytest.mark.slow
def test_a_drop_leaves_the_state_of_earlier_layers_whole(params):
    tokens, plan = prompt(3, 12, 3), plan_for(12, 3, budget=0.5)
    assert plan.drops
    dense = prefill(params, CONFIG, tokens)
    reduced = prefill(params, CONFIG, tokens, plan=plan, score_fn=score_fn(plan), query_capacity=3)
    first = plan.drops[0]
    for layer in range(first + 1):
        if CONFIG.pattern[layer] == "M":
            close_to_largest(reduced.caches[layer].ssm, dense.caches[layer].ssm)
    assert [c.k.shape[1] for c in reduced.caches if hasattr(c, "k")] == [
        plan.row_length(layer) for layer, kind in enumerate(CONFIG.pattern) if kind == "*"
    ]
    last = [int(k) for k in reduced.kept[1:, 0, 0]]
    assert last == [plan.keep(layer + 1, 12) for layer in plan.drops]


@pytest.mark.slow
def test_gradients_flow_through_a_reduced_prefill(params):
    tokens, plan = prompt(4, 12, 3), plan_for(12, 3)

    def loss(params):
        out = prefill(params, CONFIG, tokens, plan=plan, score_fn=score_fn(plan), query_capacity=3)
        return jnp.sum(jnp.square(out.tokens.x[:, -1]))

    grads = jax.grad(loss)(params)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    eps, key = 1e-2, ("mamba", "out_proj")
    direction = jax.random.normal(jax.random.key(5), params[key[0]][key[1]].shape)
    direction /= jnp.linalg.norm(direction)

    def moved(by):
        return loss({**params, key[0]: {**params[key[0]], key[1]: params[key[0]][key[1]] + by * direction}})

    slope = (moved(eps) - moved(-eps)) / (2 * eps)
    np.testing.assert_allclose(slope, jnp.vdot(grads[key[0]][key[1]], direction), rtol=2e-2)


def test_scores_are_asked_for_only_where_they_exist(params):
    tokens = prompt(5, 4, 2)
    with pytest.raises(ValueError, match="layer 1 is '-'"):
        prefill(params, CONFIG, tokens, collect=(1,), score_fn=lambda *a: None)
    with pytest.raises(ValueError, match="score_fn is needed"):
        prefill(params, CONFIG, tokens, collect=(0,))


@pytest.mark.slow
def test_rematerialisation_changes_memory_and_nothing_else(params):
    """A scan of two, a drop after a Mamba layer and one after attention: the same survivors and gradients from less kept."""
    config = dataclasses.replace(CONFIG, pattern="M-M-M*M")
    tokens = join(prompt(6, 40, 3), prompt(7, 25, 2, segment=2), 3)
    tree = jax.jit(Decoder(config).init)(jax.random.key(3), tokens)["params"]
    schedule = Schedule("list", values=(1, 1, 1, 1, 1, 0.5, 0.3))
    plan = make_plan(Reduction("str", 1.0, schedule=schedule), config, visual_tokens=65, text_tokens=8, frames=1)
    assert [config.pattern[layer] for layer in plan.drops] == ["M", "*"]
    options = {
        "plan": plan,
        "score_fn": score_fn(plan, segments=2),
        "segments": 2,
        "query_capacity": 8,
        "caches": False,
    }

    def loss(params, remat):
        out = decoder.prefill(params, config, tokens, remat=remat, **options)
        return jnp.sum(jnp.sin(out.tokens.x)), out

    found, held = {}, {}
    for remat in decoder.REMAT:
        compiled = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1).lower(tree, remat).compile()
        found[remat], held[remat] = compiled(tree), compiled.memory_analysis().temp_size_in_bytes
    (value, out), gradient = found["none"]
    assert out.caches == ()
    for remat in ("dots", "layer"):
        (again, same), other = found[remat]
        np.testing.assert_allclose(again, value, rtol=1e-5)
        jax.tree.map(close_to_largest, other, gradient)
        jax.tree.map(np.testing.assert_array_equal, (same.survivors, same.kept), (out.survivors, out.kept))
        assert held[remat] < held["none"], held


def test_what_training_asks_wrongly_is_refused(params):
    with pytest.raises(ValueError, match=r"remat: expected one of \['dots', 'layer', 'none'\], got 'all'"):
        prefill(params, CONFIG, prompt(5, 4, 2), remat="all")


@pytest.mark.parametrize("name, inside", [("tpu", True), ("gpu", False), ("cpu", False)])
def test_a_decode_loop_on_tpu_reads_weights_where_they_lie(params, name, inside):
    """Elsewhere a slice of a stack is a copy, and is made once, before the loop."""

    def loop(params):
        layers = decode_layers(params, CONFIG)
        return jax.lax.fori_loop(0, 2, lambda _, x: x + sum(jnp.sum(p["norm"]) for p in layers()), jnp.zeros(()))

    with compiling_for(name):
        before = [eqn for eqn in jax.make_jaxpr(loop)(params).eqns if "slice" in eqn.primitive.name]
        jax.tree.map(np.testing.assert_array_equal, decode_layers(params, CONFIG)(), unstack(params, CONFIG))
    assert bool(before) != inside
