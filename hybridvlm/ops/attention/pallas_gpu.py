"""Attention as a Mosaic GPU kernel for Hopper: segments, indices and log-sum-exp.

A block has 128 query rows of one head, 64 for each of two warpgroups; a third one brings the keys and values in
tiles that both of them use. Which tiles a block visits, and which of them need no mask, is worked out beforehand from
segments and indices. The backward pass is `xla.py`'s, from the kernel's own outputs and log-sum-exp.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib import cuda_versions
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridvlm.ops.attention import xla
from hybridvlm.ops.attention.reference import EMPTY_LSE
from hybridvlm.ops.mosaic import load_as
from hybridvlm.ops.platforms import require_platform

ROWS = 64  # rows of a tensor core instruction: what one warpgroup computes
WORKERS = 2  # warpgroups that compute; one more loads
STAGES = 2  # tiles in shared memory at once: the one in use and the next
BACKWARD_BLOCK = 512  # most rows and keys of a tile of the backward pass, all heads at once
LOG2E = math.log2(math.e)

MATRIX = plgpu.Layout.WGMMA
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a matrix
COLUMN = plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class _Static:
    causal: bool
    scale: float
    length: int  # keys, without what fills the last tile


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

    Raises NotImplementedError, with the reason, on other platforms and for what the kernel cannot do.
    """
    require_platform("attention", "pallas_gpu", "gpu", "'xla'")
    check_operands("attention", q, k)
    if causal and cuda_versions is not None and 12080 <= cuda_versions.cuda_runtime_get_version() < 12091:
        # So says the causal kernel that comes with jax, jax/experimental/pallas/ops/gpu/attention_mgpu.py.
        raise NotImplementedError(
            "attention: the assembler of CUDA 12.8.0 to 12.9.0 miscompiles causal masks; 'pallas_gpu' needs another CUDA, "
            "or take 'xla'"
        )
    if v.shape != k.shape or v.dtype != k.dtype:
        raise NotImplementedError(
            f"attention: 'pallas_gpu' takes v of the shape and dtype of k, {k.shape} {k.dtype}, got {v.shape} {v.dtype}; "
            "take 'xla'"
        )
    b, t, length = *q.shape[:2], k.shape[1]
    static = _Static(causal, scale, length)
    if q_segment is None and q_index is None and kv_index is None:
        return _core(static, q, k, v, None)
    return _core(static, q, k, v, _coordinates(b, t, length, q_segment, kv_segment, q_index, kv_index))


def _coordinates(b: int, t: int, length: int, q_segment=None, kv_segment=None, q_index=None, kv_index=None):
    """Segments of q and k, indices of q and k, those not given filled in: all [B,...] int32."""
    return (
        jnp.ones((b, t), jnp.int32) if q_segment is None else q_segment,
        jnp.ones((b, length), jnp.int32) if kv_segment is None else kv_segment,
        jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t)) if q_index is None else q_index,
        jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length)) if kv_index is None else kv_index,
    )


def check_operands(op: str, q: jax.Array, k: jax.Array) -> None:
    if q.dtype != k.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"{op}: 'pallas_gpu' multiplies on tensor cores, which have no float32 path: it takes operands all in bfloat16 "
            f"or all in float16, got {q.dtype} and {k.dtype}; cast them, or take 'xla'"
        )
    if q.shape[3] % 16 or q.shape[3] > 256:
        raise NotImplementedError(
            f"{op}: 'pallas_gpu' takes a head width P that is a multiple of 16 up to 256, got {q.shape[3]}; take 'xla'"
        )


def matrix_memory(width: int, kind, *shape: int):
    """Shared memory for matrices [...,rows,P], tiled as the tensor cores and the copy engine want it."""
    swizzle = next(s for s in (128, 64, 32) if width % (s // 2) == 0)
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((*shape, width), kind, transforms=transforms)


def product(left, right, columns: int):
    """left [64,...] @ right [...,columns], in float32."""

    def run(acc):
        plgpu.wgmma(acc, left, right)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))


def down(x, size: int):
    """One value per row [64] -> [64,size]"""
    return lax.broadcast_in_dim(x, (ROWS, size), [0])


def across(ref, size: int, **options):
    """One value per column, read from memory: [size] -> [64,size]"""
    return lax.broadcast_in_dim(load_as(ref, layout=COLUMN, **options), (ROWS, size), [1])


