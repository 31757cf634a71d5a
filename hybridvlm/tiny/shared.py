"""Many questions on one pass over a video, and the scores of every layer for every question."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import MIXERS, ModelConfig
from hybridvlm.nn.decoder import DecoderOutput, DropPlan, ScoreFn, extend_shared, prefill
from hybridvlm.ops.tokens import Tokens
from hybridvlm.tiny.bank import Sample, embed_video, words_and_targets

QUESTION = 4  # words of a question; the row of a training sample goes on with the answer


def video_tokens(params: dict, bank_tokens: jax.Array, cells: jax.Array) -> Tokens:
    """A batch of videos without text as Tokens [B,F*16]."""
    x = embed_video(params, bank_tokens, cells)
    b, length = x.shape[:2]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    yes, one = jnp.ones((b, length), bool), jnp.ones((b, length), jnp.int32)
    return Tokens(x, place, one, yes, ~yes, place, place // cells.shape[2])


def read_keys(_layer, aux, _tokens) -> jax.Array:
    """In the place of a score: the keys that later text scores against, b [B,L,G,N] or k [B,L,K,P]."""
    return aux.b if hasattr(aux, "b") else aux.k


def forward(
    params: dict,
    config: ModelConfig,
    bank_tokens: jax.Array,
    sample: dict[str, jax.Array],
    *,
    plan: DropPlan | None = None,
    score_fn: ScoreFn | None = None,
    keys: bool = False,
) -> tuple[jax.Array, dict, DecoderOutput]:
    """One pass over videos and all their questions: (logits [B*Q,2,V] for answer and <eos>, what the layers told, decoder output).

    keys: the visual keys of every mixer layer come back in the output's `scores`, for `layer_scores`. With a plan its
    score_fn decides what is dropped, for all questions of a video alike.
    """
    mixers = tuple(layer for layer, kind in enumerate(config.pattern) if kind in MIXERS)
    tokens = video_tokens(params, bank_tokens, sample["cells"])
    if keys:
        out = prefill(params["decoder"], config, tokens, score_fn=read_keys, collect=mixers, query_capacity=1)
    else:
        out = prefill(params["decoder"], config, tokens, plan=plan, score_fn=score_fn)
    x = jnp.take(params["embed"], sample["rows"], axis=0)
    hidden, told = extend_shared(params["decoder"], config, x, jnp.ones(sample["rows"].shape, jnp.int32), out.caches)
    return hidden[:, -2:] @ params["lm_head"], told, out


def layer_scores(
    config: ModelConfig, told: dict, out: DecoderOutput, attention: bool | None = None
) -> dict[int, jax.Array]:
    """Each mixer layer's default score of every visual token for every question: {layer: [B,Q,M]}.

    Of `forward(..., keys=True)`. Mamba: mean over the question's words and groups of c . b, decay left out. Attention: mean over
    words and heads of the softmax weight. `attention`: only these layers (True), only Mamba's (False), or both (None).
    """
    scores = {}
    for layer, keys in out.scores.items():
        b = keys.shape[0]
        is_attention = config.pattern[layer] == "*"
        if attention is not None and attention != is_attention:
            continue
        if is_attention:
            q, lse = told[layer]
            n, _, heads, width = q.shape
            q = q[:, :QUESTION].reshape(b, n // b, QUESTION, config.kv_heads, heads // config.kv_heads, width)
            lse = lse[:, :, :QUESTION].reshape(b, n // b, config.kv_heads, heads // config.kv_heads, QUESTION)
            logits = jnp.einsum("bqtkhp,bmkp->bqkhtm", q, keys) / np.sqrt(width)
            scores[layer] = jnp.exp(logits - lse[..., None]).mean((2, 3, 4))
        else:
            c = told[layer][:, :QUESTION].mean(1).reshape(b, -1, *keys.shape[2:])
            scores[layer] = jnp.einsum("bqgn,bmgn->bqm", c, keys) / keys.shape[2]
    return scores


def arrays(sample: Sample) -> dict[str, np.ndarray]:
    """A Sample as the dict of arrays that the losses take."""
    rows, targets = words_and_targets(sample.text, sample.answer)
    return {
        "cells": sample.cells,
        "rows": rows,
        "targets": targets,
        "frame": sample.frame,
        "cell": sample.cell,
        "colour": sample.colour,
        "hop2": sample.hop2,
    }
