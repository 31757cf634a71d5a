"""Which layers' scores follow the question? Weights of the layers for the method `str-calibrated`.

    python -m hybridvlm.analyze calibrate --model tiny
    python -m hybridvlm.analyze calibrate --model tiny --compare 280      # and str against str-calibrated on validation questions

Dense passes over a few videos with several questions each; no answer or needed token is read. Per layer l:

  overlap    Jaccard overlap of the top share of tokens between two questions on one video, chance taken away and rescaled: 1 for a
             score that ignores the question, 0 for choices as different as random ones
  own, other of the later attention layers' weight, the part that lies on l's top share: of the weight that the same question puts
             there, and of the weight that another question on the video does. A score that ignores the question holds as much of
             both, and so does noise; their difference is what follows the question
  at stake   the part of all question-following attention that is still to come after l, each attention layer counted by the
             difference of its own top share
  retained   1 - at stake * (1 - the part of that difference which l's top share keeps): 1 where the choice keeps all that later
             attention tells questions apart by, or where nothing is read any more
  weight     (retained - skip) / (1 - skip), 0 below --skip: such a layer neither scores nor drops

`str-calibrated` lets its schedule run over the accumulated weights instead of depth, so that most tokens are dropped where scores
follow the question. The weights are the field `layer_weights` of the Schedule, go into plans, results and checkpoints with it, and
are one option of the evaluation: --methods str-calibrated --schedule layer_weights=…, as printed.

Written: calibration.json, calibration.md, calibration.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.analyze import ablate, ablate_checkpoints, ablate_report, measures
from hybridvlm.analyze.cells import REFERENCE, Cell, cell
from hybridvlm.analyze.common import (
    COLOURS,
    Row,
    add_source,
    base_reduction,
    check_source,
    figure,
    load_embedded,
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
from hybridvlm.config import ATTENTION, Reduction, to_dict
from hybridvlm.console import print_markdown
from hybridvlm.eval.results import write_atomic
from hybridvlm.files import folder_lock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_source(parser, 8, 8, seed=1)
    add = parser.add_argument
    add(
        "--top",
        type=float,
        default=0.25,
        help="share of tokens that a layer's choice is judged by (default: %(default)s)",
    )
    add("--skip", type=float, default=0.5, help="retained part below which a layer is skipped (default: %(default)s)")
    add(
        "--compare",
        type=int,
        default=0,
        metavar="N",
        help="compare with str on N validation questions (default: not at all)",
    )
    add("--budget", type=float, default=0.25, help="of that comparison (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="of that comparison (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Score, judge, write; then compare if asked to."""
    if not 0 < options.top < 1 or not 0 <= options.skip < 1:
        raise ValueError(f"--top must lie in (0, 1) and --skip in [0, 1), got {options.top} and {options.skip}")
    if options.compare < 0 or options.batch_size < 1:
        raise ValueError(
            f"--compare must be at least 0 and --batch-size at least 1, got {options.compare} and {options.batch_size}"
        )
    check_source(options, per_video=2)
    model = load_embedded(options.model) if options.compare else load_model(options.model)
    base = dataclasses.replace(base_reduction([model.reduction]), method="str", budget=options.budget, kind="mean")
    folder = output_folder(options, f"calibration-{short(options.model)}-{source_name(options)}")
    asked = questions(model, options)
    if all(len(own) < 2 for own in asked):
        raise ValueError(f"{source_name(options)} has one question a video; calibration compares at least two on one")
    layers = judge(score_questions(model, asked), model.config.pattern, options.top)
    weights = layer_weights(layers, len(model.config.pattern), options.skip)
    reduction = calibrated(base, weights)
    data = {
        "command": options.command,
        "model": options.model,
        "layers": layers,
        "layer_weights": weights,
        "reduction": to_dict(reduction),
    }
    write_json(folder / "calibration.json", data)
    title = f"# {options.model}: which scores follow the question ({len(asked)} videos of {source_name(options)})"
    table = markdown([row | {"weight": weights[row["layer"]]} for row in layers])
    option = f"--methods str-calibrated --schedule layer_weights={','.join(f'{w:g}' for w in weights)}"
    text = f"{title}\n\n`{options.command}`\n\n{table}\n"
    write_figure(folder / "calibration.png", picture(layers))
    print_markdown(text)
    # On a line of its own, as it is to be pasted.
    print(option)
    text += f"\n`{option}`\n"
    if options.compare:
        with folder_lock(folder, "an analysis"):
            results = compare(options, base, reduction, folder)
        write_json(folder / "calibration.json", data | {"comparison": results})
        text += f"\n{ablate_report.report(results)}"
        print_markdown(ablate_report.report(results))
    write_atomic(folder / "calibration.md", text)
    print(folder / "calibration.md")
    return 0


def calibrated(base: Reduction, weights: Sequence[float]) -> Reduction:
    """`str-calibrated` with `base`'s budget, schedule and score options, and these weights of the layers."""
    return dataclasses.replace(
        base, method="str-calibrated", schedule=dataclasses.replace(base.schedule, layer_weights=tuple(weights))
    )


