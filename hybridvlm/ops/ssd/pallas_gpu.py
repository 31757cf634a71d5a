"""Chunked SSD as one Mosaic GPU kernel for Hopper: a block walks the chunks of one head, its state stays in registers.

The formulas are those of `xla.py`. A block has one warpgroup per 64 states: of a chunk of 64 tokens per warpgroup, each
computes 64 rows of outputs and 64 rows of the state [N,P], which lives in its accumulator registers in float32 from the
first chunk to the last. What the warpgroups of a block exchange goes through shared memory in the operands' type: the
state as an operand (read by all rows) and the tokens weighted for the state (read by all states). Loads of the next chunk
run while a chunk is computed.

The backward pass is `xla.py`'s. It needs the state at the start of each chunk, and gets those of the kernel itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridvlm.ops.mosaic import load_as
from hybridvlm.ops.platforms import require_platform
from hybridvlm.ops.ssd import xla
from hybridvlm.ops.ssd.chunk import Coefficients, SegmentIds

ROWS = 64  # rows of a tensor core instruction: what one warpgroup computes
STAGES = 2  # chunks in shared memory at once: the one computed and the next
SHARED_BYTES = 227 * 1024  # shared memory that a block may have on Hopper

_MATRIX = plgpu.Layout.WGMMA
_ROW = plgpu.Layout.WGMMA.reduce(1)  # one value per row of a matrix
_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def ssd(x, dt, A, B, C, *, D, reset_index, token_mask, state, chunk_size: int | None) -> tuple[jax.Array, jax.Array]:
    """`hybridvlm.ops.ssd.ssd` after its checks: x [B,L,H*P], dt [B,L,H] fp32 (0 at padding), A [H] fp32, B and C [B,L,G,N],
    D [H] fp32 or None, reset_index and token_mask [B,L] or None, state [B,H,P,N] fp32 -> y like x, final state.

    The kernel's chunk is 64 tokens for N up to 64 and 128 for N up to 128; a multiple of that may be asked for, and is
    computed in pieces. Fewer states than 64 or 128 are filled up with zeros.
    Raises NotImplementedError off GPU, for float32, and for widths that the kernel cannot hold.
    """
    require_platform("ssd", "pallas_gpu", "gpu", "'associative' or 'sequential'")
    batch, length, width = x.shape
    heads, (groups, n) = A.size, B.shape[2:]
    p, states = width // heads, ROWS if n <= ROWS else 2 * ROWS
    _check(x.dtype, p, n, states, chunk_size)
    per_group, steps = heads // groups, -(-length // states)
    full = steps * states
    x, dt = (_pad(v, full) for v in (x, dt))
    b, c = (jnp.pad(_pad(v.astype(x.dtype), full), ((0, 0),) * 3 + ((0, states - n),)) for v in (B, C))
    if reset_index is not None:
        reset_index = jnp.pad(reset_index, ((0, 0), (0, full - length)), mode="edge")
        token_mask = _pad(token_mask, full)
    sizes = xla.Sizes(length=full, chunk=states, block=1, steps=steps, groups=groups)
    coefficients, segment_ids = xla.coefficients_of(sizes, dt, A, reset_index, token_mask)
    d = None if D is None else D.reshape(groups, per_group)
    state = jnp.pad(state, ((0, 0),) * 3 + ((0, states - n),)).reshape(batch, groups, per_group, p, states)
    x = x.reshape(batch, full, heads, p)
    y, state = _core(sizes, x, b, c, d, coefficients, segment_ids, jnp.transpose(state, (0, 1, 4, 2, 3)))
    state = jnp.transpose(state, (0, 1, 3, 4, 2)).reshape(batch, heads, p, states)[..., :n]
    return y[:, :length].reshape(batch, length, width), state


def _check(kind, p: int, n: int, states: int, chunk_size: int | None) -> None:
    if kind not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            "ssd: 'pallas_gpu' multiplies on tensor cores, which have no float32 path: it takes x in bfloat16 or float16, "
            f"got {kind}; cast it, or take 'associative' or 'sequential'"
        )
    if n > 2 * ROWS or p % 16:
        raise NotImplementedError(
            f"ssd: 'pallas_gpu' takes up to {2 * ROWS} states and P a multiple of 16, got N = {n} and P = {p}"
        )
    if chunk_size is not None and chunk_size % states:
        raise NotImplementedError(
            f"ssd: 'pallas_gpu' takes chunks of a multiple of {states} tokens for N = {n}, got chunk_size {chunk_size}"
        )
    needed = _shared_bytes(p, states)
    if needed > SHARED_BYTES:
        raise NotImplementedError(
            f"ssd: 'pallas_gpu' needs {needed} bytes of shared memory a block for P = {p} and N = {n}, there are "
            f"{SHARED_BYTES}; take 'associative' or 'sequential'"
        )


def _shared_bytes(p: int, states: int) -> int:
    """What a block of the kernel below holds, and 4 KB for barriers and reductions; a chunk has as many tokens as states."""
    stage = states * (2 * (p + 2 * states) + 4 * 5 + 4 * 2)
    return STAGES * stage + 2 * 2 * states * p + 4096


def _pad(v, length: int):
    """Zeros after axis 1, up to the length: at dt = 0 a token does nothing."""
    return jnp.pad(v, ((0, 0), (0, length - v.shape[1]), *((0, 0),) * (v.ndim - 2)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _core(sizes: xla.Sizes, x, b, c, d, coefficients, segment_ids, state):
    """x [B,L,H,P], b and c [B,L,G,N], d [G,R] or None, state [B,G,N,R,P] -> y [B,L,H,P], state [B,G,N,R,P]"""
    return _launch(sizes, x, b, c, d, coefficients, segment_ids, state, keep_states=False)[:2]


def _core_fwd(sizes: xla.Sizes, x, b, c, d, coefficients, segment_ids, state):
    y, state, starts = _launch(sizes, x, b, c, d, coefficients, segment_ids, state, keep_states=True)
    return (y, state), xla.Saved(x, b, c, d, coefficients, segment_ids, starts)


_core.defvjp(_core_fwd, xla.sequential_backward)


def _launch(sizes: xla.Sizes, x, b, c, d, k: Coefficients, segment_ids: SegmentIds | None, state, keep_states: bool):
    """The kernel; keep_states: also the state at the start of each chunk [S,B,G,N,R,P], else None instead."""
    batch, _, heads, p = x.shape
    groups, n = b.shape[2:]
    per_group = heads // groups
    chunk, kind, warpgroups = sizes.chunk, x.dtype, n // ROWS

    def tile(rows: int, width: int, swizzle: int, *lead: int):
        transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM((*lead, rows, width), kind, transforms=transforms)

    # Both operands of the product that feeds the state come from shared memory, so their tiling is one: the widest
    # that divides P. C is only ever read into registers.
    narrow = next(s for s in (128, 64, 32) if p % (s // 2) == 0)
    wide = 128
    vector = plgpu.SMEM((STAGES, chunk), jnp.float32)
    id_slots = plgpu.SMEM((STAGES, chunk), jnp.int32)
    scratch = {
        "x_s": tile(chunk, p, narrow, STAGES),
        "b_s": tile(chunk, n, narrow, STAGES),
        "c_s": tile(chunk, n, wide, STAGES),
        "state_s": tile(n, p, narrow),
        "exchange_s": tile(chunk, p, narrow),
        "vectors_s": [vector] * 5,
        "ids_s": None if segment_ids is None else [id_slots] * 2,
        "loaded": plgpu.Barrier(num_arrivals=8 if segment_ids is None else 10, num_barriers=STAGES),
        "weighted": plgpu.Barrier(num_arrivals=warpgroups),
        "updated": plgpu.Barrier(num_arrivals=warpgroups),
    }

    def body(x_g, b_g, c_g, vectors_g, keep_g, d_g, ids_g, state_g, y_g, last_g, starts_g, **s):
        bi, head, w = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        group, member = lax.div(head, jnp.int32(per_group)), lax.rem(head, jnp.int32(per_group))
        own = pl.ds(w * ROWS, ROWS)  # the rows of this warpgroup: of tokens and of states
        x_s, b_s, c_s, state_s, exchange_s = (s[name] for name in ("x_s", "b_s", "c_s", "state_s", "exchange_s"))

        def load(step):
            slot = lax.rem(step, jnp.int32(STAGES))
            tokens = pl.ds(step * chunk, chunk)
            copies = [
                (x_g.at[bi, tokens, head], x_s),
                (b_g.at[bi, tokens, group], b_s),
                (c_g.at[bi, tokens, group], c_s),
            ]
            copies += [(v.at[step, bi, group, member], v_s) for v, v_s in zip(vectors_g, s["vectors_s"], strict=True)]
            if segment_ids is not None:
                copies += [(v.at[step, bi], v_s) for v, v_s in zip(ids_g, s["ids_s"], strict=True)]
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target.at[slot], s["loaded"].at[slot])

        def everyone(barrier):
            plgpu.commit_smem()
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        def product(*factors, columns):
            def run(acc):
                for left, right in factors:
                    plgpu.wgmma(acc, left, right)
                return acc[...]

            return pl.run_scoped(run, plgpu.ACC((ROWS, columns), jnp.float32))

        @pl.when(w == 0)
        def _():
            for step in range(min(STAGES, sizes.steps)):
                load(jnp.int32(step))

        start = load_as(state_g.at[bi, group, own, member], layout=_MATRIX, optimized=False)
        state_s[own] = start.astype(kind)
        everyone(s["updated"])

        def chunk_step(step, state):
            slot = lax.rem(step, jnp.int32(STAGES))
            if keep_states:
                starts_g.at[step, bi, group, own, member][...] = state
            plgpu.barrier_wait(s["loaded"].at[slot])
            whole_s, total_s, dt_s, read_s, write_s = (v.at[slot] for v in s["vectors_s"])

            def rows(v):
                return load_as(v.at[own], layout=_ROW)

            def down(v, width):
                return lax.broadcast_in_dim(v, (ROWS, width), [0])

            def across(v_s):
                return lax.broadcast_in_dim(load_as(v_s, layout=_COLUMN), (ROWS, chunk), [1])

            c_own = load_as(c_s.at[slot, own], layout=_MATRIX)
            mixed = product((c_own, b_s.at[slot].transpose((1, 0))), columns=chunk)
            at = [plgpu.broadcasted_iota(jnp.int32, (ROWS, chunk), i, layout=_MATRIX) for i in (0, 1)]
            seen = at[0] + w * ROWS >= at[1]
            if segment_ids is not None:
                reader_s, writer_s = (v.at[slot] for v in s["ids_s"])
                reader = rows(reader_s)
                seen &= down(reader, chunk) == across(writer_s)
            # The mask comes before exp: above the diagonal the difference is positive and may overflow.
            apart = [down(rows(v), chunk) - across(v) for v in (whole_s, total_s)]
            decay = jnp.exp(jnp.where(seen, apart[0] + apart[1], -jnp.inf))
            mixed = (mixed * decay * across(dt_s)).astype(kind)
            read = (c_own.astype(jnp.float32) * down(rows(read_s), n)).astype(kind)
            y = product((mixed, x_s.at[slot]), (read, state_s), columns=p)

            x_own = load_as(x_s.at[slot, own], layout=_MATRIX).astype(jnp.float32)
            if d_g is not None:
                skipped = d_g[head] * x_own
                if segment_ids is not None:
                    skipped = jnp.where(down(reader, p) >= 0, skipped, 0.0)
                y = y + skipped
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the outputs of the chunk before have left
            exchange_s[own] = (x_own * down(rows(write_s), p)).astype(kind)
            everyone(s["weighted"])

            b_own = b_s.at[slot, :, own].transpose((1, 0))
            state = state * keep_g[step, bi, group, member] + product((b_own, exchange_s), columns=p)
            state_s[own] = state.astype(kind)
            everyone(s["updated"])

            exchange_s[own] = y.astype(kind)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(exchange_s.at[own], y_g.at[bi, pl.ds(step * chunk + w * ROWS, ROWS), head])

            @pl.when((w == 0) & (step + STAGES < sizes.steps))
            def _():
                load(step + STAGES)

            return state

        state = lax.fori_loop(0, sizes.steps, chunk_step, start)
        last_g.at[bi, group, own, member][...] = state
        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct(x.shape, kind), jax.ShapeDtypeStruct(state.shape, jnp.float32)]
    if keep_states:
        out_type.append(jax.ShapeDtypeStruct((sizes.steps, *state.shape), jnp.float32))
    operands = {
        "x": x,
        "b": b,
        "c": c,
        "vectors": [k.whole, k.total, k.dt, k.read, k.write],
        "keep": k.keep,
        "state": state,
    }
    if d is not None:
        operands["d"] = d.reshape(heads)
    if segment_ids is not None:
        operands["segment_ids"] = list(segment_ids)
    leaves, tree = jax.tree.flatten(operands)
    run: Callable[..., None] = body  # which takes references by position, then scratch by name

    def entry(*refs, **scratch):
        given, outs = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        run(
            *(given[name] for name in ("x", "b", "c", "vectors", "keep")),
            *(given.get(name) for name in ("d", "segment_ids", "state")),
            *outs,
            *([] if keep_states else [None]),
            **scratch,
            **({} if "ids_s" in scratch else {"ids_s": None}),
        )

    y, last, *starts = plgpu.kernel(
        entry,
        out_type=out_type,
        scratch_types={name: value for name, value in scratch.items() if value is not None},
        grid=(batch, heads),
        grid_names=("batch", "head"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="ssd_forward",
    )(*leaves)
    return y, last, starts[0] if keep_states else None
