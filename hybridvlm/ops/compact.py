"""Dropping tokens: the one operation by which a row gets shorter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.ops.tokens import Tokens


def compact_indices(
    segment: jax.Array, visual: jax.Array, score: jax.Array, keep: jax.Array, capacity: int
) -> tuple[jax.Array, jax.Array]:
    """Places of the survivors, in order.

    segment [B,L] int32 (0 = padding, else 1..S); visual [B,L] bool; score [B,L]; keep [B,S] int32: visual tokens that
    stay in each segment; capacity: length of the compacted row. The rule is that of `compact`.

    Returns indices [B,capacity] int32 into the row and valid [B,capacity] bool; a place that is not valid has index 0.
    Raises ValueError for shapes that do not fit together or a capacity below 1.
    """
    b, length = segment.shape
    for name, array in (("visual", visual), ("score", score)):
        if array.shape != (b, length):
            raise ValueError(f"{name}: expected shape {(b, length)} as segment, got {array.shape}")
    if keep.ndim != 2 or keep.shape[0] != b or not keep.shape[1]:
        raise ValueError(f"keep: expected [B,S] with B = {b}, one count per segment, got {keep.shape}")
    if capacity < 1:
        raise ValueError(f"capacity: expected at least 1 token, got {capacity}")
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    rows = jnp.arange(b)[:, None]

    # One stable sort by (group, best score first): group 0 is what does not compete, group s the visual tokens of s.
    # lax.sort takes both zeros for equal and puts every NaN behind infinity, which is where NaN scores belong.
    group = jnp.where(visual, segment, 0)
    cost = -jax.lax.stop_gradient(score).astype(jnp.float32)
    group_sorted, _, order = jax.lax.sort((group, cost, place), dimension=1, num_keys=2, is_stable=True)

    # A token's rank is its distance from the first of its group.
    group_start = jax.lax.cummax(jnp.where(jnp.diff(group_sorted, axis=1, prepend=-1) != 0, place, 0), axis=1)
    counts = jnp.pad(keep.astype(jnp.int32), ((0, 0), (1, 0)))
    quota = jnp.take_along_axis(counts, jnp.clip(group_sorted, 0, keep.shape[1]), axis=1)
    quota = jnp.where(group_sorted <= keep.shape[1], quota, 0)
    chosen = jnp.zeros((b, length), bool).at[rows, order].set(place - group_start < quota, unique_indices=True)

    survives = (segment > 0) & (chosen | ~visual)
    slot = jnp.where(survives, jnp.cumsum(survives, axis=1, dtype=jnp.int32) - 1, capacity)
    indices = jnp.zeros((b, capacity), jnp.int32).at[rows, slot].set(place, mode="drop")
    return indices, jnp.arange(capacity) < jnp.sum(survives, axis=1, keepdims=True)


def gather_rows(array: jax.Array, indices: jax.Array) -> jax.Array:
    """array [B,L,...], indices [B,C] int32, all within the row -> [B,C,...]; whole trailing slices are copied."""
    return jax.vmap(lambda row, places: row.at[places].get(mode="promise_in_bounds"))(array, indices)


def compact(tokens: Tokens, score: jax.Array, keep: jax.Array, capacity: int) -> Tokens:
    """The tokens that survive, in their order, in rows of `capacity`.

    Text always survives and padding never. The visual tokens of segment s compete among themselves: the keep[b,s-1] with
    the highest score [B,L] stay (all of them if there are fewer), ties go to the earlier, NaN ranks below everything.
    keep [B,S] int32; a segment beyond S keeps no visual token. Every field of `Tokens`, `extra` too, is gathered along. Places
    that stay free become padding: segment 0, visual and query False, index and frame -1, position, x and extra 0.

    `capacity` is static and counts visual and text tokens together. It is for the caller to choose it large enough (the
    plan's capacities are): survivors beyond it are lost from the end of the row, without a message.
    Gradients flow to x and extra through the gather, and none to score.

    Raises ValueError for shapes that do not fit together or a capacity below 1.
    """
    indices, valid = compact_indices(tokens.segment, tokens.visual, score, keep, capacity)

    def take(array: jax.Array, empty: int) -> jax.Array:
        taken = gather_rows(array, indices)
        return jnp.where(valid.reshape(valid.shape + (1,) * (array.ndim - 2)), taken, jnp.asarray(empty, array.dtype))

    return Tokens(
        x=take(tokens.x, 0),
        position=take(tokens.position, 0),
        segment=take(tokens.segment, 0),
        visual=take(tokens.visual, False),
        query=take(tokens.query, False),
        index=take(tokens.index, -1),
        frame=take(tokens.frame, -1),
        extra={name: take(array, 0) for name, array in tokens.extra.items()},
    )
