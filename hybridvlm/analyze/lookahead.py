"""Which score finds what later attention reads: a layer's own, or that of the next attention layers?

    python -m hybridvlm.analyze lookahead --model tiny

`str` ranks the tokens after a Mamba layer by its own c·b, `str-lookahead` by how the next attention layer would look at them as
they are. Dense passes over a few videos with several questions each; no answer is read, and only `recall` reads the token that is
needed. Per layer l, and per score (`own`: c·b of a Mamba layer, the weights of an attention layer; `next`: the next attention
layer's; `all`: the mean over all attention layers that come):

  held      of the weight that the attention layers after l give to visual tokens, the part on the top share by this score
  other     the same of the weight for another question on the video: a score that ignores the question holds as much of it
  follows   their difference
  rank      Spearman's rank correlation with that weight (0: none)
  recall    how often the top share holds the token that the question needs last; only where that is known
  overlap   Jaccard overlap of the top share between two questions on one video (of random sets: about top / (2 - top))

Later attention layers count alike, each with its weight over visual tokens taken to sum to 1. The last line says, over all Mamba
layers with attention after them, which score follows the question most: drop by that one. Written: lookahead.json, lookahead.md,
lookahead.png.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.analyze import measures
from hybridvlm.analyze.common import (
    COLOURS,
    Row,
    add_source,
    check_source,
    figure,
    load_model,
    markdown,
    output_folder,
    questions,
    short,
    source_name,
    write_figure,
    write_json,
)
from hybridvlm.analyze.scores import DEFAULT, Scored, score_questions
from hybridvlm.config import ATTENTION, MAMBA
from hybridvlm.console import print_markdown, track
from hybridvlm.eval.results import write_atomic

AHEAD = {"next": 1, "all": 0}
NAMES = {"plain": "own", "next": "next", "all": "all"}
METHOD = {"own": "str", "next": "str-lookahead", "all": "str-lookahead with ahead=0"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_source(parser, 8, 8)
    parser.add_argument(
        "--top", type=float, default=0.25, help="share of tokens that a score is judged by (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Score, measure, write."""
    if not 0 < options.top < 1:
        raise ValueError(f"--top must lie in (0, 1), got {options.top}")
    check_source(options, per_video=2)
    model = load_model(options.model)
    pattern = model.config.pattern
    if ATTENTION not in pattern:
        raise ValueError(f"--model {options.model}: no layer of {pattern} is attention, so that none looks at anything")
    folder = output_folder(options, f"lookahead-{short(options.model)}-{source_name(options)}")
    scored = score_questions(model, questions(model, options), DEFAULT, AHEAD)
    if all(len(own) < 2 for own in scored):
        raise ValueError(f"{source_name(options)} has one question a video; this compares at least two on one")
    rows = measure(scored, pattern, options.top)
    means = over_layers(rows)
    write_json(
        folder / "lookahead.json",
        {"command": options.command, "model": options.model, "top": options.top, "layers": rows, "mean": means},
    )
    count = sum(map(len, scored))
    title = (
        f"# {options.model}: {count} questions on {len(scored)} videos of {source_name(options)}, top {options.top:g}"
    )
    text = f"{markdown(rows)}\n\n{markdown(means)}\n\n{advice(means)}"
    write_atomic(folder / "lookahead.md", f"{title}\n\n`{options.command}`\n\n{text}\n")
    write_figure(folder / "lookahead.png", picture(rows, options.top))
    print_markdown(f"{title}\n\n{text}\n")
    print(folder / "lookahead.md")
    return 0


