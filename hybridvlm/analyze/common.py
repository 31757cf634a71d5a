"""What the analyses share: tables, files, checkpoints by name, and one way to ask a question about a video."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hybridvlm.config import MIXERS, ModelConfig, Reduction
from hybridvlm.console import markdown_table
from hybridvlm.eval.results import write_atomic
from hybridvlm.eval.tasks import Task, TaskOptions, build_task
from hybridvlm.inference.model import Model, load
from hybridvlm.models import nemotron_vl
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import Batch, user_message
from hybridvlm.ops.tokens import Tokens
from hybridvlm.options import split
from hybridvlm.video import default_frames, most_frames, shown_clip

Row = dict[str, Any]
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#994f00", "#006cd1", "#777777", "#000000")


# -- tables and files -----------------------------------------------------------------------------------------------


def text_of(value: Any, digits: int = 3) -> str:
    """A value as a cell of a table: None is empty, floats have `digits` digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    if isinstance(value, list | tuple):
        return " ".join(text_of(v, digits) for v in value)
    return str(value)


def markdown(rows: Sequence[Row], digits: int = 3) -> str:
    """Rows as a Markdown table whose columns also line up as plain text; columns are all keys in order of appearance."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table([{name: text_of(row.get(name), digits) for name in names} for row in rows])


def output_folder(options: argparse.Namespace, name: str) -> pathlib.Path:
    """The folder of results, made if need be: --output, or results/<name>. ValueError where a file stands there."""
    path = options.output or pathlib.Path("results") / name
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output {path} is a file; give a folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_json(path: pathlib.Path, data: Any) -> None:
    """JSON, whole or not at all."""
    write_atomic(path, json.dumps(data, indent=1) + "\n")


def figure(columns: int = 1, rows: int = 1, width: float = 5.2, height: float = 3.8) -> tuple[Any, np.ndarray]:
    """A matplotlib figure that belongs to no window, and its panels [rows,columns]."""
    import matplotlib.figure

    fig = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = fig.subplots(rows, columns, squeeze=False)
    for panel in panels.ravel():
        panel.spines[["top", "right"]].set_visible(False)
    return fig, panels


def write_figure(path: pathlib.Path, fig: Any) -> None:
    """A PNG, whole or not at all."""
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=130)
    write_atomic(path, out.getvalue())


# -- checkpoints ----------------------------------------------------------------------------------------------------


def short(model: str) -> str:
    """A name for files and legends out of a packaged name or a path."""
    return re.sub(r"[^\w.+-]+", "-", pathlib.PurePath(model).name) or "model"


def load_model(name: str, dtype: str = "float32") -> Model:
    """A checkpoint of the Nemotron VL family or of Qwen VL; ValueError for a family whose layers these analyses do not know."""
    model = load(name, dtype=dtype)
    if model.family.embed_prompt is None:
        raise ValueError(
            f"--model {name}: layers of a {type(model.config).__name__}, whose text and video are two streams, are not analysed here; "
            "give a model of one row, such as tiny or tiny-reduced"
        )
    return model


def load_embedded(name: str) -> Model:
    """A checkpoint that knows the embedded benchmark: `tiny`, one trained from it, or the Transformer baseline.

    Raises:
        ValueError: for any other.
    """
    model = load_model(name)
    if model.family.NAME != nemotron_vl.NAME or model.config.vision is None or model.config.vision.kind != "stem":
        raise ValueError(
            f"--model {name}: this analysis asks the embedded benchmark's questions, which this model was not made for; "
            "give tiny, tiny-reduced or a checkpoint trained from them (sparsity, stability and calibrate take any model)"
        )
    return model


def layers_of(text: str, able: Sequence[int], pattern: str) -> list[int]:
    """--layers "0,2,8" as numbers, each one of `able`; ValueError that names the first that is none."""
    try:
        layers = [int(part) for part in split(text, "--layers")]
    except ValueError:
        raise ValueError(f"--layers takes numbers such as 0,2,8, got {text!r}") from None
    wrong = [layer for layer in layers if layer not in able]
    if wrong:
        raise ValueError(
            f"--layers: a drop after layer {wrong[0]} of {pattern} is none; there are {able[0]} to {able[-1]}: "
            f"{','.join(map(str, able))}"
        )
    return layers


def mixers(model: Model) -> tuple[int, ...]:
    """Layers that have scores: M and *."""
    return tuple(i for i, kind in enumerate(model.config.pattern) if kind in MIXERS)


def base_reduction(own: Sequence[Reduction | None]) -> Reduction:
    """The first of some checkpoints' own reductions, or the embedded benchmark's 25% plan where none has one."""
    from hybridvlm.tiny import codes

    return next((r for r in own if r is not None and r.method != "none"), codes.reduction())


# -- questions on videos ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question on one video, as the arrays of one row. needed: visual tokens that its answer needs, where that is known."""

    video: str
    question: str
    batch: Batch
    visual: Any
    needed: tuple[int, ...] = ()


