"""SSD on TPU as Pallas kernels: the state stays in VMEM from chunk to chunk, x is read as [B,L,H*P].

The maths is that of `hybridvlm.ops.ssd.xla`; how it is laid out, `pallas_tpu_common` tells. HBM sees x, dt, B and C once
(B and C once per head block that shares a group), y and the final state once. Under differentiation the forward kernel
also leaves the state at the start of every chunk, [B,L/C,H,P,N] float32, all that `pallas_tpu_backward` needs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.platforms import require_platform
from hybridvlm.ops.ssd import pallas_tpu_common as common
from hybridvlm.ops.ssd.pallas_tpu_backward import backward
from hybridvlm.ops.ssd.pallas_tpu_common import Sizes

NAME = "pallas_tpu"
CHUNK = 128  # tokens: a whole tile of lanes, and the least work within a chunk


def ssd(x, dt, A, B, C, *, D, reset_index, token_mask, state, chunk_size: int | None) -> tuple[jax.Array, jax.Array]:
    """`hybridvlm.ops.ssd.ssd` after its checks: x [B,L,H*P], dt [B,L,H] fp32 (0 at padding), A [H] fp32, B and C [B,L,G,N],
    D [H] fp32 or None, reset_index and token_mask [B,L] or None, state [B,H,P,N] fp32 -> y like x, final state.

    Raises NotImplementedError off TPU, for a chunk size that is no multiple of 128 and a dtype other than bf16 and fp32.
    """
    require_platform("ssd", NAME, "tpu", "'associative' or 'sequential'")
    chunk_size = CHUNK if chunk_size is None else chunk_size
    if chunk_size % common.LANES:
        raise NotImplementedError(
            f"ssd: {NAME!r} takes chunks of a multiple of {common.LANES} tokens, got chunk_size {chunk_size}"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"ssd: {NAME!r} takes x in bfloat16 or float32, got {x.dtype}")
    sizes = plan(
        x.shape, dt.shape[2], *B.shape[2:], chunk_size=chunk_size, packed=reset_index is not None, skip=D is not None
    )
    b, c = (v.reshape(*v.shape[:2], -1).astype(x.dtype) for v in (B, C))
    segment_ids = None if reset_index is None else common.segment_rows(sizes, reset_index, token_mask)
    d = None if D is None else jnp.repeat(D, sizes.p)[None]
    operands = (x, b, c, common.dt_rows(sizes, dt), common.a_rows(sizes, A), d, common.block_state(sizes, state))
    y, state = _ssd(sizes, segment_ids, *operands)
    return y, common.head_state(sizes, state)


def plan(
    shape: tuple[int, ...], heads: int, groups: int, n: int, *, chunk_size: int, packed: bool, skip: bool
) -> Sizes:
    """How the kernels cut x [B,L,H*P] of this shape."""
    batch, length, width = shape
    p = width // heads
    together = common.block_heads(heads, p, groups, n)
    return Sizes(batch, length, heads, p, groups, n, chunk_size, together, packed, skip)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(sizes: Sizes, segment_ids, x, b, c, dt, a, d, state):
    return forward(sizes, segment_ids, x, b, c, dt, a, d, state, keep_states=False)[:2]


def _fwd(sizes: Sizes, segment_ids, x, b, c, dt, a, d, state):
    y, state, starts = forward(sizes, segment_ids, x, b, c, dt, a, d, state, keep_states=True)
    return (y, state), (segment_ids, x, b, c, dt, a, d, starts)


def _bwd(sizes: Sizes, saved, gradients):
    return (None, *backward(sizes, *saved, *gradients))


_ssd.defvjp(_fwd, _bwd)

_READ = ("x", "b", "c", "dt", "segment_ids", "a", "d", "spread", "state")


def forward_specs(sizes: Sizes, dtype, keep_states: bool):
    """Names of the operands, and what `pl.pallas_call` is told of them: grid, block specs, shapes."""
    specs = common.common_specs(sizes, lambda k: k)
    shapes = common.common_shapes(sizes, dtype)
    read = common.given(sizes, _READ)
    written = ("x", "state", "start") if keep_states else ("x", "state")
    return read, {
        "grid": (sizes.batch, sizes.blocks, sizes.chunks),
        "in_specs": [specs[name] for name in read],
        "in_shape": [shapes[name] for name in read],
        "out_specs": [specs[name] for name in written],
        "out_shape": [shapes[name] for name in written],
    }


def forward_cost(sizes: Sizes, dtype, keep_states: bool) -> pl.CostEstimate:
    """FLOPs, exponentials and HBM bytes of the forward kernel; blocks are whole, their padding included."""
    s, item = sizes, jnp.dtype(dtype).itemsize
    tokens = s.batch * s.chunks * s.chunk
    within = tokens * s.chunk * (s.heads * s.p + s.blocks * s.block_groups * s.n)
    between = 2 * tokens * s.heads * s.p * s.n
    spread = 2 * tokens * 3 * s.rows * s.heads * s.p
    per_token = 2 * item * s.blocks * s.tiled_lanes + 2 * item * s.blocks * s.tiled_group_lanes + 4 * s.blocks * s.rows
    per_token += 4 * common.SEGMENT_ROWS * s.blocks * s.packed
    states = 4 * s.batch * s.blocks * s.tiled_lanes * s.n * (2 + s.chunks * keep_states)
    return pl.CostEstimate(
        flops=2 * (within + between + spread),
        transcendentals=tokens * s.blocks * s.rows * (s.chunk + 2),
        bytes_accessed=s.batch * s.length * per_token + states,
    )


def forward(sizes: Sizes, segment_ids, x, b, c, dt, a, d, state, *, keep_states: bool):
    """The forward kernel: y [B,L,H*P], final state [B,H/R,N,R*P], states at the chunks' starts [B,L/C,H/R,N,R*P] or None."""
    read, call = forward_specs(sizes, x.dtype, keep_states)
    call.pop("in_shape")
    operands = dict(
        x=x, b=b, c=c, dt=dt, segment_ids=segment_ids, a=a, d=d, spread=common.spread_matrix(sizes), state=state
    )
    width = (sizes.chunk, sizes.lanes)
    out = pl.pallas_call(
        functools.partial(_kernel, sizes, keep_states, read),
        **call,
        scratch_shapes=[pltpu.VMEM((sizes.n, sizes.lanes), jnp.float32), pltpu.VMEM(width, jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=common.vmem_limit(sizes, x.dtype.itemsize, backward=False),
        ),
        cost_estimate=forward_cost(sizes, x.dtype, keep_states),
        name="ssd_forward",
    )(*(operands[name] for name in read))
    return out if keep_states else (*out, None)


def _kernel(sizes: Sizes, keep_states: bool, read: list[str], *refs) -> None:
    ref = dict(zip(read, refs, strict=False))
    y_ref, final_ref, *start_ref, state_ref, mixed_ref = refs[len(read) :]
    chunk = pl.program_id(2)
    dtype = y_ref.dtype

    @pl.when(chunk == 0)
    def _():
        state_ref[...] = ref["state"][0, 0]

    if keep_states:
        start_ref[0][0, 0, 0] = state_ref[...]
    k = common.decays(sizes, chunk, ref["dt"][0, 0], ref["a"][0], ref["segment_ids"][0] if sizes.packed else None)
    spread = ref["spread"][...]
    read_weight = common.spread_heads(k.read, spread)
    write_weight = common.spread_heads(k.dt * k.to_end, spread)
    keep = read_weight[sizes.chunk - 1 :]
    if sizes.packed:
        read_weight, keep = read_weight * k.reads, keep * k.kept

    per_group = sizes.block_heads // sizes.block_groups
    for group in range(sizes.block_groups):
        at = slice(group * sizes.n, (group + 1) * sizes.n)
        b, c = (common.load_tokens(sizes, chunk, ref[name], at) for name in "bc")
        scores = common.dot(c, b, (1, 1))
        for head in range(group * per_group, (group + 1) * per_group):
            lanes = slice(head * sizes.p, (head + 1) * sizes.p)
            mixed = scores * k.between(head) * k.dt[head : head + 1]
            mixed_ref[:, lanes] = common.dot(mixed.astype(dtype), common.load_tokens(sizes, chunk, ref["x"], lanes))
        lanes = slice(group * per_group * sizes.p, (group + 1) * per_group * sizes.p)
        x = common.load_tokens(sizes, chunk, ref["x"], lanes).astype(jnp.float32)
        state = state_ref[:, lanes]
        y = mixed_ref[:, lanes] + common.dot(c, state.astype(dtype)) * read_weight[:, lanes]
        if sizes.skip:
            skip = x * ref["d"][:, lanes]
            y = y + (skip if k.token_mask is None else jnp.where(k.token_mask, skip, 0.0))
        y_ref[0, :, lanes] = y.astype(dtype)
        inflow = common.dot(b, (x * write_weight[:, lanes]).astype(dtype), (0, 0))
        state_ref[:, lanes] = state * keep[:, lanes] + inflow

    @pl.when(chunk == sizes.chunks - 1)
    def _():
        final_ref[0, 0] = state_ref[...]
