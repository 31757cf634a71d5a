"""How much the question looks at each visual token: softmax weights of query rows, reduced, never whole in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.ops.attention import xla
from hybridvlm.ops.attention.api import attention, check_shapes, default_implementations, first_that_runs, load
from hybridvlm.ops.attention.reference import EMPTY_LSE
from hybridvlm.ops.platforms import platform

# name -> module. Its text_to_visual(q, k, *, lse, row_weight, q_segment, kv_segment, q_index, kv_index, heads, queries, causal,
# scale) -> [B,L] fp32 gets everything (nothing is None): row_weight [B,R] fp32, 0 for a row that does not count; queries "sum"
# (of weight * row_weight over rows) or "max" (of the same product). It need not look at `visual`.
IMPLEMENTATIONS = {
    "reference": "hybridvlm.ops.attention.reference",
    "xla": "hybridvlm.ops.attention.xla",
    "pallas_tpu": "hybridvlm.ops.attention.pallas_tpu_scores",
    "pallas_gpu": "hybridvlm.ops.attention.pallas_gpu_scores",
}
# By `python -m hybridvlm.bench score --aot v5e:2x2` (v5p:2x2x1, v6e:2x2); see `api.DEFAULTS`.
DEFAULTS = {"tpu": "pallas_tpu"}
REDUCTIONS = {"heads": ("mean", "max"), "queries": ("mean", "max", "last")}


def text_to_visual(
    q: jax.Array,
    k: jax.Array,
    *,
    q_mask: jax.Array,
    visual: jax.Array,
    lse: jax.Array | None = None,
    q_segment: jax.Array | None = None,
    kv_segment: jax.Array | None = None,
    q_index: jax.Array | None = None,
    kv_index: jax.Array | None = None,
    heads: str = "mean",
    queries: str = "mean",
    causal: bool = True,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax weight of the question's rows on each visual token, reduced to one score per token.

    q [B,R,H,P]: the query rows, those with q_mask [B,R] False are unused; k [B,L,K,P]: all keys; visual [B,L] bool.
    The softmax runs over every key that a row sees (text too), by the rule of `attention`: same nonzero segment, and
    kv_index <= q_index when `causal`. Query rows usually stand late in the row: pass their positions as q_index [B,R]
    (kv_index None counts from 0); without q_index every row is taken to stand after all keys.
    lse [B,H,R] fp32: the rows' log-sum-exp as `attention` returns it; None computes it in a first pass over k, in "xla" in the
    same.

    heads: "mean" or "max" over the H heads; queries: "mean", "max" or "last" over the rows that are valid, apart for each
    segment: a key is scored only by rows of its own segment. Heads are reduced first, then rows.
    implementation: "xla" (2,048 keys and one head at a time), "reference" (all weights at once), or the kernels "pallas_tpu"
    and "pallas_gpu", which read k once and leave no weights in memory; None takes the platform's (`DEFAULTS`).

    Returns score [B,L] fp32, 0 where `visual` is False and where a segment has no valid row.
    Raises ValueError for shapes that do not fit together or an unknown reduction or implementation; NotImplementedError,
    with the reason, for a named implementation that cannot run on this platform or for these arguments.
    """
    check_shapes(q, k, None, q_segment, kv_segment, q_index, kv_index)
    _check(q, k, q_mask, visual, lse, heads, queries)
    (b, rows, _, width), length = q.shape, k.shape[1]
    if not rows:
        return jnp.zeros((b, length), jnp.float32)
    scale = width**-0.5 if scale is None else scale
    q_segment = jnp.ones((b, rows), jnp.int32) if q_segment is None else q_segment
    q_segment = jnp.where(q_mask, q_segment, 0)
    q = jnp.where(q_mask[..., None, None], q, 0)  # an unused row may hold anything, and so may padding
    if kv_segment is None:
        kv_segment = jnp.ones((b, length), jnp.int32)
    else:
        k = jnp.where((kv_segment > 0)[..., None, None], k, 0)
    kv_index = jnp.broadcast_to(jnp.arange(length), (b, length)) if kv_index is None else kv_index
    if q_index is None:
        q_index = jnp.full((b, rows), jnp.iinfo(jnp.int32).max, jnp.int32)
    row_weight = _row_weights(q_mask, q_segment, queries)
    where: dict[str, Any] = {"q_segment": q_segment, "kv_segment": kv_segment, "q_index": q_index, "kv_index": kv_index}
    how: dict[str, Any] = {
        "heads": heads,
        "queries": "max" if queries == "max" else "sum",
        "causal": causal,
        "scale": scale,
    }

    def run(name: str) -> jax.Array:
        if lse is None and name == "xla":
            return xla.text_to_visual_once(q, k, row_weight=row_weight, **where, **how)
        known = log_sum_exp(q, k, **where, causal=causal, scale=scale) if lse is None else lse
        known = jnp.where((q_segment > 0)[:, None], known.astype(jnp.float32), EMPTY_LSE)
        return load(IMPLEMENTATIONS, name).text_to_visual(q, k, lse=known, row_weight=row_weight, **where, **how)

    names = (implementation,) if implementation is not None else default_implementations(DEFAULTS, q, k)
    return jnp.where(visual, first_that_runs("text_to_visual", names, run), 0.0)


def log_sum_exp(q: jax.Array, k: jax.Array, **options: Any) -> jax.Array:
    """The log-sum-exp [B,H,R] float32 that `attention` returns for rows q [B,R,H,P] over keys k [B,L,K,P], without a result.

    options: of `attention`.
    """
    # On a TPU the kernel of a value of one lane takes two minutes to compile, that of whole ones five seconds.
    return attention(q, k, k if platform() == "tpu" else k[..., :1], **options)[1]


def _check(
    q: jax.Array, k: jax.Array, q_mask: jax.Array, visual: jax.Array, lse: jax.Array | None, heads: str, queries: str
) -> None:
    for name, value in (("heads", heads), ("queries", queries)):
        if value not in REDUCTIONS[name]:
            raise ValueError(f"{name}: expected one of {REDUCTIONS[name]}, got {value!r}")
    b, rows, head_count, _ = q.shape
    length = k.shape[1]
    for name, array, shape in (("q_mask", q_mask, (b, rows)), ("visual", visual, (b, length))):
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    if lse is not None and lse.shape != (b, head_count, rows):
        raise ValueError(f"lse: expected [B,H,R] = {(b, head_count, rows)}, got {lse.shape}")


def _row_weights(q_mask: jax.Array, q_segment: jax.Array, queries: str) -> jax.Array:
    """[B,R] fp32: with what weight a row enters the reduction over the rows of its segment."""
    row_weight = q_mask & (q_segment > 0)
    same = q_segment[:, :, None] == q_segment[:, None, :]
    if queries == "last":  # a row with a later valid row of its segment does not count
        later = jnp.arange(q_mask.shape[1])[None, :] > jnp.arange(q_mask.shape[1])[:, None]
        row_weight &= ~jnp.any(same & later & row_weight[:, None, :], axis=2)
    row_weight = row_weight.astype(jnp.float32)
    if queries == "mean":
        row_weight = row_weight / jnp.maximum(jnp.sum(same * row_weight[:, None, :], axis=2), 1.0)
    return row_weight
