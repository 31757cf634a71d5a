"""Causal depthwise convolution with carried state and segments."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.segments import segment_runs


def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    segment: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    initial_segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y[t] = bias + sum_j weight[j] * x[t - (W-1) + j], each channel for itself, no activation.

    x [B,L,D]; weight [W,D]; bias [D] or None; segment [B,L] int32 (0 = padding, only at the end of a row; None: all one
    segment); initial_state [B,W-1,D], the inputs before the row, zeros if None; initial_segment [B] int32, the segment
    they belong to (None: that of the row's first token). Returns y [B,L,D] in x.dtype, 0 at padding, and the final
    state [B,W-1,D] in x.dtype: the last W-1 inputs of the last real token's segment, zeros where that segment is
    shorter. Taps never reach into another segment; a row of only padding hands its incoming state on.
    Sums are taken in float32. Raises ValueError for shapes that do not fit together.
    """
    b, length, d = x.shape
    width = weight.shape[0]
    _check(x, weight, bias, segment, initial_state, initial_segment)
    if initial_state is None:
        initial_state = jnp.zeros((b, width - 1, d), x.dtype)
    extended = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    w = weight.astype(jnp.float32)

    if segment is None:
        y = sum(extended[:, j : j + length].astype(jnp.float32) * w[j] for j in range(width))
        final = extended[:, length:]
    else:
        run = segment_runs(segment, initial_segment)
        extended_run = jnp.concatenate([jnp.zeros((b, width - 1), run.dtype), run], axis=1)
        y = jnp.zeros(x.shape, jnp.float32)
        for j in range(width):
            same = extended_run[:, j : j + length] == run
            y = y + jnp.where(same[..., None], extended[:, j : j + length].astype(jnp.float32), 0.0) * w[j]
        # The last real token stands at real + W - 2 of `extended`, so the W-1 inputs that end there start at `real`.
        real = jnp.sum(segment > 0, axis=1, dtype=jnp.int32)
        place = real[:, None] + jnp.arange(width - 1, dtype=jnp.int32)
        last_run = run[:, -1:]  # padding keeps the run of the last real token
        alive = jnp.take_along_axis(extended_run, place, axis=1) == last_run
        final = jnp.where(alive[..., None], jnp.take_along_axis(extended, place[..., None], axis=1), 0)

    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if segment is not None:
        y = jnp.where((segment > 0)[..., None], y, 0.0)
    return y.astype(x.dtype), final


def _check(x, weight, bias, segment, initial_state, initial_segment) -> None:
    b, length, d = x.shape
    expected = {
        "weight": (weight, (weight.shape[0], d)),
        "bias": (bias, (d,)),
        "segment": (segment, (b, length)),
        "initial_state": (initial_state, (b, weight.shape[0] - 1, d)),
        "initial_segment": (initial_segment, (b,)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"causal_conv1d: {name} does not fit x [B,L,D] = {x.shape} and weight [W,D] = {weight.shape}, "
                f"expected {shape}, got {value.shape}"
            )
    if initial_segment is not None and segment is None:
        raise ValueError("causal_conv1d: initial_segment needs segment to be compared with; give segment [B,L] as well")
