"""The token scan: the definition of the op, and the oracle of its tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def ssd_reference(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array | None,
    reset_index: jax.Array | None,
    token_mask: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Token by token: state <- exp(dt a) state + dt x b^T, y = state c + d x.

    x [B,L,H,P], dt [B,L,H] fp32, a [H] fp32, b and c [B,L,G,N], d [H] fp32 or None, reset_index and token_mask [B,L] (see
    `segment_runs`; token_mask is False at padding) or None, state [B,H,P,N] fp32.
    Returns y [B,L,H,P] in x.dtype and the final state [B,H,P,N] fp32.
    """
    batch, length, heads, p = x.shape
    groups, n = b.shape[2:]
    if reset_index is None:
        reset_index = jnp.zeros((batch, length), jnp.int32)
    reset = jnp.diff(reset_index, axis=1, prepend=0) > 0

    # Without it, autodiff would store two copies of every token's state: the one before and the one after.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, token):
        x, dt, b, c, reset = token
        decay = jnp.where(reset[:, None], 0.0, jnp.exp(dt * a))
        inflow = (x.astype(jnp.float32) * dt[..., None]).reshape(batch, groups, heads // groups, p)
        state = decay.reshape(batch, groups, -1, 1, 1) * state + inflow[..., None] * b[:, :, None, None]
        return state, jnp.einsum("bgrpn,bgn->bgrp", state, c, precision=jax.lax.Precision.HIGHEST)

    tokens = (x, dt, b.astype(jnp.float32), c.astype(jnp.float32), reset)
    tokens = jax.tree.map(lambda t: jnp.moveaxis(t, 1, 0), tokens)
    state, y = jax.lax.scan(step, state.reshape(batch, groups, heads // groups, p, n), tokens)
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape)
    if d is not None:
        y = y + d[:, None] * x.astype(jnp.float32)
    if token_mask is not None:
        y = jnp.where(token_mask[..., None, None], y, 0.0)
    return y.astype(x.dtype), state.reshape(batch, heads, p, n)
