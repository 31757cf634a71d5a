"""Causal convolution: against a loop, split anywhere with carried state, segments and padding."""

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from hybridvlm.ops.conv1d import causal_conv1d

WIDTH, CHANNELS = 4, 3


def _inputs(batch, length, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((batch, length, CHANNELS), (WIDTH, CHANNELS), (CHANNELS,), (batch, WIDTH - 1, CHANNELS))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def _loop(x, weight, bias, segment, state, owner):
    """The definition, one row, one tap at a time: (y, final state)."""
    if segment[0] not in (0, owner):
        owner = -1  # another segment came between: its name may come back in this row, its values may not
    past = [(owner, value) for value in np.asarray(state, np.float64)]
    y = np.zeros(x.shape)
    for t, s in enumerate(segment):
        if s == 0:
            continue
        past.append((s, np.asarray(x[t], np.float64)))
        window = past[-WIDTH:]
        y[t] = bias + sum(weight[j] * value for j, (who, value) in enumerate(window) if who == s)
    last = past[-1][0]
    return y, np.stack([value if who == last else np.zeros(CHANNELS) for who, value in past[1 - WIDTH :]])


SEGMENTS = [
    [1] * 9,
    [1] * 4 + [2] * 2 + [3] * 3,
    [1, 2, 3, 3, 0, 0, 0, 0, 0],
    [2] * 7 + [4] + [0],
    [0] * 9,
]


@pytest.mark.parametrize("named", [1, 2, None])
def test_is_the_sum_over_taps_of_the_own_segment(named):
    x, weight, bias, state = _inputs(len(SEGMENTS), 9)
    segment = jnp.asarray(SEGMENTS)
    owner = None if named is None else jnp.full(len(SEGMENTS), named)
    y, final = causal_conv1d(x, weight, bias, segment=segment, initial_state=state, initial_segment=owner)
    for row, segments in enumerate(SEGMENTS):
        expected = _loop(x[row], weight, bias, segments, state[row], segments[0] if named is None else named)
        np.testing.assert_allclose(y[row], expected[0], atol=1e-5)
        np.testing.assert_allclose(final[row], expected[1], atol=1e-6)


@pytest.mark.parametrize("cut", range(1, 9))
def test_split_anywhere_equals_the_whole(cut):
    x, weight, bias, _ = _inputs(len(SEGMENTS), 9, seed=1)
    segment = jnp.asarray(SEGMENTS)
    y, final = causal_conv1d(x, weight, bias, segment=segment)
    first, state = causal_conv1d(x[:, :cut], weight, bias, segment=segment[:, :cut])
    owner = jnp.max(segment[:, :cut], axis=1)
    second, end = causal_conv1d(
        x[:, cut:], weight, bias, segment=segment[:, cut:], initial_state=state, initial_segment=owner
    )
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), y, atol=1e-6)
    np.testing.assert_array_equal(end, final)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_without_segments_is_one_segment(length):
    x, weight, bias, state = _inputs(2, length, seed=2)
    plain = causal_conv1d(x, weight, bias, initial_state=state)
    one = causal_conv1d(x, weight, bias, segment=jnp.ones((2, length), jnp.int32), initial_state=state)
    for a, b in zip(plain, one, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradients_stay_in_the_segment():
    x, weight, bias, state = _inputs(1, 9, seed=3)
    segment = jnp.asarray([[1] * 4 + [2] * 3 + [0] * 2])

    def last_of_second(x, state):
        return causal_conv1d(x, weight, bias, segment=segment, initial_state=state)[0][0, 6].sum()

    gx, gstate = jax.grad(last_of_second, argnums=(0, 1))(x, state)
    np.testing.assert_allclose(gx[0, 4:7], weight[1:], atol=1e-6)
    assert not gx[0, :4].any() and not gx[0, 7:].any() and not gstate.any()


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_gradients_by_finite_differences(segments):
    x, weight, bias, state = _inputs(len(SEGMENTS), 9, seed=5)
    segment = None if segments is None else jnp.asarray(segments)

    def run(*arrays):
        return causal_conv1d(*arrays[:3], segment=segment, initial_state=arrays[3])

    jax.test_util.check_grads(run, (x, weight, bias, state), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_bfloat16_and_errors():
    x, weight, bias, _ = _inputs(2, 9, seed=4)
    y, state = causal_conv1d(x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), bias.astype(jnp.bfloat16))
    assert y.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), causal_conv1d(x, weight, bias)[0], atol=0.1)
    with pytest.raises(ValueError, match=r"weight does not fit.*expected \(4, 3\), got \(4, 2\)"):
        causal_conv1d(x, weight[:, :2])
    with pytest.raises(ValueError, match="initial_segment needs segment"):
        causal_conv1d(x, weight, initial_segment=jnp.ones(2, jnp.int32))
