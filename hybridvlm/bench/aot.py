"""A whole prefill compiled ahead of time for TPUs: does it fit, how long does compiling take, what does it cost.

Embeddings to last-token logits, dense and under reduction methods, parameters and activations in bf16, on one slice and mesh. The
compiler is the real one; nothing runs. Per device: memory, and by the compiler's own estimates seconds and bytes with
every loop counted as often as it runs (hybridvlm/bench/hlo.py says how; transfers between chips are in neither). tflops is what
the plan counts, all devices together. speedup: the dense row's seconds over this row's, with the plan's prediction from FLOPs.

The second prompt is the one that a real video gets, with a time stamp before every frame. No method drops it: shapes are
static and any frame may keep a token until the last drop, so room for all stamps would stay even where a frame is gone.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

from hybridvlm.bench import timing
from hybridvlm.bench.prefill import STAMP_TOKENS, bench_plan
from hybridvlm.config import BUDGET_KINDS, ModelConfig, Reduction, Schedule
from hybridvlm.config_files import load_model_config
from hybridvlm.options import override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench aot`."""
    add = parser.add_argument
    add("--model", default="nemotron_nano_12b_v2_vl", help="name or JSON file of a model config")
    add("--frames", type=int, default=128, help="frames of the video (default: 128)")
    add("--text", type=int, default=512, help="text tokens of the question (default: 512)")
    add("--methods", default="none,str", help="comma list of methods; dense always comes first (default: none,str)")
    add("--budget", type=float, default=0.25, help="share of visual tokens kept (default: 0.25)")
    add("--kind", choices=BUDGET_KINDS, default="mean", help="how the budget is counted (default: mean)")
    add("--schedule", nargs="+", default=[f"stages={STAGES}"], metavar="KEY=VALUE", help=f"default: stages={STAGES}")
    add("--topology", default="v5p:2x2x1", help="slice to compile for, such as v5e:4x4 or v6e:2x2 (default: v5p:2x2x1)")
    add(
        "--mesh",
        default="tensor=1",
        help="data=, fsdp=, sequence=, tensor=, comma list; may leave chips out (default: tensor=1)",
    )
    add("--batch", type=int, default=1, help="examples; the data and fsdp axes must divide them (default: 1)")
    add("--prompt", choices=("question", "real", "both"), default="both", help="prompts to compile (default: both)")


