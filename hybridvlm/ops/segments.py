"""Where a recurrent state is cut: runs of one segment inside a packed row."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def index_in_segment(segment: jax.Array) -> jax.Array:
    """The position of every token in its own segment, counted from 0: segment [B,L] int32 -> [B,L] int32."""
    index = jnp.broadcast_to(jnp.arange(segment.shape[1], dtype=jnp.int32), segment.shape)
    first = jnp.diff(segment, axis=1, prepend=-1) != 0
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)


def segment_runs(segment: jax.Array, initial_segment: jax.Array | None = None) -> jax.Array:
    """Number of resets at or before each position: segment [B,L] int32 -> [B,L] int32.

    Two positions share a state exactly when their numbers are equal; 0 means that the state which comes in from
    before the row (it belongs to `initial_segment` [B]; None: to the row's first segment) is still alive. A reset
    happens only between two different nonzero segments, so padding (0, only at the end of a row) never resets.
    """
    first = segment[:, :1] if initial_segment is None else initial_segment[:, None].astype(segment.dtype)
    before = jnp.concatenate([first, segment[:, :-1]], axis=1)
    reset = (segment != before) & (segment > 0) & (before > 0)
    return jnp.cumsum(reset.astype(jnp.int32), axis=1)
