"""The kinds of layers that a pattern names, one table that every pass of the decoder reads.

A layer is a residual block: it takes the residual stream x [B,L,D] and gives it back with its own part added. `M` (Mamba-2)
and `*` (attention) mix tokens and have caches; `-` (MLP) and `E` (mixture of experts) look at each token by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from hybridvlm.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig
from hybridvlm.nn.attention import AttentionStack, attention_extend, attention_layer, attention_rest, attention_shared
from hybridvlm.nn.caches import Cache
from hybridvlm.nn.mamba2 import MambaStack, mamba_layer, mamba_step
from hybridvlm.nn.mlp import MlpStack, mlp_layer
from hybridvlm.nn.moe import MoeStack, moe_layer

LayerParams = dict[str, jax.Array]
# (p, config, x, segment, position, **options of attention_layer) -> (x, cache, what scores read or None)
Forward = Callable[..., tuple[jax.Array, Cache, Any]]
# (p, config, x, segment, position, cache) -> (x, longer cache, what scores read or None)
Extend = Callable[..., tuple[jax.Array, Cache, Any]]


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """One character of the pattern.

    Attributes:
        stack: Flax module that declares the parameters of all layers of this kind, stacked.
        forward: whole rows.
        extend: more tokens after a cache.
        rest: the rest of rows that begin in a cache, with at= and decode_capacity= as of `attention_rest`: what it gives is that
            of the whole row, but for scores of the scan, which are of the rest alone.
        extend_shared: many questions, each after the same cache, which is read and not written.
        step: one more token, [B,1,D].
    """

    stack: type[nn.Module]
    forward: Forward
    extend: Extend
    rest: Callable[..., tuple[jax.Array, Cache, Any]]
    extend_shared: Extend
    step: Extend


def _mamba_forward(p: LayerParams, c: ModelConfig, x, segment, position, **options):
    return mamba_layer(p, c, x, segment)


def _mamba_extend(p: LayerParams, c: ModelConfig, x, segment, position, cache, **options):
    return mamba_layer(p, c, x, segment, cache)


def _mamba_extend_shared(p: LayerParams, c: ModelConfig, x, segment, position, cache):
    x, _, aux = mamba_layer(p, c, x, segment, cache)
    return x, cache, aux.c


def _mamba_step(p: LayerParams, c: ModelConfig, x, segment, position, cache):
    return *mamba_step(p, c, x, cache), None


def _attention_forward(p: LayerParams, c: ModelConfig, x, segment, position, **options):
    return attention_layer(p, c, x, segment, position=position, **options)


def _attention_extend(p: LayerParams, c: ModelConfig, x, segment, position, cache):
    return *attention_extend(p, c, x, segment, cache, position), None


def _attention_rest(p: LayerParams, c: ModelConfig, x, segment, position, cache, **options):
    return attention_rest(p, c, x, segment, cache, position, **options)


def _attention_extend_shared(p: LayerParams, c: ModelConfig, x, segment, position, cache):
    x, q, lse = attention_shared(p, c, x, segment, cache, position)
    return x, cache, (q, lse)


def _per_token(stack: type[nn.Module], layer: Callable[..., jax.Array]) -> LayerKind:
    """A kind that looks at each token by itself: it has no cache and no score, and every pass is the same to it."""

    def forward(p: LayerParams, c: ModelConfig, x, segment, position, cache=None, **options):
        return layer(p, c, x), None, None

    return LayerKind(stack, forward, forward, forward, forward, forward)


LAYER_KINDS: dict[str, LayerKind] = {
    MAMBA: LayerKind(MambaStack, _mamba_forward, _mamba_extend, _mamba_extend, _mamba_extend_shared, _mamba_step),
    ATTENTION: LayerKind(
        AttentionStack,
        _attention_forward,
        _attention_extend,
        _attention_rest,
        _attention_extend_shared,
        _attention_extend,
    ),
    MLP: _per_token(MlpStack, mlp_layer),
    MOE: _per_token(MoeStack, moe_layer),
}
