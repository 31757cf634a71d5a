"""What a layer can tell about the importance of its tokens, as plain values in addition to its output.

The decoder hands these to `score_fn(layer, aux, tokens)`; it never needs to know what is done with them.
"""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MambaAux:
    """Inside of a Mamba-2 layer, after convolution and SiLU: what enters the scan.

    b, c [B,L,G,N]: the scan's key and query of every token. dt [B,L,H]: after softplus, 0 at padding.
    log_decay [B,L,H] fp32: dt * A, the logarithm of the decay that this token applies to the incoming state.
    """

    b: jax.Array
    c: jax.Array
    dt: jax.Array
    log_decay: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionAux:
    """Inside of an attention layer: R gathered query rows (the question's tokens) and all keys.

    q [B,R,H,P] with q_mask [B,R] bool (False: an unused row), q_segment [B,R] int32, q_index [B,R] int32 (the position of
    the row in the layer's L tokens, as the causal mask counts it); k [B,L,K,P]; lse [B,H,R] fp32, the rows'
    log-sum-exp over all keys they see, or None to have it computed.
    """

    q: jax.Array
    q_mask: jax.Array
    q_segment: jax.Array
    q_index: jax.Array
    k: jax.Array
    lse: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookaheadAux:
    """Inside of a layer, and how attention layers to come would look at its output.

    own: what the layer itself tells. ahead: of each attention layer that was asked for, nearest first, its norm and its query
    and key projections applied to the residual stream as this layer leaves it.
    """

    own: MambaAux | AttentionAux
    ahead: tuple[AttentionAux, ...]
