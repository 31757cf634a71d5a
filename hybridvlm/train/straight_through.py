"""A gradient for selection, which by itself has none.

What stays after a drop is decided by the k-th highest score, a step function. The straight-through estimator here (arXiv 1308.3432)
leaves the forward pass as it is and multiplies every visual token that is kept by 1 + g - stop_gradient(g), with

    g_i = sigmoid((s_i - c) / (temperature * sigma))

where s_i is its score, c the score of the last token to stay and sigma the standard deviation of the visual scores of its segment (both
without gradient). So ds_i = <dx_i, x_i> g_i (1 - g_i) / (temperature * sigma): a kept token whose growth would lower the loss is
ranked higher, most of all one that stands near the cut; a dropped token gets nothing. It is biased, and off by default.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybridvlm.ops.tokens import Tokens

StraightThrough = Callable[[Tokens, jax.Array, jax.Array], Tokens]


def straight_through(temperature: float) -> StraightThrough:
    """The function (tokens before a drop, score [B,L], keep [B,S]) -> tokens with the same values and a gradient to the score."""

    def straight_through_fn(tokens: Tokens, score: jax.Array, keep: jax.Array) -> Tokens:
        score = score.astype(jnp.float32)
        soft = jnp.zeros_like(score)
        for segment in range(1, keep.shape[1] + 1):
            mine = tokens.visual & (tokens.segment == segment)
            held = jax.lax.stop_gradient(score)
            ranked = -jnp.sort(jnp.where(mine, -held, jnp.inf), axis=1)  # high to low, then those of others
            last = jnp.clip(keep[:, segment - 1 : segment] - 1, 0, score.shape[1] - 1)
            cut = jnp.take_along_axis(ranked, last, axis=1)
            count = jnp.maximum(mine.sum(1, keepdims=True), 1)
            mean = jnp.where(mine, held, 0).sum(1, keepdims=True) / count
            spread = jnp.sqrt(jnp.where(mine, (held - mean) ** 2, 0).sum(1, keepdims=True) / count) + 1e-6
            cut = jnp.where(jnp.isfinite(cut), cut, mean)
            soft = jnp.where(mine, jax.nn.sigmoid((score - cut) / (temperature * spread)), soft)
        factor = 1 + (soft - jax.lax.stop_gradient(soft))
        return tokens.replace(x=tokens.x * factor[..., None].astype(tokens.x.dtype))

    return straight_through_fn
