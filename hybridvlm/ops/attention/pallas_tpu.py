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

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.attention.pallas_tpu_backward import backward
from hybridvlm.ops.attention.pallas_tpu_common import (
    BLOCK,
    LANES,
    PLACE_BYTES,
    Sizes,
    block_of,
    check_dtypes,
    column,
    cost,
    dot,
    each_head,
    nbytes,
    padded,
    parameters,
    reads,
    row_maps,
    scalars,
    tile_kind,
    together,
    visible,
)
from hybridvlm.ops.attention.reference import EMPTY_LSE
from hybridvlm.ops.attention.xla import MASK_VALUE
from hybridvlm.ops.platforms import require_platform


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


def _forward_kernel(
    sizes: Sizes, of_rows, of_keys, q, k, v, q_where, kv_where, out, lse, running_max, total, carry, q_columns
):
    n, line, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    i, j, first, last = sizes.tile(line, step)
    meet, whole = tile_kind(sizes, of_rows, of_keys, n, i, j)

    @pl.when(first)
    def _():
        running_max[...] = jnp.full_like(running_max, EMPTY_LSE)
        total[...] = jnp.zeros_like(total)
        carry[...] = jnp.zeros_like(carry)
        q_columns[0] = column(q_where[0, 0:1])
        q_columns[1] = column(q_where[0, 1:2])

    def advance(hide: bool) -> None:
        def head(h, of_q, of_k, of_v, _):
            score = dot(q[0, :, of_q], k[0, :, of_k], (1, 1)) * sizes.scale
            if hide:
                score = jnp.where(visible(sizes, q_columns, kv_where), score, MASK_VALUE)
            before = running_max[h][:, :1]
            now = jnp.maximum(before, jnp.max(score, axis=1, keepdims=True))
            weight = jnp.exp(score - now)
            rescale = jnp.exp(before - now)
            sums = total[h][:, :1] * rescale + jnp.sum(weight, axis=1, keepdims=True)
            carry[h] = carry[h] * rescale + dot(weight.astype(v.dtype), v[0, :, of_v], (1, 0))
            running_max[h] = jnp.broadcast_to(now, running_max.shape[1:])
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
            lse[0, 0, pl.ds(h, 1)] = jnp.where(some, running_max[h] + jnp.log(sums), EMPTY_LSE).T[:1]

        each_head(sizes, head)


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
    q, k, v, q_where, kv_where, out, lse = saved
    return *backward(sizes, q, k, v, q_where, kv_where, out, lse, *gradients), None, None


_attention.defvjp(_attention_fwd, _attention_bwd)
