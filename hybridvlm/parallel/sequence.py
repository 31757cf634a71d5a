"""Rows that are cut over devices: what one shard of a row needs of the others, inside `jax.shard_map`.

Of S shards each holds l tokens of every row [B,S*l], in order, so that padding fills the last ones. Per layer:

* a Mamba-2 layer takes W-1 inputs of its convolution from the shard before, and the SSM state that comes in: every shard
  knows its total decay [B,H] and the state [B,H,P,N] that it would end with if none came in; such pairs combine associatively, in
  log2(S) exchanges with ever farther neighbours and one more to the next. Then the ordinary scan starts from there.
* an attention layer gathers keys and values, which under grouped queries are small compared with the row (2 K P values a token against
  D), and the rows of the question, which every shard holds against its own keys. Later shards see more keys: work is uneven.
* a drop gathers scores and the other integers of a token (not x), decides on every device alike over the whole row, and hands on
  only rows that stay: the shorter row in a reduce-scatter, a piece of every shard at a time.

What a prefill leaves, and what comes after it: keys and values stay where their shard is, the states after the last token are
sent to every shard. A new token is whole on every shard, which attends to the keys that it holds; parts are joined by
log-sum-exp, and its own keys go to the shard that has its slot.

Gradients go the same ways back: a gather's is a reduce-scatter. Everything here is the identity where a row is whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp

from hybridvlm.config import ModelConfig
from hybridvlm.ops.compact import compact, compact_indices, gather_rows
from hybridvlm.ops.frame_text import FRAME_TEXT, FrameTextRule
from hybridvlm.ops.segments import segment_runs
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.tensor import LocalConfig

ConfigT = TypeVar("ConfigT", bound=ModelConfig)
# A shard of at least LONG tokens is a multiple of TILE, the rows of a TPU's tile of bfloat16.
LONG, TILE = 512, 16


def row_is_cut(c: ModelConfig) -> TypeGuard[LocalConfig]:
    """Whether a device holds only a shard of each row."""
    return isinstance(c, LocalConfig) and c.shards > 1


def sequence_shards(c: ModelConfig) -> int:
    """In how many shards a row is cut."""
    return c.shards if isinstance(c, LocalConfig) else 1


def shard_length(c: ModelConfig, length: int, shards: int) -> int:
    """Tokens of each of `shards` shards of a row: at least the taps of the convolution, which so reach back one shard only.

    Long ones are whole tiles: a TPU pads them in memory in any case, and its compiler failed on shards of 103,010 tokens.
    """
    even = -(-length // shards)
    return max(even + -even % TILE if even >= LONG else even, c.conv_kernel - 1)


def whole_rows(c: ConfigT) -> ConfigT:
    """The same part of a model for rows that every shard has whole, such as VAMBA's text."""
    return dataclasses.replace(c, row_axis="", shards=1) if row_is_cut(c) else c  # type: ignore[return-value]


def row_total(c: ModelConfig, part: jax.Array) -> jax.Array:
    """The sum over a row of what each shard has of it."""
    return jax.lax.psum(part, c.row_axis) if row_is_cut(c) else part


def row_start(c: ModelConfig, length: int) -> jax.Array | int:
    """The position in its row of the first token here, of `length` a shard."""
    return jax.lax.axis_index(c.row_axis) * length if row_is_cut(c) else 0


def gather_sequence(c: ModelConfig, array: jax.Array) -> jax.Array:
    """array [B,l,...] -> [B,L,...]."""
    return jax.lax.all_gather(array, c.row_axis, axis=1, tiled=True) if row_is_cut(c) else array


def own_shard(c: ModelConfig, array: jax.Array, empty: int = 0) -> jax.Array:
    """A shard's part of what every shard has whole: array [B,L,...] -> [B,l,...], `empty` beyond the end of the row."""
    if not row_is_cut(c):
        return array
    size = shard_length(c, array.shape[1], c.shards)
    fill = ((0, 0), (0, size * c.shards - array.shape[1])) + ((0, 0),) * (array.ndim - 2)
    whole = jnp.pad(array, fill, constant_values=empty)
    return jax.lax.dynamic_slice_in_dim(whole, row_start(c, size), size, axis=1)


