"""The hybrid video VLM of the Nemotron Nano VL family: RADIO tower, pixel shuffle, projector, Mamba-2/attention decoder.

The tiny embedded model is the same class with a convolutional stem for a tower.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import ModelConfig
from hybridvlm.nn.decoder import Decoder, DecoderOutput, prefill
from hybridvlm.ops.compact import compact
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import methods
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.vision import Connector, RadioTower, StemTower, encode_frames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts as arrays of one bucket.

    input_ids [B,L] int32, with any id at visual places; segment [B,L] int32 (0 = padding, at the end); frame [B,L] int32, the
    video frame of a visual place and -1 elsewhere; frame_count [B] int32, real frames of each example (the rest of the
    frame bucket is padding).
    """

    input_ids: jax.Array
    segment: jax.Array
    frame: jax.Array
    frame_count: jax.Array


class HybridVLM(nn.Module):
    """Parameters: embed [V,D] · vision · projector · decoder · lm_head [D,V] (absent with tied embeddings)."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        self.decoder = Decoder(c)
        if c.vision is not None:
            self.vision = (RadioTower if c.vision.kind == "radio" else StemTower)(c.vision)
            self.projector = Connector(c.vision, c.width)
        if not c.tie_embeddings:
            dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            self.lm_head = self.param("lm_head", dense, (c.width, c.vocab_size))

    def __call__(self, batch: Batch, pixels: jax.Array | None = None) -> jax.Array:
        """Logits [B,L,V] fp32 of whole prompts, nothing dropped; pixels [B,F,h,w,3] uint8, or None for plain text."""
        visual = None if pixels is None else self.encode(pixels)
        return self.logits(self.decoder(self.prompt(batch, visual)).tokens.x)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Frames [B,F,h,w,3] uint8 -> visual tokens [B,F,m,D]."""
        b, f = pixels.shape[:2]
        scaled = pixels.reshape(b * f, *pixels.shape[2:]).astype(jnp.float32) / 255
        params = {"vision": self.vision.parameters(), "projector": self.projector.parameters()}
        place = jnp.tile(jnp.arange(f, dtype=jnp.int32), b)
        visual = encode_frames(params, self.config.vision, scaled, place, dtype=self.embed.dtype)
        return visual.reshape(b, f, *visual.shape[1:])

    def prompt(self, batch: Batch, visual: jax.Array | None) -> Tokens:
        """Text embeddings, with the visual tokens [B,F,m,D] put in order at the places where batch.frame >= 0."""
        return assemble(self.embed, batch, visual)

    def logits(self, x: jax.Array) -> jax.Array:
        """Final hidden states [...,D] -> logits [...,V] fp32."""
        head = self.embed.T if self.config.tie_embeddings else self.lm_head
        return jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32)


def assemble(embed: jax.Array, batch: Batch, visual: jax.Array | None) -> Tokens:
    """The Tokens of a batch: embed [V,D], visual [B,F,m,D] or None for text alone."""
    is_visual = (batch.frame >= 0) & (batch.segment > 0)
    b, length = batch.input_ids.shape
    x = jnp.take(embed, batch.input_ids, axis=0)
    if visual is not None:
        flat = visual.reshape(b, -1, visual.shape[-1]).astype(x.dtype)
        order = jnp.clip(jnp.cumsum(is_visual, axis=1) - 1, 0, flat.shape[1] - 1)
        x = jnp.where(is_visual[..., None], jnp.take_along_axis(flat, order[..., None], axis=1), x)
    x = jnp.where(batch.segment[..., None] > 0, x, 0)
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    last_visual = jnp.max(jnp.where(is_visual, place, -1), axis=1, keepdims=True)
    query = (batch.segment > 0) & (place > last_visual)
    return Tokens(x, place, batch.segment, is_visual, query, place, jnp.where(is_visual, batch.frame, -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """logits [B,V] fp32 after each example's last token; decoder: caches, survivors, kept; counts [B,1] visual tokens given."""

    logits: jax.Array
    decoder: DecoderOutput
    counts: jax.Array


def prefill_prompt(
    params: dict, config: ModelConfig, batch: Batch, visual: jax.Array | None, plan: ReductionPlan | None, room: int
) -> Prefilled:
    """Embeddings to last-token logits under a plan (None: dense). visual [B,F,m,D]; `room`: cache slots for new tokens.

    The batch must be laid out for this plan: with average pooling it has the pooled number of places.
    """
    score_fn, counts = None, None
    frame_count = batch.frame_count
    if plan is not None and plan.pool_factors != (1, 1, 1):
        visual, frame_count = methods.merge_fn(plan)(visual, frame_count)
    tokens = assemble(params["embed"], batch, visual)
    text = tokens.length
    given = jnp.sum(tokens.visual, axis=1, dtype=jnp.int32)[:, None]
    if plan is not None:
        score_fn, counts, text = methods.score_fn(plan), given, plan.text_tokens
        if plan.drops_input:
            ranks = methods.input_score(plan)(visual, frame_count)
            order = jnp.clip(jnp.cumsum(tokens.visual, axis=1) - 1, 0, ranks.shape[1] - 1)
            score = jnp.where(tokens.visual, jnp.take_along_axis(ranks, order, axis=1), 0)
            tokens = compact(tokens, score, plan.keep(0, given), plan.row_length(0))
    out = prefill(
        params["decoder"], config, tokens, plan=plan, score_fn=score_fn, room=room, query_capacity=text, counts=counts
    )
    last = jnp.maximum(jnp.sum(out.tokens.segment > 0, axis=1) - 1, 0)
    x = jnp.take_along_axis(out.tokens.x, last[:, None, None], axis=1)[:, 0]
    head = params["embed"].T if config.tie_embeddings else params["lm_head"]
    return Prefilled(jnp.matmul(x, head.astype(x.dtype), preferred_element_type=jnp.float32), out, given)