def add_source(parser: argparse.ArgumentParser, videos: int, per_video: int, seed: int = 0) -> None:
    """The options that say which questions on which videos an analysis looks at."""
    add = parser.add_argument
    add(
        "--model",
        default="tiny-reduced",
        help="packaged name (tiny, tiny-reduced) or checkpoint folder (default: %(default)s)",
    )
    task = "needle, the embedded benchmark, or a .jsonl file of questions on video files (default: needle)"
    add("--task", default="needle", help=task)
    add(
        "--split", default="val", choices=("val", "test"), help="split of the embedded benchmark (default: %(default)s)"
    )
    add("--videos", type=int, default=videos, help="videos of the task (default: %(default)s)")
    add("--per-video", type=int, default=per_video, help="questions on each of them, at most (default: %(default)s)")
    add("--seed", type=int, default=seed, help="other videos of the split have other seeds (default: %(default)s)")
    add("--frames", type=int, help="frames per video (default: what the task and the model take)")
    add("--video", metavar="FILE", help="one video file instead of a task; ask about it with --question")
    add("--question", action="append", default=[], metavar="TEXT", help="a question on --video; may be repeated")
    add("--output", type=pathlib.Path, help="folder for tables, JSON and pictures (default: results/...)")


def check_source(options: argparse.Namespace, per_video: int = 1) -> None:
    """ValueError for options that name no questions, or fewer than `per_video` on a video; before anything is loaded."""
    if (options.video is None) != (not options.question):
        raise ValueError("--video FILE goes with at least one --question TEXT, and the other way round")
    for name in ("videos", "per_video"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if (len(options.question) if options.video is not None else options.per_video) < per_video:
        raise ValueError(
            f"questions on one video are compared: give at least {per_video} by --per-video, or by --question"
        )
    if options.frames is not None and options.frames < 1:
        raise ValueError(f"--frames must be at least 1, got {options.frames}")


def source_name(options: argparse.Namespace) -> str:
    """What was looked at, for titles and file names."""
    if options.video is not None:
        return short(options.video)
    return f"needle-{options.split}" if options.task == "needle" else short(options.task)


def questions(model: Model, options: argparse.Namespace) -> list[list[Asked]]:
    """All questions, one list per video; the visual tokens of a video are encoded once."""
    if options.video is not None:
        return [_on_file(model, options)]
    return list(_on_task(model, options))


def _on_file(model: Model, options: argparse.Namespace) -> list[Asked]:
    family, most = model.family, most_frames(model.config, model.buckets)
    frames = min(options.frames or default_frames(model.config, model.buckets), most)
    clip, config = shown_clip(family, model.config, options.video, frames=frames)
    return _on_clip(model, str(options.video), clip, config, options.question)


def _on_clip(model: Model, video: str, clip: Clip, config: ModelConfig, questions: Sequence[str]) -> list[Asked]:
    family, out = model.family, list[Asked]()
    for question in questions:
        messages = [user_message(question, model.style, [clip.kind])]
        layout = family.prompt(config, model.tokenizer, messages, [clip], style=model.style)
        batch, frames, _ = family.make_batch(config, [layout], model.buckets)
        visual = out[0].visual if out else model.encode(family.pixels(config, [clip], frames))
        out.append(Asked(video, question, batch, visual))
    return out


def _on_task(model: Model, options: argparse.Namespace) -> Iterator[list[Asked]]:
    if options.task == "needle":
        yield from _on_needle(model, options)
        return
    task: Task = build_task(options.task, TaskOptions(model.config, options.frames, model.buckets))
    problems = task.check()
    if problems:
        raise ValueError("\n".join(problems))
    for video in task.videos[: options.videos]:
        clip, config = task.clip(video)
        own = [sample for sample in task.samples if sample.video == video][: options.per_video]
        yield _on_clip(model, video, clip, config, [task.prompt(sample) for sample in own])


def _on_needle(model: Model, options: argparse.Namespace) -> Iterator[list[Asked]]:
    """Questions of the benchmark's own list; more per video than it has follow the same rules."""
    from hybridvlm.tiny import needle

    frames = options.frames or needle.FRAMES
    for video, asked in needle.split_questions(options.split, options.videos, options.per_video, frames, options.seed):
        visual = model.encode(needle.render_video(video)[None])
        seconds = [float(i) for i in range(frames)]
        needed = [tuple(int(t) for t in pair if t >= 0) for pair in zip(asked.hop1, asked.hop2, strict=True)]
        yield [
            Asked(f"{video.split}-{video.index:04d}", text, model.batch([text], [seconds], None)[0], visual, tokens)
            for text, tokens in zip(asked.texts(), needed, strict=True)
        ]


def tokens_of(model: Model, params: dict, batch: Batch, visual: Any) -> Tokens:
    """The prompt's Tokens as layer 0 sees them."""
    assert model.family.embed_prompt is not None, "load_model refuses families without one row"
    return model.family.embed_prompt(params, model.config, batch, visual)
