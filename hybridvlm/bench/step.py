"""A training step, dense and under reduction: forward, backward and AdamW of the decoder, runs interleaved.

Weights, visual tokens and text are random: what is measured depends on shapes alone. The vision tower is frozen and its features are
given, as in training with cached features; compilation and the first run are not timed.
"""

from __future__ import annotations

import argparse
from typing import Any

from hybridvlm.bench import timing
from hybridvlm.config import Reduction
from hybridvlm.config_files import load_model_config
from hybridvlm.options import split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench step`."""
    add = parser.add_argument
    add("--config", default="bench_100m", help="name or JSON file of a model config (default: bench_100m)")
    add("--length", type=int, default=8192, help="tokens of a row, visual and text (default: 8192)")
    add("--text", type=int, default=128, help="text tokens of it at least (default: 128)")
    add("--batch", type=int, default=1, help="rows (default: 1)")
    add("--budgets", default="0.25", help="comma list of mean shares kept under str; dense always runs (default: 0.25)")
    add("--remat", default="layer", choices=("none", "dots", "layer"), help="rematerialisation (default: layer)")
    add("--repeats", type=int, default=3, help="interleaved rounds (default: 3)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and return the rows."""
    from hybridvlm.train.measure import step_calls

    config = load_model_config(args.config)
    if config.vision is None:
        raise ValueError(
            f"config {args.config!r} has no vision side, and so no visual tokens to reduce; try bench_100m"
        )
    if args.length <= args.text or min(args.text, args.batch, args.repeats) < 1:
        raise ValueError(f"--length {args.length} must hold --text {args.text} and at least one frame")
    per_frame = config.vision.tokens_per_frame
    frames = (args.length - args.text) // per_frame
    if not frames:
        raise ValueError(f"--length {args.length} holds no frame of {per_frame} tokens with {args.text} of text")
    text = args.length - frames * per_frame
    budgets = [1.0, *(float(b) for b in split(args.budgets, "--budgets"))]
    timing.say(
        f"{config.name}: compiling {len(budgets)} steps of {args.batch} x {args.length} tokens ({frames} frames)"
    )
    reductions = [None, *(Reduction("str", budget) for budget in budgets[1:])]
    steps = step_calls(config, reductions, frames=frames, text=text, rows=args.batch, remat=args.remat)
    seconds = timing.interleaved({b: s.call for b, s in zip(budgets, steps, strict=True)}, rounds=args.repeats)
    return [
        {
            "config": config.name or args.config,
            "tokens": args.length,
            "batch": args.batch,
            "remat": args.remat,
            "method": "none" if step.plan is None else "str",
            "budget": budget,
            "ms": timing.median_ms(seconds[budget]),
            "speedup": timing.paired_ratio(seconds[1.0], seconds[budget]),
            "flop_speedup": 1.0 if step.plan is None else step.plan.flop_speedup,
            "compile_s": step.compile_seconds,
            "repeats": args.repeats,
        }
        for budget, step in zip(budgets, steps, strict=True)
    ]
