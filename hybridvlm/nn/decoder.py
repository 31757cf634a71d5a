"""The decoder: a pattern string becomes a walk over stacked parameters, with drops where a plan asks for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import KINDS, MIXERS, MOE, ModelConfig
from hybridvlm.nn.attention import AttentionStack, attention_extend, attention_layer, attention_shared
from hybridvlm.nn.caches import AttentionCache, Cache
from hybridvlm.nn.linear import cut_columns
from hybridvlm.nn.mamba2 import MambaStack, mamba_layer, mamba_step
from hybridvlm.nn.mlp import MlpStack, mlp_layer
from hybridvlm.nn.moe import MoeStack, moe_layer
from hybridvlm.nn.parallel import fetch
from hybridvlm.nn.sequence import compact_row, row_shards, row_start, row_total, whole_row
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.segments import own_place
from hybridvlm.ops.tokens import OWN_PLACE, Tokens

Params = dict[str, Any]
ScoreFn = Callable[[int, Any, Tokens], jax.Array]
Gate = Callable[[Tokens, jax.Array, jax.Array], Tokens]

# What the backward pass finds of a layer's inside (the residual stream before each layer is kept in any case); the rest is computed
# again. None: all of it is kept.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layer": jax.checkpoint_policies.nothing_saveable,
}


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
    """tokens: after the last layer and the final norm. caches: one entry per layer; () from a prefill that was asked for none.

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


def plane_after(layer: int) -> str:
    """The name in Tokens.extra of what is added to the residual stream behind `layer` (DeepStack, arXiv 2406.04334)."""
    return f"plane_after_{layer}"


def visual_counts(tokens: Tokens, segments: int) -> jax.Array:
    """Visual tokens of each segment: [B,S] int32."""
    ids = jnp.arange(1, segments + 1, dtype=tokens.segment.dtype)
    mine = tokens.visual[:, :, None] & (tokens.segment[:, :, None] == ids)
    return jnp.sum(mine, axis=1, dtype=jnp.int32)


def _layer(kind: str, p, c: ModelConfig, x, segment, position, *, query=None, query_capacity=0, room=0):
    if kind == "M":
        return mamba_layer(p, c, x, segment)
    if kind == "*":
        return attention_layer(
            p, c, x, segment, position=position, query=query, query_capacity=query_capacity, room=room
        )
    return _per_token(kind, p, c, x), None, None


def _per_token(kind: str, p, c: ModelConfig, x):
    """The layers that look at every token by itself."""
    return moe_layer(p, c, x) if kind == MOE else mlp_layer(p, c, x)


@dataclasses.dataclass(frozen=True)
class _Span:
    """Layers start..stop-1, which neither drop nor score; `copied`: repeated units scan over copies of their parameters,
    `inside`: of such a scan."""

    config: ModelConfig
    start: int
    stop: int
    room: int
    remat: str = "none"
    caches: bool = True
    copied: bool = False
    inside: bool = False


def _run_layer(span: _Span, layer: int, stack: Params, index, x, segment, position, query=None, **options):
    """One layer, the `index`-th of its kind's `stack`: (x, its cache or None, aux), rematerialised as the span says."""
    kind = span.config.pattern[layer]

    def run(stack, index, x, segment, position, query):
        p = fetch(span.config, KINDS[kind], _pick(stack, index), x.dtype)
        x, cache, aux = _layer(kind, p, span.config, x, segment, position, query=query, room=span.room, **options)
        return x, cache if span.caches else None, aux

    if REMAT[span.remat] is None:
        return run(stack, index, x, segment, position, query)
    # What enters is kept, so a layer's parameters are picked and fetched inside. The body of a scan is compiled apart from its
    # backward pass: XLA finds nothing there that it could merge with the second computation.
    static = (1,) if isinstance(index, int) else ()
    again = jax.checkpoint(run, policy=REMAT[span.remat], prevent_cse=not span.inside, static_argnums=static)
    return again(stack, index, x, segment, position, query)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _span(span: _Span, params: Params, x, segment, position):
    """x after the layers of a span, and their caches."""
    base = {kind: span.config.pattern[: span.start].count(kind) for kind in KINDS}
    return _walk(span, params, base, x, segment, position)


def _span_forward(span: _Span, params: Params, x, segment, position):
    run = _span.__wrapped__
    return jax.vjp(
        lambda params, x: run(dataclasses.replace(span, copied=True), params, x, segment, position), params, x
    )


def _span_backward(span: _Span, pull, gradient):
    return (*pull(gradient), None, None)


_span.defvjp(_span_forward, _span_backward)


