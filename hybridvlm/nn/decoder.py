"""The hybrid decoder: layers by a pattern string, over rows of tokens that a plan shortens by dropping visual tokens.

`prefill` is the model, top to bottom. Layers run in ranges; the layer that ends a range may be scored, and after it visual
tokens may be dropped, so that the next range runs on a shorter row. incremental.py continues from the caches
that `prefill` returns, `prefill` itself from a `Prefix` (prefix.py), which `run_prefix` makes. Layers are in mamba2.py,
attention.py, mlp.py and moe.py; scan.py runs a range of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from hybridvlm.config import ATTENTION, KINDS, MAMBA, MIXERS, ModelConfig
from hybridvlm.nn.caches import AttentionCache, Cache, MambaCache
from hybridvlm.nn.layers import LAYER_KINDS
from hybridvlm.nn.prefix import Prefix, continue_rows
from hybridvlm.nn.scan import REMAT, LayerRange, Params, look_ahead, run_layer, run_layers
from hybridvlm.ops.fold import Selection, fold_tokens
from hybridvlm.ops.layer_aux import LookaheadAux
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.segments import index_in_segment
from hybridvlm.ops.tokens import INDEX_IN_SEGMENT, Tokens
from hybridvlm.parallel.sequence import compact_row, gather_sequence, row_start, row_total, sequence_shards
from hybridvlm.parallel.tensor import LocalConfig

ScoreFn = Callable[[int, Any, Tokens], jax.Array | Selection]
DEEPSTACK = "deepstack_"
StraightThrough = Callable[[Tokens, jax.Array, jax.Array], Tokens]


class DropPlan(Protocol):
    """What the decoder needs of a plan.

    `drops` are layers after which tokens are dropped; `keep` and `row_length` take the layer that is entered, so what is
    left after a drop at layer i is keep(i + 1) of a row of row_length(i + 1).
    """

    @property
    def drops(self) -> tuple[int, ...]: ...

    def keep(self, layer: int, count: jax.Array) -> jax.Array:
        """Visual tokens that enter `layer`, for examples that came with `count` [B,S]."""
        ...

    def row_length(self, layer: int) -> int:
        """Static row length (visual and text) from `layer` on."""
        ...

    @property
    def frames(self) -> int:
        """Frames that a row has at most."""
        ...

    def most_frames(self, kept: jax.Array) -> jax.Array | None:
        """How many frames keep text of their own at most [B,S], where `kept` [B,S] visual tokens are left; None: all."""
        ...


CachesT = TypeVar("CachesT")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecoderOutput(Generic[CachesT]):
    """What `prefill` gives.

    Attributes:
        tokens: after the last layer and the final norm (unless that was left to the caller).
        caches: one entry per layer; () from a prefill that was asked for none. A family that remembers more puts it around them.
        survivors: for every drop, (index [B,L], visual [B,L]) of the row after it.
        kept: [1+drops,B,S], visual tokens that entered layer 0, then what was left after each drop.
        scores: [B,L] of every layer named in `collect`.
        hidden_states: [B,L,D] after every layer named in `hidden_states`, before what is dropped there.
    """

    tokens: Tokens
    caches: CachesT
    survivors: tuple[tuple[jax.Array, jax.Array], ...]
    kept: jax.Array
    scores: dict[int, jax.Array]
    hidden_states: dict[int, jax.Array] = dataclasses.field(default_factory=dict)


def output_specs(c: LocalConfig) -> DecoderOutput[Any]:
    """How what `prefill` returns of a device's part `c` lies on the mesh: PartitionSpecs, each for all arrays below it.

    Keys and values are cut by row and kv head, new tokens' slots too; states by head, convolution states by the devices' own channels
    (x|B|C each). Heads and groups that several devices hold appear once per device.
    """
    batch, row, tensor = P(c.batch_axes), P(c.batch_axes, c.row_axis), c.axis
    kv = P(c.batch_axes, c.row_axis, tensor)
    entries: dict[str, Any] = {
        MAMBA: with_specs(MambaCache, P(c.batch_axes, None, tensor), P(c.batch_axes, tensor), batch),
        ATTENTION: with_specs(AttentionCache, kv, kv, row, kv, kv, row, P()),
    }
    return with_specs(
        DecoderOutput,
        tokens=row,
        caches=tuple(entries.get(kind) for kind in c.pattern),
        survivors=row,
        kept=P(None, c.batch_axes),
        scores=row,
        hidden_states=row,
    )


def with_specs(node: Callable[..., Any], *specs: Any, **named: Any) -> Any:
    """A node of a tree with partition specs in the positions of its arrays, as `jax.shard_map` takes them."""
    return node(*specs, **named)


class Decoder(nn.Module):
    """The decoder's parameters, stacked by kind of layer: params["decoder"] = {mamba, attention, mlp, moe, norm_f}."""

    config: ModelConfig

    def setup(self) -> None:
        for kind, name in KINDS.items():
            if self.config.count(kind):
                setattr(self, name, LAYER_KINDS[kind].stack(self.config))
        self.norm_f = self.param("norm_f", nn.initializers.ones, (self.config.width,))

    def stacks(self) -> Params:
        """The parameters as the plain nested dict that the functions of this file take."""
        stacks = {name: getattr(self, name)() for kind, name in KINDS.items() if self.config.count(kind)}
        return stacks | {"norm_f": self.norm_f}

    def __call__(self, tokens: Tokens, **options: Any) -> DecoderOutput[tuple[Cache, ...]]:
        return prefill(self.stacks(), self.config, tokens, **options)


