"""The scores of every layer for every question, out of dense passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.analyze.common import Asked, mixers, tokens_of
from hybridvlm.config import ScoreOptions
from hybridvlm.console import progress
from hybridvlm.inference.model import Model
from hybridvlm.nn.decoder import prefill
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.reduction import attention_score, mamba_score

DEFAULT = {"plain": ScoreOptions()}
WITH_DECAY = DEFAULT | {"decay": ScoreOptions(decay=True)}


def _scores(params, batch, visual, *, model: Model, variants: tuple[tuple[str, ScoreOptions], ...]):
    tokens = tokens_of(model, params, batch, visual)

    def score_fn(_layer, aux, tokens):
        score = attention_score if isinstance(aux, AttentionAux) else mamba_score
        return {name: score(aux, tokens, options) for name, options in variants}

    out = prefill(params["decoder"], model.config, tokens, score_fn=score_fn, collect=mixers(model))
    return out.scores, tokens.visual


@dataclasses.dataclass(frozen=True)
class Scored:
    """score[variant][layer]: [M] of one question's visual tokens, in their order in the prompt."""

    asked: Asked
    score: Mapping[str, Mapping[int, np.ndarray]]


def score_questions(
    model: Model, questions: Sequence[Sequence[Asked]], variants: Mapping[str, ScoreOptions] = DEFAULT
) -> list[list[Scored]]:
    """Every mixer layer's score of every visual token for every question: a dense prefill each, one list per video."""
    layers = mixers(model)
    out: list[list[Scored]] = []
    static: dict[str, Any] = {"model": model, "variants": tuple(variants.items())}
    with progress(sum(map(len, questions)), "question", "scores") as bar:
        for asked in questions:
            out.append([])
            for one in asked:
                args = (model.params, one.batch, one.visual)
                found, visual = jax.device_get(model.programs.get(_scores, *args, **static)(*args))
                index = np.flatnonzero(visual[0])
                score = {
                    name: {layer: np.asarray(found[layer][name][0], np.float32)[index] for layer in layers}
                    for name in variants
                }
                for layer, values in ((layer, score[name][layer]) for name in variants for layer in layers):
                    if not np.isfinite(values).all():
                        raise ValueError(
                            f"layer {layer} gives scores that are not finite: {one.question!r} on {one.video}"
                        )
                out[-1].append(Scored(one, score))
                bar.update()
    return out
