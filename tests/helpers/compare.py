"""How near to each other two arrays have to be, by four meanings of near."""

import jax
import numpy as np


def close_for_shares(got, expected, tolerance, name="", unseen=None):
    """Errors relative to the largest expected value, by share of the values.

    Args:
        tolerance: share of the values -> the largest error among so many of the best.
        name: what the two are, for the message.
        unseen: values below stand for minus infinity: on both sides in the same places.
    """
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    assert got.shape == expected.shape, name
    assert np.isfinite(got).all(), name
    if unseen is not None:
        np.testing.assert_array_equal(got < unseen, expected < unseen, err_msg=name)
        got, expected = (np.where(x < unseen, 0, x) for x in (got, expected))
    scale = max(np.abs(expected).max(), 1e-6)
    error = np.sort(np.abs(got - expected).ravel()) / scale
    for share, most in tolerance.items():
        found = error[max(0, int(np.ceil(share * error.size)) - 1)]
        assert found <= most, f"{name}: {found:.2e} of the largest value {scale:.2e} for {share:.1%} of the values"


def close_to_largest(got, expected, tolerance=1e-5, name=""):
    """The largest error relative to the largest expected value."""
    close_for_shares(got, expected, {1.0: tolerance}, name)


def close_absolutely(got, expected, tolerance=1e-4):
    """The largest error as it is, in float64: what the goldens promise of logits."""
    assert got.shape == expected.shape
    assert np.max(np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64))) <= tolerance


def trees_close(got, expected):
    """Trees of the same shapes and dtypes, errors relative to each array's largest value, or to 1 where that is less."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.max(np.abs(b)))))
