"""Rows of embeddings through the decoder under a plan, whole or in two parts: what all questions share, and a question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybridvlm import sharding
from hybridvlm.config import ModelConfig, ScoreOptions
from hybridvlm.models.nemotron_vl.pixels import check_kept
from hybridvlm.models.nemotron_vl.rows import (
    assemble,
    merged,
    rest_rows,
    shared_batch,
    split_attention,
    visual_positions,
)
from hybridvlm.models.prompt import Batch, own_text
from hybridvlm.nn import decoder
from hybridvlm.nn.caches import Cache
from hybridvlm.nn.decoder import DecoderOutput, visual_counts
from hybridvlm.nn.prefix import Prefix
from hybridvlm.ops.frame_text import FRAME_TEXT
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.scores import reduce_scores
from hybridvlm.parallel.sequence import compact_row, gather_sequence, own_shard, row_total, sequence_shards
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction import methods, plan_functions
from hybridvlm.reduction.plan import ReductionPlan

AssembleFn = Callable[[ModelConfig, jax.Array, Any, jax.Array | None], Tokens]


def decoder_output(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Batch,
    visual: jax.Array | None,
    plan: ReductionPlan | None,
    *,
    decode_capacity: int = 0,
    assemble_fn: AssembleFn = assemble,
    mesh: Mesh | None = None,
    question: jax.Array | None = None,
    segments: int = 1,
    score_fn: methods.ScoreFn | None = None,
    **options: Any,
) -> tuple[DecoderOutput[tuple[Cache, ...]], jax.Array]:
    """Embeddings through the decoder under a plan (None: dense): its output, and the visual tokens given, counts [B,S].

    Args:
        params: of the model.
        config: of the family.
        batch: laid out for this plan: with average pooling it has the pooled number of visual tokens.
        visual: [B,F,m,D], or None for text alone.
        plan: what is dropped where.
        decode_capacity: cache slots for new tokens.
        assemble_fn: how embeddings, batch and visual tokens become one row; a family whose visual tokens carry more after
            their first D values has its own.
        mesh: for training, the devices that `params` are cut over; inside a program over a mesh `config` is a device's part.
        question: [B,L] bool, the text that says what matters, where that is not simply all after the last visual token, as
            in rows that hold answers or several packed samples.
        segments: S, samples packed in a row.
        score_fn: instead of the plan's own.
        options: as of `nn.decoder.prefill`.
    """
    tokens, given, length = enter_decoder(
        params, config, batch, visual, plan, assemble_fn=assemble_fn, question=question, segments=segments
    )
    run = decoder.prefill if mesh is None else functools.partial(sharding.prefill, mesh=mesh)
    options = {
        "decode_capacity": decode_capacity,
        "query_capacity": length if plan is None else plan.text_tokens,
        "counts": None if plan is None else given,
        "segments": segments,
    } | options
    score_fn = _score_fn(config, plan, segments, score_fn)
    return run(params["decoder"], config, tokens, plan=plan, score_fn=score_fn, **options), given


def enter_decoder(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Batch,
    visual: jax.Array | None,
    plan: ReductionPlan | None,
    *,
    assemble_fn: AssembleFn = assemble,
    question: jax.Array | None = None,
    segments: int = 1,
) -> tuple[Tokens, jax.Array, int]:
    """Arguments as of `decoder_output`: Tokens as they enter layer 0, visual tokens given [B,S], length of the unreduced rows."""
    frame_count = batch.frame_count
    check_kept(config, visual, plan)
    if visual is not None and plan is not None and plan.input_method != "none":
        # what merges or ranks before the decoder looks at the whole video
        visual = gather_sequence(config, visual)
    if segments > 1 and plan is not None and plan.input_method != "none":
        raise ValueError(
            f"{plan.input_method} works on one video a row, and rows pack up to {segments}; use segments=1"
        )
    if plan is not None and plan.merges:
        visual, frame_count = plan_functions.merge_fn(plan)(_needed(plan, visual), frame_count)
    if plan is not None and plan.drops_input:
        visual, attention = split_attention(config, _needed(plan, visual))
        chosen = plan_functions.input_selection(plan)(visual[..., : config.width], frame_count, attention)
        visual = merged(visual, chosen)
    if visual is not None and plan is not None and plan.input_method != "none":
        visual = own_shard(config, visual.reshape(visual.shape[0], -1, 1, visual.shape[-1]))
    tokens = assemble_fn(config, params["embed"], batch, visual)
    if question is not None:
        tokens = tokens.replace(query=question & (tokens.segment > 0) & ~tokens.visual)
    if plan is not None:
        tokens = _prepared(config, plan, tokens, segments)
        if plan.drop_text != "none":
            owner = jnp.where(
                jnp.asarray(batch.segment) > 0, jnp.maximum(own_text(jnp.asarray(batch.frame)), -1) + 1, 0
            )
            tokens = tokens.replace(extra=tokens.extra | {FRAME_TEXT: own_shard(config, owner)})
    length = tokens.length * sequence_shards(config)
    given = row_total(config, visual_counts(tokens, segments))
    if plan is not None and plan.drops_input:
        is_visual, order = visual_positions(batch)
        ranks = jnp.take_along_axis(chosen.score, jnp.minimum(order, chosen.score.shape[1] - 1), axis=1)
        score = own_shard(config, jnp.where(is_visual, ranks, 0))
        keep = plan.keep(0, given)
        tokens = compact_row(config, tokens, score, keep, plan.row_length(0), plan.most_frames(keep), plan.frames)
    return tokens, given, length


def _prepared(config: ModelConfig, plan: ReductionPlan, tokens: Tokens, segments: int) -> Tokens:
    """Tokens with what the plan's method needs to know of layer 0."""
    prepare = methods.get_method(plan.decoder_method).prepare
    if prepare is None:
        return tokens
    row = jax.tree.map(lambda a: gather_sequence(config, a), tokens)
    extra = {name: own_shard(config, array) for name, array in prepare(row, plan, segments).items()}
    return tokens.replace(extra=tokens.extra | extra)


