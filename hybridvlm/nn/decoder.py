"""The decoder: a pattern string becomes a walk over stacked parameters, with drops where a plan asks for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import KINDS, MIXERS, ModelConfig
from hybridvlm.nn.attention import AttentionStack, attention_extend, attention_layer, attention_shared
from hybridvlm.nn.caches import AttentionCache, Cache
from hybridvlm.nn.linear import cut_columns
from hybridvlm.nn.mamba2 import MambaStack, mamba_layer, mamba_step
from hybridvlm.nn.mlp import MlpStack, mlp_layer
from hybridvlm.ops.compact import compact
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.tokens import Tokens

Params = dict[str, Any]
ScoreFn = Callable[[int, Any, Tokens], jax.Array]


class DropPlan(Protocol):
    """What the decoder asks of a plan: after which layers tokens drop, how many each example keeps, how long rows become."""

    drops: tuple[int, ...]

    def keep(self, layer: int, count: jax.Array) -> jax.Array:
        """Visual tokens that enter `layer`, for examples that came with `count` [B,S]."""
        ...

    def row_length(self, layer: int) -> int:
        """Static row length (visual and text) from `layer` on."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput:
    """tokens: after the last layer and the final norm. caches: one entry per layer.

    survivors: for every drop, (index [B,L], visual [B,L]) of the row behind it. kept [1+drops,B,S]: visual tokens that entered
    layer 0, then what was left after each drop.
    scores: [B,L] for every layer named in `collect`.
    """

    tokens: Tokens
    caches: tuple[Cache, ...]
    survivors: tuple[tuple[jax.Array, jax.Array], ...]
    kept: jax.Array
    scores: dict[int, jax.Array]


