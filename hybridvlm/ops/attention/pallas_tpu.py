"""Attention as a Mosaic TPU kernel: segments, indices and log-sum-exp, heads read where the projection left them.

q lies as [B,T,H*P] and k, v as [B,L,K*P], as matmuls write them: a block is some rows by the lanes of whole kv heads, so that
nothing is transposed or repeated in HBM. A program instance works on one tile of rows by keys, for the G query heads of
each kv head in its block; maxima, sums and outputs stay in VMEM over the keys of a row.

What a tile needs (nothing, no mask, a mask) is decided from the extremes of the segments and indices that meet in it, as
`xla.py` does; they are prefetched scalars. A causal row without indices walks only the tiles up to its diagonal: rows i and
I-1-i share a line of the grid, of I+1 steps for any i, so no step is empty. Otherwise a row walks all tiles, and those
outside the range that any of its queries may see are neither fetched nor computed.

The backward pass is that of `pallas_tpu_backward.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.attention.reference import NOTHING
from hybridvlm.ops.attention.xla import HIDDEN
from hybridvlm.ops.platforms import require_platform
from hybridvlm.ops.traffic import tiled_bytes

LANES = 128
BLOCK = 512  # most rows and keys of a tile
VMEM_BYTES = 96 * 2**20
LOW, HIGH, FIRST, LAST, ONE, BEGIN, END = range(7)  # what is prefetched of a block of rows or keys
STATS = 7
PLACE_BYTES = 32  # of one token's segment and index: two rows of an array in tiles of eight
BIG = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes: G query heads for each of K kv heads, `together` kv heads in a block; rows x keys in a tile, I x J of them."""

    groups: int
    kv_heads: int
    together: int
    width: int
    v_width: int
    rows: int
    keys: int
    row_blocks: int
    key_blocks: int
    causal: bool
    folded: bool
    scale: float

    @property
    def head_blocks(self) -> int:
        return self.kv_heads // self.together

    @property
    def steps(self) -> tuple[int, int]:
        """Lines of tiles, and steps of a line."""
        if self.folded:
            return -(-self.row_blocks // 2), self.row_blocks + 1
        return self.row_blocks, self.key_blocks

    def tile(self, line, step):
        """(row block, key block, whether it is a row's first tile, and its last) of a step of a line."""
        if not self.folded:
            return line, step, step == 0, step == self.key_blocks - 1
        lower = step <= line
        i = jnp.where(lower, line, self.row_blocks - 1 - line)
        j = jnp.where(lower, step, step - line - 1)
        return i, j, j == 0, j == i


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_segment: jax.Array | None,
    kv_segment: jax.Array | None,
    q_index: jax.Array | None,
    kv_index: jax.Array | None,
    causal: bool,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """q [B,T,H,P], k and v [B,L,K,P] -> out [B,T,H,P] in q.dtype, lse [B,H,T] fp32. Arguments as in `api.attention`.

    Raises NotImplementedError on other platforms and for operands that are not all bfloat16 or all float32.
    """
    require_platform("attention", "pallas_tpu", "tpu", "'xla'")
    check_dtypes(q, k, v)
    b, t, heads, width = q.shape
    length, kv_heads, v_width = v.shape[1:]
    block = BLOCK
    folded = causal and q_index is None and kv_index is None and t == length
    q_segment = jnp.ones((b, t), jnp.int32) if q_segment is None else q_segment
    kv_segment = jnp.ones((b, length), jnp.int32) if kv_segment is None else kv_segment
    q_index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)) if q_index is None else q_index
    kv_index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length)) if kv_index is None else kv_index
    rows, row_blocks = block_of(t, block)
    keys, key_blocks = block_of(length, block)
    sizes = Sizes(
        groups=heads // kv_heads,
        kv_heads=kv_heads,
        together=together(kv_heads, heads // kv_heads, width, v_width),
        width=width,
        v_width=v_width,
        rows=rows,
        keys=keys,
        row_blocks=row_blocks,
        key_blocks=key_blocks,
        causal=causal,
        folded=folded,
        scale=scale,
    )
    q, q_segment, q_index = (padded(x, rows * row_blocks) for x in (q, q_segment, q_index))
    k, v, kv_segment, kv_index = (padded(x, keys * key_blocks) for x in (k, v, kv_segment, kv_index))
    out, lse = _attention(
        sizes,
        *(x.reshape(*x.shape[:2], -1) for x in (q, k, v)),
        jnp.stack([q_segment, q_index], axis=1).astype(jnp.int32),
        jnp.stack([kv_segment, kv_index], axis=1).astype(jnp.int32),
    )
    return out[:, :t].reshape(b, t, heads, v_width), lse.reshape(b, heads, -1)[:, :, :t]


def check_dtypes(*arrays: jax.Array) -> None:
    """NotImplementedError unless the operands are of one type that the kernels take."""
    dtypes = {x.dtype.name for x in arrays}
    if dtypes not in ({"bfloat16"}, {"float32"}):
        raise NotImplementedError(
            f"pallas_tpu: operands must be all bfloat16 or all float32, got {sorted(dtypes)}; cast them, or take 'xla'"
        )


def block_of(length: int, most: int) -> tuple[int, int]:
    """Size and number of the blocks of a length: multiples of the lanes, as large as adds little padding."""
    sizes = [size for size in (most, most // 2, most // 4) if size >= LANES] or [LANES]
    for size in sizes:
        padded = -(-length // size) * size
        if padded <= 1.04 * length:
            return size, padded // size
    size = min(sizes[0], -(-length // LANES) * LANES)
    if length > sizes[0]:
        size = sizes[-1]
    return size, -(-length // size)


def together(kv_heads: int, groups: int, *widths: int) -> int:
    """kv heads in a block: the fewest whose lanes are whole tiles, or all of them."""
    for count in range(1, kv_heads):
        if kv_heads % count == 0 and all(count * width % LANES == 0 for width in widths):
            return count
    return kv_heads


def padded(x: jax.Array, length: int) -> jax.Array:
    """Zeros (segment 0: seen by nobody) behind axis 1, up to the length."""
    more = length - x.shape[1]
    return x if more == 0 else jnp.pad(x, ((0, 0), (0, more)) + ((0, 0),) * (x.ndim - 2))


def scalars(sizes: Sizes, q_where: jax.Array, kv_where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What decides about tiles: q_where [B,2,T], kv_where [B,2,L] -> [B*I*7] and [B*J*7] int32, flat for scalar memory."""
    b = q_where.shape[0]

    def extremes(where, blocks):
        segment, index = where.reshape(b, 2, blocks, -1).swapaxes(0, 1)
        real = segment > 0
        low = jnp.min(jnp.where(real, segment, BIG), axis=-1)
        high = jnp.max(segment, axis=-1)
        first = jnp.min(jnp.where(real, index, BIG), axis=-1)
        last = jnp.max(jnp.where(real, index, -BIG), axis=-1)
        one = (low == high) & jnp.all(real, axis=-1)
        return jnp.stack([low, high, first, last, one.astype(jnp.int32)], axis=-1)

    of_rows, of_keys = extremes(q_where, sizes.row_blocks), extremes(kv_where, sizes.key_blocks)
    low, high, _, last, _ = jnp.moveaxis(of_rows, -1, 0)[..., None]
    key_low, key_high, key_first, _, _ = jnp.moveaxis(of_keys, -1, 0)[:, :, None]
    meet = (low <= key_high) & (key_low <= high)
    if sizes.causal:
        meet &= key_first <= last

    def with_range(stats, meet):
        begin = jnp.argmax(meet, axis=-1)
        end = jnp.where(jnp.any(meet, axis=-1), meet.shape[-1] - 1 - jnp.argmax(meet[..., ::-1], axis=-1), begin)
        return jnp.concatenate([stats, jnp.stack([begin, end], axis=-1).astype(jnp.int32)], axis=-1).reshape(-1)

    return with_range(of_rows, meet), with_range(of_keys, meet.swapaxes(1, 2))


def tile_kind(sizes: Sizes, of_rows, of_keys, n, i, j):
    """(whether any query of the tile may see any key, whether all see all), from the prefetched scalars."""
    row, key = (n * sizes.row_blocks + i) * STATS, (n * sizes.key_blocks + j) * STATS
    meet = (of_rows[row + LOW] <= of_keys[key + HIGH]) & (of_keys[key + LOW] <= of_rows[row + HIGH])
    whole = (of_rows[row + ONE] + of_keys[key + ONE] == 2) & (of_rows[row + LOW] == of_keys[key + LOW])
    if sizes.causal:
        meet &= of_keys[key + FIRST] <= of_rows[row + LAST]
        whole &= of_keys[key + LAST] <= of_rows[row + FIRST]
    return meet, whole


def column(row: jax.Array) -> jax.Array:
    """[1,n] -> [n,128], every lane the same: the way from lanes to sublanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matmul over axis contract[0] of a and contract[1] of b, in fp32; float32 operands keep all their bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def each_head(sizes: Sizes, body: Callable[..., None]) -> None:
    """body(h, lanes in q, in k, in v, in out) for every query head of a block: a loop where heads are whole tiles of lanes."""
    p, w, heads = sizes.width, sizes.v_width, sizes.together * sizes.groups
    if p % LANES == 0 and w % LANES == 0:  # then a block has one kv head

        def step(h, carry):
            body(
                h,
                pl.ds(pl.multiple_of(h * p, LANES), p),
                slice(0, p),
                slice(0, w),
                pl.ds(pl.multiple_of(h * w, LANES), w),
            )
            return carry

        jax.lax.fori_loop(0, heads, step, 0)
    else:
        for h in range(heads):
            c = h // sizes.groups
            body(h, pl.ds(h * p, p), slice(c * p, c * p + p), slice(c * w, c * w + w), pl.ds(h * w, w))


def row_maps(sizes: Sizes) -> tuple[Callable, Callable]:
    """Index maps by (example, head block, line, step): of a block of rows, and of one of keys, [B,T,lanes]."""

    def rows(n, c, line, step, of_rows, of_keys):
        return n, sizes.tile(line, step)[0], c

    def keys(n, c, line, step, of_rows, of_keys):
        i, j, _, _ = sizes.tile(line, step)
        at = (n * sizes.row_blocks + i) * STATS
        return n, jnp.clip(j, of_rows[at + BEGIN], of_rows[at + END]), c

    return rows, keys


def _forward_kernel(sizes: Sizes, of_rows, of_keys, q, k, v, q_where, kv_where, out, lse, highest, total, carry, place):
    n, line, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    i, j, first, last = sizes.tile(line, step)
    meet, whole = tile_kind(sizes, of_rows, of_keys, n, i, j)

    @pl.when(first)
    def _():
        highest[...] = jnp.full_like(highest, NOTHING)
        total[...] = jnp.zeros_like(total)
        carry[...] = jnp.zeros_like(carry)
        place[0] = column(q_where[0, 0:1])
        place[1] = column(q_where[0, 1:2])

    def advance(hide: bool) -> None:
        def head(h, of_q, of_k, of_v, _):
            score = dot(q[0, :, of_q], k[0, :, of_k], (1, 1)) * sizes.scale
            if hide:
                score = jnp.where(visible(sizes, place, kv_where), score, HIDDEN)
            before = highest[h][:, :1]
            now = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
            weight = jnp.exp(score - now)
            fade = jnp.exp(before - now)
            sums = total[h][:, :1] * fade + jnp.sum(weight, axis=1, keepdims=True)
            carry[h] = carry[h] * fade + dot(weight.astype(v.dtype), v[0, :, of_v], (1, 0))
            highest[h] = jnp.broadcast_to(now, highest.shape[1:])
            total[h] = jnp.broadcast_to(sums, total.shape[1:])

        each_head(sizes, head)

    pl.when(meet & whole)(lambda: advance(False))
    pl.when(meet & ~whole)(lambda: advance(True))

    @pl.when(last)
    def _():
        def head(h, _of_q, _of_k, _of_v, of_out):
            some = total[h] > 0
            sums = jnp.where(some, total[h], 1.0)
            out[0, :, of_out] = (carry[h] / sums[:, :1]).astype(out.dtype)
            lse[0, 0, pl.ds(h, 1)] = jnp.where(some, highest[h] + jnp.log(sums), NOTHING).T[:1]

        each_head(sizes, head)


def visible(sizes: Sizes, place, kv_where) -> jax.Array:
    """Mask [rows,keys] of a tile: place [2,rows,128] and kv_where [1,2,keys], segments before indices."""
    segment = place[0][:, :1]
    seen = (segment == kv_where[0, 0:1]) & (segment > 0)
    return seen & (kv_where[0, 1:2] <= place[1][:, :1]) if sizes.causal else seen


def parameters(lines: int) -> pltpu.CompilerParams:
    """The grid is (example, head block, ..., lines of tiles, steps): only what accumulates goes in order."""
    semantics = ("parallel", "parallel", *("arbitrary",) * lines)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_BYTES)


def nbytes(*arrays: jax.Array | jax.ShapeDtypeStruct) -> int:
    """In tiled memory."""
    return sum(tiled_bytes(x.shape, x.dtype) for x in arrays)


def reads(sizes: Sizes) -> int:
    """Blocks of keys fetched for the rows of a head block, or of rows for its keys."""
    lines, steps = sizes.steps
    return lines * steps if not sizes.folded else sizes.row_blocks * (sizes.row_blocks + 1) // 2


def cost(sizes: Sizes, b: int, matmuls: int, moved: int) -> pl.CostEstimate:
    """Of the tiles of an unpacked row: two operations per multiply-add, an exponential per score, bytes as told."""
    scores = b * sizes.kv_heads * sizes.groups * reads(sizes) * sizes.rows * sizes.keys
    width = (sizes.width + sizes.v_width) // 2
    return pl.CostEstimate(flops=2 * matmuls * scores * width, transcendentals=scores, bytes_accessed=moved)


def _forward(sizes: Sizes, q, k, v, q_where, kv_where):
    b, t = q.shape[:2]
    heads = sizes.together * sizes.groups
    rows, keys = row_maps(sizes)
    lanes, v_lanes = sizes.together * sizes.width, sizes.together * sizes.v_width

    def where(of):
        return lambda *at: (at[0], 0, of(*at)[1])

    lines, steps = sizes.steps
    out_shape = (
        jax.ShapeDtypeStruct((b, t, sizes.kv_heads * sizes.groups * sizes.v_width), q.dtype),
        jax.ShapeDtypeStruct((b, sizes.head_blocks, heads, t), jnp.float32),
    )
    fetched = reads(sizes)
    moved = nbytes(q, *out_shape) + nbytes(k, v) // sizes.key_blocks * fetched
    moved += PLACE_BYTES * b * sizes.head_blocks * (t + fetched * sizes.keys)
    return pl.pallas_call(
        functools.partial(_forward_kernel, sizes),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, sizes.head_blocks, lines, steps),
            in_specs=[
                pl.BlockSpec((1, sizes.rows, sizes.groups * lanes), rows),
                pl.BlockSpec((1, sizes.keys, lanes), keys),
                pl.BlockSpec((1, sizes.keys, v_lanes), keys),
                pl.BlockSpec((1, 2, sizes.rows), where(rows)),
                pl.BlockSpec((1, 2, sizes.keys), where(keys)),
            ],
            out_specs=[
                pl.BlockSpec((1, sizes.rows, sizes.groups * v_lanes), rows),
                pl.BlockSpec((1, 1, heads, sizes.rows), lambda *at: (at[0], at[1], 0, rows(*at)[1])),
            ],
            scratch_shapes=[
                pltpu.VMEM((heads, sizes.rows, LANES), jnp.float32),
                pltpu.VMEM((heads, sizes.rows, LANES), jnp.float32),
                pltpu.VMEM((heads, sizes.rows, sizes.v_width), jnp.float32),
                pltpu.VMEM((2, sizes.rows, LANES), jnp.int32),
            ],
        ),
        compiler_params=parameters(2),
        cost_estimate=cost(sizes, b, 2, moved),
        name="attention_forward",
    )(*scalars(sizes, q_where, kv_where), q, k, v, q_where, kv_where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(sizes: Sizes, q, k, v, q_where, kv_where):
    """q [B,T,H*P], k and v [B,L,K*P], where [B,2,T] and [B,2,L] -> out [B,T,H*P], lse [B,K/n,n*G,T] fp32."""
    return _forward(sizes, q, k, v, q_where, kv_where)


def _attention_fwd(sizes: Sizes, *arrays):
    out, lse = _attention(sizes, *arrays)
    return (out, lse), (*arrays, out, lse)


def _attention_bwd(sizes: Sizes, saved, gradients):
    from hybridvlm.ops.attention.pallas_tpu_backward import backward

    q, k, v, q_where, kv_where, out, lse = saved
    return *backward(sizes, q, k, v, q_where, kv_where, out, lse, *gradients), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)
