"""Gradients of the attention kernel: one kernel for q over the tiles of a row, one for k and v over the tiles of a key block.

Scores are computed again from q, k and the log-sum-exp. Per query, shift = d_out·out - d_lse is the same for all its keys:
d score = weight * (d_out·v - shift). The kernel for k and v holds its tiles with keys as rows, so that what belongs to a
query (log-sum-exp, shift) lies along lanes as it comes, and the G query heads of a kv head add up in VMEM.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.attention.pallas_tpu_common import (
    BEGIN,
    END,
    LANES,
    PLACE_BYTES,
    STATS,
    Sizes,
    column,
    cost,
    dot,
    each_head,
    nbytes,
    parameters,
    reads,
    row_maps,
    scalars,
    tile_kind,
    visible,
)
from hybridvlm.ops.attention.xla import MASK_VALUE


def backward(sizes: Sizes, q, k, v, q_where, kv_where, out, lse, d_out, d_lse):
    """Of out [B,T,H*P] and lse [B,K/n,n*G,T]: d_q like q, d_k and d_v like k and v."""
    b, t = q.shape[:2]
    product = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).reshape(b, t, *lse.shape[1:3], -1)
    shift = jnp.moveaxis(jnp.sum(product, axis=-1), 1, 3) - d_lse
    given = (*scalars(sizes, q_where, kv_where), q, k, v, d_out, lse, shift, q_where, kv_where)
    return _d_rows(sizes, *given), *_d_keys(sizes, *given)


def _specs(sizes: Sizes, rows, keys) -> list[pl.BlockSpec]:
    """Of q, k, v, d_out, lse, shift and the positions, by the maps of row and key blocks."""
    heads = sizes.together * sizes.groups
    lanes, v_lanes = sizes.together * sizes.width, sizes.together * sizes.v_width

    def along_rows(*at):
        return at[0], at[1], 0, rows(*at)[1]

    return [
        pl.BlockSpec((1, sizes.rows, sizes.groups * lanes), rows),
        pl.BlockSpec((1, sizes.keys, lanes), keys),
        pl.BlockSpec((1, sizes.keys, v_lanes), keys),
        pl.BlockSpec((1, sizes.rows, sizes.groups * v_lanes), rows),
        pl.BlockSpec((1, 1, heads, sizes.rows), along_rows),
        pl.BlockSpec((1, 1, heads, sizes.rows), along_rows),
        pl.BlockSpec((1, 2, sizes.rows), lambda *at: (at[0], 0, rows(*at)[1])),
        pl.BlockSpec((1, 2, sizes.keys), lambda *at: (at[0], 0, keys(*at)[1])),
    ]


def _d_rows_kernel(
    sizes: Sizes, of_rows, of_keys, q, k, v, d_out, lse, shift, q_where, kv_where, d_q, carry, per_row, columns
):
    n, line, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    i, j, first, last = sizes.tile(line, step)
    meet, whole = tile_kind(sizes, of_rows, of_keys, n, i, j)

    @pl.when(first)
    def _():
        carry[...] = jnp.zeros_like(carry)
        columns[0] = column(q_where[0, 0:1])
        columns[1] = column(q_where[0, 1:2])

        def head(h, *_):
            per_row[0, h] = column(lse[0, 0, pl.ds(h, 1)])
            per_row[1, h] = column(shift[0, 0, pl.ds(h, 1)])

        each_head(sizes, head)

    def advance(hide: bool) -> None:
        def head(h, of_q, of_k, of_v, of_out):
            score = dot(q[0, :, of_q], k[0, :, of_k], (1, 1)) * sizes.scale - per_row[0, h][:, :1]
            if hide:
                score = jnp.where(visible(sizes, columns, kv_where), score, MASK_VALUE)
            d_weight = dot(d_out[0, :, of_out], v[0, :, of_v], (1, 1))
            d_score = jnp.exp(score) * (d_weight - per_row[1, h][:, :1]) * sizes.scale
            carry[:, of_q] += dot(d_score.astype(k.dtype), k[0, :, of_k], (1, 0))

        each_head(sizes, head)

    pl.when(meet & whole)(lambda: advance(False))
    pl.when(meet & ~whole)(lambda: advance(True))

    @pl.when(last)
    def _():
        d_q[0] = carry[...].astype(d_q.dtype)


def _d_rows(sizes: Sizes, of_rows, of_keys, q, k, v, d_out, lse, shift, q_where, kv_where):
    b = q.shape[0]
    heads = sizes.together * sizes.groups
    rows, keys = row_maps(sizes)
    specs = _specs(sizes, rows, keys)
    fetched = reads(sizes)
    moved = 2 * nbytes(q) + nbytes(d_out, lse, shift) + nbytes(k, v) // sizes.key_blocks * fetched
    moved += PLACE_BYTES * b * sizes.head_blocks * (q.shape[1] + fetched * sizes.keys)
    return pl.pallas_call(
        functools.partial(_d_rows_kernel, sizes),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, sizes.head_blocks, *sizes.steps),
            in_specs=specs,
            out_specs=specs[0],
            scratch_shapes=[
                pltpu.VMEM((sizes.rows, sizes.groups * sizes.together * sizes.width), jnp.float32),
                pltpu.VMEM((2, heads, sizes.rows, LANES), jnp.float32),
                pltpu.VMEM((2, sizes.rows, LANES), jnp.int32),
            ],
        ),
        compiler_params=parameters(2),
        cost_estimate=cost(sizes, b, 3, moved),
        name="attention_backward_rows",
    )(of_rows, of_keys, q, k, v, d_out, lse, shift, q_where, kv_where)


def _key_tile(sizes: Sizes, line, step):
    """(row block, key block, whether it is the key block's first tile, and its last) of a step of a line of keys."""
    if not sizes.folded:
        return step, line, step == 0, step == sizes.row_blocks - 1
    blocks = sizes.row_blocks
    upper = step < blocks - line
    j = jnp.where(upper, line, blocks - 1 - line)
    i = jnp.where(upper, line + step, step - 1)
    return i, j, i == j, i == blocks - 1


def _d_keys_kernel(
    sizes: Sizes, of_rows, of_keys, q, k, v, d_out, lse, shift, q_where, kv_where, d_k, d_v, carry_k, carry_v, columns
):
    n, line, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    i, j, first, last = _key_tile(sizes, line, step)
    meet, whole = tile_kind(sizes, of_rows, of_keys, n, i, j)

    @pl.when(first)
    def _():
        carry_k[...] = jnp.zeros_like(carry_k)
        carry_v[...] = jnp.zeros_like(carry_v)
        columns[0] = column(kv_where[0, 0:1])
        columns[1] = column(kv_where[0, 1:2])

    def advance(hide: bool) -> None:
        def head(h, of_q, of_k, of_v, of_out):
            score = dot(k[0, :, of_k], q[0, :, of_q], (1, 1)) * sizes.scale - lse[0, 0, pl.ds(h, 1)]
            if hide:
                segment = columns[0][:, :1]
                seen = (segment == q_where[0, 0:1]) & (segment > 0)
                if sizes.causal:
                    seen &= columns[1][:, :1] <= q_where[0, 1:2]
                score = jnp.where(seen, score, MASK_VALUE)
            weight = jnp.exp(score)
            d_weight = dot(v[0, :, of_v], d_out[0, :, of_out], (1, 1))
            d_score = weight * (d_weight - shift[0, 0, pl.ds(h, 1)]) * sizes.scale
            carry_v[:, of_v] += dot(weight.astype(v.dtype), d_out[0, :, of_out], (1, 0))
            carry_k[:, of_k] += dot(d_score.astype(q.dtype), q[0, :, of_q], (1, 0))

        each_head(sizes, head)

    pl.when(meet & whole)(lambda: advance(False))
    pl.when(meet & ~whole)(lambda: advance(True))

    @pl.when(last)
    def _():
        d_k[0] = carry_k[...].astype(d_k.dtype)
        d_v[0] = carry_v[...].astype(d_v.dtype)


def _d_keys(sizes: Sizes, of_rows, of_keys, q, k, v, d_out, lse, shift, q_where, kv_where):
    b = q.shape[0]
    lanes, v_lanes = sizes.together * sizes.width, sizes.together * sizes.v_width

    def rows(n, c, line, step, of_rows, of_keys):
        i, j, _, _ = _key_tile(sizes, line, step)
        at = (n * sizes.key_blocks + j) * STATS
        return n, jnp.clip(i, of_keys[at + BEGIN], of_keys[at + END]), c

    def keys(n, c, line, step, of_rows, of_keys):
        return n, _key_tile(sizes, line, step)[1], c

    specs = _specs(sizes, rows, keys)
    fetched = reads(sizes)
    moved = 2 * nbytes(k, v) + nbytes(q, d_out, lse, shift) // sizes.row_blocks * fetched
    moved += PLACE_BYTES * b * sizes.head_blocks * (k.shape[1] + fetched * sizes.rows)
    steps = sizes.steps if sizes.folded else (sizes.key_blocks, sizes.row_blocks)
    return pl.pallas_call(
        functools.partial(_d_keys_kernel, sizes),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, sizes.head_blocks, *steps),
            in_specs=specs,
            out_specs=[specs[1], specs[2]],
            scratch_shapes=[
                pltpu.VMEM((sizes.keys, lanes), jnp.float32),
                pltpu.VMEM((sizes.keys, v_lanes), jnp.float32),
                pltpu.VMEM((2, sizes.keys, LANES), jnp.int32),
            ],
        ),
        compiler_params=parameters(2),
        cost_estimate=cost(sizes, b, 4, moved),
        name="attention_backward_keys",
    )(of_rows, of_keys, q, k, v, d_out, lse, shift, q_where, kv_where)
