"""The picture of the README: `python -m hybridvlm.tiny.figure --output .github/front_page.png`.

Left, one two-hop question of the embedded benchmark: a few frames of its video, and which image tiles are left after
some of the layers that drop. Right, accuracy against the predicted saving, read from the results of
`python -m hybridvlm.analyze ablate` that lie under `notebooks/results`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridvlm.tiny import needle, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABLATIONS = ("notebooks/results/ablation-schedules/ablation.json", "notebooks/results/ablation-rules/ablation.json")
RIVALS = {
    "oneshot-mamba": "one early drop",
    "fastv": "FastV",
    "saliency": "saliency (no question)",
    "random": "random",
}
ACCENT, SECOND, DARK, PALE = "#c2410c", "#0f766e", "#334155", "#8a8f98"
_DROPPED = 0.13  # of a dropped tile's brightness


@dataclasses.dataclass(frozen=True)
class Trace:
    """One question and what a plan kept of its video.

    frames: uint8 [F,h,w,3]. needed: the tiles that the answer depends on, in the order in which they are read; a tile
    is frame * 16 + position. kept: for every drop (layer, bool [F * 16]). letters: the kind of every layer.
    """

    frames: np.ndarray
    question: str
    answer: str
    needed: tuple[int, ...]
    kept: tuple[tuple[int, np.ndarray], ...]
    letters: str


def trace(model_name: str, budget: float, split: str, videos: int) -> Trace:
    """The first question whose answer is found by following an item's tags (2P), answered rightly under `budget`.

    Raises:
        RuntimeError: the model answers none of them on the first `videos` videos of the split.
    """
    import jax

    from hybridvlm.config import Reduction
    from hybridvlm.inference.model import load

    model = load(model_name)
    reduction = dataclasses.replace(model.reduction or Reduction(), method="str", budget=budget)
    for video, questions in needle.split_questions(split, videos=videos):
        for number in np.flatnonzero(questions.type == needle.POINTED):
            text, seconds = questions.texts()[number], [float(t) for t in range(video.frames)]
            batch, plan = model.batch([text], [seconds], reduction)
            frames = needle.render_video(video)
            generation = model.generate(batch, model.encode(frames[None]), plan)
            model.verify(generation)
            if generation.text[0] != questions.answers()[number] or plan is None:
                continue
            ordinal = np.cumsum(model.layout(text, seconds).frame >= 0) - 1
            kept = []
            for layer, (index, visual) in zip(plan.drops, generation.prefilled.decoder.survivors, strict=True):
                index, visual = (np.asarray(jax.device_get(part))[0] for part in (index, visual))
                alive = np.zeros(video.frames * tiles.CELLS, bool)
                alive[ordinal[index[visual]]] = True
                kept.append((layer, alive))
            needed = int(questions.hop1[number]), int(questions.hop2[number])
            return Trace(frames, text, generation.text[0], needed, tuple(kept), model.config.pattern)
    raise RuntimeError(f"{model_name} answered no 2P question on the first {videos} videos of {split} under {budget:g}")


def _columns(needed: Sequence[int], frames: int, count: int) -> list[int]:
    """`count` frames in order: those that hold a needed tile, and others spread over the video."""
    chosen = sorted({tile // tiles.CELLS for tile in needed})
    while len(chosen) < count:  # in the middle of the widest gap
        edges = [-1, *chosen, frames]
        gap = int(np.argmax(np.diff(edges)))
        chosen.insert(gap, (edges[gap] + edges[gap + 1]) // 2)
    return chosen


def _draw_frame(axes: Axes, frame: np.ndarray, kept: np.ndarray, needed: dict[int, int]) -> None:
    """One frame, its dropped tiles dark; needed: position in the frame -> number of the look-up that reads it."""
    from matplotlib.patches import Rectangle

    light = np.kron(kept.reshape(tiles.GRID, tiles.GRID), np.ones((tiles.CELL, tiles.CELL)))[..., None]
    axes.imshow(np.where(light, frame, _DROPPED * frame + 22).astype(np.uint8), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    for position, number in needed.items():
        top, left = (tiles.CELL * part for part in divmod(position, tiles.GRID))
        colour = ACCENT if number == 1 else SECOND
        style = "-" if kept[position] else ":"
        side = tiles.CELL - 1
        axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor="white", linewidth=5.5, clip_on=False))
        axes.add_patch(
            Rectangle(
                (left, top), side, side, fill=False, edgecolor=colour, linewidth=3.2, linestyle=style, clip_on=False
            )
        )


def _draw_trace(figure: Any, grid: Any, shown: Trace, layers: Sequence[int], count: int) -> None:
    kinds = {"M": "Mamba", "*": "attention"}
    columns = _columns(shown.needed, len(shown.frames), count)
    everything = np.ones(len(shown.frames) * tiles.CELLS, bool)
    rows = [("all tiles", everything)]
    rows += [
        (f"after layer {layer}\n({kinds[shown.letters[layer]]})", kept) for layer, kept in shown.kept if layer in layers
    ]
    for row, (title, kept) in enumerate(rows):
        for column, frame in enumerate(columns):
            axes = figure.add_subplot(grid[row, column])
            own = slice(frame * tiles.CELLS, (frame + 1) * tiles.CELLS)
            here = {tile % tiles.CELLS: n for n, tile in enumerate(shown.needed, 1) if tile // tiles.CELLS == frame}
            _draw_frame(axes, shown.frames[frame], kept[own], here)
            if row == 0:
                axes.set_title(f"frame {frame}", fontsize=15, color="#333", pad=7)
            if column == 0:
                label = f"{title}\n{kept.sum():,} = {kept.mean():.0%}" if row else f"{title}\n{kept.sum():,}"
                axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=12, fontsize=15)


def read_ablations(paths: Sequence[str | pathlib.Path], group: str = "after") -> list[dict[str, Any]]:
    """The rows of a group of models in files of `analyze ablate`, as method, budget, accuracy, low, high and saving.

    Raises:
        FileNotFoundError: a file is missing; they are in the repository, not in an installed package.
    """
    rows: list[dict[str, Any]] = []
    for path in map(pathlib.Path, paths):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no results of `analyze ablate`; start this in a checkout, or give --ablations"
            )
        for row in json.loads(path.read_text())["rows"]:
            if row["group"] != group:
                continue
            accuracy = row["accuracy"]
            low, high = accuracy["ci95_seeds"] or accuracy["ci95_videos"] or (accuracy["mean"],) * 2
            rows.append(
                {
                    "cell": row["cell"],
                    "method": row["method"],
                    "budget": row["budget"],
                    "accuracy": 100 * accuracy["mean"],
                    "low": 100 * low,
                    "high": 100 * high,
                    "saving": 1 / row["flops"],
                }
            )
    return rows


def budget_curve(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dense and `str` at its default schedule, by rising saving, each budget once."""
    chosen = {r["budget"]: r for r in rows if r["cell"] in ("dense", "str") or r["cell"].startswith("str ")}
    return sorted(chosen.values(), key=lambda row: row["saving"])