def take_from_shards(c: ModelConfig, array: jax.Array, index: jax.Array) -> jax.Array:
    """Rows from anywhere: array [B,n,D], the shards' parts of one of S*n rows, index [B,l] into that -> [B,l,D].

    The parts go round from shard to shard, so that none ever holds more than its own and one other.
    """
    if not row_is_cut(c):
        return gather_rows(array, index)
    n, here = array.shape[1], jax.lax.axis_index(c.row_axis)
    ring = [(i, (i + 1) % c.shards) for i in range(c.shards)]

    def turn(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part, out = carry
        local = index - (here - step) % c.shards * n
        mine = (local >= 0) & (local < n)
        out = jnp.where(mine[..., None], gather_rows(part, jnp.clip(local, 0, n - 1)), out)
        return jax.lax.ppermute(part, c.row_axis, ring), out

    empty = jnp.zeros((*index.shape, array.shape[-1]), array.dtype)
    return jax.lax.fori_loop(0, c.shards, turn, (array, empty))[1]


def after_last_token(c: LocalConfig, tree: Any, segment: jax.Array) -> Any:
    """What the shard that holds the last real token of each row has, on every shard: arrays [B,...], segment [B,l]."""
    count = row_total(c, jnp.sum(segment > 0, axis=1))
    owner = jnp.maximum(count - 1, 0) // segment.shape[1]
    mine = owner == jax.lax.axis_index(c.row_axis)

    def send(a: jax.Array) -> jax.Array:
        return row_total(c, jnp.where(mine.reshape(mine.shape + (1,) * (a.ndim - 1)), a, 0))

    return jax.tree.map(send, tree)


def write_slots(c: ModelConfig, old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """old [B,R,...], a shard's slots, with new [B,T,...] (whole on every shard) in the slots from number `at` on that it has."""
    if not row_is_cut(c):
        return jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
    place = row_start(c, old.shape[1]) + jnp.arange(old.shape[1], dtype=jnp.int32) - at
    mine = (place >= 0) & (place < new.shape[1])
    taken = jnp.take(new, jnp.clip(place, 0, new.shape[1] - 1), axis=1)
    return jnp.where(mine.reshape((1, -1) + (1,) * (old.ndim - 2)), taken, old)


def write_rows(c: ModelConfig, old: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """old [B,l,...], a shard of rows, with new [B,T,...] (whole on every shard) in each row from its position `at` [B] on.

    What is beyond the end of a row is left out.
    """
    place = row_start(c, old.shape[1]) + jnp.arange(old.shape[1], dtype=jnp.int32) - at[:, None]
    mine = (place >= 0) & (place < new.shape[1])
    taken = gather_rows(new.astype(old.dtype), jnp.clip(place, 0, new.shape[1] - 1))
    return jnp.where(mine.reshape(mine.shape + (1,) * (old.ndim - 2)), taken, old)


def join_keys(c: ModelConfig, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention over each shard's keys, out [B,T,H,P] with log-sum-exp [B,H,T], as if it had been over all of them."""
    if not row_is_cut(c):
        return out, lse
    # JAX has no derivative of pmax, and none is needed: neither result depends on what is taken out of the sums
    largest = jax.lax.pmax(jax.lax.stop_gradient(lse), c.row_axis)
    share = jnp.exp(lse - largest)
    weighted = out.astype(jnp.float32) * share.swapaxes(1, 2)[..., None]
    total, parts = jax.lax.psum((share, weighted), c.row_axis)
    return (parts / total.swapaxes(1, 2)[..., None]).astype(out.dtype), largest + jnp.log(total)


def halo(c: LocalConfig, channels: jax.Array, segment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a convolution finds before this shard: channels [B,l,D] -> its inputs [B,W-1,D], and whose they are [B] (0: nobody's)."""
    taps = c.conv_kernel - 1
    tail, owner = channels[:, -taps:] if taps else channels[:, :0], segment[:, -taps:] if taps else segment[:, :0]
    own = owner == segment[:, -1:]  # a shard that ends in padding is followed by nothing else
    tail = jnp.where(own[..., None], tail, 0)
    return _passed_on(c, (tail, segment[:, -1]))


def incoming_state(
    c: LocalConfig, x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, segment: jax.Array, before: jax.Array
) -> jax.Array:
    """The SSM state [B,H,P,N] float32 before this shard; it belongs to segment `before` [B], the last one there.

    x [B,l,H*P], dt [B,l,H] (0 at padding), A [H], B [B,l,G,N], segment [B,l]: what this shard would put into the scan.
    """
    b, length, heads = dt.shape
    groups, n = B.shape[2:]
    run = segment_runs(segment, before)
    log = dt * A
    psum_tensor = jnp.sum(log, axis=1)
    # what comes after a token: shifted, for taking a strong decay away again would leave its rounding
    after = jnp.pad(jnp.flip(jnp.cumsum(jnp.flip(log[:, 1:], 1), axis=1), 1), ((0, 0), (0, 1), (0, 0)))
    weight = jnp.where((run == run[:, -1:])[..., None], dt * jnp.exp(after), 0.0)
    u = x.reshape(b, length, heads, -1)
    u = (u.astype(jnp.float32) * weight[..., None]).astype(x.dtype).reshape(b, length, groups, heads // groups, -1)
    state = jnp.einsum("blgjp,blgn->bgjpn", u, B, preferred_element_type=jnp.float32).reshape(b, heads, -1, n)
    decay = jnp.where(run[:, -1:] == 0, jnp.exp(psum_tensor), 0.0)  # a reset lets nothing through

    far = 1
    while far < c.shards:
        decay_before, state_before = _passed_on(c, (decay, state), far)
        state = state + decay[..., None, None] * state_before
        decay = decay * decay_before
        far *= 2
    return _passed_on(c, state)


def _passed_on(c: LocalConfig, tree: Any, far: int = 1) -> Any:
    """What the shard `far` before this one has; zeros where there is none."""
    pairs = [(i, i + far) for i in range(c.shards - far)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, c.row_axis, pairs), tree)


def pick_rows(c: ModelConfig, array: jax.Array, index: jax.Array, counted: jax.Array) -> jax.Array:
    """Rows from anywhere in the row, for every shard: array [B,l,...], index [B,R], counted [B,R] -> [B,R,...], 0 uncounted."""
    length = array.shape[1]
    local = index - row_start(c, length)
    mine = counted & (local >= 0) & (local < length)
    taken = gather_rows(array, jnp.clip(local, 0, length - 1))
    return row_total(c, jnp.where(mine.reshape(mine.shape + (1,) * (array.ndim - 2)), taken, 0))  # each has one owner


def merge_lse(c: ModelConfig, lse: jax.Array) -> jax.Array:
    """Log-sum-exp over a shard's own keys [B,H,R] -> over those of the whole row."""
    if not row_is_cut(c):
        return lse
    # JAX has no derivative of pmax, and none is needed: the sum does not depend on what is taken out of it
    largest = jax.lax.pmax(jax.lax.stop_gradient(lse), c.row_axis)
    return largest + jnp.log(jax.lax.psum(jnp.exp(lse - largest), c.row_axis))


def compact_row(
    c: ModelConfig,
    tokens: Tokens,
    score: jax.Array,
    keep: jax.Array,
    capacity: int,
    most_frames: jax.Array | None = None,
    frames: int = 0,
) -> Tokens:
    """`hybridvlm.ops.compact.compact`, of shards: score [B,l]; the row that is left is cut evenly again.

    Whole, it is of `capacity` tokens or, where that leaves a remainder (or less than a convolution's taps), a few more of padding.
    most_frames [B,S], of `frames` that a row has at most: where text of frames' own may be dropped, as tokens.extra[FRAME_TEXT] has it.
    """
    rule = None
    if most_frames is not None:
        owner, frame = (gather_sequence(c, a) for a in (tokens.extra[FRAME_TEXT], tokens.frame))
        rule = FrameTextRule(owner, frame, most_frames, frames)
    if not row_is_cut(c):
        return compact(tokens, score, keep, capacity, frame_text=rule)
    size = shard_length(c, capacity, c.shards)
    segment, visual, ranks = (
        gather_sequence(c, a) for a in (tokens.segment, tokens.visual, jax.lax.stop_gradient(score))
    )
    indices, valid = compact_indices(segment, visual, ranks, keep, capacity, frame_text=rule)
    filled = ((0, 0), (0, size * c.shards - capacity))
    indices, valid = jnp.pad(indices, filled), jnp.pad(valid, filled)

    start = row_start(c, size)
    mine, real = (jax.lax.dynamic_slice_in_dim(a, start, size, axis=1) for a in (indices, valid))
    length = tokens.length

    def take(array: jax.Array, empty: int) -> jax.Array:
        """What is known whole: the positions of this shard, from anywhere."""
        taken = gather_rows(gather_sequence(c, array), mine)
        return jnp.where(real.reshape(real.shape + (1,) * (array.ndim - 2)), taken, jnp.asarray(empty, array.dtype))

    # a piece of every shard at a time, so that no device ever holds more of the shorter row than one shard of it
    pieces = c.shards
    piece = -(-size // pieces)
    local = jnp.where(valid, indices, -1) - row_start(c, length)

    def cut(positions: jax.Array) -> jax.Array:
        """[B,S*size] -> [pieces,B,S*piece]: the n-th piece of every shard, one shard after the other."""
        by_shard = positions.reshape(-1, c.shards, size)
        by_shard = jnp.pad(by_shard, ((0, 0), (0, 0), (0, pieces * piece - size)), constant_values=-1)
        return jnp.moveaxis(by_shard.reshape(-1, c.shards, pieces, piece), 2, 0).reshape(pieces, -1, c.shards * piece)

    def move(array: jax.Array) -> jax.Array:
        """Everybody's rows to their positions, of which each gets its own shard; a position has one giver or none."""

        def one(_: None, at: jax.Array) -> tuple[None, jax.Array]:
            held = (at >= 0) & (at < length)
            rows = gather_rows(array, jnp.clip(at, 0, length - 1))
            given = jnp.where(held.reshape(held.shape + (1,) * (array.ndim - 2)), rows, 0)
            return None, jax.lax.psum_scatter(given, c.row_axis, scatter_dimension=1, tiled=True)

        _, moved = jax.lax.scan(one, None, cut(local))
        return jnp.moveaxis(moved, 0, 1).reshape(array.shape[0], pieces * piece, *array.shape[2:])[:, :size]

    def extra(array: jax.Array) -> jax.Array:
        return move(array) if jnp.issubdtype(array.dtype, jnp.floating) else take(array, 0)

    return Tokens(
        x=move(tokens.x),
        position=take(tokens.position, 0),
        segment=take(tokens.segment, 0),
        visual=take(tokens.visual, False),
        query=take(tokens.query, False),
        index=take(tokens.index, -1),
        frame=take(tokens.frame, -1),
        extra={name: extra(array) for name, array in tokens.extra.items()},
    )
