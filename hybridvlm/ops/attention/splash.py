"""JAX's splash attention (TPU) after our signature: segments and log-sum-exp, no indices, no gradient of the log-sum-exp."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from hybridvlm.ops.attention.reference import EMPTY_LSE
from hybridvlm.ops.platforms import require_platform

LANES = 128
BLOCK = 512
MASKED = -1e38  # splash gives a row that sees nothing a log-sum-exp of -2.4e38


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

    Raises NotImplementedError on other platforms, for explicit indices, for 16-bit operands other than bfloat16, and when
    the log-sum-exp is differentiated.
    """
    require_platform("attention", "splash", "tpu", "'xla'")
    if q_index is not None or kv_index is not None:
        raise NotImplementedError("splash: its masks are static, no q_index or kv_index; take 'pallas_tpu' or 'xla'")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"splash: operands must be bfloat16 or float32, got {q.dtype.name}; take 'xla'")
    b, t = q.shape[:2]
    length = k.shape[1]
    q_segment = jnp.ones((b, t), jnp.int32) if q_segment is None else q_segment
    kv_segment = jnp.ones((b, length), jnp.int32) if kv_segment is None else kv_segment
    (q_block, t_padded), (kv_block, length_padded) = _padded_length(t), _padded_length(length)
    q, k, v, q_where, kv_where = (
        jnp.pad(x, ((0, 0), (0, n - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
        for x, n in zip(
            (q, k, v, q_segment, kv_segment),
            (t_padded, length_padded, length_padded, t_padded, length_padded),
            strict=True,
        )
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)  # splash knows no scale
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in (q, k, v))
    out, lse = _splash((causal, q_block, kv_block), q, k, v, q_where.astype(jnp.int32), kv_where.astype(jnp.int32))
    some = (lse > MASKED) & (q_where > 0)[:, None]
    out = jnp.where(some[..., None], out, 0.0)
    lse = jnp.where(some, lse, EMPTY_LSE)
    return jnp.moveaxis(out, 1, 2)[:, :t], lse[:, :, :t]


def _padded_length(length: int) -> tuple[int, int]:
    """Block and length that it divides."""
    block = min(BLOCK, -(-length // LANES) * LANES)
    return block, -(-length // block) * block


def _kernel(sizes: tuple[bool, int, int], heads: int, t: int, length: int, with_lse: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    causal, q_block, kv_block = sizes
    mask = masks.CausalMask((t, length)) if causal else masks.FullMask((t, length))
    blocks: dict[str, Any] = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), q_block)
    blocks |= dict.fromkeys(
        ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"), kv_block
    )
    return kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads), block_sizes=kernel.BlockSizes(**blocks), save_residuals=with_lse
    )


def _run(sizes, with_lse: bool, q, k, v, q_segment, kv_segment):
    """q [B,H,T,P], k and v [B,K,L,P], segments [B,T] and [B,L]; examples one after the other, as a TPU takes them anyway."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    kernel = _kernel(sizes, q.shape[1], q.shape[2], k.shape[2], with_lse)

    def example(parts):
        q, k, v, *segments = parts
        return kernel(q, k, v, segment_ids=SegmentIds(*segments))

    arrays = (q, k, v, q_segment, kv_segment)
    if q.shape[0] > 1:
        return jax.lax.map(example, arrays)
    return jax.tree.map(lambda x: x[None], example(tuple(x[0] for x in arrays)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _splash(sizes, q, k, v, q_segment, kv_segment):
    out, (lse,) = _run(sizes, True, q, k, v, q_segment, kv_segment)
    return out, lse


def _splash_fwd(sizes, q, k, v, q_segment, kv_segment):
    # The library differentiates only the kernel that keeps its log-sum-exp to itself. Where nobody uses ours, the
    # second call is removed by the compiler.
    q, k, v, q_segment, kv_segment = (x.value for x in (q, k, v, q_segment, kv_segment))
    out, pull = jax.vjp(lambda q, k, v: _run(sizes, False, q, k, v, q_segment, kv_segment), q, k, v)
    return (out, _splash(sizes, q, k, v, q_segment, kv_segment)[1]), pull


def _splash_bwd(sizes, pull, gradients):
    d_out, d_lse = gradients
    if not isinstance(d_lse, SymbolicZero):
        raise NotImplementedError("splash: its log-sum-exp has no gradient; take 'pallas_tpu' or 'xla'")
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(d_out.shape, d_out.dtype)
    return *pull(d_out), None, None


_splash.defvjp(_splash_fwd, _splash_bwd, symbolic_zeros=True)