def _draw_curve(axes: Axes, paths: Sequence[str | pathlib.Path]) -> None:
    for group, colour, label, style in (
        ("before", PALE, "str, before finetuning", "--"),
        ("after", ACCENT, "str, finetuned at 25%", "-"),
    ):
        curve = budget_curve(read_ablations(paths, group))
        x = [row["saving"] for row in curve]
        axes.plot(x, [row["accuracy"] for row in curve], style, color=colour, marker="o", ms=7, lw=2.6, label=label)
        if group == "after":
            low, high = ([row[key] for row in curve] for key in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.14, lw=0)
            for row in curve[1:]:
                flat = row["accuracy"] > 95  # a row of labels over the plateau, then to the right of the slope
                at = (row["saving"], 101.8) if flat else (row["saving"], row["accuracy"])
                axes.annotate(
                    f"{100 * row['budget']:g}%",
                    at,
                    (0, 0) if flat else (9, 5),
                    textcoords="offset points",
                    ha="center" if flat else "left",
                    fontsize=14,
                    color=colour,
                )
    rows = {row["method"]: row for row in read_ablations(paths) if row["method"] in RIVALS}
    for method, label in RIVALS.items():
        row = rows[method]
        label_of_all = "other rules at 25%, finetuned" if method == "random" else None
        axes.plot(row["saving"], row["accuracy"], "s", color=DARK, ms=8, ls="", label=label_of_all)
        nudge = {"saliency": 5, "random": -5}.get(method, 0)
        axes.annotate(
            label,
            (row["saving"], row["accuracy"]),
            (-7, -19) if method == "oneshot-mamba" else (11, nudge),
            textcoords="offset points",
            va="center",
            fontsize=14,
            color=DARK,
        )
    axes.set_xscale("log", base=2)
    ticks = [1, 2, 4, 8]
    axes.set_xticks(ticks, [f"{tick}x" for tick in ticks])
    axes.set_xlim(0.93, 14)
    axes.set_ylim(44, 105)
    axes.set_yticks(range(50, 101, 10))
    axes.set_xlabel("fewer prefill FLOPs than dense (predicted)", fontsize=15)
    axes.set_ylabel("accuracy, %", fontsize=15)
    axes.tick_params(labelsize=14)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", fontsize=14, frameon=False)


