"""Merging tokens: sums written into the rows of anchors, after which `compact` drops the rest.

Every published merge is linear in the tokens and leaves each result at one of its own tokens, the anchor: so a
merge is a fold and the same `compact` as a drop. Order, positions and indices stay those of the anchors.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from hybridvlm.ops.tokens import Tokens

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """What a reduction method decides of the tokens of a row.

    Attributes:
        score: [B,L], by which tokens stay; anchors rank above what is merged into them.
        into: [B,A,L] int32, positions to which a token contributes (A at most), L for none; None: nothing is merged.
        weight: [B,A,L], with which factor; an anchor contributes to itself, too. Of the mean of n tokens each has 1/n.
    """

    score: jax.Array
    into: jax.Array | None = None
    weight: jax.Array | None = None


def fold(x: Float[Array, "B L D"], into: Int[Array, "B A L"], weight: Float[Array, "B A L"]) -> Float[Array, "B L D"]:
    """Sums of tokens at the positions of their anchors.

    Args:
        x: [B,L,D] tokens.
        into: [B,A,L] int32, positions that each token contributes to; L (or beyond): nowhere.
        weight: [B,A,L], the factors. Gradients flow to x, none to the factors.

    Returns: [B,L,D] in x's dtype, y[p] = sum of weight[a,t] * x[t] over all into[a,t] = p, summed in float32; a
    position that nothing is written to keeps its x.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    if into.ndim != 3 or into.shape != weight.shape or (into.shape[0], into.shape[2]) != x.shape[:2]:
        raise ValueError(
            f"fold: into and weight must be [B,A,L] with B, L = {x.shape[:2]} of x, got {into.shape} and {weight.shape}"
        )
    length = x.shape[1]
    weight = jax.lax.stop_gradient(weight).astype(jnp.float32)

    def one(row: jax.Array, into: jax.Array, weight: jax.Array) -> jax.Array:
        wide = row.astype(jnp.float32)

        def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            at, factor = part
            return total.at[at].add(factor[:, None] * wide, mode="drop"), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(wide), (into, weight))
        written = jnp.zeros(length, bool).at[into.reshape(-1)].set(True, mode="drop")
        return jnp.where(written[:, None], total.astype(row.dtype), row)

    return jax.vmap(one)(x, jnp.clip(into, 0, length), weight)


def fold_tokens(tokens: Tokens, chosen: Selection, along: str) -> Tokens:
    """Tokens with what is merged written into its anchors: x, and the arrays of `extra` whose names begin with `along`."""
    if chosen.into is None or chosen.weight is None:
        return tokens
    into, weight = chosen.into, chosen.weight
    extra = {name: fold(a, into, weight) for name, a in tokens.extra.items() if name.startswith(along)}
    return tokens.replace(x=fold(tokens.x, into, weight), extra=tokens.extra | extra)
