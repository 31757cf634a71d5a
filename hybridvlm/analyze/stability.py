"""Do layers agree on which visual tokens matter?

    python -m hybridvlm.analyze stability --model tiny-reduced

For every pair of mixer layers, means over questions of dense passes: Jaccard overlap of the top share of tokens (`chance`: that of
random sets), Kendall's tau of the whole rankings (chance 0), and rank-biased overlap, which weighs the heads of the rankings (the
depth that counts is the top share; `rbo chance`: that of random rankings). Ties go to the earlier token, as where a plan drops.
`range` is the 95% interval of the Jaccard overlap, clustered by video. By type: M-M, M-*, *-* (how far attention and Mamba scores
agree), neighbours and all pairs. Low overlap between neighbours means that what one layer drops may be what a later one would
have kept.
`other question`: overlap of one layer's choice between two questions on one video; layers of high overlap there agree with
others for reasons that are not the question's. Written: stability.json, stability.md, stability.png.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.analyze import measures
from hybridvlm.analyze.common import (
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
from hybridvlm.analyze.scores import Scored, score_questions
from hybridvlm.console import print_markdown, track
from hybridvlm.eval.results import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_source(parser, 16, 4)
    parser.add_argument(
        "--top", type=float, default=0.25, help="share of tokens that is compared (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Score, compare, write."""
    if not 0 < options.top < 1:
        raise ValueError(f"--top must lie in (0, 1), got {options.top}")
    check_source(options)
    model = load_model(options.model)
    folder = output_folder(options, f"stability-{short(options.model)}-{source_name(options)}")
    asked = questions(model, options)
    scored = score_questions(model, asked)
    found = measure(scored, model.config.pattern, options.top)
    write_json(folder / "stability.json", {"command": options.command, "model": options.model} | found)
    count = sum(map(len, scored))
    title = (
        f"# {options.model}: {count} questions on {len(scored)} videos of {source_name(options)}, top {options.top:g}"
    )
    text = f"{markdown(found['by_type'])}\n\n{markdown(found['layers'])}"
    write_atomic(folder / "stability.md", f"{title}\n\n`{options.command}`\n\n{text}\n")
    write_figure(folder / "stability.png", picture(found))
    print_markdown(f"{title}\n\n{text}\n")
    print(folder / "stability.md")
    return 0


def measure(scored: Sequence[Sequence[Scored]], pattern: str, share: float) -> dict[str, Any]:
    """pairs, by_type, layers and the matrices after them; `depth` lists the layers of their rows."""
    flat = [one for own in scored for one in own]
    depth = sorted(flat[0].score["plain"])
    n = len(depth)
    matrices = {name: np.zeros((len(flat), n, n)) for name in ("jaccard", "kendall", "rbo")}
    chance: dict[str, list[float]] = {"chance": [], "rbo chance": []}
    for q, one in enumerate(track(flat, "question", "agreement")):
        scores = [one.score["plain"][layer] for layer in depth]
        m = len(scores[0])
        k = measures.count_of(share, m)
        persistence = 1 - 1 / k
        chance["chance"].append(measures.chance_jaccard(k, m))
        chance["rbo chance"].append(measures.chance_rbo(persistence, m))
        chosen = [measures.top(s, k) for s in scores]
        for i, j in itertools.combinations_with_replacement(range(n), 2):
            values = {
                "jaccard": measures.jaccard(chosen[i], chosen[j]),
                "kendall": measures.kendall(scores[i], scores[j]),
                "rbo": measures.rank_biased_overlap(scores[i], scores[j], persistence),
            }
            for name, value in values.items():
                matrices[name][q, i, j] = matrices[name][q, j, i] = value
    mean = {name: values.mean(0) for name, values in matrices.items()}
    pairs: list[Row] = [
        {"first": depth[i], "second": depth[j], "type": _type(pattern, depth[i], depth[j]), "neighbours": j == i + 1}
        | {name: float(values[i, j]) for name, values in mean.items()}
        for i, j in itertools.combinations(range(n), 2)
    ]
    by_type = list[Row]()
    at = {layer: i for i, layer in enumerate(depth)}
    by_chance = {name: float(np.mean(values)) for name, values in chance.items()}
    videos = [one.asked.video for one in flat]
    for kind in ("M-M", "M-*", "*-*"):
        for which in ("neighbours", "all"):
            own = [p for p in pairs if p["type"] == kind and (which == "all" or p["neighbours"])]
            if own:
                indices = ([at[p["first"]] for p in own], [at[p["second"]] for p in own])
                each = matrices["jaccard"][:, *indices].mean(1)
                row: Row = {"type": kind, "which": which, "pairs": len(own)}
                row["jaccard"], row["range"] = measures.mean_interval(each.tolist(), videos)
                row |= {name: float(np.mean([p[name] for p in own])) for name in ("kendall", "rbo")}
                by_type.append(row | by_chance)
    other = other_question(scored, share)
    layers = [
        {"layer": layer, "kind": pattern[layer]}
        | {f"{name} with next": float(mean[name][i, i + 1]) if i + 1 < n else None for name in mean}
        | {"other question": other[layer]}
        for i, layer in enumerate(depth)
    ]
    return {
        "by_type": by_type,
        "layers": layers,
        "pairs": pairs,
        "depth": depth,
        "chance": by_chance["chance"],
        "rbo chance": by_chance["rbo chance"],
        "matrices": {name: values.tolist() for name, values in mean.items()},
    }


def other_question(scored: Sequence[Sequence[Scored]], share: float) -> dict[int, float | None]:
    """Per layer, Jaccard overlap of the top share between two questions on one video; None with one question a video."""
    out: dict[int, float | None] = {}
    for layer in sorted(scored[0][0].score["plain"]):
        overlaps = []
        for own in scored:
            scores = [one.score["plain"][layer] for one in own]
            chosen = [measures.top(s, measures.count_of(share, len(s))) for s in scores]
            overlaps += [measures.jaccard(a, b) for a, b in itertools.combinations(chosen, 2)]
        out[layer] = float(np.mean(overlaps)) if overlaps else None
    return out


def _type(pattern: str, first: int, second: int) -> str:
    kinds = {pattern[first], pattern[second]}
    return "M-*" if len(kinds) == 2 else f"{pattern[first]}-{pattern[first]}"


def picture(found: dict[str, Any]) -> Any:
    """The two matrices of overlap and tau."""
    fig, panels = figure(2, width=5.0, height=4.4)
    labels = [f"{row['layer']}{row['kind']}" for row in found["layers"]]
    for panel, name in zip(panels[0], ("jaccard", "kendall"), strict=True):
        matrix = np.array(found["matrices"][name])
        np.fill_diagonal(matrix, np.nan)
        shown = panel.imshow(
            matrix, cmap="viridis" if name == "jaccard" else "coolwarm", vmin=0 if name == "jaccard" else -1, vmax=1
        )
        panel.set_xticks(range(len(labels)), labels, fontsize=6, rotation=90)
        panel.set_yticks(range(len(labels)), labels, fontsize=6)
        panel.set(title=f"{name} (chance {found['chance']:.2f})" if name == "jaccard" else "Kendall's tau")
        fig.colorbar(shown, ax=panel, shrink=0.8)
    return fig
