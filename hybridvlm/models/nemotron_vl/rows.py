"""Prompts and visual tokens as the rows that enter layer 0; where rows are cut over devices, a device's shard of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hybridvlm.config import ModelConfig
from hybridvlm.models.prompt import Batch
from hybridvlm.ops.fold import Selection, fold
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.sequence import own_shard, sequence_shards, take_from_shards
from hybridvlm.parallel.vocab import embed_tokens


def visual_positions(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Of every token of a batch's prompts [B,L]: whether it is visual, and how many visual tokens come before it."""
    is_visual = (jnp.asarray(batch.frame) >= 0) & (jnp.asarray(batch.segment) > 0)
    return is_visual, jnp.maximum(jnp.cumsum(is_visual, axis=1) - 1, 0)


def split_attention(config: ModelConfig, visual: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Visual tokens [B,F,m,C] as `encode` gives them: without the tower's attention, and that [B,F,m] fp32, if it is there."""
    planes = 0 if config.vision is None else len(config.vision.deepstack)
    width = config.width * (1 + planes)
    if visual.shape[-1] == width:
        return visual, None
    return visual[..., :width], jnp.sum(visual[..., width:].astype(jnp.float32), axis=-1)


def merged(visual: jax.Array, chosen: Selection) -> jax.Array:
    """Visual tokens [B,F,m,C] with what a method merges written into its anchors."""
    if chosen.into is None or chosen.weight is None:
        return visual
    flat = visual.reshape(visual.shape[0], -1, visual.shape[-1])
    return fold(flat, chosen.into, chosen.weight).reshape(visual.shape)


def visual_rows(config: ModelConfig, batch: Batch, visual: jax.Array) -> jax.Array:
    """visual [B,F,m,D] -> [B,L,D]: the visual tokens in order where the batch has indices for them, 0 elsewhere.

    Of a row that is cut over devices this is a device's shard, and `visual` its share of the frames.
    """
    is_visual, order = visual_positions(batch)
    mine, order = own_shard(config, is_visual), own_shard(config, order)
    flat = visual.reshape(visual.shape[0], -1, visual.shape[-1])
    rows = take_from_shards(config, flat, jnp.minimum(order, flat.shape[1] * sequence_shards(config) - 1))
    return jnp.where(mine[..., None], rows, 0)


def assemble(config: ModelConfig, embed: jax.Array, batch: Batch, visual: jax.Array | None) -> Tokens:
    """The Tokens of a batch: text embeddings, with the visual tokens in order where batch.frame >= 0.

    Args:
        config: of the family; of a device's part it says which shard of the rows is made.
        embed: [V,D].
        batch: prompts of L tokens.
        visual: [B,F,m,D], at least as many as the batch has indices for; None for text alone.
    """
    rows = None if visual is None else visual_rows(config, batch, visual)
    # what may come after a token's own values is the tower's attention
    return token_rows(config, embed, batch, None if rows is None else rows[..., : config.width])


def token_rows(config: ModelConfig, embed: jax.Array, batch: Batch, visual: jax.Array | None) -> Tokens:
    """`assemble` of visual tokens that are in their positions already: [B,L,D], as `visual_rows` gives them."""
    is_visual, _ = visual_positions(batch)
    b, length = batch.input_ids.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    last_visual = jnp.max(jnp.where(is_visual, index, -1), axis=1, keepdims=True)
    query = (batch.segment > 0) & (index > last_visual)
    own = functools.partial(own_shard, config)
    segment = own(jnp.asarray(batch.segment))
    x = embed_tokens(config, embed, own(jnp.asarray(batch.input_ids)))
    if visual is not None:
        x = jnp.where(own(is_visual)[..., None], visual.astype(x.dtype), x)
    return Tokens(
        x=jnp.where(segment[..., None] > 0, x, 0),
        position=own(index),
        segment=segment,
        visual=own(is_visual),
        query=own(query),
        index=own(index, -1),
        frame=own(jnp.where(is_visual, batch.frame, -1), -1),
    )


def shared_batch(batch: Batch) -> tuple[Batch, jax.Array]:
    """Prompts without the text behind their last visual token, and how many tokens are left of each [B]."""
    is_visual, _ = visual_positions(batch)
    index = jnp.arange(is_visual.shape[1], dtype=jnp.int32)
    count = jnp.max(jnp.where(is_visual, index + 1, 0), axis=1)
    segment = jnp.where(index < count[:, None], batch.segment, 0)
    return dataclasses.replace(batch, segment=segment), count


def rest_rows(config: ModelConfig, embed: jax.Array, batch: Batch, following: jax.Array) -> Tokens:
    """The Tokens of text alone that comes after `following` [B] others, whole on every device; all of it is the question.

    batch: [B,T], of a family with rotary positions with a field `position`.
    """
    segment = jnp.asarray(batch.segment)
    real = segment > 0
    x = jnp.where(real[..., None], embed_tokens(config, embed, batch.input_ids), 0)
    index = following[:, None] + jnp.arange(segment.shape[1], dtype=jnp.int32)
    position = jnp.asarray(getattr(batch, "position", index))
    no = jnp.zeros(segment.shape, bool)
    return Tokens(x, position, segment, no, real, index, jnp.full(segment.shape, -1, jnp.int32))