STAGES = 7  # lengths that rows have: every one compiles the layers anew


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile, print, and return the rows."""
    from hybridvlm import aot

    config = load_model_config(args.model)
    if config.vision is None:
        raise ValueError(f"model {args.model!r} has no vision side, and so no visual tokens to reduce")
    if args.frames < 1 or args.text < 1 or args.batch < 1:
        raise ValueError(f"--frames, --text, --batch must be at least 1, got {args.frames}, {args.text}, {args.batch}")
    where = aot.target(args.topology)
    if where.platform != "tpu":
        raise ValueError(
            f"--topology must be a TPU slice, since XLA's GPU compiler estimates no cost, got {where.name}"
        )
    mesh = mesh_there(args.mesh, where)
    methods = ["none", *(m for m in dict.fromkeys(args.methods.split(",")) if m != "none")]
    stamps = {"question": (0,), "real": (STAMP_TOKENS,), "both": (0, STAMP_TOKENS)}[args.prompt]
    rows: list[dict[str, Any]] = []
    for stamp in stamps:
        text = args.text + stamp * args.frames
        dense = None
        for method in methods:
            budget = 1.0 if method == "none" else args.budget
            reduction = Reduction(method, budget, args.kind, schedule=override(Schedule(), args.schedule, "--schedule"))
            plan = plan_there(reduction, config, args.frames, text, where)
            name = f"{method} {budget:g}, {plan.visual_tokens} visual and {text} text tokens, {args.topology}"
            timing.say(f"compiling {name}")
            compiled = compile_prefill(where, mesh, config, None if method == "none" else plan, args, stamp)
            row = _row(args, mesh, plan, stamp, compiled)
            dense = dense or row["cost_s"]
            row["speedup"] = dense / row["cost_s"]
            row["predicted"] = plan.flop_speedup
            row["share_of_predicted"] = row["speedup"] / row["predicted"]
            rows.append(row)
            timing.say(
                ", ".join(f"{key} {row[key]:.4g}" for key in ("compile_cpu_s", "needed_gb", "cost_s", "speedup"))
            )
    return rows


def compile_prefill(where, mesh, config: ModelConfig, plan, args: argparse.Namespace, stamp: int):
    """The `aot.Compiled` prefill of one bucket, exactly full, under a plan (None: dense)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from hybridvlm import aot, sharding
    from hybridvlm.inference import functions, placement
    from hybridvlm.models import nemotron_vl
    from hybridvlm.models.prompt import Batch
    from hybridvlm.parallel.mesh import tensor_size

    devices = tensor_size(mesh)
    params = jax.eval_shape(
        lambda: sharding.permute_for_tp(nemotron_vl.init(config, jax.random.key(0)), config, devices)
    )
    shardings = sharding.INFERENCE_RULES.shardings(mesh, params)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=s), params, shardings)
    part = placement.part_of(config, params, mesh)
    over_batch = NamedSharding(mesh, P(part.batch_axes))
    over_frames = NamedSharding(mesh, P(part.batch_axes, part.row_axis))

    def struct(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((args.batch, *shape), dtype, sharding=over_batch)

    per_frame = config.tower.tokens_per_frame
    length = args.frames * (per_frame + stamp) + args.text
    merged = (
        (args.frames, per_frame) if plan is None else (plan.decoder_frames, plan.decoder_tokens // plan.decoder_frames)
    )
    if merged != (args.frames, per_frame):
        length = merged[0] * (merged[1] + stamp) + args.text
    row = struct((length,), jnp.int32)
    batch = Batch(row, row, row, struct((), jnp.int32))
    # a video is cut into stretches of whole frames
    frames = args.frames + -args.frames % part.shards
    visual = jax.ShapeDtypeStruct((args.batch, frames, per_frame, config.width), jnp.bfloat16, sharding=over_frames)

    def prefill(*given):
        if mesh.size == 1:
            out = nemotron_vl.prefill(given[0], config, given[1], given[2], plan, 0)
        else:
            out = placement.over_mesh(
                *given,
                phase=functions.prefill,
                results=functions.RESULTS[functions.prefill],
                mesh=mesh,
                specs=placement.arguments_specs((params, batch, visual)),
                family=nemotron_vl,
                config=part,
                plan=plan,
                decode_capacity=0,
            )
        return out.logits, out.decoder.caches, out.decoder.survivors, out.decoder.kept

    return aot.compile_for(where, prefill, params, batch, visual)


def mesh_there(text: str, where):
    """The mesh that `--mesh` asks for, over the first devices of a slice, or all of them."""
    from hybridvlm.parallel.mesh import make_mesh, mesh_sizes

    sizes = mesh_sizes(text)
    count = len(where.devices) if -1 in sizes.values() else math.prod(sizes.values())
    return make_mesh(**sizes, devices=where.devices[:count])


def compiled_prefill_row(topology: str, sizes: dict[str, int], work: Any, name: str) -> dict[str, Any]:
    """The row of one `hybridvlm.estimates.Workload` on one slice and mesh, its prompt a question after the frames."""
    from hybridvlm import aot, sharding

    where = aot.target(topology)
    mesh = sharding.make_mesh(**sizes, devices=where.devices[: math.prod(sizes.values())])
    args = argparse.Namespace(
        model=name, frames=work.groups, text=work.text, batch=work.batch, topology=topology, prompt="question"
    )
    reduced = work.reduction is not None
    reduction = work.reduction if reduced else Reduction("none", 1.0)
    plan = plan_there(reduction, work.config, args.frames, args.text, where)
    return _row(args, mesh, plan, 0, compile_prefill(where, mesh, work.config, plan if reduced else None, args, 0))


def plan_there(reduction: Reduction, config: ModelConfig, frames: int, text: int, where):
    import jax

    with jax.default_device(where.devices[0]):  # the chunk that runs there is part of the plan
        return bench_plan(reduction, config, frames, config.tower.tokens_per_frame, text)


def _row(args: argparse.Namespace, mesh, plan, stamp: int, compiled) -> dict[str, Any]:
    from hybridvlm.bench.hlo import program_cost

    cost = program_cost(compiled.executable.as_text(), compiled.target.chip)
    gb = 1e-9
    return {
        "model": args.model,
        "topology": args.topology,
        "mesh": "x".join(str(n) for n in mesh.shape.values()),
        "visual_tokens": plan.visual_tokens,
        "text_tokens": plan.text_tokens,
        "prompt": "time stamps" if stamp else "question",
        "method": plan.method,
        "budget": plan.budget,
        "stages": len(plan.stages),
        "trace_s": compiled.trace_seconds,
        "compile_s": compiled.compile_seconds,
        "compile_cpu_s": compiled.compile_cpu_seconds,
        "tflops": args.batch * plan.cost.decoder * 1e-12,
        "moved_gb": cost.bytes * gb,
        "exchanged_gb": cost.exchanged * gb,
        "arguments_gb": compiled.arguments * gb,
        "outputs_gb": compiled.outputs * gb,
        "temporaries_gb": compiled.temporaries * gb,
        "needed_gb": compiled.peak_bytes * gb,
        "hbm_gb": compiled.target.chip.hbm_bytes * gb,
        "fits": compiled.fits,
        "unread_loops": cost.unread_loops,
        "cost_s": cost.seconds,
    }