def _score_fn(
    config: ModelConfig, plan: ReductionPlan | None, segments: int, score_fn: methods.ScoreFn | None
) -> methods.ScoreFn | None:
    """What ranks tokens under a plan, on a mesh as all devices agree on it."""
    if plan is not None and score_fn is None:
        score_fn = plan_functions.score_fn(plan, segments=segments)
    if isinstance(config, LocalConfig) and score_fn is not None:
        options = ScoreOptions() if plan is None else plan.score
        score_fn = reduce_scores(score_fn, config, options, getattr(score_fn, "method", None))
    return score_fn


def _needed(plan: ReductionPlan, visual: jax.Array | None) -> jax.Array:
    if visual is None:
        raise ValueError(
            f"{plan.input_method} reduces visual tokens, and there are none; pass plan=None for text alone"
        )
    return visual


# -- in two parts ---------------------------------------------------------------------------------------------------------


def memory_serves(plan: ReductionPlan | None) -> bool:
    """Whether `build_video_memory` is for a plan: one that drops inside the decoder, by what the question asks for.

    Under any other, text goes on from the caches of the whole prompt. A method that looks at the question's embeddings before layer 0
    has to have it there (`Method.prepare`).
    """
    if plan is None or methods.get_method(plan.decoder_method).prepare is not None:
        return False
    return plan.depends_on_query and bool(plan.drops)


def build_video_memory(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Batch,
    visual: jax.Array,
    plan: ReductionPlan | None,
    assemble_fn: AssembleFn = assemble,
) -> Prefix:
    """What all questions on these videos share: prompts up to their last visual token, through the layers before the first drop.

    Arguments as of `decoder_output`. Text behind the videos is not looked at, whatever it is.

    Raises:
        ValueError: for a plan that drops nothing, or nothing that the question asks for.
    """
    if plan is None or not memory_serves(plan):
        name = "a dense pass" if plan is None else repr(plan.method)
        raise ValueError(
            f"build_video_memory: {name} drops nothing inside the decoder by the question; prefill once, and go on from its caches"
        )
    batch, following = shared_batch(batch)
    tokens, given, _ = enter_decoder(params, config, batch, visual, plan, assemble_fn=assemble_fn)
    return decoder.run_prefix(params["decoder"], config, tokens, plan.drops[0], given, following)


def continue_prefix(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Batch,
    prefix: Prefix,
    plan: ReductionPlan | None,
    **options: Any,
) -> tuple[DecoderOutput[tuple[Cache, ...]], jax.Array]:
    """`decoder_output` of prompts whose beginnings are in a Prefix: batch [V*Q,T] is their text behind the last visual token."""
    times = batch.segment.shape[0] // prefix.rows
    tokens = rest_rows(config, params["embed"], batch, jnp.repeat(prefix.following, times))
    score_fn = _score_fn(config, plan, 1, None)
    if plan is not None:
        options["query_capacity"] = plan.text_tokens
    out = decoder.prefill(params["decoder"], config, tokens, plan=plan, score_fn=score_fn, prefix=prefix, **options)
    return out, jnp.repeat(prefix.given, times, axis=0)
