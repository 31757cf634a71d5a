"""How few visual tokens hold a layer's score, and is the score a matter of position?

    python -m hybridvlm.analyze sparsity --model tiny
    python -m hybridvlm.analyze sparsity --model CHECKPOINT --video clip.mp4 --question "What colour is the car?"

Per layer, means over questions of dense passes: the share of visual tokens that hold 50, 80, 90 and 95% of the score's mass, Gini
coefficient (0: all alike, 1: one token) and entropy over log M (1: all alike). Attention weights are a mass as they are. A Mamba
layer's c.b is signed, so that its mass is a reading: `relu` counts positive parts, `abs` magnitudes, `softmax` is that of the
z-scored score; all three are in the JSON, --mass picks the table's. `positive` is the share of tokens with a positive score: where
hardly any has one, relu's mass says little (it is even where none has). A flat mass may still rank well: see `recall`, how often
the tokens that the answer needs are in the top quarter (embedded benchmark only), and `calibrate`.

Position bias: Spearman's correlation of the score with a token's position (positive: late tokens score higher), without the decay
and with it (Mamba layers). `range` is its 95% interval, clustered by video. Written: sparsity.json, sparsity.md, sparsity.png.
"""

from __future__ import annotations

import argparse
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
from hybridvlm.analyze.scores import WITH_DECAY, Scored, score_questions
from hybridvlm.console import print_markdown
from hybridvlm.eval.results import write_atomic

SHARES = (0.5, 0.8, 0.9, 0.95)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_source(parser, 16, 4)
    parser.add_argument("--mass", default="abs", choices=measures.MASSES, help="in the table (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Score, measure, write."""
    check_source(options)
    model = load_model(options.model)
    folder = output_folder(options, f"sparsity-{short(options.model)}-{source_name(options)}")
    asked = questions(model, options)
    scored = score_questions(model, asked, WITH_DECAY)
    layers = measure(scored, model.config.pattern)
    write_json(folder / "sparsity.json", {"command": options.command, "model": options.model, "layers": layers})
    table = markdown([_shown(row, options.mass) for row in layers])
    count = sum(map(len, scored))
    title = (
        f"# {options.model}: {count} questions on {len(scored)} videos of {source_name(options)}, mass: {options.mass}"
    )
    write_atomic(folder / "sparsity.md", f"{title}\n\n`{options.command}`\n\n{table}\n")
    write_figure(folder / "sparsity.png", picture(layers, options.mass))
    print_markdown(f"{title}\n\n{table}\n")
    print(folder / "sparsity.md")
    return 0


def measure(scored: Sequence[Sequence[Scored]], pattern: str) -> list[Row]:
    """One row per mixer layer: means over all questions, under every reading of the mass."""
    flat = [one for own in scored for one in own]
    videos = [one.asked.video for one in flat]
    rows = []
    for layer in sorted(flat[0].score["plain"]):
        row: Row = {"layer": layer, "kind": pattern[layer]}
        for how in measures.MASSES:
            weights = [measures.mass(one.score["plain"][layer], how) for one in flat]
            held = np.mean([measures.tokens_holding(w, SHARES) for w in weights], axis=0)
            row[how] = {
                "holding": dict(zip(map(str, SHARES), held.tolist(), strict=True)),
                "gini": float(np.mean([measures.gini(w) for w in weights])),
                "entropy": float(np.mean([measures.entropy(w) for w in weights])),
            }
        for name in ("plain", "decay"):
            bias = [measures.spearman(s := one.score[name][layer], np.arange(len(s))) for one in flat]
            mean, interval = measures.correlation_interval(bias, videos)
            row[f"position_{name}"] = {"mean": mean, "ci95": interval}
        row["positive"] = float(np.mean([(one.score["plain"][layer] > 0).mean() for one in flat]))
        row["recall"] = recall(flat, layer)
        rows.append(row)
    return rows


def recall(flat: Sequence[Scored], layer: int, share: float = 0.25) -> dict[str, float] | None:
    """How often the needed tokens are among the top `share`: of the first look-up, and of the second where there is one."""
    found: dict[str, list[bool]] = {"first": [], "second": []}
    for one in flat:
        score = one.score["plain"][layer]
        chosen = measures.top(score, measures.count_of(share, len(score)))
        for name, token in zip(found, one.asked.needed, strict=False):
            found[name].append(bool(chosen[token]))
    return {name: float(np.mean(values)) for name, values in found.items() if values} or None


def _shown(row: Row, how: str) -> Row:
    values = row[how]
    out: Row = {"layer": row["layer"], "kind": row["kind"]}
    out |= {f"{100 * float(share):g}% in": held for share, held in values["holding"].items()}
    out |= {
        "gini": values["gini"],
        "entropy": values["entropy"],
        "positive": row["positive"],
        "position": row["position_plain"]["mean"],
    }
    out["range"] = row["position_plain"]["ci95"]
    out["position, decay on"] = row["position_decay"]["mean"] if row["kind"] == "M" else None
    for name in ("first", "second"):
        if row["recall"] and name in row["recall"]:
            out[f"recall {name}"] = row["recall"][name]
    return out


def picture(layers: Sequence[Row], how: str) -> Any:
    """Shares that hold the mass, and the position bias, over depth; attention layers are marked."""
    import matplotlib.ticker

    fig, panels = figure(2)
    first, second = panels[0]
    depth = [row["layer"] for row in layers]
    for i, share in enumerate(SHARES):
        first.plot(
            depth, [100 * r[how]["holding"][str(share)] for r in layers], color=COLOURS[i], label=f"{100 * share:g}%"
        )
    first.set(
        title=f"tokens that hold … of the mass ({how})",
        xlabel="layer",
        ylabel="share of visual tokens, %",
        yscale="log",
    )
    first.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    second.plot(depth, [r["position_plain"]["mean"] for r in layers], color=COLOURS[0], label="without decay")
    mamba = [r for r in layers if r["kind"] == "M"]
    second.plot(
        [r["layer"] for r in mamba],
        [r["position_decay"]["mean"] for r in mamba],
        ".-",
        color=COLOURS[1],
        label="with decay",
    )
    second.set(title="rank correlation of score and position", xlabel="layer", ylim=(-1.05, 1.05))
    for panel in (first, second):
        attention = [row["layer"] for row in layers if row["kind"] == "*"]
        for layer in attention:
            label = "attention layer" if layer == attention[0] else None
            panel.axvline(layer, color="#dddddd", zorder=0, label=label)
        panel.legend(fontsize=8, frameon=False)
    return fig
