"""`python -m hybridvlm.plan`: memory, seconds and traffic of a model on a slice, before anything is rented or compiled."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from hybridvlm.config import BUDGET_KINDS, Reduction, Schedule
from hybridvlm.options import InputError, add_drop_text, override

EXAMPLES = """\
examples:
  python -m hybridvlm.plan --model nemotron_nano_12b_v2_vl --frames 128
      the usual slices of five kinds of chips, up to the first of each that fits
  python -m hybridvlm.plan --model nemotron_nano_12b_v2_vl --frames 1024 --budget 0.25 --topology v5e:4x4
      one slice in full: what each chip holds, the least seconds, what chips send one another
  python -m hybridvlm.plan --model qwen3_vl_8b --frames 512 --topology H100:8 --mesh data=2,tensor=4 --batch 2
      on a mesh of one's own
  python -m hybridvlm.plan --model nemotron_nano_12b_v2_vl --topology v5p:2x2x1 --mesh tensor=1 --compile
      with what the compiler says next to it (minutes; pip install "hybridvlm[aot-tpu]")

Nothing is downloaded, compiled (but for --compile) or run, and no accelerator is touched. Memory is counted from shapes and within
15% of the compilers' on the cases of hybridvlm/plan/README.md; seconds are a roofline, which no program beats.
exit code: 0 it fits, dense or reduced; 1 neither does; 2 a wrong option."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.plan",
        description="Whether a model fits on devices that need not be there, and how fast it could be at best.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="name or JSON file of a model config, or a checkpoint's folder")
    add("--frames", type=int, default=128, help="frames of the video (default: 128)")
    add("--size", metavar="HxW", help="height and width of the video, for models that keep its aspect")
    add("--text", type=int, default=512, help="text tokens of the prompt, time stamps included (default: 512)")
    add("--batch", type=int, default=1, help="prompts at once (default: 1)")
    add("--max-new", type=int, default=256, help="tokens of an answer (default: 256)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="weights and activations")
    add("--method", default="str", help="reduction next to dense; none for dense alone (default: str)")
    add("--budget", type=float, default=0.25, help="share of visual tokens kept (default: 0.25)")
    add("--kind", default="mean", choices=BUDGET_KINDS, help="how the budget is counted (default: mean)")
    add("--schedule", nargs="+", default=[], metavar="KEY=VALUE", help="shares over depth, as of hybridvlm.eval")
    add(
        "--first-drop",
        type=int,
        metavar="N",
        help="no drop before this layer has run: further questions share what is before",
    )
    add_drop_text(parser)
    add(
        "--frame-text",
        type=int,
        default=0,
        metavar="N",
        help="with --drop-text: of --text, tokens that each frame has of its own, such as its time stamp",
    )
    add("--question", type=int, default=64, help="text tokens of a further question (default: 64)")
    add("--topology", help="a slice such as v5e:4x4, v5p:2x2x1, H200:8 (default: a table of the usual ones)")
    add(
        "--mesh",
        help="data=, fsdp=, sequence=, tensor=, comma list, one may be -1: the rest (default: auto, the smallest "
        "tensor x sequence that fits)",
    )
    add("--compile", action="store_true", help="the compiler's own memory and cost model of the prefill, too")
    add("--json", type=pathlib.Path, metavar="FILE", help="write the figures to FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = build_parser().parse_args(argv)
    import jax

    # shapes alone: an accelerator of this machine stays free for whoever is at work on it
    jax.config.update("jax_platforms", "cpu")
    try:
        return _run(options)
    except (OSError, ValueError, ImportError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from hybridvlm.plan import report

    if options.json is not None and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        what = "is a folder; give a file" if options.json.is_dir() else "cannot be written, its folder does not exist"
        raise InputError(f"--json {options.json} {what}")
    works = workloads(options)
    if options.compile and options.topology is None:
        raise InputError("--compile needs --topology: one slice to compile for")
    if options.topology is None:
        if options.mesh not in (None, "auto"):
            raise InputError(
                "--mesh goes with --topology; without one the smallest mesh that fits is taken on each slice"
            )
        tables = report.survey(works)
        print(report.survey_text(works, tables))
        found: list[dict[str, Any]] = [row for rows in tables.values() for row in rows]
        fits = any(row["fits"] for row in found)
    else:
        estimates = report.on_slice(works, options.topology, options.mesh)
        print(report.slice_text(works, estimates))
        found, fits = [report.as_row(name, made) for name, made in estimates.items()], False
        fits = any(made.fits for made in estimates.values())
        if options.compile:
            found += report.compile_rows(options, works, next(iter(estimates.values())))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if fits else 1


def workloads(options: argparse.Namespace) -> dict[str, Any]:
    """What is compared, by name: dense, and the reduction that the options name."""
    from hybridvlm.estimates import Workload
    from hybridvlm.models.family import family_for
    from hybridvlm.reduction.methods import no_first_drop, takes_first_drop

    config = _config(options.model)
    if config.vision is None and options.frames:
        raise InputError(f"the model {options.model!r} has no vision tower; pass --frames 0")
    if options.size is not None and not options.frames:
        raise InputError("--size is of the frames of a video, and --frames 0 asks for none")
    if options.size is not None:
        size = family_for(config).frame_size(config, *_sides(options.size), options.frames, "video")
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=size))
    sizes = (options.frames, options.text, options.batch, options.max_new, options.dtype)
    works = {"dense": Workload(config, *sizes, question=options.question)}
    if options.method != "none" and options.frames:
        schedule = override(Schedule(), options.schedule, "--schedule")
        if options.first_drop is not None:
            schedule = dataclasses.replace(schedule, start=options.first_drop)
            if not takes_first_drop(options.method):
                raise InputError(f"--first-drop {options.first_drop}: {no_first_drop(options.method)}; leave it out")
        drop_text = options.drop_text or "none"
        if (drop_text != "none") != bool(options.frame_text):
            raise InputError(
                "--drop-text and --frame-text go together: which text of frames' own goes, and how long it is"
            )
        reduction = Reduction(options.method, options.budget, options.kind, schedule=schedule, drop_text=drop_text)
        works[f"{options.method} at {options.budget:.0%}"] = Workload(
            config, *sizes, reduction=reduction, question=options.question, frame_text=options.frame_text
        )
    for work in works.values():
        _ = work.plan  # a budget that cannot be met is refused here
    return works


def _config(name: str) -> Any:
    from hybridvlm.checkpoints.describe import describe
    from hybridvlm.config_files import config_names

    try:
        return describe(name).config
    except FileNotFoundError as error:
        if "/" in name:  # a path, or an id of the hub
            raise
        near = difflib.get_close_matches(name, config_names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"--model {name!r} is no folder or JSON file here, and no model config; {hint}there are {', '.join(config_names())}"
        ) from error


def _sides(text: str) -> tuple[int, int]:
    height, cross, width = text.partition("x")
    if not (cross and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise InputError(f"--size takes height x width in pixels, such as 720x1280, got {text!r}")
    return int(height), int(width)


if __name__ == "__main__":
    raise SystemExit(main())