def filled(shape: tuple[int, ...], value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def slot_of(step):
    return lax.rem(step, jnp.int32(STAGES))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(static: _Static, q, k, v, coordinates):
    """positions: segments of q and k, indices of q and k, all [B,...] int32; None: one segment, both indices from 0."""
    return _launch(static, q, k, v, coordinates)


def _core_fwd(static: _Static, q, k, v, coordinates):
    out, lse = _launch(static, q, k, v, coordinates)
    return (out, lse), (q, k, v, coordinates, out, lse)


def _core_bwd(static: _Static, saved, gradients):
    q, k, v, coordinates, out, lse = saved
    d_out, d_lse = gradients
    (b, t, heads, _), (length, kv_heads) = q.shape, k.shape[1:3]
    groups = heads // kv_heads
    rows, q_tiles = xla._tile(t, BACKWARD_BLOCK)
    columns, kv_tiles = xla._tile(length, BACKWARD_BLOCK)
    pairs = tuple(
        (i, j)
        for i in range(q_tiles)
        for j in range(kv_tiles)
        if coordinates is not None or not static.causal or j * columns < (i + 1) * rows
    )

    def of_rows(x):
        """[B,T,H,W] -> [I,B*K,G*rows,W]"""
        x = xla._pad(x, q_tiles * rows).reshape(b, q_tiles, rows, kv_heads, groups, -1)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(q_tiles, b * kv_heads, groups * rows, -1)

    def of_keys(x):
        """[B,L,K,W] -> [J,B*K,columns,W]"""
        x = xla._pad(x, kv_tiles * columns).reshape(b, kv_tiles, columns, kv_heads, -1)
        return x.transpose(1, 0, 3, 2, 4).reshape(kv_tiles, b * kv_heads, columns, -1)

    def per_head(x, tiles, size):
        return jnp.repeat(xla._pad(x, tiles * size).reshape(b, tiles, size).swapaxes(0, 1), kv_heads, axis=1)

    q_segment, kv_segment, q_index, kv_index = coordinates or _coordinates(b, t, length)
    # d score = weight * (d_out.v - d_out.out + d_lse): the last two are the same for all keys of a row.
    shift = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse.swapaxes(1, 2)
    tiles, back = jax.vjp(lambda q, k, v: (of_rows(q), of_keys(k), of_keys(v)), q, k, v)
    lse, shift = (of_rows(x[..., None])[..., 0] for x in (lse.swapaxes(1, 2), shift))
    gradient = xla._backward(
        xla.Tiling(rows, columns, pairs, static.causal, static.scale),
        *tiles,
        per_head(q_segment, q_tiles, rows),
        per_head(kv_segment, kv_tiles, columns),
        per_head(q_index, q_tiles, rows),
        per_head(kv_index, kv_tiles, columns),
        lse,
        shift,
        of_rows(d_out),
    )
    return *back(gradient), None


_core.defvjp(_core_fwd, _core_bwd)


def _spans(static: _Static, t: int, rows: int, columns: int, coordinates):
    """Which tiles of keys a block of queries visits: [B or 1,I,4] int32, (first, whole, after whole, end).

    Tiles from `first` up to `end` are visited, those from `whole` up to `after whole` without a mask.
    """
    q_tiles, kv_tiles = -(-t // rows), -(-static.length // columns)
    if coordinates is None:
        i, j = jnp.arange(q_tiles)[None, :, None], jnp.arange(kv_tiles)[None, None]
        meet, whole = jnp.ones((1, q_tiles, kv_tiles), bool), (j + 1) * columns <= static.length
        if static.causal:
            meet, whole = j * columns < (i + 1) * rows, whole & ((j + 1) * columns <= i * rows + 1)
        whole = whole & meet
    else:
        big = jnp.iinfo(jnp.int32).max

        def extremes(segment, index, tiles, size):
            segment, index = (xla._pad(x, tiles * size).reshape(-1, tiles, size) for x in (segment, index))
            real = segment > 0
            low, high = jnp.min(jnp.where(real, segment, big), -1), jnp.max(segment, -1)
            first, last = jnp.min(jnp.where(real, index, big), -1), jnp.max(jnp.where(real, index, -big), -1)
            return low, high, first, last, (low == high) & jnp.all(real, -1)

        q_segment, kv_segment, q_index, kv_index = coordinates
        q_low, q_high, q_first, q_last, q_one = (e[..., None] for e in extremes(q_segment, q_index, q_tiles, rows))
        low, high, first, last, one = (e[:, None] for e in extremes(kv_segment, kv_index, kv_tiles, columns))
        meet, whole = (q_low <= high) & (low <= q_high), q_one & one & (q_low == low)
        if static.causal:
            meet, whole = meet & (first <= q_last), whole & (last <= q_first)
    some = jnp.any(meet, -1)
    first = jnp.argmax(meet, -1)
    end = jnp.where(some, kv_tiles - jnp.argmax(meet[..., ::-1], -1), first)
    start = jnp.where(jnp.any(whole, -1), jnp.argmax(whole, -1), end)
    broken = ~whole & (jnp.arange(kv_tiles) > start[..., None])
    stop = jnp.where(jnp.any(broken, -1), jnp.argmax(broken, -1), kv_tiles)
    return jnp.stack([first, start, jnp.clip(stop, start, end), end], axis=-1).astype(jnp.int32)


def _launch(static: _Static, q, k, v, coordinates):
    batch, t, heads, width = q.shape
    length, kv_heads = k.shape[1:3]
    kind, rows = q.dtype, WORKERS * ROWS
    columns = 128 if width <= 128 else 64
    spans = _spans(static, t, rows, columns, coordinates)
    spans = jnp.broadcast_to(spans, (batch, *spans.shape[1:]))
    t_full, full = -(-t // rows) * rows, -(-length // columns) * columns
    q, k, v = xla._pad(q, t_full), xla._pad(k, full), xla._pad(v, full)
    operands = [q, k, v, spans]
    if coordinates is not None:
        operands += [xla._pad(x, size) for x, size in zip(coordinates, (t_full, full) * 2, strict=True)]

    scratch = {
        "q_s": matrix_memory(width, kind, WORKERS, ROWS),
        "k_s": matrix_memory(width, kind, STAGES, columns),
        "v_s": matrix_memory(width, kind, STAGES, columns),
        "lse_s": plgpu.SMEM((WORKERS, ROWS), jnp.float32),
        "asked": plgpu.Barrier(num_barriers=WORKERS),
        "loaded": plgpu.Barrier(num_arrivals=2 if coordinates is None else 4, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=STAGES),
    }
    if coordinates is not None:
        scratch |= {name: plgpu.SMEM((STAGES, columns), jnp.int32) for name in ("segment_s", "index_s")}

    def kernel(*refs, q_s, k_s, v_s, lse_s, asked, loaded, free, segment_s=None, index_s=None):
        q_g, k_g, v_g, spans_g, *places_g, out_g, lse_g = refs
        head, bi, w = lax.axis_index("head"), lax.axis_index("batch"), lax.axis_index("warpgroup")
        block = t_full // rows - 1 - lax.axis_index("block")  # causal rows at the end have most to do: they go first
        first, whole, after, end = (spans_g[bi, block, i] for i in range(4))

        @pl.when(w == WORKERS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            kv_head = lax.div(head, jnp.int32(heads // kv_heads))

            def load(j, carry):
                slot = slot_of(j - first)

                @pl.when(j - first >= STAGES)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                keys = pl.ds(j * columns, columns)
                copies = [(k_g.at[bi, keys, kv_head], k_s), (v_g.at[bi, keys, kv_head], v_s)]
                if places_g:
                    copies += [(places_g[1].at[bi, keys], segment_s), (places_g[3].at[bi, keys], index_s)]
                for source, target in copies:
                    plgpu.copy_gmem_to_smem(source, target.at[slot], loaded.at[slot])

            lax.fori_loop(first, end, load, None)
            last = jnp.maximum(first, end - STAGES)
            lax.fori_loop(last, end, lambda j, _: plgpu.barrier_wait(free.at[slot_of(j - first)]), None)

        @pl.when(w < WORKERS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(block * rows + w * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_g.at[bi, own, head], q_s.at[w], asked.at[w])
            if places_g:
                segment, index = (load_as(x.at[bi, own], layout=ROW, optimized=False) for x in places_g[::2])
            plgpu.barrier_wait(asked.at[w])

            def masked(score, j, slot):
                if places_g:
                    seen = down(segment, columns) == across(segment_s.at[slot], columns)
                    seen &= down(segment, columns) > 0
                    if static.causal:
                        seen &= across(index_s.at[slot], columns) <= down(index, columns)
                else:
                    row, key = (plgpu.broadcasted_iota(jnp.int32, score.shape, i, layout=MATRIX) for i in (0, 1))
                    seen = key < static.length - j * columns
                    if static.causal:
                        seen &= key - row <= block * rows + w * ROWS - j * columns
                return jnp.where(seen, score, xla.MASK_VALUE)

            def step(j, carry):
                out, running_max, total = carry
                slot = slot_of(j - first)
                plgpu.barrier_wait(loaded.at[slot])
                score = product(q_s.at[w], k_s.at[slot].transpose((1, 0)), columns)
                score = score * (static.scale * LOG2E)  # powers of 2 from here on
                plain = (j >= whole) & (j < after)
                score = lax.cond(plain, lambda score: score, lambda score: masked(score, j, slot), score)
                new_highest = jnp.maximum(running_max, jnp.max(score, axis=1))
                weight = jnp.exp2(score - down(new_highest, columns))
                rescale = jnp.exp2(running_max - new_highest)
                total = total * rescale + jnp.sum(weight, axis=1)
                part = product(weight.astype(kind), v_s.at[slot], width)
                plgpu.barrier_arrive(free.at[slot])
                return out * down(rescale, width) + part, new_highest, total

            start = (filled((ROWS, width), 0.0, MATRIX), filled((ROWS,), EMPTY_LSE, ROW), filled((ROWS,), 0.0, ROW))
            out, running_max, total = lax.fori_loop(first, end, step, start)
            some = total > 0
            total = jnp.where(some, total, 1.0)
            q_s.at[w][...] = (out / down(total, width)).astype(kind)
            lse_s.at[w][...] = jnp.where(some, running_max * (1 / LOG2E) + jnp.log(total), EMPTY_LSE)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s.at[w], out_g.at[bi, own, head])
            plgpu.copy_smem_to_gmem(lse_s.at[w], lse_g.at[bi, head, own])
            plgpu.wait_smem_to_gmem(0)

    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, kind),
            jax.ShapeDtypeStruct((batch, heads, t_full), jnp.float32),
        ],
        scratch_types=scratch,
        grid=(heads, t_full // rows, batch),
        grid_names=("head", "block", "batch"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_forward",
    )(*operands)
    return out[:, :t], lse[:, :, :t]
