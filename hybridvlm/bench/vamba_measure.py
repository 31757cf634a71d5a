"""VAMBA and the Transformer that it replaces, run on the device at hand: a training step and a prefill at several lengths of video.

Both steps are `hybridvlm.train`'s own, with layers rematerialised, the tower frozen and its tokens given; random weights. Calls take
turns.
resident_gb: the most that the process, which has both models in memory, held during a call (CPU alone); compiler_gb: what the
program needs by its compiler.
exponent: how cost grows with length, d log(seconds) / d log(tokens) between this length and the one before. further_s: another question
on the same video, from the memory that the first one left.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

from hybridvlm.bench import timing
from hybridvlm.config import QwenConfig, VambaConfig, VisionConfig

FRAME = 64  # visual tokens of a frame
PHASES = ("train", "prefill")


def pair(layers: int = 8, width: int = 512) -> dict[str, QwenConfig]:
    """A Transformer of 33 M parameters (by default), and the VAMBA of 51 M that it becomes."""
    from hybridvlm.models.vamba import convert

    side = math.isqrt(FRAME)
    vision = VisionConfig(
        kind="qwen",
        image_size=(28 * side, 28 * side),
        patch_size=14,
        width=64,
        layers=1,
        heads=2,
        mlp_width=64,
        position_rows=0,
        prefix_tokens=0,
        temporal_patch=2,
        projector_width=256,
        activation="quick_gelu",
    )
    transformer = QwenConfig(
        pattern="*-" * layers,
        width=width,
        vocab_size=8192,
        attention_heads=width // 64,
        kv_heads=width // 256,
        head_dim=64,
        mlp_width=3 * width,
        attention_bias=True,
        rope_theta=1e6,
        rope_sections=(8, 12, 12),
        mlp_gated=True,
        norm_eps=1e-6,
        eos_ids=(2,),
        vision=vision,
        name="transformer",
    )
    return {"vamba": convert.vamba_config(transformer, ssm_state=64), "transformer": transformer}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print, and return the rows."""
    if min(args.tokens) < FRAME or args.text < 16 or args.repeats < 1:
        raise ValueError(
            f"--tokens, --text, --repeats must be at least {FRAME}, 16 and 1, got {args.tokens}, {args.text}, {args.repeats}"
        )
    if args.layers < 1 or args.width < 256 or args.width % 256:
        raise ValueError(
            f"--layers must be at least 1 and --width a multiple of 256, got {args.layers} and {args.width}"
        )
    phases = [phase for phase in PHASES if phase in args.phases]
    if len(phases) < len(set(args.phases)):
        raise ValueError(f"--measure runs --phases of {', '.join(PHASES)}, got {' '.join(args.phases)}")
    configs, rows = pair(args.layers, args.width), []
    for phase in phases:
        before: dict[str, dict[str, Any]] = {}
        # whole frames: lengths that come out the same are one, which has no exponent against itself
        for frames in sorted({-(-tokens // FRAME) for tokens in args.tokens}):
            found = _measure(phase, configs, frames, args)
            for name, row in found.items():
                if name in before:
                    longer = math.log(row["visual_tokens"] / before[name]["visual_tokens"])
                    row["exponent"] = math.log(row["seconds"] / before[name]["seconds"]) / longer
                rows.append(row)
                timing.say(", ".join(f"{key} {value}" for key, value in row.items()))
            before = found
    return rows


def _measure(phase: str, configs: dict[str, QwenConfig], frames: int, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of both models for one phase and length, their calls interleaved."""
    timing.say(f"compiling {phase} of {frames * FRAME} visual tokens")
    make: dict[str, Callable[..., _Calls]] = {"train": _train, "prefill": _prefill}
    made = {name: make[phase](config, frames, args.text) for name, config in configs.items()}
    resident: dict[str, float | None] = {name: _resident(calls.call) for name, calls in made.items()}
    calls = {name: own.call for name, own in made.items()}
    calls |= {f"{name} further": own.further for name, own in made.items() if own.further is not None}
    seconds = timing.interleaved(calls, rounds=args.repeats, warmup=0)
    return {
        name: {
            "phase": phase,
            "model": name,
            "visual_tokens": frames * FRAME,
            "parameters": own.parameters,
            "seconds": statistics.median(seconds[name]),
            "faster": timing.paired_ratio(seconds["transformer"], seconds[name]),
            "compiler_gb": own.peak * 1e-9,
            "resident_gb": None if (held := resident[name]) is None else held * 1e-9,
            "exponent": None,
            "further_s": statistics.median(seconds[f"{name} further"]) if own.further is not None else None,
            "compile_s": own.compile_seconds,
        }
        for name, own in made.items()
    }


class _Calls:
    """A compiled program as a call without arguments, what it needs, and the call for a further question."""

    def __init__(self, call: Callable[[], Any], peak: int, seconds: float, parameters: int) -> None:
        self.call, self.peak, self.compile_seconds, self.parameters = call, peak, seconds, parameters
        self.further: Callable[[], Any] | None = None


def _train(config: QwenConfig, frames: int, text: int) -> _Calls:
    from hybridvlm.train.measure import step_calls

    (step,) = step_calls(config, [None], frames=frames, text=text, answer=8, remat="layer")
    return _Calls(step.call, step.peak_bytes, step.compile_seconds, step.parameters)


def _prefill(config: QwenConfig, frames: int, text: int) -> _Calls:
    """One prompt from visual tokens to last-token logits and caches."""
    import jax

    from hybridvlm.inference.model import Model, init
    from hybridvlm.inference.program_cache import peak_bytes
    from hybridvlm.train.measure import random_row

    model: Model = init(config)
    row = random_row(config, frames, text, 1, 8)
    batch, visual = jax.device_put((row.batch, row.visual["features"]))
    program = model._prefill_program(batch, visual, None, 0)
    count = sum(a.size for a in jax.tree.leaves(model.params))
    calls = _Calls(
        lambda: program(model.params, batch, visual).logits, peak_bytes(program), model.programs.compile_seconds, count
    )
    if isinstance(config, VambaConfig):
        memory = jax.block_until_ready(model.build_video_memory(batch, visual, None))
        again = model._prefill_program(batch, memory, None, 0)
        jax.block_until_ready(again(model.params, batch, memory).logits)
        calls.further = lambda: again(model.params, batch, memory).logits
    return calls


def _resident(call: Callable[[], Any]) -> float | None:
    """The most that this process holds in memory during a call; None where the device has memory of its own, or nobody tells."""
    import jax

    from hybridvlm.bench.load_memory import resident

    reset = pathlib.Path("/proc/self/clear_refs")
    if jax.default_backend() != "cpu" or not reset.exists():
        jax.block_until_ready(call())
        return None
    reset.write_text("5")
    jax.block_until_ready(call())
    return resident("VmHWM")
