"""Text-to-visual scores as a Mosaic GPU kernel for Hopper: the keys are read once, and no weights leave the chip.

A block has 128 keys, 64 for each of two warpgroups, and meets the query rows head by head; a third warpgroup loads. With the
rows' log-sum-exp given, a weight is final as soon as it is computed, so heads and rows are reduced in registers and one
number per key is written.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridvlm.ops.attention import xla
from hybridvlm.ops.attention.pallas_gpu import (
    LOG2E,
    MATRIX,
    ROW,
    ROWS,
    STAGES,
    WORKERS,
    across,
    check_operands,
    down,
    filled,
    matrix_memory,
    product,
    slot_of,
)
from hybridvlm.ops.mosaic import load_as
from hybridvlm.ops.platforms import require_platform


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

    Up to 128 rows k is read once; for every 128 more a block reads its keys again, most likely out of the L2 cache. Its
    gradient is that of "xla".
    Raises NotImplementedError, with the reason, on other platforms and for what the kernel cannot do.
    """
    require_platform("text_to_visual", "pallas_gpu", "gpu", "'xla'")
    check_operands("text_to_visual", q, k)
    options = (("heads", heads), ("queries", queries), ("causal", causal), ("scale", scale))
    return _score(options, q, k, lse, row_weight, q_segment, kv_segment, q_index, kv_index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _score(options, *arrays):
    return _launch_score(*arrays, **dict(options))


def _score_fwd(options, *arrays):
    return _score(options, *arrays), arrays


_score.defvjp(_score_fwd, xla.score_gradients)


def _launch_score(
    q,
    k,
    lse,
    row_weight,
    q_segment,
    kv_segment,
    q_index,
    kv_index,
    *,
    heads: str,
    queries: str,
    causal: bool,
    scale: float,
):
    b, t, head_count, width = q.shape
    length, kv_heads = k.shape[1:3]
    groups, keys = head_count // kv_heads, WORKERS * ROWS
    rows = 64 if t <= 64 else 128
    t_full, full = -(-t // rows) * rows, -(-length // keys) * keys
    tiles = t_full // rows

    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, t_full - t)))
    of_rows = [xla._pad(x, t_full) for x in (q_segment, q_index, row_weight)]
    of_keys = [xla._pad(x, full) for x in (kv_segment, kv_index)]
    operands = (xla._pad(q, t_full), xla._pad(k, full), lse, *of_rows, *of_keys)
    scratch = {
        "q_s": matrix_memory(width, q.dtype, STAGES, rows),
        "k_s": matrix_memory(width, q.dtype, STAGES, keys),
        "lse_s": plgpu.SMEM((STAGES, rows), jnp.float32),
        "score_s": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
        "asked": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "loaded": plgpu.Barrier(num_barriers=STAGES),
        "q_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES),
        "k_free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES),
    }

    def kernel(*refs, q_s, k_s, lse_s, score_s, asked, loaded, q_free, k_free):
        q_g, k_g, lse_g, q_segment_g, q_index_g, weight_g, kv_segment_g, kv_index_g, score_g = refs
        bi, block, w = lax.axis_index("batch"), lax.axis_index("block"), lax.axis_index("warpgroup")

        @pl.when(w == WORKERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def reuse(free, count):
                pl.when(count >= STAGES)(lambda: plgpu.barrier_wait(free.at[slot_of(count)]))

            @pl.loop(0, tiles)
            def _(tile):
                row_slice = pl.ds(tile * rows, rows)

                @pl.loop(0, kv_heads)
                def _(kv_head):
                    k_count = tile * kv_heads + kv_head
                    reuse(k_free, k_count)
                    slot = slot_of(k_count)
                    plgpu.copy_gmem_to_smem(
                        k_g.at[bi, pl.ds(block * keys, keys), kv_head], k_s.at[slot], loaded.at[slot]
                    )

                    @pl.loop(0, groups)
                    def _(member):
                        count, head = k_count * groups + member, kv_head * groups + member
                        reuse(q_free, count)
                        slot = slot_of(count)
                        plgpu.copy_gmem_to_smem(q_g.at[bi, row_slice, head], q_s.at[slot], asked.at[slot])
                        plgpu.copy_gmem_to_smem(lse_g.at[bi, head, row_slice], lse_s.at[slot], asked.at[slot])

            for count, free in ((tiles * head_count, q_free), (tiles * kv_heads, k_free)):
                for last in range(max(0, count - STAGES), count):
                    plgpu.barrier_wait(free.at[last % STAGES])

        @pl.when(w < WORKERS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(block * keys + w * ROWS, ROWS)
            segment, index = (load_as(x.at[bi, mine], layout=ROW, optimized=False) for x in (kv_segment_g, kv_index_g))

            def tile_step(tile, score):
                def head_step(k_slot, first, member, weight):
                    slot = slot_of(first + member)
                    plgpu.barrier_wait(asked.at[slot])
                    own = k_s.at[k_slot, pl.ds(w * ROWS, ROWS)]
                    raw = product(own, q_s.at[slot].transpose((1, 0)), rows)
                    # At most 0 for a key that is seen; held there, so that an unseen key cannot overflow.
                    power = jnp.minimum(raw * (scale * LOG2E) - across(lse_s.at[slot], rows) * LOG2E, 0.0)
                    plgpu.barrier_arrive(q_free.at[slot])
                    return weight + jnp.exp2(power) if heads == "mean" else jnp.maximum(weight, jnp.exp2(power))

                def kv_step(kv_head, weight):
                    k_count = tile * kv_heads + kv_head
                    plgpu.barrier_wait(loaded.at[slot_of(k_count)])
                    step = functools.partial(head_step, slot_of(k_count), k_count * groups)
                    weight = lax.fori_loop(0, groups, step, weight)
                    plgpu.barrier_arrive(k_free.at[slot_of(k_count)])
                    return weight

                weight = lax.fori_loop(0, kv_heads, kv_step, filled((ROWS, rows), 0.0, MATRIX))
                q_segment, q_index, row_weight = (
                    across(x.at[bi, pl.ds(tile * rows, rows)], rows, optimized=False)
                    for x in (q_segment_g, q_index_g, weight_g)
                )
                seen = (down(segment, rows) == q_segment) & (q_segment > 0)
                if causal:
                    seen &= down(index, rows) <= q_index
                weight = jnp.where(seen, weight * row_weight, 0.0)
                if heads == "mean":
                    weight = weight * (1 / head_count)
                if queries == "max":
                    return jnp.maximum(score, jnp.max(weight, axis=1))
                return score + jnp.sum(weight, axis=1)

            score_s.at[w][...] = lax.fori_loop(0, tiles, tile_step, filled((ROWS,), 0.0, ROW))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(score_s.at[w], score_g.at[bi, mine])
            plgpu.wait_smem_to_gmem(0)

    score = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((b, full), jnp.float32),
        scratch_types=scratch,
        grid=(full // keys, b),
        grid_names=("block", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="text_to_visual",
    )(*operands)
    return score[:, :length]
