"""Text-to-visual scores as a Mosaic TPU kernel: the keys are read once, and no weights leave the chip.

A program instance holds all query rows in VMEM and takes a block of keys of one kv head after the other. With the rows'
log-sum-exp given, a weight is one exponential of one product; its sum (or maximum) over heads stays in VMEM, keys as rows,
so that what belongs to a query row lies along lanes as it comes. After the last head the block is turned once, and reduced
over the rows that each key's segment and position allow.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.attention import xla
from hybridvlm.ops.attention.pallas_tpu_common import (
    LANES,
    VMEM_BYTES,
    block_of,
    check_dtypes,
    dot,
    nbytes,
    padded,
    together,
)
from hybridvlm.ops.platforms import require_platform

BLOCK = 512  # most keys at a time


def text_to_visual(
    q: jax.Array,
    k: jax.Array,
    *,
    lse: jax.Array,
    row_weight: jax.Array,
    q_segment: jax.Array,
    kv_segment: jax.Array,
    q_index: jax.Array,
    kv_index: jax.Array,
    heads: str,
    queries: str,
    causal: bool,
    scale: float,
) -> jax.Array:
    """q [B,R,H,P], k [B,L,K,P], lse [B,H,R], row_weight [B,R] -> score [B,L] fp32. Arguments as in `visual`.

    Its gradient is that of "xla". Query rows beyond what VMEM holds are taken in parts, which reads k once for each.
    Raises NotImplementedError on other platforms and for operands that are not all bfloat16 or all float32.
    """
    require_platform("text_to_visual", "pallas_tpu", "tpu", "'xla'")
    check_dtypes(q, k)
    options = (("heads", heads), ("queries", queries), ("causal", causal), ("scale", scale))
    resident = LANES * (2 * q.shape[2] * (q.shape[3] * q.dtype.itemsize + 4) + 8 * BLOCK * 4)
    most = max(VMEM_BYTES // resident, 1) * LANES
    score = jnp.zeros(k.shape[:2], jnp.float32)
    for start in range(0, q.shape[1], most):
        part = slice(start, start + most)
        rows = (
            q[:, part],
            k,
            lse[:, :, part],
            row_weight[:, part],
            q_segment[:, part],
            kv_segment,
            q_index[:, part],
            kv_index,
        )
        more = _score(options, *rows)
        score = jnp.maximum(score, more) if queries == "max" else score + more
    return score


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(options, q, k, lse, row_weight, q_segment, kv_segment, q_index, kv_index):
    options = dict(options)
    b, rows, head_count, width = q.shape
    length, kv_heads = k.shape[1], k.shape[2]
    keys, blocks = block_of(length, BLOCK)
    row_places = -(-rows // LANES) * LANES
    count = together(kv_heads, head_count // kv_heads, width)
    q, row_weight, q_segment, q_index = (padded(x, row_places) for x in (q, row_weight, q_segment, q_index))
    k, kv_segment, kv_index = (padded(x, keys * blocks) for x in (k, kv_segment, kv_index))
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, row_places - rows))).reshape(b, kv_heads // count, -1, row_places)
    q_where = jnp.stack([q_segment, q_index], axis=2).astype(jnp.int32)
    kv_where = jnp.stack([kv_segment, kv_index], axis=1).astype(jnp.int32)
    # by kv head first: the kernel picks the queries of the head whose keys it holds
    q = q.reshape(b, row_places, kv_heads // count, -1).swapaxes(1, 2)
    k = k.reshape(b, keys * blocks, -1)
    per_head = (head_count // kv_heads, count, width)
    score = _scores(per_head, keys, **options, arrays=(q, k, lse, row_weight[..., None], q_where, kv_where))
    return score[:, 0, :length]


def _score_fwd(options, *arrays):
    return _score(options, *arrays), arrays


_score.defvjp(_score_fwd, xla.score_gradients)


def _kernel(per_head, heads, queries, causal, scale, q, k, lse, row_weight, q_where, kv_where, score, total):
    groups, count, width = per_head
    c, last = pl.program_id(2), pl.num_programs(2) - 1

    @pl.when(c == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    def head(h, of_q, of_k) -> None:
        raw = dot(k[0, :, of_k], q[0, c, :, of_q], (1, 1)) * scale
        # The difference is at most 0 for a key that is seen; held there, so that an unseen key cannot overflow.
        weight = jnp.exp(jnp.minimum(raw - lse[0, c, pl.ds(h, 1)], 0.0))
        total[...] = total[...] + weight if heads == "mean" else jnp.maximum(total[...], weight)

    if width % LANES == 0:  # then a block has one kv head

        def step(h, carry):
            head(h, pl.ds(pl.multiple_of(h * width, LANES), width), slice(0, width))
            return carry

        jax.lax.fori_loop(0, groups, step, 0)
    else:
        for h in range(groups * count):
            head(h, pl.ds(h * width, width), slice(h // groups * width, (h // groups + 1) * width))

    @pl.when(c == last)
    def _():
        weight = total[...].T / ((last + 1) * groups * count if heads == "mean" else 1)  # [R,keys]
        segment = q_where[0, :, 0:1]
        seen = (segment == kv_where[0, 0:1]) & (segment > 0)
        if causal:
            seen &= kv_where[0, 1:2] <= q_where[0, :, 1:2]
        weight = jnp.where(seen, weight * row_weight[0], 0.0)
        reduce = jnp.max if queries == "max" else jnp.sum
        score[0] = reduce(weight, axis=0, keepdims=True)


def _scores(per_head, keys, *, heads, queries, causal, scale, arrays):
    """q [B,K/n,R,n*G*P], k [B,L,K*P], lse [B,K/n,n*G,R], row_weight [B,R,1], where [B,R,2] and [B,2,L] -> [B,1,L]."""
    q, k, lse, row_weight, q_where, kv_where = arrays
    groups, count, width = per_head
    b, head_blocks, rows, lanes = q.shape
    length = k.shape[1]
    pairs = b * head_blocks * groups * count * rows * length
    return pl.pallas_call(
        functools.partial(_kernel, per_head, heads, queries, causal, scale),
        out_shape=jax.ShapeDtypeStruct((b, 1, length), jnp.float32),
        grid=(b, length // keys, head_blocks),
        in_specs=[
            pl.BlockSpec((1, head_blocks, rows, lanes), lambda n, j, c: (n, 0, 0, 0)),
            pl.BlockSpec((1, keys, count * width), lambda n, j, c: (n, j, c)),
            pl.BlockSpec((1, head_blocks, groups * count, rows), lambda n, j, c: (n, 0, 0, 0)),
            pl.BlockSpec((1, rows, 1), lambda n, j, c: (n, 0, 0)),
            pl.BlockSpec((1, rows, 2), lambda n, j, c: (n, 0, 0)),
            pl.BlockSpec((1, 2, keys), lambda n, j, c: (n, 0, j)),
        ],
        out_specs=pl.BlockSpec((1, 1, keys), lambda n, j, c: (n, 0, j)),
        scratch_shapes=[pltpu.VMEM((keys, rows), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * width,
            transcendentals=pairs,
            bytes_accessed=nbytes(q, k, lse, row_weight, q_where, kv_where) + 4 * b * length,
        ),
        name="text_to_visual",
    )(q, k, lse, row_weight, q_where, kv_where)
