"""Rotary position embedding: against complex rotation, and the relative-position law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.ops.rope import apply_rope


def complex_rope(x: np.ndarray, position: np.ndarray, theta: float, rotated: int) -> np.ndarray:
    half = rotated // 2
    rate = theta ** (-np.arange(half) * 2.0 / rotated)
    turn = np.exp(1j * position[..., None].astype(np.float64) * rate)[:, :, None]
    z = (x[..., :half] + 1j * x[..., half:rotated]) * turn
    return np.concatenate([z.real, z.imag, x[..., rotated:]], axis=-1)


@pytest.mark.parametrize(("width", "fraction", "theta"), [(8, 1.0, 10000.0), (16, 0.5, 1e6), (8, 0.25, 100.0)])
def test_equals_complex_rotation(width, fraction, theta):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 7, 3, width)).astype(np.float32)
    position = rng.integers(0, 50, (2, 7)).astype(np.int32)
    got = apply_rope(jnp.asarray(x), jnp.asarray(position), theta, fraction)
    np.testing.assert_allclose(got, complex_rope(x, position, theta, int(fraction * width)), rtol=1e-5, atol=1e-5)


def test_products_depend_on_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(a: int, b: int) -> float:
        return float(jnp.sum(apply_rope(q, jnp.array([[a]])) * apply_rope(k, jnp.array([[b]]))))

    assert product(5, 2) == pytest.approx(product(25, 22), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 4), abs=1e-2)


def test_position_zero_changes_nothing_and_dtype_stays():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8), jnp.bfloat16)
    got = apply_rope(x, jnp.zeros((1, 3), jnp.int32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("fraction", [0.3, 1.5, 0.125])
def test_refuses_a_fraction_without_pairs(fraction):
    with pytest.raises(ValueError, match="fraction: expected an even number"):
        apply_rope(jnp.zeros((1, 2, 1, 8)), jnp.zeros((1, 2), jnp.int32), fraction=fraction)


def test_refuses_positions_of_another_shape():
    with pytest.raises(ValueError, match="position: expected"):
        apply_rope(jnp.zeros((1, 2, 1, 8)), jnp.zeros((1, 3), jnp.int32))