def judge(scored: Sequence[Sequence[Scored]], pattern: str, share: float) -> list[Row]:
    """One row per mixer layer: overlap, own, other, at stake, retained. ValueError where no video has two questions."""
    if all(len(own) < 2 for own in scored):
        raise ValueError("calibration compares different questions on one video; ask at least two on a video")
    depth = sorted(scored[0][0].score["plain"])
    attention = [layer for layer in depth if pattern[layer] == ATTENTION]
    held: dict[tuple[int, int], dict[str, list[float]]] = {
        pair: {"own": [], "other": []} for pair in itertools.product(depth, attention)
    }
    overlaps: dict[int, list[float]] = {layer: [] for layer in depth}
    for own in scored:
        weights = [{a: measures.mass(one.score["plain"][a], "relu") for a in attention} for one in own]
        chosen = [
            {
                layer: measures.top(scores := one.score["plain"][layer], measures.count_of(share, len(scores)))
                for layer in depth
            }
            for one in own
        ]
        for i, j in itertools.permutations(range(len(own)), 2):
            for layer in depth:
                if i < j:
                    m = len(chosen[i][layer])
                    overlap = measures.jaccard(chosen[i][layer], chosen[j][layer])
                    overlaps[layer].append(measures.above_chance(overlap, measures.count_of(share, m), m))
                for a in attention:
                    held[layer, a]["own"].append(weights[i][a][chosen[i][layer]].sum())
                    held[layer, a]["other"].append(weights[j][a][chosen[i][layer]].sum())
    mean = {pair: {k: float(np.mean(v)) for k, v in values.items()} for pair, values in held.items()}

    def gap(layer: int, a: int) -> float:
        return max(0.0, mean[layer, a]["own"] - mean[layer, a]["other"])

    follows = {a: gap(a, a) for a in attention}
    total = sum(follows.values())
    if total <= 0:
        raise ValueError(
            "no attention layer of this model tells the questions apart; there is nothing to measure scores by"
        )
    rows = []
    for layer in depth:
        later = [a for a in attention if a > layer and follows[a] > 0]
        coming = sum(follows[a] for a in later)
        row: Row = {"layer": layer, "kind": pattern[layer], "overlap": float(np.mean(overlaps[layer]))}
        for which in ("own", "other"):
            row[which] = sum(follows[a] * mean[layer, a][which] for a in later) / coming if later else None
        lost = sum(max(0.0, follows[a] - gap(layer, a)) for a in later) / total
        rows.append(row | {"at stake": coming / total, "retained": 1.0 - lost})
    return rows


def layer_weights(layers: Sequence[Row], count: int, skip: float) -> list[float]:
    """Schedule.layer_weights: a number per layer of the pattern, 0 below `skip` and for layers without a score."""
    weights = [0.0] * count
    for row in layers:
        weights[row["layer"]] = round(max(0.0, row["retained"] - skip) / (1 - skip), 3)
    if not any(weights):
        most = max(row["retained"] for row in layers)
        raise ValueError(f"no layer's retained part reaches --skip {skip:g}; the most is {most:.3f}")
    return weights


def compared(base: Reduction, reduction: Reduction) -> list[Cell]:
    """str, str-calibrated and attention layers alone; where str starts late, both also from layer 0: a layer of weight 0 near the
    start makes str-calibrated start earlier, which by itself changes what is kept."""
    attention = dataclasses.replace(base, method="str-attention")
    cells = [
        cell("reference", REFERENCE, base),
        cell("calibration", "str-calibrated", reduction, base, lower=True),
        cell("calibration", "str-attention", attention, base, lower=True),
    ]
    if base.schedule.start:
        for name, one in (("str", base), ("str-calibrated", reduction)):
            early = dataclasses.replace(one, schedule=dataclasses.replace(one.schedule, start=0))
            cells.append(cell("calibration", f"{name}, from 0", early, base))
    return cells


def compare(options: argparse.Namespace, base: Reduction, reduction: Reduction, folder: Any) -> Row:
    """str and str-calibrated at the predicted FLOPs of str, on the same validation questions."""
    own = argparse.Namespace(**vars(options))
    own.split, own.limit, own.dry_run = "val", options.compare, False
    models, cells = ablate_checkpoints.load_models([(short(options.model), options.model)]), compared(base, reduction)
    checkpoints = ablate_checkpoints.open_checkpoints(own, models, cells, folder / "answers")
    results = ablate.answer_cells(own, checkpoints, cells)
    assert results is not None
    return results


def picture(layers: Sequence[Row]) -> Any:
    """Overlap and the retained part over depth, Mamba and attention layers apart."""
    fig, panels = figure(2)
    for panel, name in zip(panels[0], ("overlap", "retained"), strict=True):
        for i, (kind, label) in enumerate((("M", "Mamba"), ("*", "attention"))):
            own = [row for row in layers if row["kind"] == kind]
            if own:
                panel.plot([r["layer"] for r in own], [r[name] for r in own], ".-", color=COLOURS[i], label=label)
        panel.set(
            xlabel="layer",
            title={
                "overlap": "choice shared by two questions (0: chance)",
                "retained": "retained: what it keeps of later attention",
            }[name],
        )
        panel.legend(fontsize=8, frameon=False)
    return fig
