"""What the forward and the backward TPU kernel share: how a row is cut into blocks, and the decays of one block in VMEM.

A grid step is one chunk of C tokens of one head block: R heads side by side in the lanes of x [B,L,H*P], so many that
their R*P lanes are whole tiles of 128 (16 heads of 80 are ten tiles). Along the chunks of a head block the state stays
in VMEM as [N,R*P], so that reading and writing it are dense matrix products for all heads of a group at once.

What depends on dt and A is laid out with a head per row and tokens along the lanes, [rows,C]; rows is R rounded up to
whole tiles of 8. A weight per (token, head) meets x through a product with a 0/1 matrix (`spread`), exact because
the weight is split into three bfloat16 parts that hold all 24 bits of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.ssd.decays import log_decays

LANES, SUBLANES = 128, 8
WIDEST = 2048  # lanes of a head block, unless no narrower block is made of whole tiles
SEGMENT_ROWS = 8  # rows of `segment_ids`


class Sizes(NamedTuple):
    """A call as the kernels see it."""

    batch: int
    length: int
    heads: int
    p: int
    groups: int
    n: int
    chunk: int
    block_heads: int  # R: heads of a head block
    packed: bool  # segments were given
    skip: bool  # D was given

    @property
    def blocks(self) -> int:
        return self.heads // self.block_heads

    @property
    def lanes(self) -> int:
        return self.block_heads * self.p

    @property
    def rows(self) -> int:
        return SUBLANES * -(-self.block_heads // SUBLANES)

    @property
    def block_groups(self) -> int:
        """Groups of a head block: several where a group's heads do not fill whole tiles."""
        return max(1, self.block_heads * self.groups // self.heads)

    @property
    def sharing(self) -> int:
        """Head blocks that read the same groups: several where a group has many heads."""
        return max(1, self.heads // self.groups // self.block_heads)

    @property
    def tiled_lanes(self) -> int:
        """Lanes of x that a block takes in memory."""
        return LANES * -(-self.lanes // LANES)

    @property
    def tiled_group_lanes(self) -> int:
        """Lanes of B that a block takes in memory."""
        return LANES * -(-self.block_groups * self.n // LANES)

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def ragged(self) -> bool:
        """The last chunk reaches beyond the row, where a block holds anything."""
        return self.length % self.chunk > 0


def block_heads(heads: int, p: int, groups: int, n: int) -> int:
    """Heads of a head block: as many of one group as make whole tiles, up to WIDEST lanes; else the least of several groups."""
    per_group = heads // groups

    def whole(count: int) -> bool:
        fits = per_group % count == 0 or count % per_group == 0
        group_lanes = groups == 1 or max(1, count // per_group) * n % LANES == 0
        return count == heads or (fits and count * p % LANES == 0 and group_lanes)

    fitting = [count for count in range(1, heads + 1) if heads % count == 0 and whole(count)]
    single = [count for count in fitting if count <= per_group and count * p <= WIDEST]
    return max(single) if single else min(fitting)


# -- what the kernels are given, made by XLA --


def dt_rows(sizes: Sizes, dt: jax.Array) -> jax.Array:
    """dt [B,L,H] -> [B,H/R,rows,L]"""
    dt = jnp.transpose(dt.reshape(sizes.batch, sizes.length, sizes.blocks, sizes.block_heads), (0, 2, 3, 1))
    return jnp.pad(dt, ((0, 0), (0, 0), (0, sizes.rows - sizes.block_heads), (0, 0)))


def a_rows(sizes: Sizes, a: jax.Array) -> jax.Array:
    """A [H] -> [H/R,rows,1]"""
    a = a.reshape(sizes.blocks, sizes.block_heads, 1)
    return jnp.pad(a, ((0, 0), (0, sizes.rows - sizes.block_heads), (0, 0)))


def block_state(sizes: Sizes, state: jax.Array) -> jax.Array:
    """[B,H,P,N] -> [B,H/R,N,R*P]"""
    return jnp.swapaxes(state.reshape(sizes.batch, sizes.blocks, sizes.lanes, sizes.n), 2, 3)


def head_state(sizes: Sizes, state: jax.Array) -> jax.Array:
    """[B,H/R,N,R*P] -> [B,H,P,N]"""
    return jnp.swapaxes(state, 2, 3).reshape(sizes.batch, sizes.heads, sizes.p, sizes.n)


def segment_rows(sizes: Sizes, reset_index: jax.Array, token_mask: jax.Array) -> jax.Array:
    """Who sees whom, float32 [B,8,L]: the run that a token reads (-1 at padding); the run that it writes; whether it reads the
    chunk's incoming state; whether it writes the outgoing one; whether the one is what is left of the other."""
    padded = jnp.pad(reset_index, ((0, 0), (0, sizes.chunks * sizes.chunk - sizes.length)), mode="edge")
    ends = padded[:, sizes.chunk - 1 :: sizes.chunk]
    before = jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    ends, before = (jnp.repeat(v, sizes.chunk, axis=1)[:, : sizes.length] for v in (ends, before))
    reader = jnp.where(token_mask, reset_index, -1)
    segment_ids = (reader, reset_index, reader == before, reset_index == ends, before == ends)
    rows = jnp.stack([row.astype(jnp.float32) for row in segment_ids], axis=1)
    return jnp.pad(rows, ((0, 0), (0, SEGMENT_ROWS - rows.shape[1]), (0, 0)))


def spread_matrix(sizes: Sizes) -> jax.Array:
    """[3*rows,R*P] bfloat16: 1 where the lane belongs to the row's head."""
    head = np.arange(sizes.lanes) // sizes.p
    return jnp.asarray(np.tile(head == np.arange(sizes.rows)[:, None], (3, 1)), jnp.bfloat16)


# -- block specs of what both kernels read; `at(k)` is the chunk of the k-th step --


def common_specs(sizes: Sizes, at) -> dict[str, pl.BlockSpec]:
    c, lanes, rows, sharing = sizes.chunk, sizes.lanes, sizes.rows, sizes.sharing
    group_lanes = sizes.block_groups * sizes.n
    by_group = pl.BlockSpec((1, c, group_lanes), lambda b, i, k: (b, at(k), i // sharing))
    return {
        "x": pl.BlockSpec((1, c, lanes), lambda b, i, k: (b, at(k), i)),
        "b": by_group,
        "c": by_group,
        "dt": pl.BlockSpec((1, 1, rows, c), lambda b, i, k: (b, i, 0, at(k))),
        "segment_ids": pl.BlockSpec((1, SEGMENT_ROWS, c), lambda b, i, k: (b, 0, at(k))),
        "a": pl.BlockSpec((1, rows, 1), lambda b, i, k: (i, 0, 0)),
        "d": pl.BlockSpec((1, lanes), lambda b, i, k: (0, i)),
        "spread": pl.BlockSpec((3 * rows, lanes), lambda b, i, k: (0, 0)),
        "state": pl.BlockSpec((1, 1, sizes.n, lanes), lambda b, i, k: (b, i, 0, 0)),
        "start": pl.BlockSpec((1, 1, 1, sizes.n, lanes), lambda b, i, k: (b, at(k), i, 0, 0)),
    }


def common_shapes(sizes: Sizes, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays after `common_specs`."""
    s = sizes
    shapes = {
        "x": ((s.batch, s.length, s.heads * s.p), dtype),
        "b": ((s.batch, s.length, s.groups * s.n), dtype),
        "c": ((s.batch, s.length, s.groups * s.n), dtype),
        "dt": ((s.batch, s.blocks, s.rows, s.length), jnp.float32),
        "segment_ids": ((s.batch, SEGMENT_ROWS, s.length), jnp.float32),
        "a": ((s.blocks, s.rows, 1), jnp.float32),
        "d": ((1, s.heads * s.p), jnp.float32),
        "spread": ((3 * s.rows, s.lanes), jnp.bfloat16),
        "state": ((s.batch, s.blocks, s.n, s.lanes), jnp.float32),
        "start": ((s.batch, s.chunks, s.blocks, s.n, s.lanes), jnp.float32),
    }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def given(sizes: Sizes, names: tuple[str, ...]) -> list[str]:
    """Of the operands' names those that this call has."""
    absent = {"segment_ids": not sizes.packed, "d": not sizes.skip}
    return [name for name in names if not absent.get(name, False)]


# -- in VMEM --


def dot(left, right, contract: tuple[int, int] = (1, 0)):
    """Matrix product into float32; float32 operands keep their 24 bits, whatever precision the caller has set."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _top_bits(v):
    """float32 with the last 16 bits cleared: a bfloat16, and what is left of v is exact."""
    bits = lax.bitcast_convert_type(v, jnp.int32) & jnp.int32(-65536)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _thirds(v):
    """v float32 as three bfloat16 arrays whose sum it is."""
    high = _top_bits(v)
    middle = _top_bits(v - high)
    return [part.astype(jnp.bfloat16) for part in (high, middle, v - high - middle)]


def spread_heads(v, spread):
    """v [rows,C], spread [3*rows,lanes] -> [C,lanes]: every lane gets its head's value."""
    return dot(jnp.concatenate(_thirds(v), axis=0), spread, (0, 0))


def sum_heads(v, spread):
    """v [C,lanes] summed over the lanes of each head: [rows,C]"""
    rows = spread.shape[0] // 3
    return sum(dot(spread[:rows], part, (1, 1)) for part in _thirds(v))


def running_sum(v, reverse: bool = False):
    """Along the lanes of [rows,C], in log2(C) steps; reverse: from the last lane."""
    size = v.shape[1]
    lane = lax.broadcasted_iota(jnp.int32, v.shape, 1)
    for step in (2**i for i in range((size - 1).bit_length())):
        if reverse:
            v = v + jnp.where(lane < size - step, pltpu.roll(v, size - step, 1), 0.0)
        else:
            v = v + jnp.where(lane >= step, pltpu.roll(v, step, 1), 0.0)
    return v


class Decays(NamedTuple):
    """Of one chunk and head block: a head per row. `column` and the masks by token have tokens along sublanes."""

    dt: jax.Array  # [rows,C]
    whole: jax.Array  # [rows,C] running sum of dt A: its integer parts (`hybridvlm.ops.ssd.decays.log_decays`)
    total: jax.Array  # [rows,C] that of the rest
    column: jax.Array  # [C,2*rows] both, total first
    read: jax.Array  # [rows,C] exp(whole + total)
    to_end: jax.Array  # [rows,C] what is left of a token's inflow at the end, 0 where it does not get there
    reads: jax.Array | None  # [C,1] 1 where a token reads the incoming state
    token_mask: jax.Array | None  # [C,1] whether it is no padding
    kept: jax.Array | None  # [1,1] 1 where the outgoing state continues the incoming one
    seen: jax.Array  # [C,C] bool, whether token i sees token j

    def between(self, head: int):
        """exp(t_i - t_j) where token i sees token j, else 0: [C,C]. The mask comes before exp: no overflow."""
        row, rows = slice(head, head + 1), self.total.shape[0]
        exponent = self.column[:, rows + head : rows + head + 1] - self.whole[row]
        exponent += self.column[:, row] - self.total[row]
        return jnp.exp(jnp.where(self.seen, exponent, -jnp.inf))


def valid_tokens(sizes: Sizes, chunk, axis: int, shape: tuple[int, ...]):
    """Whether a position of the chunk is inside the row; tokens along `axis` of shape."""
    return lax.broadcasted_iota(jnp.int32, shape, axis) < sizes.length - chunk * sizes.chunk


def load_tokens(sizes: Sizes, chunk, ref, lanes: slice = slice(None)):
    """[C,lanes] of a block [1,C,...], 0 beyond the row."""
    v = ref[0, :, lanes]
    return jnp.where(valid_tokens(sizes, chunk, 0, (sizes.chunk, 1)), v, 0).astype(v.dtype) if sizes.ragged else v


def decays(sizes: Sizes, chunk, dt, a, segment_ids) -> Decays:
    """dt [rows,C], a [rows,1], segment_ids [8,C] or None."""
    size = sizes.chunk
    if sizes.ragged:
        dt = jnp.where(valid_tokens(sizes, chunk, 1, dt.shape), dt, 0.0)
    whole, total = (running_sum(v) for v in log_decays(dt, a))
    # The last token's own distance is 0 whatever the sums are; written so, its two gradients need not cancel.
    last = lax.broadcasted_iota(jnp.int32, total.shape, 1) == size - 1
    to_end = (whole[:, size - 1 :] - whole) + (total[:, size - 1 :] - total)
    to_end = jnp.exp(jnp.where(last, 0.0, to_end))
    read = jnp.exp(whole + total)
    seen = lax.broadcasted_iota(jnp.int32, (size, size), 0) >= lax.broadcasted_iota(jnp.int32, (size, size), 1)
    if segment_ids is None:
        column = jnp.transpose(jnp.concatenate([total, whole], axis=0))
        return Decays(dt, whole, total, column, read, to_end, None, None, None, seen)
    if sizes.ragged:
        segment_ids = jnp.where(valid_tokens(sizes, chunk, 1, segment_ids.shape), segment_ids, 0.0)
    columns = jnp.transpose(jnp.concatenate([total, whole, segment_ids], axis=0))
    reader, reads = (columns[:, 2 * sizes.rows + i : 2 * sizes.rows + i + 1] for i in (0, 2))
    return Decays(
        dt=dt,
        whole=whole,
        total=total,
        column=columns,
        read=read,
        to_end=jnp.where(segment_ids[3:4] > 0, to_end, 0.0),
        reads=reads,
        token_mask=reader >= 0,
        kept=segment_ids[4:5, :1],
        seen=seen & (reader == segment_ids[1:2]),
    )


@functools.cache
def vmem_limit(sizes: Sizes, itemsize: int, backward: bool) -> int:
    """Bytes of VMEM to ask for, with room: the blocks, twice for the pipeline, the states, and the float32 values of a chunk; at
    most what every TPU since v5e has."""
    tokens, state = sizes.chunk * sizes.lanes, 4 * sizes.n * sizes.lanes
    squares = 4 * sizes.chunk**2
    count = (3, 12, 8) if backward else (2, 6, 6)
    need = 2 * count[0] * itemsize * tokens + 4 * count[1] * tokens + count[2] * state + 12 * squares
    return min(60 << 20, max(32 << 20, 2 * need))