def repeats(pattern: str, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Cut layers start..stop-1 into runs (first layer, unit length, times): the longest repetitions found from left to right."""
    runs, at = [], start
    while at < stop:
        best = (1, 1)
        for unit in range(1, (stop - at) // 2 + 1):
            times = 1
            while pattern[at : at + unit] == pattern[at + times * unit : at + (times + 1) * unit] and (
                at + (times + 1) * unit <= stop
            ):
                times += 1
            if times > 1 and (times - 1) * unit > (best[1] - 1) * best[0]:
                best = (unit, times)
        runs.append((at, *best))
        at += best[0] * best[1]
    return runs


def layer_params(params: Params, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
    """The parameters of one layer, cut out of the stack of its kind."""
    kind, index = config.kind_index(layer)
    return jax.tree.map(lambda a: a[index], params[kind])


def unstack(params: Params, config: ModelConfig) -> tuple[dict[str, jax.Array], ...]:
    """One dict per layer, for `step`. A decode loop slices the stacks once, before it starts, and not again for every token."""
    layers = []
    for layer in range(len(config.pattern)):
        p = layer_params(params, config, layer)
        layers.append({name: cut_columns(a) if name.endswith("_proj") else a for name, a in p.items()})
    return tuple(layers)


def visual_counts(tokens: Tokens, segments: int) -> jax.Array:
    """Visual tokens of each segment: [B,S] int32."""
    ids = jnp.arange(1, segments + 1, dtype=tokens.segment.dtype)
    mine = tokens.visual[:, :, None] & (tokens.segment[:, :, None] == ids)
    return jnp.sum(mine, axis=1, dtype=jnp.int32)


def _layer(kind: str, p, c: ModelConfig, x, segment, *, query=None, query_capacity=0, room=0):
    if kind == "M":
        return mamba_layer(p, c, x, segment)
    if kind == "*":
        return attention_layer(p, c, x, segment, query=query, query_capacity=query_capacity, room=room)
    return mlp_layer(p, c, x), None, None


def _run(params: Params, c: ModelConfig, first: int, unit: int, times: int, x, segment, room: int):
    """Layers that neither drop nor score: `times` repetitions of a unit as one scan, so that they compile once."""
    kinds = c.pattern[first : first + unit]
    if times == 1:
        caches = []
        for offset, kind in enumerate(kinds):
            x, cache, _ = _layer(kind, layer_params(params, c, first + offset), c, x, segment, room=room)
            caches.append(cache)
        return x, caches
    stacks = {}
    for kind in set(kinds):
        _, begin = c.kind_index(c.pattern.index(kind, first))
        per_unit = kinds.count(kind)
        stacks[kind] = jax.tree.map(
            lambda a, begin=begin, per=per_unit: a[begin : begin + times * per].reshape(times, per, *a.shape[1:]),
            params[KINDS[kind]],
        )

    def body(x, unit_params):
        seen = dict.fromkeys(unit_params, 0)
        caches = []
        for kind in kinds:
            p = jax.tree.map(lambda a, i=seen[kind]: a[i], unit_params[kind])
            seen[kind] += 1
            x, cache, _ = _layer(kind, p, c, x, segment, room=room)
            caches.append(cache)
        return x, tuple(caches)

    x, stacked = jax.lax.scan(body, x, stacks)
    return x, [jax.tree.map(lambda a, i=i: a[i], cache) for i in range(times) for cache in stacked]


class Decoder(nn.Module):
    """Stacked parameters by kind, and the walk over them. `params["decoder"]` = {mamba, attention, mlp, norm_f}."""

    config: ModelConfig

    def setup(self):
        c = self.config
        if c.count("M"):
            self.mamba = MambaStack(c)
        if c.count("*"):
            self.attention = AttentionStack(c)
        if c.count("-"):
            self.mlp = MlpStack(c)
        self.norm_f = self.param("norm_f", nn.initializers.ones, (c.width,))

    def stacks(self) -> Params:
        """The parameters as the plain nested dict that the functions of this file take."""
        c = self.config
        out = {name: getattr(self, name)() for kind, name in KINDS.items() if c.count(kind)}
        return out | {"norm_f": self.norm_f}

    def __call__(self, tokens: Tokens, **options) -> DecoderOutput:
        return prefill(self.stacks(), self.config, tokens, **options)


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Tokens,
    *,
    plan: DropPlan | None = None,
    score_fn: ScoreFn | None = None,
    collect: tuple[int, ...] = (),
    room: int = 0,
    segments: int = 1,
    query_capacity: int | None = None,
    counts: jax.Array | None = None,
) -> DecoderOutput:
    """Run whole prompts through the decoder.

    plan: where tokens drop; score_fn(layer, aux, tokens) -> [B,L] ranks them (needed with a plan that drops, or `collect`).
    collect: mixer layers whose scores are returned without dropping. room: empty cache slots for tokens to come.
    segments: samples packed in a row. query_capacity: most question rows of an example (default: the text length, L minus visual).
    counts [B,S]: visual tokens that each example came with, when some were dropped before the decoder (default: those here).
    """
    c = config
    drops = set(plan.drops) if plan is not None else set()
    for layer in sorted(drops | set(collect)):
        if c.pattern[layer] not in MIXERS:
            raise ValueError(f"layer {layer} is {c.pattern[layer]!r}; scores exist only after M and *")
    if (drops or collect) and score_fn is None:
        raise ValueError("score_fn is needed where the plan drops or scores are collected")
    scored = drops | set(collect)
    if query_capacity is None:
        query_capacity = tokens.length
    if counts is None:
        counts = visual_counts(tokens, segments)
    caches: list[Cache] = []
    survivors, kept, scores = [], [visual_counts(tokens, segments)], {}
    at = 0
    while at < len(c.pattern):
        stop = next((layer for layer in range(at, len(c.pattern)) if layer in scored), len(c.pattern))
        for first, unit, times in repeats(c.pattern, at, stop):
            x, entries = _run(params, c, first, unit, times, tokens.x, tokens.segment, room)
            tokens = tokens.replace(x=x)
            caches += entries
        if stop == len(c.pattern):
            break
        x, cache, aux = _layer(
            c.pattern[stop],
            layer_params(params, c, stop),
            c,
            tokens.x,
            tokens.segment,
            query=tokens.query,
            query_capacity=min(query_capacity, tokens.length),
            room=room,
        )
        caches.append(cache)
        tokens = tokens.replace(x=x)
        score = score_fn(stop, aux, tokens)
        if stop in collect:
            scores[stop] = score
        if stop in drops:
            tokens = compact(tokens, score, plan.keep(stop + 1, counts), plan.row_length(stop + 1))
            survivors.append((tokens.index, tokens.visual))
            kept.append(visual_counts(tokens, segments))
        at = stop + 1
    tokens = tokens.replace(x=rms_norm(tokens.x, params["norm_f"], c.norm_eps))
    return DecoderOutput(tokens, tuple(caches), tuple(survivors), jnp.stack(kept), scores)


def step(
    layers: tuple[dict[str, jax.Array], ...],
    norm_f: jax.Array,
    config: ModelConfig,
    x: jax.Array,
    caches: tuple[Cache, ...],
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """One new token per example: x [B,1,D] -> final hidden state [B,1,D] and the caches, each one token longer."""
    out = []
    segment = jnp.ones(x.shape[:2], jnp.int32)
    for kind, p, cache in zip(config.pattern, layers, caches, strict=True):
        if kind == "M":
            x, cache = mamba_step(p, config, x, cache)
        elif kind == "*":
            x, cache = attention_extend(p, config, x, segment, cache)
        else:
            x = mlp_layer(p, config, x)
        out.append(cache)
    return rms_norm(x, norm_f, config.norm_eps), tuple(out)


def extend(
    params: Params, config: ModelConfig, x: jax.Array, segment: jax.Array, caches: tuple[Cache, ...]
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """A piece of text after what the caches hold: x [B,T,D], segment [B,T] -> final hidden states [B,T,D] and the longer caches."""
    out = []
    for layer, (kind, cache) in enumerate(zip(config.pattern, caches, strict=True)):
        p = layer_params(params, config, layer)
        if kind == "M":
            x, cache, _ = mamba_layer(p, config, x, segment, cache)
        elif kind == "*":
            x, cache = attention_extend(p, config, x, segment, cache)
        else:
            x = mlp_layer(p, config, x)
        out.append(cache)
    return rms_norm(x, params["norm_f"], config.norm_eps), tuple(out)


def extend_shared(
    params: Params, config: ModelConfig, x: jax.Array, segment: jax.Array, caches: tuple[Cache, ...]
) -> tuple[jax.Array, dict[int, Any]]:
    """Q questions on each of B videos, apart from one another: x [B*Q,T,D], caches of B rows that are read, not written.

    Returns the hidden states [B*Q,T,D] after each layer's residual stream ended (final norm applied), and per mixer layer
    what its scores need: for M the questions' c [B*Q,T,G,N], for * (q [B*Q,T,H,P], lse [B*Q,H,T]); and under key -1 - layer
    the residual stream after that layer, for losses on what a layer has read.
    """
    told: dict[int, Any] = {}
    for layer, (kind, cache) in enumerate(zip(config.pattern, caches, strict=True)):
        p = layer_params(params, config, layer)
        if kind == "M":
            x, _, aux = mamba_layer(p, config, x, segment, cache)
            told[layer] = aux.c
        elif kind == "*":
            if not isinstance(cache, AttentionCache):
                raise TypeError(f"layer {layer} is attention, its cache is {type(cache).__name__}")
            x, q, lse = attention_shared(p, config, x, segment, cache)
            told[layer] = (q, lse)
        else:
            x = mlp_layer(p, config, x)
        told[-1 - layer] = x
    return rms_norm(x, params["norm_f"], config.norm_eps), told
