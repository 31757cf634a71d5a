"""Decoder prefill, embeddings to last-token logits: dense and under reduction methods, runs interleaved.

Weights, pixels, visual tokens and text are random: what is measured depends on shapes alone. Scoring and compaction are part
of the time; compilation and the first run are not. The vision tower is timed by itself, of a method that spares it
(evs-pixels, frames) or reads its attention (visionzip) as that has it; from_pixels_ columns are tower and decoder
together. The second prompt is the one that a real video gets, with a time stamp before every frame: text that stays
whatever a method drops, unless --drop-text says otherwise. With --questions 2 also what a further question on the same
video takes, once the layers before the first drop have seen it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybridvlm.bench import timing
from hybridvlm.config import ModelConfig, Reduction, Schedule
from hybridvlm.config_files import load_model_config
from hybridvlm.models.prompt import own_text
from hybridvlm.options import add_drop_text, override, split
from hybridvlm.reduction import ReductionPlan, make_plan, parse_method
from hybridvlm.reduction.pixels import PixelSelection

# what of a video's pixels enters the tower (None: all), and whether its attention comes out
Encoding = tuple[PixelSelection | None, bool]
WHOLE: Encoding = (None, False)
STAMP_TOKENS = 12  # of "Frame 7 sampled at 3.50 seconds: <img>" and its end, in the vocabulary of Nemotron Nano


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench prefill`."""
    add = parser.add_argument
    add("--config", default="bench_100m", help="name or JSON file of a model config (default: bench_100m)")
    add("--visual", type=int, default=8192, help="visual tokens, a multiple of the config's per frame (default: 8192)")
    add("--frames", type=int, help="frames instead of --visual")
    add("--text", type=int, default=128, help="text tokens of the question (default: 128)")
    add("--budget", type=float, default=0.25, help="mean share of visual tokens kept (default: 0.25)")
    add("--methods", default="none,str", help="comma list of methods; dense always runs (default: none,str)")
    add("--schedule", nargs="+", default=[], metavar="KEY=VALUE", help="schedule of shares over depth, as for eval")
    add("--first-drop", type=int, metavar="N", help="no drop before this layer has run (default: the schedule's)")
    add_drop_text(parser)
    add("--questions", type=int, default=1, help="on one video: 2 or more measure a further one (default: 1)")
    add("--repeats", type=int, default=5, help="interleaved rounds (default: 5)")
    yes_no = argparse.BooleanOptionalAction
    add("--real-prompt", action=yes_no, default=True, help="also with a time stamp per frame in the prompt")
    add("--vision", action=yes_no, default=True, help="also the vision tower's time")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print, and return the rows."""
    config = load_model_config(args.config)
    if config.vision is None:
        raise ValueError(
            f"config {args.config!r} has no vision side, and so no visual tokens to reduce; try bench_100m"
        )
    per_frame = config.vision.tokens_per_frame
    frames = args.visual // per_frame if args.frames is None else args.frames
    if frames < 1 or (args.frames is None and args.visual % per_frame):
        raise ValueError(f"--visual must be a multiple of {per_frame}, the tokens of a frame, got {args.visual}")
    if args.text < 1 or args.repeats < 1 or args.questions < 1:
        given = f"{args.text}, {args.repeats} and {args.questions}"
        raise ValueError(f"--text, --repeats and --questions must be at least 1, got {given}")
    if args.drop_text and not args.real_prompt:
        raise ValueError(f"--drop-text {args.drop_text} is about time stamps; leave --no-real-prompt out")
    methods = ["none", *(m for m in dict.fromkeys(split(args.methods, "--methods")) if m != "none")]
    plans = {}
    for stamps in (0, STAMP_TOKENS) if args.real_prompt else (0,):
        text = args.text + stamps * frames
        plans[stamps] = {m: _reduced(m, args, config, frames, text, stamps) for m in methods}

    timing.say(f"{config.name or args.config}: {frames} frames of {per_frame} tokens, {args.text} text tokens")
    params = random_params(config)
    encodings = dict.fromkeys(_encoding(plan) for by_method in plans.values() for plan in by_method.values())
    visual, towers = _encoded(config, params, frames, list(encodings), timed=args.vision)
    rows = []
    for stamps, by_method in plans.items():
        rows += _measure(args, config, params, visual, by_method, stamps, towers)
    return rows


def random_params(config: ModelConfig) -> dict[str, Any]:
    """Parameters of the whole model at their initial distribution, float32, in the memory of the device."""
    import jax

    from hybridvlm.models.nemotron_vl.model import HybridVLM

    ids = np.zeros((1, 1), np.int32)
    batch = _batch(ids, np.full_like(ids, -1), 0)
    pixels = None if config.vision is None else np.zeros((1, 1, *config.vision.image_size, 3), np.uint8)
    return jax.jit(HybridVLM(config).init)(jax.random.key(0), batch, pixels)["params"]


def prompt(frames: int, per_frame: int, text: int, stamps: int, vocabulary: int):
    """One prompt as a Batch: `stamps` text tokens of its own, then `per_frame` visual positions, for every frame; then the question."""
    numbers = np.arange(frames, dtype=np.int32)
    frame = np.concatenate([np.tile(own_text(numbers), (stamps, 1)), np.tile(numbers, (per_frame, 1))]).T
    frame = np.concatenate([frame.ravel(), np.full(text, -1, np.int32)])[None]
    return _batch(np.random.default_rng(0).integers(0, vocabulary, frame.shape, np.int32), frame, frames)


def _batch(ids: np.ndarray, frame: np.ndarray, frames: int):
    from hybridvlm.models.nemotron_vl.model import Batch

    return Batch(ids, np.ones_like(ids), frame.astype(np.int32), np.full(1, frames, np.int32))


def _reduced(method: str, args: argparse.Namespace, config: ModelConfig, frames: int, text: int, stamps: int):
    if method == "none":
        return None
    schedule = override(Schedule(), args.schedule, "--schedule")
    if args.first_drop is not None:
        schedule = dataclasses.replace(schedule, start=args.first_drop)
    reduction = Reduction(method, args.budget, schedule=schedule, drop_text=dropped_text(args.drop_text, stamps))
    return bench_plan(reduction, config, frames, config.tower.tokens_per_frame, text, stamps)


def _product(method: str, budget: float) -> float:
    """The budget of all parts of a method together: those without a rate have `budget`."""
    return math.prod(budget if rate is None else rate for _, rate in parse_method(method)) if method != "none" else 1.0


def dropped_text(asked: str | None, stamps: int) -> str:
    """--drop-text for a prompt with so many text tokens before every frame: none where there are none to drop."""
    return asked if asked and stamps else "none"


def _compiled(function: Callable, *args) -> tuple[Callable[[], Any], float]:
    """The program of function(*args) as a call without arguments, run once, and the seconds that it took to compile."""
    import jax

    start = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(program(*args))
    return lambda: program(*args), seconds


def _encoding(plan: ReductionPlan | None) -> Encoding:
    """What of a video's pixels enters the tower under a plan (None: all), and whether it hands out its attention."""
    return WHOLE if plan is None else (plan.pixel_selection, plan.needs_attention)


