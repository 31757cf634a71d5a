"""What several methods choose by, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.ops.fold import fold
from hybridvlm.reduction import choose
from hybridvlm.reduction.choose import cosine, diverse_order, flagged, ranks

apportion = jax.jit(choose.apportion)


def apportioned(total, counts):
    """The rule by words: whole parts, then the largest fractions, ties to the earlier."""
    total = min(total, sum(counts))
    quota = [total * n / max(sum(counts), 1) for n in counts]
    out = [int(q + 1e-9) for q in quota]
    left = sorted(range(len(counts)), key=lambda i: (-(quota[i] - out[i]), i))
    for i in left[: total - sum(out)]:
        out[i] += 1
    return out


def test_apportion():
    assert apportion(2, jnp.array([2, 0, 0, 2, 2])).tolist() == [1, 0, 0, 1, 0]
    assert apportion(4, jnp.array([2, 0, 0, 2, 2])).tolist() == [2, 0, 0, 1, 1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(0, 9, 7)
        total = int(rng.integers(0, counts.sum() + 3))
        out = np.asarray(apportion(total, jnp.asarray(counts)))
        assert out.tolist() == apportioned(total, counts.tolist())
        assert out.sum() == min(total, counts.sum()) and (out <= counts).all()


def test_apportion_of_more_than_the_product_of_two_int32_holds():
    """A thousand frames of 256 tokens in few scenes, as FlashVID hands its roots out."""
    for total, counts in ((19456, [216000, 64, 0]), (19456, [100000, 116064, 7]), (262143, [131071, 131072, 5])):
        assert apportion(total, jnp.array(counts)).tolist() == apportioned(total, counts)


def test_apportion_in_groups():
    counts, group = jnp.array([3, 1, 5, 2, 2]), jnp.array([0, 1, 0, 1, 1])
    out = apportion(jnp.array([4, 3, 0, 0, 0]), counts, group)
    assert out[jnp.array([0, 2])].tolist() == apportioned(4, [3, 5])
    assert out[jnp.array([1, 3, 4])].tolist() == apportioned(3, [1, 2, 2])


def test_ranks_and_flags_give_ties_to_the_earlier():
    assert ranks(jnp.array([1.0, 3.0, 1.0, 3.0])).tolist() == [2, 0, 3, 1]
    score = flagged(jnp.array([[0, 1, 1, 0]]), jnp.array([[9.0, 1.0, 1.0 + 1e-6, 9.0]]))[0]
    assert np.argsort(-np.asarray(score)).tolist() == [2, 1, 0, 3]


def test_cosines_of_zeros_and_equals():
    a = jnp.asarray(np.random.default_rng(0).normal(size=(3, 300)), jnp.bfloat16)
    assert cosine(a, a).tolist() == [1, 1, 1] and cosine(a, 0 * a).tolist() == [0, 0, 0]


def test_the_diverse_order_extends_itself_and_never_picks_padding():
    order = jax.jit(diverse_order, static_argnums=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 4)), jnp.float32)
    real = jnp.arange(12) < 9
    long, short = (np.asarray(order(x, real, n)) for n in (9, 4))
    assert sorted(long[:9].tolist()) == list(range(9)) and (long[9:] == 12).all()
    assert [i for i in range(12) if short[i] < 4] == [i for i in range(12) if long[i] < 4]
    assert np.asarray(order(jnp.ones((5, 3)), jnp.ones(5, bool), 3)).tolist() == [0, 1, 2, 5, 5]


def test_fold_against_a_loop_and_what_nobody_writes_to_stays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    into, weight = rng.integers(0, 8, (2, 2, 6)), rng.normal(size=(2, 2, 6)).astype(np.float32)
    expected = np.zeros_like(x)
    for b in range(2):
        for p in range(6):
            hits = [(a, t) for a in range(2) for t in range(6) if into[b, a, t] == p]
            expected[b, p] = sum(weight[b, a, t] * x[b, t] for a, t in hits) if hits else x[b, p]
    np.testing.assert_allclose(fold(jnp.asarray(x), jnp.asarray(into), jnp.asarray(weight)), expected, atol=1e-6)
    with pytest.raises(ValueError, match="into and weight must be"):
        fold(jnp.asarray(x), jnp.asarray(into)[:, 0], jnp.asarray(weight))