def _walk(span: _Span, params: Params, base: dict[str, Any], x, segment, position):
    """`_span` with base[kind]: the place in its stack of the first layer of a kind here."""
    c, base, caches = span.config, dict(base), []
    for first, unit, times in repeats(c.pattern, span.start, span.stop):
        kinds = c.pattern[first : first + unit]
        if times > 1:
            inner = dataclasses.replace(span, start=first, stop=first + unit, inside=True)
            x, entries = _repeat(inner, times, params, base, x, segment, position)
            caches += entries
        else:
            x, cache, _ = _run_layer(span, first, params[KINDS[kinds]], base[kinds], x, segment, position)
            caches.append(cache)
        base = {kind: place + times * kinds.count(kind) for kind, place in base.items()}
    return x, caches


def _repeat(unit: _Span, times: int, params: Params, base: dict[str, Any], x, segment, position):
    """`times` units of the same kinds as one scan, and scans within it, so that each kind of layer compiles once.

    The scan reads every layer's parameters where they lie in the stack: a stretch of the stack, cut out for it, would be a
    copy. Only under differentiation it is cut, since the gradient of reading in place is as large as the stack, per layer.
    """
    kinds = unit.config.pattern[unit.start : unit.stop]
    per = {kind: kinds.count(kind) for kind in base}

    def cut(kind: str) -> Params:
        at, n = base[kind], per[kind]
        take = lambda a: a[at : at + times * n].reshape(times, n, *a.shape[1:])  # noqa: E731
        return jax.tree.map(take, params[KINDS[kind]])

    def step(x, part):
        i, copies = part
        if unit.copied:
            return _walk(unit, copies, dict.fromkeys(base, 0), x, segment, position)
        return _walk(unit, params, {kind: base[kind] + i * per[kind] for kind in base}, x, segment, position)

    copies = {KINDS[kind]: cut(kind) for kind in sorted(set(kinds))} if unit.copied else {}
    x, stacked = jax.lax.scan(step, x, (jnp.arange(times, dtype=jnp.int32), copies))
    return x, [jax.tree.map(lambda a, i=i: a[i], cache) for i in range(times) for cache in stacked]


def _pick(stack: dict[str, jax.Array], index: int | jax.Array) -> dict[str, jax.Array]:
    """The parameters of one layer; `index` may be a traced int32."""
    if isinstance(index, int):
        return jax.tree.map(lambda a: a[index], stack)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)


class Decoder(nn.Module):
    """Stacked parameters by kind, and the walk over them. `params["decoder"]` = {mamba, attention, mlp, moe, norm_f}."""

    config: ModelConfig

    def setup(self):
        c = self.config
        if c.count("M"):
            self.mamba = MambaStack(c)
        if c.count("*"):
            self.attention = AttentionStack(c)
        if c.count("-"):
            self.mlp = MlpStack(c)
        if c.count(MOE):
            self.moe = MoeStack(c)
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
    remat: str = "none",
    caches: bool = True,
    gate: Gate | None = None,
) -> DecoderOutput:
    """Run whole prompts through the decoder.

    plan: where tokens drop; score_fn(layer, aux, tokens) -> [B,L] ranks them (needed with a plan that drops, or `collect`).
    collect: mixer layers whose scores are returned without dropping. room: empty cache slots for tokens to come.
    segments: samples packed in a row. query_capacity: most question rows of an example (default: the text length, L minus visual).
    counts [B,S]: visual tokens that each example came with, when some were dropped before the decoder (default: those here).
    tokens.extra[plane_after(layer)] [B,L,D] is added to the residual stream behind that layer, and is not carried further.
    remat: what a backward pass finds kept of a layer, a name of `REMAT`: "none" (everything), "dots" (what is multiplied by a weight
    gives), "layer" (the residual stream before it); which tokens stay is never decided again. caches=False for training: none
    are returned, and so none are kept.

    gate(tokens, score [B,L], keep [B,S]) -> tokens, right before each drop: a way for gradients to reach the scores.

    Scores that only choose carry no gradient; those of `collect` do, and all do with a gate.
    """
    c = config
    if remat not in REMAT:
        raise ValueError(f"remat: expected one of {sorted(REMAT)}, got {remat!r}")
    if row_shards(c) > 1 and gate is not None:
        raise ValueError("a gate sees whole rows, and these are cut over the sequence axis; use a mesh of sequence=1")
    if row_shards(c) > 1 and caches:
        raise ValueError(
            "a row that is cut over the sequence axis leaves no caches; pass caches=False, or a mesh of sequence=1"
        )
    drops = set(plan.drops) if plan is not None else set()
    for layer in sorted(drops | set(collect)):
        if c.pattern[layer] not in MIXERS:
            raise ValueError(f"layer {layer} is {c.pattern[layer]!r}; scores exist only after M and *")
    if (drops or collect) and score_fn is None:
        raise ValueError("score_fn is needed where the plan drops or scores are collected")
    scored = drops | set(collect)
    planes = {layer for layer in range(len(c.pattern)) if plane_after(layer) in tokens.extra}
    if query_capacity is None:
        query_capacity = tokens.length * row_shards(c)
    here = row_total(c, visual_counts(tokens, segments))
    if counts is None:
        counts = here
    if segments > 1 and score_fn is not None:
        tokens = _with_own_place(c, tokens)
    entries: list[Cache] = []
    survivors, kept, scores = [], [here], {}
    at = 0
    while at < len(c.pattern):
        stop = next((layer for layer in range(at, len(c.pattern)) if layer in scored | planes), len(c.pattern))
        if at < stop:
            span = _Span(c, at, stop, room, remat, caches)
            x, found = _span(span, params, tokens.x, tokens.segment, tokens.position)
            tokens = tokens.replace(x=x)
            entries += found
        if stop == len(c.pattern):
            break
        kind, index = c.kind_index(stop)
        x, cache, aux = _run_layer(
            _Span(c, stop, stop + 1, room, remat, caches),
            stop,
            params[kind],
            index,
            tokens.x,
            tokens.segment,
            tokens.position,
            query=tokens.query if stop in scored else None,
            query_capacity=min(query_capacity, tokens.length * row_shards(c)),
        )
        entries.append(cache)
        if stop in planes:
            extra = dict(tokens.extra)
            x = x + extra.pop(plane_after(stop)).astype(x.dtype)
            tokens = tokens.replace(extra=extra)
        tokens = tokens.replace(x=x)
        if stop in scored:
            told = (aux, tokens) if stop in collect or gate is not None else jax.lax.stop_gradient((aux, tokens))
            score = score_fn(stop, *told)
        if stop in collect:
            scores[stop] = score
        if stop in drops:
            keep = plan.keep(stop + 1, counts)
            tokens = tokens if gate is None else gate(tokens, score, keep)
            tokens = compact_row(c, tokens, score, keep, plan.row_length(stop + 1))
            survivors.append((tokens.index, tokens.visual))
            kept.append(row_total(c, visual_counts(tokens, segments)))
        at = stop + 1
    tokens = tokens.replace(x=rms_norm(tokens.x, params["norm_f"], c.norm_eps))
    return DecoderOutput(tokens, tuple(entries) if caches else (), tuple(survivors), jnp.stack(kept), scores)