def draw(shown: Trace, ablations: Sequence[str | pathlib.Path], layers: Sequence[int], columns: int = 6) -> bytes:
    """The whole picture as the bytes of a PNG of 1600 x 900 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(16, 9), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    rows = 1 + sum(layer in layers for layer, _ in shown.kept)
    grid = figure.add_gridspec(
        rows, columns, left=0.117, right=0.628, top=0.828, bottom=0.075, wspace=0.05, hspace=0.06
    )
    _draw_trace(figure, grid, shown, layers, columns)
    heading: dict[str, Any] = {"fontsize": 18, "fontweight": "bold"}
    quiet: dict[str, Any] = {"fontsize": 14.5, "color": "#555"}
    figure.text(0.012, 0.955, "Which image tiles (visual tokens) are left, layer by layer", **heading)
    figure.text(0.012, 0.920, f"Q: {shown.question}    A: {shown.answer}", fontsize=16, family="monospace")
    colour, frame = shown.question.split()[0].split("@t")
    meaning = f"(the tags of the {colour} item in frame {int(frame)} name a frame: what is in the same tile there?)"
    figure.text(0.012, 0.889, meaning, **quiet)
    figure.text(0.117, 0.030, "read first", fontsize=15, color=ACCENT, fontweight="bold")
    figure.text(0.205, 0.030, "read second", fontsize=15, color=SECOND, fontweight="bold")
    figure.text(0.312, 0.030, f"dark: dropped; {columns} of {len(shown.frames)} frames are shown", **quiet)
    figure.text(0.66, 0.955, "Accuracy against saving", **heading)
    figure.text(0.66, 0.920, "embedded benchmark; band: 95% over 3 seeds", **quiet)
    _draw_curve(figure.add_axes((0.695, 0.135, 0.29, 0.75)), ablations)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    buffer = io.BytesIO()
    image.quantize(192, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        buffer, format="PNG", optimize=True
    )
    return buffer.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.tiny.figure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default=".github/front_page.png", help="the PNG to write (%(default)s)")
    parser.add_argument("--model", default="tiny-reduced", help="model of the left half (%(default)s)")
    parser.add_argument("--budget", type=float, default=0.25, help="share of visual tokens that it keeps (%(default)s)")
    parser.add_argument("--split", default="val", help="split that the question is taken from (%(default)s)")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 10, 18], help="layers to show the rest after")
    parser.add_argument("--ablations", nargs="+", default=list(ABLATIONS), help="results of `analyze ablate`")
    args = parser.parse_args(arguments)
    try:  # before the model runs
        read_ablations(args.ablations)
    except FileNotFoundError as error:
        print(f"hybridvlm.tiny.figure: {error}", file=sys.stderr)
        return 2
    picture = draw(trace(args.model, args.budget, args.split, 8), args.ablations, args.layers)
    output = pathlib.Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(picture)
    print(f"wrote {output}, {len(picture) / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
