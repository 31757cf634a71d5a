"""Dropping tokens: the one operation by which a row gets shorter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from hybridvlm.ops.frame_text import FrameTextRule, ranked_frames
from hybridvlm.ops.platforms import platform
from hybridvlm.ops.tokens import Tokens

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Bool, Float, Int

# `python -m hybridvlm.bench compact`, on CPU and with --aot v5p:2x2x1: on CPU sorting is up to four times faster for short rows and
# counting even with it for long ones. The TPU compilers estimate no time for a sort or a scatter, so their cost model
# cannot compare; counting has neither of them and compiles in a fraction of the time, which a plan of many drops pays for each.
DEFAULTS = {"tpu": "threshold"}


def compact_indices(
    segment: Int[Array, "B L"],
    visual: Bool[Array, "B L"],
    score: Float[Array, "B L"],
    keep: Int[Array, "B S"],
    capacity: int,
    implementation: str | None = None,
    frame_text: FrameTextRule | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Positions of the survivors, in order.

    segment [B,L] int32 (0 = padding, else 1..S); visual [B,L] bool; score [B,L]; keep [B,S] int32: visual tokens that
    stay in each segment; capacity: length of the compacted row. The rule is that of `compact`.
    implementation: "sort" (one stable sort of the row) or "threshold" (the score of the last to stay, found digit by digit
    by counting; O(L) a digit, nothing sorted or scattered); equal results; None takes the platform's.
    frame_text: text of a frame's own goes where the frame has no visual token left, or is not among the `most` of its segment whose
    best token scores highest (ties to the earlier frame). None: all text stays.

    Returns indices [B,capacity] int32 into the row and valid [B,capacity] bool; a position that is not valid has index 0.
    Raises ValueError for shapes that do not fit together, a capacity below 1 or an unknown implementation.
    """
    b, length = segment.shape
    if not length:
        raise ValueError(f"segment: expected rows of at least one token, got {segment.shape}")
    for name, array in (("visual", visual), ("score", score)):
        if array.shape != (b, length):
            raise ValueError(f"{name}: expected shape {(b, length)} as segment, got {array.shape}")
    if keep.ndim != 2 or keep.shape[0] != b or not keep.shape[1]:
        raise ValueError(f"keep: expected [B,S] with B = {b}, one count per segment, got {keep.shape}")
    if capacity < 1:
        raise ValueError(f"capacity: expected at least 1 token, got {capacity}")
    implementation = implementation or DEFAULTS.get(platform(), "sort")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {sorted(IMPLEMENTATIONS)}, got {implementation!r}")
    chosen, select = IMPLEMENTATIONS[implementation]
    score = jax.lax.stop_gradient(score).astype(jnp.float32)
    stays = chosen(segment, visual, score, keep.astype(jnp.int32))
    survives = (segment > 0) & (~visual | stays)
    if frame_text is not None:
        owner, rivals, best = ranked_frames(frame_text, segment, visual & stays & (segment > 0), score)
        kept = chosen(owner, rivals, best, frame_text.most.astype(jnp.int32)) & rivals
        # the first entry is for text of no frame
        kept = jnp.pad(kept, ((0, 0), (1, 0)), constant_values=True)
        survives &= visual | jnp.take_along_axis(kept, jnp.clip(frame_text.owner, 0, frame_text.frames), axis=1)
    count = jnp.cumsum(survives, axis=1, dtype=jnp.int32)
    valid = jnp.arange(capacity) < count[:, -1:]
    return jnp.where(valid, select(survives, count, capacity), 0), valid


def _chosen_by_sort(segment: jax.Array, visual: jax.Array, score: jax.Array, keep: jax.Array) -> jax.Array:
    """Which visual tokens stay, [B,L] bool: one stable sort by (group, best score first)."""
    b, length = segment.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    # Group 0 is what does not compete, group s the visual tokens of s. lax.sort takes both zeros for equal and puts every
    # NaN after infinity, which is where NaN scores belong.
    group = jnp.where(visual, segment, 0)
    group_sorted, _, order = jax.lax.sort((group, -score, index), dimension=1, num_keys=2, is_stable=True)

    # A token's rank is its distance from the first of its group.
    group_start = jax.lax.cummax(jnp.where(jnp.diff(group_sorted, axis=1, prepend=-1) != 0, index, 0), axis=1)
    quota = jnp.take_along_axis(jnp.pad(keep, ((0, 0), (1, 0))), jnp.clip(group_sorted, 0, keep.shape[1]), axis=1)
    quota = jnp.where(group_sorted <= keep.shape[1], quota, 0)
    rows = jnp.arange(b)[:, None]
    return jnp.zeros((b, length), bool).at[rows, order].set(index - group_start < quota, unique_indices=True)


def _places_by_scatter(survives: jax.Array, count: jax.Array, capacity: int) -> jax.Array:
    """Positions of the survivors: survives [B,L] and how many there are up to each position, count [B,L] -> [B,capacity]."""
    b, length = survives.shape
    slot = jnp.where(survives, count - 1, capacity)
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    return jnp.zeros((b, capacity), jnp.int32).at[jnp.arange(b)[:, None], slot].set(index, mode="drop")


