"""Dense passes that show how the model's own layers score: over ordinary rows, and over many questions that share one video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import ATTENTION, MIXERS, ModelConfig
from hybridvlm.models.prompt import Batch
from hybridvlm.nn.decoder import DecoderOutput
from hybridvlm.nn.incremental import extend_shared
from hybridvlm.ops.tokens import Tokens


def mixers(config: ModelConfig) -> tuple[int, ...]:
    """The layers that tell a score."""
    return tuple(layer for layer, kind in enumerate(config.pattern) if kind in MIXERS)


def row_mask(batch: Batch, segments: int) -> jax.Array:
    """Which visual tokens belong to which packed sample: [B,S,L] bool."""
    visual = (batch.frame >= 0) & (batch.segment > 0)
    return visual[:, None] & (batch.segment[:, None] == jnp.arange(1, segments + 1)[:, None])


def read_keys(_layer: int, aux: Any, _tokens: Tokens) -> jax.Array:
    """Instead of a score: the keys that later text scores against, b [B,L,G,N] or k [B,L,K,P]."""
    return aux.b if hasattr(aux, "b") else aux.k


def shared_pass(
    family: Any,
    params: Mapping[str, Any],
    config: ModelConfig,
    given: Mapping[str, jax.Array],
    visual: jax.Array,
    **options: Any,
) -> tuple[jax.Array, dict[int, jax.Array], jax.Array]:
    """Q questions on each of B videos, one pass over each video: (hidden states [B*Q,T,D], {layer: score [B,Q,P]}, mask [B,1,P]).

    given: as `NeedleSource.shared` has it, batched. The scores are the defaults of `ScoreOptions`: of a Mamba layer c . b, mean over
    the question's words and the groups, decay left out; of an attention layer the softmax weight, mean over words and heads.
    """
    frame = given["prefix_frame"]
    count = jnp.max(frame, axis=1) + 1
    prompt = Batch(given["prefix"], jnp.ones_like(frame), frame, count)
    none = jnp.zeros(frame.shape, bool)
    out, _ = family.decoder_output(
        params,
        config,
        prompt,
        visual,
        None,
        question=none,
        collect=mixers(config),
        score_fn=read_keys,
        query_capacity=1,
        **options,
    )
    b, q, t = given["ids"].shape
    flat = lambda name: given[name].reshape(b * q, t)  # noqa: E731
    segment = flat("segment")
    x = jnp.where(segment[..., None] > 0, jnp.take(params["embed"], flat("ids"), axis=0), 0)
    shared = extend_shared(params["decoder"], config, x, segment, out.caches)
    return shared.x, shared_scores(config, shared.queries, out, flat("question")), (frame >= 0)[:, None]


def shared_scores(config: ModelConfig, queries: dict, out: DecoderOutput, question: jax.Array) -> dict[int, jax.Array]:
    """{mixer layer: score [B,Q,P]} of the questions' part of `extend_shared` and the video's keys.

    question [B*Q,T] bool: the words that count.
    """
    asked = question.astype(jnp.float32)
    words = jnp.maximum(asked.sum(1), 1)
    found = {}
    for layer, keys in out.scores.items():
        b = keys.shape[0]
        if config.pattern[layer] == ATTENTION:
            q, lse = queries[layer]
            lse = jnp.where(question[:, None], lse, jnp.inf)  # of padding, whose sum is empty, nothing may be counted
            n, t, heads, width = q.shape
            q = q.reshape(b, n // b, t, config.kv_heads, heads // config.kv_heads, width)
            lse = lse.reshape(b, n // b, config.kv_heads, heads // config.kv_heads, t)
            logits = jnp.einsum("bqtkhp,bmkp->bqkhtm", q, keys).astype(jnp.float32) * width**-0.5
            weight = asked.reshape(b, n // b, 1, 1, t, 1) / (words.reshape(b, -1, 1, 1, 1, 1) * heads)
            found[layer] = jnp.sum(jnp.exp(logits - lse[..., None]) * weight, axis=(2, 3, 4))
        else:
            c = jnp.einsum("nt,ntgs->ngs", asked, queries[layer].astype(jnp.float32)) / words[:, None, None]
            c = c.reshape(b, -1, *c.shape[1:])
            found[layer] = jnp.einsum("bqgn,bmgn->bqm", c, keys.astype(jnp.float32)) / keys.shape[2]
    return found