def _with_own_place(c: ModelConfig, tokens: Tokens) -> Tokens:
    """Packed rows, nothing dropped yet, with every token's place in its own sample: what a score by number has to go by."""
    place, start = own_place(whole_row(c, tokens.segment)), row_start(c, tokens.length)
    mine = jax.lax.dynamic_slice_in_dim(place, start, tokens.length, axis=1)
    return tokens.replace(extra=tokens.extra | {OWN_PLACE: mine})


def step(
    layers: tuple[dict[str, jax.Array], ...],
    norm_f: jax.Array,
    config: ModelConfig,
    x: jax.Array,
    caches: tuple[Cache, ...],
    position: jax.Array | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """One new token per example: x [B,1,D] -> final hidden state [B,1,D] and the caches, each one token longer.

    position [B,1]: the new token's, for a config with rotary embedding.
    """
    out = []
    segment = jnp.ones(x.shape[:2], jnp.int32)
    for kind, p, cache in zip(config.pattern, layers, caches, strict=True):
        if kind == "M":
            x, cache = mamba_step(p, config, x, cache)
        elif kind == "*":
            x, cache = attention_extend(p, config, x, segment, cache, position)
        else:
            x = _per_token(kind, p, config, x)
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
    """A piece of text after what the caches hold: x [B,T,D], segment [B,T] -> final hidden states [B,T,D] and the longer caches.

    position [B,T]: for a config with rotary embedding.
    """
    out = []
    for layer, (kind, cache) in enumerate(zip(config.pattern, caches, strict=True)):
        p = layer_params(params, config, layer)
        if kind == "M":
            x, cache, _ = mamba_layer(p, config, x, segment, cache)
        elif kind == "*":
            x, cache = attention_extend(p, config, x, segment, cache, position)
        else:
            x = _per_token(kind, p, config, x)
        out.append(cache)
    return rms_norm(x, params["norm_f"], config.norm_eps), tuple(out)


def extend_shared(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    segment: jax.Array,
    caches: tuple[Cache, ...],
    position: jax.Array | None = None,
) -> tuple[jax.Array, dict[int, Any]]:
    """Q questions on each of B videos, apart from one another: x [B*Q,T,D], caches of B rows that are read, not written.
    position [B*Q,T]: for a config with rotary embedding.

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
            x, q, lse = attention_shared(p, config, x, segment, cache, position)
            told[layer] = (q, lse)
        else:
            x = _per_token(kind, p, config, x)
        told[-1 - layer] = x
    return rms_norm(x, params["norm_f"], config.norm_eps), told