def measure(scored: Sequence[Sequence[Scored]], pattern: str, share: float) -> list[Row]:
    """One row per mixer layer that has attention after it, and per score."""
    depth = sorted(scored[0][0].score["plain"])
    attention = [layer for layer in depth if pattern[layer] == ATTENTION]
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for own in track(scored, "video", "agreement"):
        read = [{a: measures.mass(one.score["plain"][a], "relu") for a in attention} for one in own]
        for layer in depth:
            after = [a for a in attention if a > layer]
            if not after:
                continue
            later = [np.mean([weights[a] for a in after], axis=0) for weights in read]
            for variant, name in NAMES.items():
                values = found.setdefault((layer, name), {})
                scores = [one.score[variant][layer] for one in own]
                needed = [one.asked.needed[-1] if one.asked.needed else None for one in own]
                for key, each in _agreement(scores, later, needed, share).items():
                    values.setdefault(key, []).extend(each)
    rows = []
    for (layer, name), values in found.items():
        row: Row = {"layer": layer, "kind": pattern[layer], "score": name}
        row |= {key: float(np.mean(each)) if each else None for key, each in values.items()}
        row["follows"] = row["held"] - row["other"] if row["other"] is not None else None
        rows.append(row)
    return rows


def _agreement(
    scores: Sequence[np.ndarray], later: Sequence[np.ndarray], needed: Sequence[int | None], share: float
) -> dict[str, list[float]]:
    """The measures of one layer's score for the questions on one video: scores and later [M], one each per question."""
    chosen = [measures.top(score, measures.count_of(share, len(score))) for score in scores]
    pairs = list(itertools.permutations(range(len(scores)), 2))
    return {
        "held": [float(weight[own].sum()) for own, weight in zip(chosen, later, strict=True)],
        "other": [float(later[j][chosen[i]].sum()) for i, j in pairs],
        "rank": [measures.spearman(score, weight) for score, weight in zip(scores, later, strict=True)],
        "recall": [float(own[token]) for own, token in zip(chosen, needed, strict=True) if token is not None],
        "overlap": [measures.jaccard(chosen[i], chosen[j]) for i, j in pairs if i < j],
    }


def over_layers(rows: Sequence[Row]) -> list[Row]:
    """Means over the Mamba layers (of a model without any: over all layers), one row per score."""
    kind = MAMBA if any(row["kind"] == MAMBA for row in rows) else ATTENTION
    means = []
    for name in NAMES.values():
        own = [row for row in rows if row["score"] == name and row["kind"] == kind]
        mean: Row = {"layers": kind, "score": name}
        for key in ("held", "other", "follows", "rank", "recall", "overlap"):
            values = [row[key] for row in own if row[key] is not None]
            mean[key] = float(np.mean(values)) if values else None
        means.append(mean)
    return means


def advice(means: Sequence[Row]) -> str:
    """The line that says which score follows the question most."""
    best = max(means, key=lambda row: row["follows"])
    own = next(row for row in means if row["score"] == "own")
    return (
        f"`{METHOD[best['score']]}` follows the question most: {best['follows']:.3f} of later attention more for its own "
        f"question than for another, `str` {own['follows']:.3f}."
    )


def picture(rows: Sequence[Row], share: float) -> Any:
    """What each score holds of later attention, how it ranks, and whether it has the needed token, over depth."""
    panels_of = {"follows": "later attention held, own question less another's", "rank": "rank correlation with it"}
    panels_of["recall" if any(row["recall"] is not None for row in rows) else "overlap"] = (
        f"needed token in the top {share:g}"
        if any(row["recall"] is not None for row in rows)
        else "choice shared by two questions"
    )
    fig, panels = figure(len(panels_of), width=4.6)
    for panel, (key, title) in zip(panels[0], panels_of.items(), strict=True):
        for i, name in enumerate(NAMES.values()):
            own = [row for row in rows if row["score"] == name]
            panel.plot([r["layer"] for r in own], [r[key] for r in own], "-", color=COLOURS[i], label=name, lw=1)
            for kind, mark in ((MAMBA, "o"), (ATTENTION, "*")):
                at = [r for r in own if r["kind"] == kind]
                panel.plot([r["layer"] for r in at], [r[key] for r in at], mark, color=COLOURS[i], ms=5)
        panel.set(xlabel="layer (o Mamba, * attention)", title=title)
        panel.legend(fontsize=8, frameon=False)
    return fig
