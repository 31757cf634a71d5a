"""Many questions on one pass over a video."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import ModelConfig
from hybridvlm.nn.decoder import DecoderOutput, DropPlan, ScoreFn, prefill
from hybridvlm.nn.incremental import SharedOutput, extend_shared
from hybridvlm.ops.tokens import Tokens
from hybridvlm.tiny.bank import Sample, embed_video, words_and_targets

QUESTION = 4  # words of a question; the row of a training sample goes on with the answer


def video_tokens(params: dict, bank_tokens: jax.Array, cells: jax.Array) -> Tokens:
    """A batch of videos without text as Tokens [B,F*16]."""
    x = embed_video(params, bank_tokens, cells)
    b, length = x.shape[:2]
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    yes, one = jnp.ones((b, length), bool), jnp.ones((b, length), jnp.int32)
    return Tokens(x, index, one, yes, ~yes, index, index // cells.shape[2])


def forward(
    params: dict,
    config: ModelConfig,
    bank_tokens: jax.Array,
    sample: dict[str, jax.Array],
    *,
    plan: DropPlan | None = None,
    score_fn: ScoreFn | None = None,
) -> tuple[jax.Array, SharedOutput, DecoderOutput]:
    """One pass over videos and all their questions: (logits [B*Q,2,V] for answer and <eos>, the questions' pass, the video's).

    With a plan, score_fn decides what is dropped, for all questions of a video alike.
    """
    tokens = video_tokens(params, bank_tokens, sample["cells"])
    out = prefill(params["decoder"], config, tokens, plan=plan, score_fn=score_fn)
    x = jnp.take(params["embed"], sample["rows"], axis=0)
    shared = extend_shared(params["decoder"], config, x, jnp.ones(sample["rows"].shape, jnp.int32), out.caches)
    return shared.x[:, -2:] @ params["lm_head"], shared, out


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
