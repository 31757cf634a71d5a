"""More tokens after the caches that a prefill returns: one, a piece of text, or many questions that share them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import KINDS, MIXERS, ModelConfig
from hybridvlm.nn.caches import AttentionCache, Cache
from hybridvlm.nn.layers import LAYER_KINDS
from hybridvlm.nn.linear import cut_columns
from hybridvlm.nn.scan import Params, layer_params
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.platforms import platform
from hybridvlm.parallel.tensor import all_gather_params


def step(
    layers: tuple[Params, ...],
    norm_f: jax.Array,
    config: ModelConfig,
    x: jax.Array,
    caches: tuple[Cache, ...],
    position: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """One new token per example.

    Args:
        layers: one dict of parameters per layer, of `decode_layers`.
        norm_f: [D], the final norm.
        x: [B,1,D].
        caches: one entry per layer.
        position: [B,1], the new token's, for a config with rotary embedding.

    Returns:
        The final hidden state [B,1,D], and the caches, each one token longer.
    """
    segment = jnp.ones(x.shape[:2], jnp.int32)
    out = []
    for kind, p, cache in zip(config.pattern, layers, caches, strict=True):
        p = all_gather_params(config, KINDS[kind], p, x.dtype)
        x, cache, _ = LAYER_KINDS[kind].step(p, config, x, segment, position, cache)
        out.append(cache)
    return rms_norm(x, norm_f, config.norm_eps), tuple(out)


def extend(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    caches: tuple[Cache, ...],
    position: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """A piece of text after what the caches hold.

    Args:
        params: the stacks of `Decoder.stacks`.
        config: of the decoder.
        x: [B,T,D], embeddings.
        segment: [B,T], 0 = padding at the end.
        caches: one entry per layer, with T free slots.
        position: [B,T], for a config with rotary embedding.

    Returns:
        Final hidden states [B,T,D], and the longer caches.
    """
    out = []
    for layer, (kind, cache) in enumerate(zip(config.pattern, caches, strict=True)):
        p = all_gather_params(config, KINDS[kind], layer_params(params, config, layer), x.dtype)
        x, cache, _ = LAYER_KINDS[kind].extend(p, config, x, segment, position, cache)
        out.append(cache)
    return rms_norm(x, params["norm_f"], config.norm_eps), tuple(out)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedOutput:
    """What `extend_shared` gives.

    Attributes:
        x: [B*Q,T,D], after the last layer and the final norm.
        queries: per mixer layer, what its scores need: of `M` the questions' c [B*Q,T,G,N], of `*` (q [B*Q,T,H,P],
            log-sum-exp [B*Q,H,T]).
        residual: per layer, the residual stream after it, for losses on what a layer has read.
    """

    x: jax.Array
    queries: dict[int, Any]
    residual: dict[int, jax.Array]


def extend_shared(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    caches: tuple[Cache, ...],
    position: jax.Array | None = None,
) -> SharedOutput:
    """Q questions on each of B videos, apart from one another: the caches of B rows are read, not written.

    Args:
        params: the stacks of `Decoder.stacks`.
        config: of the decoder.
        x: [B*Q,T,D], embeddings; the questions on one video are next to each other.
        segment: [B*Q,T], 0 = padding at the end.
        caches: of B videos, one entry per layer.
        position: [B*Q,T], for a config with rotary embedding.

    Raises:
        TypeError: for an attention layer whose cache is none of attention.
    """
    queries, residual = {}, {}
    for layer, (kind, cache) in enumerate(zip(config.pattern, caches, strict=True)):
        if kind == "*" and not isinstance(cache, AttentionCache):
            raise TypeError(f"layer {layer} is attention, its cache is {type(cache).__name__}")
        p = layer_params(params, config, layer)
        x, _, aux = LAYER_KINDS[kind].extend_shared(p, config, x, segment, position, cache)
        if kind in MIXERS:
            queries[layer] = aux
        residual[layer] = x
    return SharedOutput(rms_norm(x, params["norm_f"], config.norm_eps), queries, residual)


def decode_layers(params: Params, config: ModelConfig) -> Callable[[], tuple[Params, ...]]:
    """A function that gives `step` its layers, to be called for every token.

    XLA for TPU reads a layer's weights where they lie in their stack, so that they are sliced inside the loop: 15 layers of the
    12B take 0.1 GB beside their weights there, and 5.4 GB where the slices are made before it. On CPU and GPU a slice is a
    copy, and is made once.
    """
    if platform() == "tpu":
        return lambda: unstack(params, config)
    layers = unstack(params, config)
    return lambda: layers


def unstack(params: Params, config: ModelConfig) -> tuple[Params, ...]:
    """One dict per layer, for `step`."""
    layers = []
    for layer in range(len(config.pattern)):
        p = layer_params(params, config, layer)
        layers.append({name: cut_columns(a) if name.endswith("_proj") else a for name, a in p.items()})
    return tuple(layers)
