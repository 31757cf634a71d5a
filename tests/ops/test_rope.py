"""Rotary position embedding: against complex rotation, and the relative-position law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.ops.rope import apply_rope, axial_angles, pair_axes


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


def three_axes(x: np.ndarray, position: np.ndarray, theta: float, axes: list[int]) -> np.ndarray:
    """M-RoPE pair by pair: pair i turns by the position on axis axes[i]."""
    half = x.shape[-1] // 2
    out = np.array(x, np.float64)
    for i, axis in enumerate(axes):
        angle = position[..., axis].astype(np.float64) * theta ** (-i / half)
        cos, sin = np.cos(angle)[..., None], np.sin(angle)[..., None]
        out[..., i] = x[..., i] * cos - x[..., i + half] * sin
        out[..., i + half] = x[..., i + half] * cos + x[..., i] * sin
    return out


@pytest.mark.parametrize(
    ("sections", "interleaved", "axes"),
    [
        ((2, 3, 3), False, [0, 0, 1, 1, 1, 2, 2, 2]),
        ((4, 2, 2), True, [0, 1, 2, 0, 1, 2, 0, 0]),
        ((3, 3, 2), True, [0, 1, 2, 0, 1, 2, 0, 1]),
    ],
)
def test_sections_follow_their_axes(sections, interleaved, axes):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 5, 3, 16)).astype(np.float32)
    position = rng.integers(0, 40, (2, 5, 3)).astype(np.int32)
    got = apply_rope(jnp.asarray(x), jnp.asarray(position), 1e4, sections=sections, interleaved=interleaved)
    np.testing.assert_allclose(got, three_axes(x, position, 1e4, axes), rtol=1e-5, atol=1e-5)


def test_published_sections():
    """Qwen2-VL's three runs, and Qwen3-VL's turns: every third pair for row and column until their 20 are used up."""
    assert pair_axes((16, 24, 24), False).tolist() == [0] * 16 + [1] * 24 + [2] * 24
    axes = pair_axes((24, 20, 20), True)
    assert axes[:60].tolist() == [0, 1, 2] * 20
    assert axes[60:].tolist() == [0] * 4


def test_equal_axes_are_the_plain_embedding():
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 16))
    position = jnp.arange(4)[None]
    plain = apply_rope(x, position, 1e4)
    for places in (position, jnp.broadcast_to(position[..., None], (1, 4, 3))):
        np.testing.assert_array_equal(apply_rope(x, places, 1e4, sections=(4, 2, 2), interleaved=True), plain)


def test_refuses_sections_that_do_not_fit():
    x, position = jnp.zeros((1, 2, 1, 16)), jnp.zeros((1, 2, 3), jnp.int32)
    with pytest.raises(ValueError, match="sections: expected a sum of 8 pairs"):
        apply_rope(x, position, sections=(2, 3, 4))
    with pytest.raises(ValueError, match="cannot be interleaved"):
        apply_rope(x, position, sections=(1, 4, 3), interleaved=True)
    with pytest.raises(ValueError, match="position: expected"):
        apply_rope(x, position)


def test_axial_angles_have_all_rates_for_either_axis():
    place = np.array([[0, 0], [3, 0], [0, 5]])
    angle = axial_angles(place, 16, 100.0)
    rate = 100.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(angle, [[0] * 8, [*(3 * rate), 0, 0, 0, 0], [0, 0, 0, 0, *(5 * rate)]], rtol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        axial_angles(place, 6)
