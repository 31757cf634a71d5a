"""Norms against their formulas in double precision."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from hybridvlm.ops.norms import gated_rms_norm, layer_norm, rms_norm


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _rms(x, eps):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + eps)


def test_rms_norm():
    x, weight = 3 * _normal(2, 5, 8), _normal(8, seed=1)
    np.testing.assert_allclose(rms_norm(x, weight, 1e-3), _rms(x, 1e-3) * weight, rtol=1e-5, atol=1e-6)


def test_rms_norm_counts_in_float32():
    x = jnp.full((1, 4096), 300.0, jnp.bfloat16)
    assert np.allclose(rms_norm(x, jnp.ones(4096, jnp.bfloat16)).astype(jnp.float32), 1.0)
    assert rms_norm(x, jnp.ones(4096)).dtype == jnp.bfloat16


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gated_rms_norm(groups):
    y, z, weight = _normal(2, 5, 8), _normal(2, 5, 8, seed=1), _normal(8, seed=2)
    u = y * (z / (1 + np.exp(-z)))
    expected = _rms(u.reshape(2, 5, groups, -1), 1e-5).reshape(y.shape) * weight
    np.testing.assert_allclose(gated_rms_norm(y, z, weight, groups, 1e-5), expected, rtol=1e-5, atol=1e-6)


def test_layer_norm():
    x, weight, bias = 2 + _normal(3, 8), _normal(8, seed=1), _normal(8, seed=2)
    centred = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(
        layer_norm(x, weight, bias, 1e-5), _rms(centred, 1e-5) * weight + bias, rtol=1e-4, atol=1e-5
    )


def test_gradients_by_finite_differences():
    y, z, weight, bias = _normal(2, 3, 8), _normal(2, 3, 8, seed=1), _normal(8, seed=2), _normal(8, seed=3)
    check = functools.partial(jax.test_util.check_grads, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
    check(rms_norm, (y, weight))
    check(functools.partial(gated_rms_norm, groups=2), (y, z, weight))
    check(layer_norm, (y, weight, bias))


def test_errors_name_the_argument():
    x = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match=r"weight.*expected \(8,\), got \(7,\)"):
        rms_norm(x, jnp.ones(7))
    with pytest.raises(ValueError, match="divisor of 8, got 3"):
        gated_rms_norm(x, x, jnp.ones(8), 3)
    with pytest.raises(ValueError, match="z must have the shape"):
        gated_rms_norm(x, x[:1], jnp.ones(8))