def _chosen_by_threshold(segment: jax.Array, visual: jax.Array, score: jax.Array, keep: jax.Array) -> jax.Array:
    """Which visual tokens stay, [B,L] bool: all above a segment's threshold, and the earliest of those that are on it."""
    length = segment.shape[1]
    rivals = visual[:, None] & (segment[:, None] == jnp.arange(1, keep.shape[1] + 1)[:, None])  # [B,S,L]
    keep = jnp.maximum(keep, 0)
    # Unsigned integers in the order of the scores: negative floats turned around, both zeros equal, NaN below everything.
    bits = jax.lax.bitcast_convert_type(jnp.where(score == 0, 0.0, score), jnp.uint32)
    key = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    key = jnp.where(jnp.isnan(score), 0, key)[:, None]
    threshold = _threshold(key, rivals, keep, 32)[..., None]
    above, level = rivals & (key > threshold), rivals & (key == threshold)
    left = keep - jnp.sum(above, axis=-1, dtype=jnp.int32)
    earliness = (length - 1 - jnp.arange(length)).astype(jnp.uint32)[None, None]
    cut = _threshold(earliness, level, left, length.bit_length())[..., None]
    return jnp.any(above | (level & (earliness >= cut) & (left[..., None] > 0)), axis=1)


def _threshold(key: jax.Array, counted: jax.Array, least: jax.Array, bits: int) -> jax.Array:
    """The largest t that at least `least` [B,S] of the counted keys reach, 0 if there are fewer; [B,S] uint32.

    key [B,1,L] uint32 below 2^bits, counted [B,S,L] bool. Two bits a round, three counts in one pass over the row: by the TPU
    compiler's cycles less work in all than one bit or four.
    """
    rounds = (bits + 1) // 2

    def narrow(done: jax.Array, t: jax.Array) -> jax.Array:
        shift = (2 * (rounds - 1 - done)).astype(jnp.uint32)
        steps = t[..., None] + (jnp.arange(1, 4, dtype=jnp.uint32) << shift)
        reached = counted[:, :, None] & (key[:, :, None] >= steps[..., None])
        enough = jnp.sum(reached, axis=-1, dtype=jnp.int32) >= least[..., None]
        return t + (jnp.sum(enough, axis=-1, dtype=jnp.uint32) << shift)

    return jax.lax.fori_loop(0, rounds, narrow, jnp.zeros(least.shape, jnp.uint32))


def _places_by_rank(survives: jax.Array, count: jax.Array, capacity: int) -> jax.Array:
    """As `_places_by_scatter`, by search: whole blocks before survivor c, then the positions of its block before it."""
    b, length = count.shape
    blocks = -(-length // _BLOCK)
    count = jnp.pad(count, ((0, 0), (0, blocks * _BLOCK - length)), mode="edge").reshape(b, blocks, _BLOCK)
    rank = jnp.arange(capacity)[:, None]
    block = jnp.sum(count[:, None, :, -1] <= rank, axis=-1, dtype=jnp.int32)
    own = gather_rows(count, jnp.minimum(block, blocks - 1))
    return block * _BLOCK + jnp.sum(own <= rank, axis=-1, dtype=jnp.int32)


_BLOCK = 256
IMPLEMENTATIONS = {
    "sort": (_chosen_by_sort, _places_by_scatter),
    "threshold": (_chosen_by_threshold, _places_by_rank),
}


def gather_rows(array: jax.Array, indices: jax.Array) -> jax.Array:
    """array [B,L,...], indices [B,C] int32, all within the row -> [B,C,...]; whole trailing slices are copied."""
    return jax.vmap(lambda row, index: row.at[index].get(mode="promise_in_bounds"))(array, indices)


def compact(
    tokens: Tokens,
    score: Float[Array, "B L"],
    keep: Int[Array, "B S"],
    capacity: int,
    implementation: str | None = None,
    frame_text: FrameTextRule | None = None,
) -> Tokens:
    """The tokens that survive, in their order, in rows of `capacity`.

    Text always survives, but for what `frame_text` says (see `compact_indices`), and padding never. The visual tokens of segment s
    compete among themselves: the keep[b,s-1] with the highest score [B,L] stay (all of them if there are fewer), ties go to the
    earlier, NaN ranks below everything.
    keep [B,S] int32; a segment beyond S keeps no visual token. Every field of `Tokens`, `extra` too, is gathered along. Positions
    that stay free become padding: segment 0, visual and query False, index and frame -1, position, x and extra 0.

    `capacity` is static and counts visual and text tokens together. It is for the caller to choose it large enough (the
    plan's capacities are): survivors beyond it are lost from the end of the row, without a message.
    Gradients flow to x and extra through the gather, and none to score.

    implementation: as of `compact_indices`; it changes no result.

    Raises ValueError for shapes that do not fit together, a capacity below 1 or an unknown implementation.
    """
    indices, valid = compact_indices(tokens.segment, tokens.visual, score, keep, capacity, implementation, frame_text)

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
