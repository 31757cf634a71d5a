"""The backward TPU kernel of SSD: chunks from last to first, the state's gradient in VMEM, everything else recomputed."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridvlm.ops.ssd import pallas_tpu_common as common
from hybridvlm.ops.ssd.decays import LEAST
from hybridvlm.ops.ssd.pallas_tpu_common import Sizes

_READ = ("x", "b", "c", "dt", "segment_ids", "a", "d", "spread", "start", "gy", "gstate")


def backward_specs(sizes: Sizes, dtype):
    """Names of the operands, and what `pl.pallas_call` is told of them: grid, block specs, shapes."""
    s, last = sizes, sizes.chunks - 1
    specs = common.common_specs(sizes, lambda k: last - k)
    shapes = common.common_shapes(sizes, dtype)
    specs |= {
        "gy": specs["x"],
        "gstate": specs["state"],
        # Head blocks that share a group leave a part each, summed outside: [sharing,B,L,G*N].
        "part": pl.BlockSpec(
            (1, 1, s.chunk, s.block_groups * s.n), lambda b, i, k: (i % s.sharing, b, last - k, i // s.sharing)
        ),
        "ga": pl.BlockSpec((1, 1, s.rows, s.chunk), lambda b, i, k: (b, i, 0, 0)),
        "gd": pl.BlockSpec((1, common.SUBLANES, s.lanes), lambda b, i, k: (b, 0, i)),
    }
    part = dtype if s.sharing == 1 else jnp.float32
    shapes |= {
        "gy": shapes["x"],
        "gstate": shapes["state"],
        "part": jax.ShapeDtypeStruct((s.sharing, s.batch, s.length, s.groups * s.n), part),
        "ga": jax.ShapeDtypeStruct((s.batch, s.blocks, s.rows, s.chunk), jnp.float32),
        "gd": jax.ShapeDtypeStruct((s.batch, common.SUBLANES, s.heads * s.p), jnp.float32),
    }
    read = common.given(sizes, _READ)
    written = ["x", "part", "part", "dt", "ga", "state", *(["gd"] if s.skip else [])]
    return read, {
        "grid": (s.batch, s.blocks, s.chunks),
        "in_specs": [specs[name] for name in read],
        "in_shape": [shapes[name] for name in read],
        "out_specs": [specs[name] for name in written],
        "out_shape": [shapes[name] for name in written],
    }


def backward_cost(sizes: Sizes, dtype) -> pl.CostEstimate:
    """FLOPs, exponentials and HBM bytes of the backward kernel; blocks are whole, their padding included."""
    s, item = sizes, jnp.dtype(dtype).itemsize
    tokens = s.batch * s.chunks * s.chunk
    groups = s.blocks * s.block_groups
    within = tokens * s.chunk * (2 * s.heads * s.p + 3 * groups * s.n)
    between = 5 * tokens * s.heads * s.p * s.n
    spread = 4 * tokens * 3 * s.rows * s.heads * s.p
    part = item if s.sharing == 1 else 4
    per_token = (
        3 * item * s.blocks * s.tiled_lanes + 2 * (item + part) * s.blocks * s.tiled_group_lanes + 8 * s.blocks * s.rows
    )
    per_token += 4 * common.SEGMENT_ROWS * s.blocks * s.packed
    states = 4 * s.batch * s.blocks * s.tiled_lanes * s.n * (2 + s.chunks)
    return pl.CostEstimate(
        flops=2 * (within + between + spread),
        transcendentals=tokens * s.blocks * s.rows * (s.chunk + 2),
        bytes_accessed=s.batch * s.length * per_token + states,
    )


def backward(sizes: Sizes, segment_ids, x, b, c, dt, a, d, starts, gy, gstate):
    """Gradients of x, b, c, dt rows, a rows, d and the initial state, as `pallas_tpu.forward` takes them."""
    read, call = backward_specs(sizes, x.dtype)
    call.pop("in_shape")
    operands = dict(
        x=x, b=b, c=c, dt=dt, segment_ids=segment_ids, a=a, d=d, spread=common.spread_matrix(sizes), start=starts, gy=gy
    )
    operands["gstate"] = gstate
    width = (sizes.chunk, sizes.lanes)
    gx, gb, gc, gdt, ga, ginitial, *gd = pl.pallas_call(
        functools.partial(_kernel, sizes, read),
        **call,
        scratch_shapes=[
            pltpu.VMEM((sizes.n, sizes.lanes), jnp.float32),
            pltpu.VMEM(width, jnp.float32),
            pltpu.VMEM((3, sizes.rows, sizes.chunk), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=common.vmem_limit(sizes, x.dtype.itemsize, backward=True),
        ),
        cost_estimate=backward_cost(sizes, x.dtype),
        name="ssd_backward",
    )(*(operands[name] for name in read))
    gb, gc = (v[0] if sizes.sharing == 1 else v.sum(0).astype(x.dtype) for v in (gb, gc))
    return gx, gb, gc, gdt, ga.sum((0, 3))[..., None], gd[0].sum((0, 1))[None] if gd else None, ginitial


def _kernel(sizes: Sizes, read: list[str], *refs) -> None:
    ref = dict(zip(read, refs, strict=False))
    gx_ref, gb_ref, gc_ref, gdt_ref, ga_ref, ginitial_ref, *gd_ref, gstate_ref, gx_sum_ref, sums_ref = refs[len(read) :]
    chunk = sizes.chunks - 1 - pl.program_id(2)
    dtype, size = gx_ref.dtype, sizes.chunk

    @pl.when(pl.program_id(2) == 0)
    def _():
        gstate_ref[...] = ref["gstate"][0, 0]
        ga_ref[...] = jnp.zeros_like(ga_ref)
        for gd in gd_ref:
            gd[...] = jnp.zeros_like(gd)

    k = common.decays(sizes, chunk, ref["dt"][0, 0], ref["a"][0], ref["segment_ids"][0] if sizes.packed else None)
    spread = ref["spread"][...]
    read_weight = common.spread_heads(k.read, spread)
    write_weight = common.spread_heads(k.dt * k.to_end, spread)
    keep = read_weight[size - 1 :]
    if sizes.packed:
        read_weight, keep = read_weight * k.reads, keep * k.kept

    # Sums over a head's lanes, a head per row: what reading the incoming state, writing the outgoing one and keeping the
    # former give to total. In sums_ref: gradient of dt inside the chunk, and both ends of t_i - t_j.
    sums_ref[...] = jnp.zeros_like(sums_ref)
    gread = jnp.zeros((sizes.rows, size), jnp.float32)
    gwrite = jnp.zeros((sizes.rows, size), jnp.float32)
    gkeep = jnp.zeros((sizes.rows, common.SUBLANES), jnp.float32)
    per_group = sizes.block_heads // sizes.block_groups
    for group in range(sizes.block_groups):
        at = slice(group * sizes.n, (group + 1) * sizes.n)
        lanes = slice(group * per_group * sizes.p, (group + 1) * per_group * sizes.p)
        b, c = (common.load_tokens(sizes, chunk, ref[name], at) for name in "bc")
        x, gy = (common.load_tokens(sizes, chunk, ref[name], lanes).astype(jnp.float32) for name in ("x", "gy"))
        state, gstate = ref["start"][0, 0, 0, :, lanes], gstate_ref[:, lanes]
        state_16, gstate_16 = state.astype(dtype), gstate.astype(dtype)
        mine = spread[:, lanes]

        # Reading the incoming state, y += read * (c state).
        weighted = gy * read_weight[:, lanes]
        gread += common.sum_heads(weighted * common.dot(c, state_16), mine)
        weighted = weighted.astype(dtype)
        gc = common.dot(weighted, state_16, (1, 1))
        # Writing the outgoing one, state += b (x * write), and keeping the incoming one.
        arrived = common.dot(b, gstate_16)
        gwrite += common.sum_heads(x * arrived, mine)
        gx = arrived * write_weight[:, lanes]
        gb = common.dot((x * write_weight[:, lanes]).astype(dtype), gstate_16, (1, 1))
        kept = jnp.sum(state * gstate, axis=0, keepdims=True) * keep[:, lanes]
        gkeep += common.sum_heads(jnp.broadcast_to(kept, (common.SUBLANES, kept.shape[1])), mine)
        gstate_ref[:, lanes] = gstate * keep[:, lanes] + common.dot(c, weighted, (0, 0))
        if sizes.skip:
            skipped = gy if k.token_mask is None else jnp.where(k.token_mask, gy, 0.0)
            gx = gx + skipped * ref["d"][:, lanes]
            product = (skipped * x).reshape(-1, common.SUBLANES, x.shape[1])
            gd_ref[0][0, :, lanes] += jnp.sum(product, axis=0)
        gx_sum_ref[:, lanes] = gx

        heads = range(group * per_group, (group + 1) * per_group)
        load = functools.partial(common.load_tokens, sizes, chunk)
        gscores = _within_chunk(sizes, heads, k, common.dot(c, b, (1, 1)), ref, load, gx_sum_ref, sums_ref)
        gx_ref[0, :, lanes] = gx_sum_ref[:, lanes].astype(dtype)
        gscores = gscores.astype(dtype)
        gb_ref[0, 0, :, at] = (gb + common.dot(gscores, c, (0, 0))).astype(gb_ref.dtype)
        gc_ref[0, 0, :, at] = (gc + common.dot(gscores, b)).astype(gc_ref.dtype)

    # From the weights to total, and from there to dt and A.
    lane = lax.broadcasted_iota(jnp.int32, gread.shape, 1)
    written = jnp.where(lane < size - 1, gwrite * k.dt * k.to_end, 0.0)
    at_last = jnp.sum(written, axis=1, keepdims=True) + gkeep[:, :1]
    gtotal = sums_ref[2] - sums_ref[1] + gread - written + jnp.where(lane == size - 1, at_last, 0.0)
    glog = common.running_sum(gtotal, reverse=True)  # gradient of dt A, which has none where it is held at the least
    glog = jnp.where(k.dt * ref["a"][0] > LEAST, glog, 0.0)
    gdt_ref[0, 0] = sums_ref[0] + gwrite * k.to_end + ref["a"][0] * glog
    ga_ref[0, 0] += k.dt * glog

    @pl.when(chunk == 0)
    def _():
        ginitial_ref[0, 0] = gstate_ref[...]


def _within_chunk(sizes: Sizes, heads: range, k: common.Decays, scores, ref, load, gx_sum_ref, sums_ref) -> jax.Array:
    """Of y = M x, M = scores * decay * dt, for the heads of one group: adds to the gradient of x, writes the sums of each head.

    Returns the gradient [C,C] of the group's scores.
    """
    size, dtype = sizes.chunk, ref["x"].dtype
    below = lax.broadcasted_iota(jnp.int32, (size, size), 0) > lax.broadcasted_iota(jnp.int32, (size, size), 1)
    gscores = jnp.zeros((size, size), jnp.float32)
    for head in heads:
        here, row = slice(head * sizes.p, (head + 1) * sizes.p), slice(head, head + 1)
        gy_head, x_head = load(ref["gy"], here), load(ref["x"], here)
        decay = k.between(head)
        weight = decay * k.dt[row]
        gmixed = common.dot(gy_head, x_head, (1, 1))
        gx_sum_ref[:, here] += common.dot((scores * weight).astype(dtype), gy_head, (0, 0))
        gscores += gmixed * weight
        gweight = gmixed * scores * decay
        # The exponent t_i - t_i is 0 whatever t is; left in, its two gradients would cancel only up to rounding.
        gexponent = jnp.where(below, gweight * k.dt[row], 0.0)
        sums_ref[0, row] = jnp.sum(gweight, axis=0, keepdims=True)
        sums_ref[1, row] = jnp.sum(gexponent, axis=0, keepdims=True)
        sums_ref[2, row] = jnp.sum(jnp.transpose(gexponent), axis=0, keepdims=True)
    return gscores
