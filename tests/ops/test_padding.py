"""Padding is inert whatever stands there, NaN and infinities included: forward and backward, in every op and implementation."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.ops import attention, causal_conv1d, compact, ssd, text_to_visual
from hybridvlm.ops.platforms import kernels_run, tpu_interpreter
from hybridvlm.ops.tokens import text_tokens

B, L, H, P, G, N = 2, 40, 4, 8, 2, 4
LENGTHS = (40, 26)
SEGMENT = jnp.asarray([[1] * 15 + [2] * 25, [1] * 26 + [0] * 14], jnp.int32)
DIRT = (np.nan, np.inf, -np.inf)
KERNEL = pytest.param("pallas_tpu", marks=pytest.mark.skipif(not kernels_run(), reason="kernels need a newer jax"))


def arrays(*shapes, seed=0):
    r = np.random.default_rng(seed)
    return [jnp.asarray(r.normal(size=shape), jnp.float32) for shape in shapes]


def soiled(array, dirt, axis=1):
    """array [B,L,...] with `dirt` at padding."""
    padding = (SEGMENT == 0).reshape(B, L, *(1,) * (array.ndim - 2))
    return jnp.where(padding, dirt, array)


def tracing(implementation):
    return tpu_interpreter() if implementation == "pallas_tpu" else contextlib.nullcontext()


def check(function, given, implementation=None, dirt=DIRT):
    """function(*given) -> arrays, all 0 at padding or without it: the same, and the same gradients, from soiled arguments."""

    @jax.jit
    def run(given):
        def loss(given):
            outs = function(*given)
            return sum(jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))) for out in outs), outs

        return jax.value_and_grad(loss, has_aux=True)(given)

    with tracing(implementation):
        clean = jax.block_until_ready(run(given))
        soil = [[soiled(a, value) if a.shape[:2] == (B, L) else a for a in given] for value in dirt]
        dirty = [jax.block_until_ready(run(arrays)) for arrays in soil]
    for want in jax.tree.leaves(clean):
        assert np.isfinite(np.asarray(want)).all()
    for value, found in zip(dirt, dirty, strict=True):
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(clean), strict=True):
            tolerance = 1e-6 * max(1.0, np.abs(want).max())
            np.testing.assert_allclose(np.asarray(got), np.asarray(want), atol=tolerance, err_msg=str(value))


@pytest.mark.parametrize("implementation", ["reference", "associative", "sequential", KERNEL])
def test_ssd(implementation):
    x, dt, b, c, state = arrays((B, L, H, P), (B, L, H), (B, L, G, N), (B, L, G, N), (B, H, P, N))
    a, d = -jnp.arange(1.0, H + 1), jnp.ones(H)
    options = {} if implementation in ("reference", "pallas_tpu") else {"chunk_size": 16}

    def function(x, dt, b, c, state):
        return ssd(x, dt, a, b, c, D=d, segment=SEGMENT, initial_state=state, implementation=implementation, **options)

    check(function, [x, jax.nn.softplus(dt), b, c, state], implementation)


@pytest.mark.parametrize(
    "implementation, rows",
    [
        *((name, rows) for name in ("reference", "xla") for rows in (L, 5)),
        pytest.param("pallas_tpu", L, marks=KERNEL.marks),
        pytest.param("pallas_tpu", 5, marks=[*KERNEL.marks, pytest.mark.slow]),
    ],
)
def test_attention(implementation, rows):
    q, k, v = arrays((B, L, H, P), (B, L, G, P), (B, L, G, P))
    place = jnp.broadcast_to(jnp.arange(L), (B, L))

    def function(q, k, v):
        options = dict(q_segment=SEGMENT[:, -rows:], kv_segment=SEGMENT, q_index=place[:, -rows:], kv_index=place)
        out, lse = attention(q[:, -rows:], k, v, implementation=implementation, **options)
        return out, jnp.where(lse > -1e29, lse, 0)

    check(function, [q, k, v], implementation)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_text_to_visual(implementation):
    q, k = arrays((B, L, H, P), (B, L, G, P))
    mask = (SEGMENT > 0) & (jnp.arange(L) % 3 == 0)
    visual = SEGMENT > 0

    def function(q, k):
        return (
            text_to_visual(
                q, k, q_mask=mask, visual=visual, q_segment=SEGMENT, kv_segment=SEGMENT, implementation=implementation
            ),
        )

    check(function, [q, k])


def test_convolution():
    x, weight, bias, state = arrays((B, L, 6), (4, 6), (6,), (B, 3, 6))
    check(lambda *args: causal_conv1d(*args[:3], segment=SEGMENT, initial_state=args[3]), [x, weight, bias, state])


@pytest.mark.slow
def test_a_state_of_another_segment_may_hold_anything():
    x, dt, b, c = arrays((B, L, H, P), (B, L, H), (B, L, G, N), (B, L, G, N))
    given = dict(segment=SEGMENT, initial_segment=jnp.asarray([7, 7]))
    for implementation in ("reference", "sequential", "associative"):
        args = (x, jax.nn.softplus(dt), -jnp.ones(H), b, c)
        want = ssd(*args, **given, implementation=implementation)
        got = ssd(*args, **given, implementation=implementation, initial_state=jnp.full((B, H, P, N), jnp.nan))
        for one, other in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    want = causal_conv1d(x[..., 0], jnp.ones((4, H)), **given)
    got = causal_conv1d(x[..., 0], jnp.ones((4, H)), **given, initial_state=jnp.full((B, 3, H), jnp.nan))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_compacting():
    (x, score) = arrays((B, L, 6), (B, L))
    tokens = text_tokens(x, SEGMENT)
    tokens = tokens.replace(visual=(jnp.arange(L) % 2 == 0) & (SEGMENT > 0))
    keep = jnp.asarray([[3, 4], [5, 0]])
    want = compact(tokens, score, keep, 30)
    got = compact(tokens.replace(x=soiled(x, np.nan)), soiled(score, np.nan), keep, 30)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), got, want)


STRONG = {
    "one": np.where(np.arange(200) == 40, 1e4, 0.01),
    "beyond squares": np.where(np.arange(200) == 40, 1e30, 0.01),
    "some": np.where(np.arange(200) % 30 == 7, 1e4, 0.01),
    "a run, then calm": np.where(np.arange(200) % 128 < 60, 3e3, 0.01),
    "everywhere": np.full(200, 20.0),
}


@pytest.mark.parametrize("implementation", ["associative", "sequential", KERNEL])
def test_behind_a_strong_decay_the_scan_is_exact(implementation):
    # an interpreted kernel takes long
    names = ("one", "a run, then calm") if implementation == "pallas_tpu" else tuple(STRONG)
    r = np.random.default_rng(1)
    x, b, c = arrays((1, 200, H, P), (1, 200, G, N), (1, 200, G, N))
    a, noise = -jnp.asarray([1.0, 0.5, 2.0, 4.0]), 1 + 0.3 * r.random((1, 200, H))

    def program(implementation):
        def loss(x, dt, a, b, c):
            y, state = ssd(x, dt, a, b, c, implementation=implementation)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size).reshape(y.shape))) + jnp.sum(state), (y, state)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))

    expected, found = program("reference"), program(implementation)
    for name in names:
        dt = jnp.asarray(STRONG[name][None, :, None] * noise, jnp.float32)
        (_, outs), gradients = expected(x, dt, a, b, c)
        want = (*outs, *gradients)
        with tracing(implementation):
            (_, outs), gradients = jax.block_until_ready(found(x, dt, a, b, c))
        for part, one, other in zip(("y", "state", "x", "dt", "A", "B", "C"), (*outs, *gradients), want, strict=True):
            one, other = np.asarray(one), np.asarray(other)
            tolerance = 1e-5 if part in ("y", "state") else 1e-4
            assert np.isfinite(one).all(), (name, part)
            assert np.abs(one - other).max() <= tolerance * np.abs(other).max(), (name, part)
