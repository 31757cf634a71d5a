"""Whole inference compiled ahead of time for TPUs: does it fit, how long does compiling take, what does it cost.

The prefill (embeddings to last-token logits), a decode step and the tower as models run them, dense and under reduction methods,
and the layers that questions about a video share (memory) with a further question on it, in bf16, on one slice and mesh. The
compiler is the real one; nothing runs. Per device: memory, and by the compiler's own estimates seconds and bytes with every loop
counted as often as it runs (hybridvlm/bench/hlo.py says how; transfers between chips are in neither: exchanged_gb lists them); of
decoding, one step. Beside it what `python -m hybridvlm.plan` counts: counted_gb, least_s by its roofline, sent_gb, and tflops of
all devices together. speedup: the dense row's seconds over this row's; predicted: the plan's, from FLOPs. of_first: a further
question's seconds over those of the method's own prefill; predicted_of_first: by FLOPs. pixels_s, pixels_speedup, pixels_predicted:
as seconds, speedup and predicted, of tower and prefill together, where both are compiled. A program that does not fit is a row as
well: needed_gb is then what the compiler says it would have taken.

The second prompt is the one that a real video gets, with a time stamp before every frame. Rows keep room for all stamps,
whatever a method drops, unless --drop-text says otherwise: best-frames leaves room for as many as the tokens left would fill.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from hybridvlm.bench import timing
from hybridvlm.bench.prefill import STAMP_TOKENS, bench_plan, dropped_text
from hybridvlm.config import BUDGET_KINDS, ModelConfig, Reduction, Schedule, VambaConfig
from hybridvlm.config_files import load_model_config
from hybridvlm.estimates.memory import PROGRAMS
from hybridvlm.estimates.result import estimate_on
from hybridvlm.estimates.workload import MeshSizes, Workload
from hybridvlm.hardware import parse_slice
from hybridvlm.options import add_drop_text, override, split
from hybridvlm.reduction import ReductionPlan

# of inference, and what questions about one video share of its prefill, with what a further one has left
COMPILED = (*PROGRAMS, "memory", "further")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench aot`."""
    add = parser.add_argument
    add("--model", default="nemotron_nano_12b_v2_vl", help="name or JSON file of a model config")
    add("--frames", type=int, default=128, help="frames of the video (default: 128)")
    add("--text", type=int, default=512, help="text tokens of the question (default: 512)")
    add("--methods", default="none,str", help="comma list of methods; dense always comes first (default: none,str)")
    add("--budget", type=float, default=0.25, help="share of visual tokens kept (default: 0.25)")
    add("--kind", choices=BUDGET_KINDS, default="mean", help="how the budget is counted (default: mean)")
    add("--schedule", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the default schedule")
    add_drop_text(parser)
    add("--topology", default="v5p:2x2x1", help="slice to compile for, such as v5e:4x4 or v6e:2x2 (default: v5p:2x2x1)")
    add(
        "--mesh",
        default="tensor=1",
        help="data=, fsdp=, sequence=, tensor=, comma list; may leave chips out (default: tensor=1)",
    )
    add("--batch", type=int, default=1, help="examples; the data and fsdp axes must divide them (default: 1)")
    add("--programs", default="prefill", help=f"comma list of {', '.join(COMPILED)} (default: prefill)")
    add("--question", type=int, default=64, help="text tokens of a further question (default: 64)")
    add("--max-new", type=int, default=256, help="tokens of an answer (default: 256)")
    add("--prompt", choices=("question", "real", "both"), default="both", help="prompts to compile (default: both)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile, print, and return the rows."""
    from hybridvlm import aot

    programs = tuple(dict.fromkeys(split(args.programs, "--programs")))
    if not set(programs) <= set(COMPILED):
        raise ValueError(f"--programs takes a comma list of {', '.join(COMPILED)}, got {args.programs!r}")
    works = _workloads(args)
    where = aot.target(args.topology)
    if where.platform != "tpu":
        raise ValueError(
            f"--topology must be a TPU slice, since XLA's GPU compiler estimates no cost, got {where.name}"
        )
    mesh = mesh_there(args.mesh, where)
    rows: list[dict[str, Any]] = []
    towers: dict[str, float] = {}
    for by_method in works.values():
        dense: dict[str, float] = {}
        for method, work in by_method.items():
            own: dict[str, float] = {}
            for program in (name for name in programs if _differs(name, work)):
                row = compiled_row(program, where, mesh, work)
                rows.append(row)
                if "cost_s" in row:
                    own[program] = row["cost_s"]
                if program == "further" and {"prefill", "further"} <= set(own):
                    row["of_first"] = own["further"] / own["prefill"]
                if row["fits"] and "cost_s" in row and program in PROGRAMS:
                    first = dense.setdefault(program, row["cost_s"])
                    row["speedup"] = first / row["cost_s"]
                if program == "prefill" and "speedup" in row:
                    row["share_of_predicted"] = row["speedup"] / row["predicted"]
                if program == "tower" and "cost_s" in row:
                    towers[method] = row["cost_s"]
                if program == "prefill" and "cost_s" in row and towers:
                    row |= _from_pixels(row["cost_s"], towers.get(method, towers.get("none")), dense, work.plan)
                shown = ("compile_cpu_s", "needed_gb", "counted_gb", "cost_s", "speedup", "of_first", "pixels_speedup")
                timing.say(", ".join(f"{key} {row[key]:.4g}" for key in shown if key in row))
    return rows


def _workloads(args: argparse.Namespace) -> dict[int, dict[str, Workload]]:
    """What is compiled, by the text tokens before every frame and the method, dense first; ValueError for what cannot be."""
    config = load_model_config(args.model)
    if config.vision is None:
        raise ValueError(f"model {args.model!r} has no vision side, and so no visual tokens to reduce")
    if isinstance(config, VambaConfig):
        raise ValueError("--model must be of the families nemotron_vl or qwen_vl; bench vamba compiles VAMBA")
    sizes = {"--frames": args.frames, "--text": args.text, "--batch": args.batch, "--max-new": args.max_new}
    sizes["--question"] = args.question
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if args.drop_text and args.prompt == "question":
        raise ValueError(f"--drop-text {args.drop_text} is about time stamps; compile --prompt real or both")
    schedule = override(Schedule(), args.schedule, "--schedule")
    groups = -(-args.frames // config.vision.temporal_patch)
    works: dict[int, dict[str, Workload]] = {}
    for stamp in {"question": (0,), "real": (STAMP_TOKENS,), "both": (0, STAMP_TOKENS)}[args.prompt]:
        whole = (config, args.frames, args.text + stamp * groups, args.batch, args.max_new)
        works[stamp] = {"none": Workload(*whole, question=args.question, frame_text=stamp)}
        drop_text = dropped_text(args.drop_text, stamp)
        for method in (m for m in split(args.methods, "--methods") if m != "none"):
            reduction = Reduction(method, args.budget, args.kind, schedule=schedule, drop_text=drop_text)
            works[stamp][method] = dataclasses.replace(works[stamp]["none"], reduction=reduction)
            _ = works[stamp][method].plan  # a budget that cannot be met is refused before anything is compiled
    return works


def _differs(program: str, work: Workload) -> bool:
    """Whether a program is another one under this method and prompt: the tower does not know what is dropped later, but what was
    chosen before it; and after a dense prefill a further question goes on from its caches."""
    if program == "tower":
        return not work.frame_text and (work.reduction is None or work.plan.pixel_selection is not None)
    return program in PROGRAMS or work.reduction is not None


def _from_pixels(prefill: float, tower: float | None, dense: dict[str, float], plan: ReductionPlan) -> dict[str, float]:
    """Columns of tower and prefill together; {} where the tower was not compiled, or does not fit."""
    if tower is None:
        return {}
    seconds = tower + prefill
    speedup = dense.setdefault("pixels", seconds) / seconds
    return {"pixels_s": seconds, "pixels_speedup": speedup, "pixels_predicted": 1 / plan.total_flop_ratio}


def compiled_row(program: str, where: Any, mesh: Any, work: Workload) -> dict[str, Any]:
    """One of `COMPILED` of a workload, compiled for a mesh of `where`; each frame has `work.frame_text` text tokens of its own.

    A program that does not fit is a row as well: needed_gb is then what its compiler says it would have taken.
    """
    from hybridvlm.bench.inference_programs import InferenceShapes, compile_program

    reduction = work.reduction or Reduction("none", 1.0)
    stamp = work.frame_text
    plan = plan_there(reduction, work.config, work.groups, work.text, where, stamp)
    row = _head(program, where, mesh, work, plan)
    timing.say(f"compiling {', '.join(str(row[key]) for key in ('program', 'method', 'budget', 'topology', 'mesh'))}")
    reduced = plan if work.reduction is not None else None
    text = work.text - stamp * work.groups
    shapes = InferenceShapes(work.config, reduced, work.groups, text, work.batch, work.max_new, stamp, work.question)
    return row | measured(lambda: compile_program(program, where, mesh, shapes))


def mesh_there(text: str, where):
    """The mesh that `--mesh` asks for, over the first devices of a slice, or all of them."""
    from hybridvlm.parallel.mesh import make_mesh, mesh_sizes

    sizes = mesh_sizes(text)
    count = len(where.devices) if -1 in sizes.values() else math.prod(sizes.values())
    return make_mesh(**sizes, devices=where.devices[:count])


def plan_there(
    reduction: Reduction, config: ModelConfig, frames: int, text: int, where: Any, frame_text: int = 0
) -> ReductionPlan:
    """The plan of a full bucket on a device of `where`, whose SSD chunk is part of it; sizes as of `bench_plan`."""
    import jax

    with jax.default_device(where.devices[0]):
        return bench_plan(reduction, config, frames, config.tower.tokens_per_frame, text, frame_text)


def _head(program: str, where: Any, mesh: Any, work: Workload, plan: ReductionPlan) -> dict[str, Any]:
    """What is compiled, and what hybridvlm/estimates counts of it, each on one device."""
    sizes = MeshSizes.of(mesh)
    counted = estimate_on(work, parse_slice(where.name), sizes)
    known: dict[str, Any] = {}
    if program in PROGRAMS:
        needed = counted.memory.program(program)
        if needed > counted.limit:
            needed = counted.memory.program(program, least=True)
        known["counted_gb"] = needed * 1e-9
    if program in counted.phases:
        phase = counted.phases[program]
        known |= {"least_s": phase.seconds, "sent_gb": phase.sent * 1e-9, "tflops": phase.flops * sizes.devices * 1e-12}
    if program == "further":
        prefill = counted.phases["prefill"]
        known["predicted_of_first"] = phase.flops / prefill.flops
    return {
        "program": program,
        "model": work.config.name,
        "topology": where.name,
        "mesh": str(sizes),
        "method": plan.method,
        "prompt": "time stamps" if work.frame_text else "question",
        "drop_text": plan.drop_text,
        "frames": work.frames,
        "visual_tokens": plan.visual_tokens,
        "text_tokens": plan.text_tokens,
        "budget": plan.budget,
        "stages": len(plan.stages),
        "predicted": plan.dense_cost.vision / plan.cost.vision if program == "tower" else plan.flop_speedup,
        "hbm_gb": counted.limit * 1e-9,
    } | known


def measured(compile_it: Callable[[], Any]) -> dict[str, Any]:
    """What the compiler says of an `aot.Compiled`, or of one that it refuses because it does not fit."""
    import jax

    from hybridvlm import aot
    from hybridvlm.bench.hlo import program_cost

    start, gb = time.perf_counter(), 1e-9
    try:
        compiled = compile_it()
    except jax.errors.JaxRuntimeError as error:
        needed = aot.memory_refused(error)
        if needed is None:
            raise
        timing.say(str(error).splitlines()[0])
        return {"compile_s": time.perf_counter() - start, "needed_gb": needed * gb, "fits": False}
    cost = program_cost(compiled.executable.as_text(), compiled.target.chip)
    return {
        "needed_gb": compiled.peak_bytes * gb,
        "arguments_gb": compiled.arguments * gb,
        "outputs_gb": compiled.outputs * gb,
        "temporaries_gb": compiled.temporaries * gb,
        "fits": compiled.fits,
        "cost_s": cost.seconds,
        "moved_gb": cost.bytes * gb,
        "exchanged_gb": cost.exchanged * gb,
        "unread_loops": cost.unread_loops,
        "trace_s": compiled.trace_seconds,
        "compile_s": compiled.compile_seconds,
        "compile_cpu_s": compiled.compile_cpu_seconds,
    }
