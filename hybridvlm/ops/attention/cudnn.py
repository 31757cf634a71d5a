"""cuDNN's fused attention, through `jax.nn.dot_product_attention`: causal or full rows, padded at their end, on NVIDIA GPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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
    q_length: jax.Array | None = None,
    kv_length: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """q [B,T,H,P], k and v [B,L,K,P] -> out [B,T,H,P] in q.dtype, lse [B,H,T] fp32, rounded to q.dtype by JAX. Arguments as in
    `api.attention`; q_length, kv_length [B] int32: tokens of each row before its padding (None: all), where out is anything.

    Raises NotImplementedError on other platforms, for segments and indices (cuDNN would not see them), for operands
    that are not bfloat16 or float16, without cuDNN, and when the log-sum-exp is differentiated.
    """
    require_platform("attention", "cudnn", "gpu", "'xla'")
    given = {"q_segment": q_segment, "kv_segment": kv_segment, "q_index": q_index, "kv_index": kv_index}
    for name, array in given.items():
        if array is not None:
            raise NotImplementedError(
                f"cudnn: it knows no indices, and segments only by one_segment=True, got {name}; take 'pallas_gpu' or 'xla'"
            )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"cudnn: operands must be bfloat16 or float16, got {q.dtype.name}; take 'xla'")
    return _cudnn(causal, scale, q, k, v, (q_length, kv_length))


def _both(causal: bool, scale: float, q, k, v, lengths):
    try:
        out, lse = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=causal,
            query_seq_lengths=lengths[0],
            key_value_seq_lengths=lengths[1],
            implementation="cudnn",
            return_residual=True,
        )
    except RuntimeError as error:  # no cuDNN, or one that is too old
        raise NotImplementedError(f"cudnn: {error} Take 'pallas_gpu' or 'xla', or install jax[cuda13]") from error
    return out, jnp.swapaxes(lse, 1, 2).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cudnn(causal: bool, scale: float, q, k, v, lengths):
    return _both(causal, scale, q, k, v, lengths)


def _cudnn_fwd(causal, scale, q, k, v, lengths):
    lengths = jax.tree.map(lambda leaf: leaf.value, lengths)
    run = lambda q, k, v: _both(causal, scale, q, k, v, lengths)  # noqa: E731
    out, pull, lse = jax.vjp(run, q.value, k.value, v.value, has_aux=True)
    return (out, lse), (pull,)


def _cudnn_bwd(causal, scale, saved, gradients):
    d_out, d_lse = gradients
    if not isinstance(d_lse, SymbolicZero):  # the library would drop it without a word
        raise NotImplementedError("cudnn: its log-sum-exp has no gradient; take 'pallas_gpu' or 'xla'")
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros(d_out.shape, d_out.dtype)
    return (*saved[0](d_out), None)


_cudnn.defvjp(_cudnn_fwd, _cudnn_bwd, symbolic_zeros=True)