def prefill(
    params: Params,
    config: ModelConfig,
    tokens: Tokens,
    *,
    plan: DropPlan | None = None,
    score_fn: ScoreFn | None = None,
    collect: tuple[int, ...] = (),
    hidden_states: tuple[int, ...] = (),
    decode_capacity: int = 0,
    segments: int = 1,
    query_capacity: int | None = None,
    counts: jax.Array | None = None,
    remat: str = "none",
    caches: bool = True,
    straight_through: StraightThrough | None = None,
    prefix: Prefix | None = None,
    one_segment: bool = False,
    final_norm: bool = True,
) -> DecoderOutput[tuple[Cache, ...]]:
    """Run whole prompts through the decoder.

    Args:
        params: the stacks of `Decoder.stacks`.
        tokens: x [B,L,D] and what belongs to each token. `tokens.extra[deepstack_key(layer)]` [B,L,D] is added to the
            residual stream after that layer, and is not carried further.
        plan: where tokens drop.
        score_fn: (layer, aux, tokens) -> [B,L], or a Selection that also merges, ranks them; needed with a plan that
            drops, and with `collect`. Where its attribute `ahead` (layer) -> (attention layers, as a rule those after it),
            if it has one, names any, aux is a LookaheadAux of them.
        collect: mixer layers whose scores are returned without dropping.
        hidden_states: layers after which the residual stream is returned.
        decode_capacity: empty cache slots for tokens to come.
        segments: samples packed in a row.
        query_capacity: most question tokens of an example (default: L). A smaller number makes scoring cheaper.
        counts: [B,S], visual tokens that each example came with, when some were dropped before (default: those here).
        remat: which activations of a layer are saved for the backward pass, a name of `REMAT`: "none" (nothing is
            recomputed, all are saved), "dots" (results of products with weights), "layer" (only the layer's input). The
            choice of tokens is never recomputed.
        caches: whether they are returned; set False for training.
        straight_through: (tokens, score [B,L], keep [B,S]) -> tokens, right before each drop: a way for gradients to
            reach the scores. Without it, scores that only choose carry no gradient; those of `collect` do.
        prefix: of `run_prefix` up to the first layer of plan.drops; `tokens` are then the text behind it, as of `continue_rows`,
            and counts those of its rows.
        one_segment: a promise that each row is one example from its first token on, padded at its end: what attention may
            then leave to a library.
        final_norm: set False to leave it to the caller, who needs few of the tokens: over whole rows it takes twice their
            memory in fp32.

    Raises:
        ValueError: for a site that is no mixer layer, a missing score_fn, an unknown remat, what a row that is cut over
            devices cannot do, or a prefix that does not end where the plan drops first.
    """
    num_layers = len(config.pattern)
    drops = set(plan.drops) if plan is not None else set()
    scored = drops | set(collect)
    _check(config, scored, hidden_states, score_fn, remat, straight_through)
    first, begun = 0, None
    if prefix is not None:
        first = len(prefix.caches) - 1
        length = _check_prefix(first, plan, collect, hidden_states, segments)
        tokens, *begun = continue_rows(params, config, prefix, tokens, length, decode_capacity)
        counts = jnp.repeat(prefix.given, tokens.x.shape[0] // prefix.rows, axis=0)
    deepstack = {layer for layer in range(num_layers) if deepstack_key(layer) in tokens.extra}
    if query_capacity is None:
        query_capacity = tokens.length * sequence_shards(config)
    initial_counts = row_total(config, visual_counts(tokens, segments))
    counts = initial_counts if counts is None else counts
    if segments > 1 and score_fn is not None:
        tokens = _with_index_in_segment(config, tokens)

    layer_caches: list[Cache] = [] if begun is None else list(begun[0])
    survivors: list[tuple[jax.Array, jax.Array]] = []
    kept, scores, hidden = [initial_counts], {}, {}
    for start, layer in _ranges(num_layers, scored | deepstack | set(hidden_states), first):
        layer_range = LayerRange(config, start, layer, decode_capacity, remat, caches, one_segment=one_segment)
        tokens, new = _run_before(layer_range, params, tokens)
        layer_caches += new
        if layer == num_layers:
            break
        # the layer that ends the range
        if begun is not None and layer == first:
            aux = begun[1]
        else:
            query = tokens.query if layer in scored else None
            tokens, cache, aux = _run_last(layer_range, layer, params, tokens, query, query_capacity)
            layer_caches.append(cache)
        if layer in hidden_states:
            hidden[layer] = tokens.x
        if layer in scored:
            # `_check` refuses a missing score_fn
            assert score_fn is not None
            inputs = (params, aux, tokens)
            differentiable = layer in collect or straight_through is not None
            inputs = inputs if differentiable else jax.lax.stop_gradient(inputs)
            chosen = _score(layer_range, layer, score_fn, *inputs, query_capacity)
        if layer in collect:
            scores[layer] = chosen.score
        if plan is not None and layer in drops:
            tokens = _drop(config, plan, layer, tokens, chosen, counts, straight_through)
            survivors.append((tokens.index, tokens.visual))
            kept.append(row_total(config, visual_counts(tokens, segments)))
    if final_norm:
        tokens = tokens.replace(x=apply_final_norm(params, config, tokens.x))
    return DecoderOutput(
        tokens, tuple(layer_caches) if caches else (), tuple(survivors), jnp.stack(kept), scores, hidden
    )


def apply_final_norm(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    """The residual stream [...,D] after the last layer, as the head takes it."""
    return rms_norm(x, params["norm_f"], config.norm_eps)


def run_prefix(
    params: Params, config: ModelConfig, tokens: Tokens, last: int, given: jax.Array, following: jax.Array
) -> Prefix:
    """Layers 0..last over the part of prompts that all questions share, for `prefill` to go on from.

    Args:
        params: the stacks of `Decoder.stacks`.
        config: of the decoder.
        tokens: as of `prefill`: rows of L tokens, with padding where text is to come.
        last: the layer after which a plan drops first.
        given: [V,1], visual tokens that each example came with.
        following: [V] int32, position in the unreduced prompt of the token that comes next.
    """
    caches: list[Cache] = []
    aux = None
    deepstack = {layer for layer in range(last) if deepstack_key(layer) in tokens.extra}
    for start, layer in _ranges(last, deepstack):
        layer_range = LayerRange(config, start, layer)
        tokens, new = _run_before(layer_range, params, tokens)
        tokens, cache, aux = _run_last(layer_range, layer, params, tokens, None, 0)
        caches += [*new, cache]
    return Prefix(tokens, tuple(caches), aux, given, following)


def deepstack_key(layer: int) -> str:
    """The name in Tokens.extra of what is added to the residual stream after `layer` (DeepStack, arXiv 2406.04334)."""
    return f"{DEEPSTACK}{layer}"


def visual_counts(tokens: Tokens, segments: int) -> jax.Array:
    """Visual tokens of each segment: [B,S] int32."""
    ids = jnp.arange(1, segments + 1, dtype=tokens.segment.dtype)
    own = tokens.visual[:, :, None] & (tokens.segment[:, :, None] == ids)
    return jnp.sum(own, axis=1, dtype=jnp.int32)


def _ranges(num_layers: int, ends: Iterable[int], first: int = 0) -> list[tuple[int, int]]:
    """(first layer, the layer of `ends` that ends it) of each range from layer `first` on; the last one ends with the decoder."""
    stops = [*sorted(ends), num_layers]
    return list(zip([first, *(layer + 1 for layer in stops[:-1])], stops, strict=True))


def _run_before(layer_range: LayerRange, params: Params, tokens: Tokens) -> tuple[Tokens, list[Cache]]:
    """The layers of a range, of which nothing but the residual stream and the caches is needed."""
    if layer_range.start == layer_range.stop:
        return tokens, []
    x, caches = run_layers(layer_range, params, tokens.x, tokens.segment, tokens.position)
    return tokens.replace(x=x), caches


def _run_last(
    layer_range: LayerRange,
    layer: int,
    params: Params,
    tokens: Tokens,
    query: jax.Array | None,
    query_capacity: int,
) -> tuple[Tokens, Cache, Any]:
    """One layer by itself, with what is added after it: tokens, cache, and what its score reads (with `query` alone)."""
    config = layer_range.config
    name, index = config.kind_index(layer)
    x, cache, aux = run_layer(
        layer_range,
        layer,
        params[name],
        index,
        tokens.x,
        tokens.segment,
        tokens.position,
        query=query,
        query_capacity=min(query_capacity, tokens.length * sequence_shards(config)),
    )
    return _add_deepstack(tokens.replace(x=x), layer), cache, aux


def _score(
    layer_range: LayerRange,
    layer: int,
    score_fn: ScoreFn,
    params: Params,
    aux: Any,
    tokens: Tokens,
    query_capacity: int,
) -> Selection:
    """The score after a layer, of what the layer tells and of how the attention layers look that the score asks for."""
    config, ahead = layer_range.config, getattr(score_fn, "ahead", None)
    coming = () if ahead is None else tuple(ahead(layer))
    for other in coming:
        if not 0 <= other < len(config.pattern) or config.pattern[other] != ATTENTION:
            raise ValueError(f"score_fn.ahead({layer}): expected attention layers of {config.pattern}, got {coming}")
    if coming:
        row = (tokens.x, tokens.segment, tokens.position, tokens.query)
        capacity = min(query_capacity, tokens.length * sequence_shards(config))
        aux = LookaheadAux(aux, tuple(look_ahead(layer_range, other, params, *row, capacity) for other in coming))
    chosen = score_fn(layer, aux, tokens)
    return chosen if isinstance(chosen, Selection) else Selection(chosen)


def _drop(
    config: ModelConfig,
    plan: DropPlan,
    layer: int,
    tokens: Tokens,
    chosen: Selection,
    counts: jax.Array,
    straight_through: StraightThrough | None,
) -> Tokens:
    """The tokens that enter the layer after `layer`; counts [B,S]: visual tokens that each example came with."""
    keep = plan.keep(layer + 1, counts)
    # planes that are still to be added belong to their tokens
    tokens = fold_tokens(tokens, chosen, DEEPSTACK)
    if straight_through is not None:
        tokens = straight_through(tokens, chosen.score, keep)
    most = plan.most_frames(keep)
    return compact_row(config, tokens, chosen.score, keep, plan.row_length(layer + 1), most, plan.frames)


def _add_deepstack(tokens: Tokens, layer: int) -> Tokens:
    if deepstack_key(layer) not in tokens.extra:
        return tokens
    extra = dict(tokens.extra)
    return tokens.replace(x=tokens.x + extra.pop(deepstack_key(layer)).astype(tokens.x.dtype), extra=extra)


def _with_index_in_segment(config: ModelConfig, tokens: Tokens) -> Tokens:
    """Packed rows, nothing dropped yet, with every token's index in its own sample: what a score by position has to go by."""
    index, start = index_in_segment(gather_sequence(config, tokens.segment)), row_start(config, tokens.length)
    own = jax.lax.dynamic_slice_in_dim(index, start, tokens.length, axis=1)
    return tokens.replace(extra=tokens.extra | {INDEX_IN_SEGMENT: own})


def _check(
    config: ModelConfig,
    scored: set[int],
    hidden_states: tuple[int, ...],
    score_fn: ScoreFn | None,
    remat: str,
    straight_through: StraightThrough | None,
) -> None:
    if remat not in REMAT:
        raise ValueError(f"remat: expected one of {sorted(REMAT)}, got {remat!r}")
    if sequence_shards(config) > 1 and straight_through is not None:
        raise ValueError(
            "straight_through sees whole rows, and these are cut over the sequence axis; use a mesh of sequence=1"
        )
    for layer in sorted(scored | set(hidden_states)):
        if not 0 <= layer < len(config.pattern):
            raise ValueError(f"layer {layer}: the decoder has layers 0 to {len(config.pattern) - 1}")
    for layer in sorted(scored):
        if config.pattern[layer] not in MIXERS:
            raise ValueError(f"layer {layer} is {config.pattern[layer]!r}; scores exist only after M and *")
    if scored and score_fn is None:
        raise ValueError("score_fn is needed where the plan drops or scores are collected")


def _check_prefix(
    last: int, plan: DropPlan | None, collect: tuple[int, ...], hidden_states: tuple[int, ...], segments: int
) -> int:
    """ValueError where a prefix up to layer `last` cannot be gone on from; else the length of the rows."""
    if plan is None or plan.drops[:1] != (last,):
        drops = "no plan" if plan is None else f"drops after {plan.drops}"
        raise ValueError(f"prefix: it ends with layer {last}, and must where the plan drops first, got {drops}")
    if collect or hidden_states or segments > 1:
        raise ValueError("prefix: scores, hidden states and packed rows need prompts that are run whole, from layer 0")
    return plan.row_length(0)
