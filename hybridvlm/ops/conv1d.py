"""Causal depthwise convolution with carried state and segments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from hybridvlm.ops.segments import segment_runs

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Float, Int


def causal_conv1d(
    x: Float[Array, "B L D"],
    weight: Float[Array, "W D"],
    bias: Float[Array, " D"] | None = None,
    *,
    segment: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B W-1 D"] | None = None,
    initial_segment: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B L D"], Float[Array, "B W-1 D"]]:
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
    if segment is not None:
        x = jnp.where((segment > 0)[..., None], x, 0)  # be it NaN there: 0 * NaN is no 0 in the weight's gradient
    if initial_state is None:
        initial_state = jnp.zeros((b, width - 1, d), x.dtype)
    extended = jnp.concatenate([initial_state.astype(x.dtype), x], axis=1)
    if segment is None:
        seen = None
        final = extended[:, length:]
    else:
        reset_index = segment_runs(segment, initial_segment)
        extended_index = jnp.concatenate([jnp.zeros((b, width - 1), reset_index.dtype), reset_index], axis=1)
        seen = jnp.stack([extended_index[:, j : j + length] == reset_index for j in range(width)])
        # The last real token stands at count + W - 2 of `extended`, so the W-1 inputs that end there start at `count`.
        count = jnp.sum(segment > 0, axis=1, dtype=jnp.int32)
        tail = count[:, None] + jnp.arange(width - 1, dtype=jnp.int32)
        last_reset = reset_index[:, -1:]  # padding keeps the run of the last real token
        alive = jnp.take_along_axis(extended_index, tail, axis=1) == last_reset
        final = jnp.where(alive[..., None], jnp.take_along_axis(extended, tail[..., None], axis=1), 0)

    y = _taps(extended, weight.astype(jnp.float32), seen)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    if segment is not None:
        y = jnp.where((segment > 0)[..., None], y, 0.0)
    return y.astype(x.dtype), final


@jax.custom_vjp
def _taps(extended: jax.Array, weight: jax.Array, seen: jax.Array | None) -> jax.Array:
    """extended [B,W-1+L,D], weight [W,D] fp32, seen [W,B,L] bool (None: all) -> [B,L,D] fp32."""
    length = extended.shape[1] - weight.shape[0] + 1
    y = jnp.zeros((), jnp.float32)
    for j, w in enumerate(weight):
        x = extended[:, j : j + length].astype(jnp.float32)
        y = y + (x if seen is None else jnp.where(seen[j][..., None], x, 0.0)) * w
    return y


def _taps_forward(
    extended: jax.Array, weight: jax.Array, seen: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
    return _taps(extended, weight, seen), (extended, weight, seen)


def _taps_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array | None], gy: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    extended, weight, seen = saved
    last = weight.shape[0] - 1
    gx, gweight = jnp.zeros((), jnp.float32), []
    # gy is shifted (a pad fuses) rather than x (a slice does not): autodiff's own version is forty times slower on CPU
    # and holds a product as large as x per tap.
    for j, w in enumerate(weight):
        g = gy if seen is None else jnp.where(seen[j][..., None], gy, 0.0)
        g = jnp.pad(g, ((0, 0), (j, last - j), (0, 0)))
        gx = gx + g * w
        gweight.append(jnp.sum(g * extended.astype(jnp.float32), axis=(0, 1)))
    return gx.astype(extended.dtype), jnp.stack(gweight), None


_taps.defvjp(_taps_forward, _taps_backward)


def _check(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    segment: jax.Array | None,
    initial_state: jax.Array | None,
    initial_segment: jax.Array | None,
) -> None:
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
