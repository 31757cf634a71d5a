"""The scores of every layer for every question, out of dense passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.analyze.common import Asked, mixers, tokens_of
from hybridvlm.config import ATTENTION, ScoreOptions
from hybridvlm.console import progress
from hybridvlm.inference.model import Model
from hybridvlm.nn.decoder import prefill
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux
from hybridvlm.reduction import attention_score, mamba_score

DEFAULT = {"plain": ScoreOptions()}
WITH_DECAY = DEFAULT | {"decay": ScoreOptions(decay=True)}


def _scores(
    params,
    batch,
    visual,
    *,
    model: Model,
    variants: tuple[tuple[str, ScoreOptions], ...],
    ahead: tuple[tuple[str, int], ...],
):
    tokens, pattern = tokens_of(model, params, batch, visual), model.config.pattern

    def score_fn(_layer, aux, tokens):
        own, coming = (aux.own, aux.ahead) if isinstance(aux, LookaheadAux) else (aux, ())
        score: Any = attention_score if isinstance(own, AttentionAux) else mamba_score
        found: dict[str, Any] = {name: score(own, tokens, options) for name, options in variants}
        looks = [attention_score(layer, tokens) for layer in coming]
        for name, count in ahead if looks else ():
            used = looks[:count] if count else looks
            found[name] = sum(used) / len(used)
        return found

    if ahead:
        score_fn.ahead = lambda layer: tuple(i for i in range(layer + 1, len(pattern)) if pattern[i] == ATTENTION)  # type: ignore[attr-defined]
    out = prefill(params["decoder"], model.config, tokens, score_fn=score_fn, collect=mixers(model))
    return out.scores, tokens.visual


@dataclasses.dataclass(frozen=True)
class Scored:
    """score[variant][layer]: [M] of one question's visual tokens, in their order in the prompt; no layer without such a score."""

    asked: Asked
    score: Mapping[str, Mapping[int, np.ndarray]]


def score_questions(
    model: Model,
    questions: Sequence[Sequence[Asked]],
    variants: Mapping[str, ScoreOptions] = DEFAULT,
    ahead: Mapping[str, int] | None = None,
) -> list[list[Scored]]:
    """Every mixer layer's score of every visual token for every question: a dense prefill each, one list per video.

    variants: the layers' own scores, by name and options. ahead: scores by the next attention layers, by name and how many
    of them (0: all), after every mixer layer that has one ahead.
    """
    layers, names = mixers(model), (*variants, *(ahead or ()))
    out: list[list[Scored]] = []
    static: dict[str, Any] = {
        "model": model,
        "variants": tuple(variants.items()),
        "ahead": tuple((ahead or {}).items()),
    }
    with progress(sum(map(len, questions)), "question", "scores") as bar:
        for asked in questions:
            out.append([])
            for one in asked:
                args = (model.params, one.batch, one.visual)
                found, visual = jax.device_get(model.programs.get(_scores, *args, **static)(*args))
                index = np.flatnonzero(visual[0])
                score = {
                    name: {
                        layer: np.asarray(found[layer][name][0], np.float32)[index]
                        for layer in layers
                        if name in found[layer]
                    }
                    for name in names
                }
                for layer, values in ((layer, values) for own in score.values() for layer, values in own.items()):
                    if not np.isfinite(values).all():
                        raise ValueError(
                            f"layer {layer} gives scores that are not finite: {one.question!r} on {one.video}"
                        )
                out[-1].append(Scored(one, score))
                bar.update()
    return out