def _encoded(
    config: ModelConfig,
    params: dict[str, Any],
    frames: int,
    encodings: Sequence[Encoding],
    timed: bool,
) -> tuple[dict[Encoding, Any], dict[Encoding, list[float]]]:
    """(visual tokens of a random video as each encoding has them, seconds of the tower for each, where `timed`).

    Of a whole video, where no tower has to run for it, tokens are drawn at random.
    """
    import jax

    from hybridvlm.models.nemotron_vl.model import encode

    shape = (1, frames, *config.tower.image_size, 3)
    pixels = jax.device_put(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    count = np.full(1, frames, np.int32)
    tokens: dict[Encoding, Any] = {}
    calls = {}
    for encoding in encodings:
        keep, attention = encoding
        if encoding == WHOLE and not timed:
            size = (1, frames, config.tower.tokens_per_frame, config.width)
            tokens[WHOLE] = jax.random.normal(jax.random.key(1), size)
            continue
        how = ", with its attention" if attention else "" if keep is None else f", with {keep.method}"
        timing.say(f"the vision tower on {frames} frames{how}")

        def run_tower(params, pixels, count, keep=keep, attention=attention):
            return encode(params, config, pixels, attention, keep, None if keep is None else count)

        calls[encoding], _ = _compiled(run_tower, params, pixels, count)
        tokens[encoding] = calls[encoding]()
    return tokens, timing.interleaved(calls, rounds=3, warmup=0) if timed else {}


def _measure(args, config, params, visual, plans, stamps: int, towers) -> list[dict[str, Any]]:
    from hybridvlm.models import nemotron_vl

    frames, per_frame = visual[WHOLE].shape[1:3]
    text = args.text + stamps * frames
    calls, compile_s = {}, {}
    for method, plan in plans.items():
        timing.say(f"compiling {method} with {text} text tokens")
        tokens = per_frame if plan is None else plan.decoder_tokens // plan.decoder_frames
        count = frames if plan is None else plan.decoder_frames
        batch = prompt(count, tokens, args.text, stamps, config.vocab_size)
        batch = dataclasses.replace(batch, frame_count=np.full(1, frames, np.int32))

        def prefill(params, batch, visual, plan=plan):
            out = nemotron_vl.prefill(params, config, batch, visual, plan, 0)
            return out.logits, out.decoder.caches

        given = visual[_encoding(plan)]
        calls[method], compile_s[method] = _compiled(prefill, params, batch, given)
        if args.questions > 1 and nemotron_vl.memory_serves(plan):
            memory, further = _in_two(config, params, batch, given, plan)
            calls[method, "memory"], calls[method, "further"] = memory, further
    seconds = timing.interleaved(calls, rounds=args.repeats, warmup=0)
    rows = []
    for method, plan in plans.items():
        speedup = timing.paired_ratio(seconds["none"], seconds[method])
        predicted = 1.0 if plan is None else plan.flop_speedup
        rows.append(
            {
                "config": config.name or args.config,
                "visual_tokens": frames * per_frame,
                "text_tokens": text,
                "prompt": "time stamps" if stamps else "question",
                "method": method,
                "drop_text": "none" if plan is None else plan.drop_text,
                "budget": _product(method, args.budget),
                "ms": timing.median_ms(seconds[method]),
                "speedup": speedup,
                "flop_speedup": predicted,
                "share_of_predicted": speedup / predicted,
                "compile_s": compile_s[method],
            }
            | _shared(method, seconds, args.questions)
            | _from_pixels(plan, timing.median_ms(seconds["none"]), timing.median_ms(seconds[method]), towers)
            | {"repeats": args.repeats}
        )
    return rows


def _from_pixels(plan: ReductionPlan | None, dense_ms: float, ms: float, towers) -> dict[str, Any]:
    """Columns from pixels to the first token: the tower's time under a plan, both together, and how much faster than dense."""
    if not towers:
        return {"vision_ms": None}
    vision_ms = timing.median_ms(towers[_encoding(plan)])
    dense = timing.median_ms(towers[WHOLE]) + dense_ms
    return {
        "vision_ms": vision_ms,
        "from_pixels_ms": vision_ms + ms,
        "from_pixels_speedup": dense / (vision_ms + ms),
        "from_pixels_predicted": 1.0 if plan is None else 1 / plan.total_flop_ratio,
    }


def _in_two(config, params, batch, visual, plan) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Calls that make the memory of a video, and that go on from it with a question."""
    from hybridvlm.models import nemotron_vl
    from hybridvlm.models.prompt import rest_length, rest_of

    build = lambda params, batch, visual: nemotron_vl.build_video_memory(params, config, batch, visual, plan)  # noqa: E731
    make, _ = _compiled(build, params, batch, visual)
    rest = rest_of(batch, rest_length(batch))

    def question(params, rest, memory):
        out = nemotron_vl.prefill(params, config, rest, memory, plan, 0)
        return out.logits, out.decoder.caches

    return make, _compiled(question, params, rest, make())[0]


def _shared(method: str, seconds: dict[Any, list[float]], questions: int) -> dict[str, Any]:
    """Columns about questions that share a video: the first one in two programs, a further one, and both by the whole prompt's time."""
    if (method, "further") not in seconds:
        return {"first_ms": None, "further_ms": None, "further_share": None} if questions > 1 else {}
    first = [a + b for a, b in zip(seconds[method, "memory"], seconds[method, "further"], strict=True)]
    further = seconds[method, "further"]
    return {
        "first_ms": timing.median_ms(first),
        "further_ms": timing.median_ms(further),
        "further_share": timing.paired_ratio(further, first),
    }


def bench_plan(
    reduction: Reduction, config: ModelConfig, frames: int, per_frame: int, text: int, frame_text: int = 0
) -> ReductionPlan:
    """The plan of a bucket that is exactly full, its FLOPs counted at the SSD chunk that runs here.

    Args:
        reduction: method and budget.
        config: of the model.
        frames: of the bucket.
        per_frame: visual tokens of each.
        text: text tokens of the bucket.
        frame_text: of these, what each frame has of its own.
    """
    size = {"visual_tokens": frames * per_frame, "text_tokens": text, "frames": frames, "frame_text": frame_text}
    return make_plan(reduction, config, **size, chunk_size=running_chunk(config), itemsize=4)


def running_chunk(config: ModelConfig) -> int:
    """Tokens per chunk of the SSD that the model runs on this platform."""
    from hybridvlm.ops.ssd.api import default_choice

    return config.chunk_size or default_choice().chunk_size
