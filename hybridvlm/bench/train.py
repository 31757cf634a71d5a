"""A whole step of training compiled ahead of time for TPUs: does it fit, what does it cost, how long does compiling take.

Forward under a plan, next-token loss on the answer, backward, AdamW: float32 master weights and moments, computed in bfloat16, dense
and under reduction methods, on one slice and mesh. The compiler is the real one; nothing runs. The vision tower is frozen, and its
tokens are inputs. Per device: bytes of HBM, and by the compiler's own estimates seconds and bytes with every loop counted as often
as it runs (hybridvlm/bench/hlo.py says how; transfers between chips are in neither, exchanged_gb lists them).

A program that does not fit is a row as well: needed_gb is then what the compiler says it would have taken, fits is empty.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

from hybridvlm.bench import timing
from hybridvlm.bench.aot import measured, mesh_there, plan_there
from hybridvlm.config import BUDGET_KINDS, ModelConfig, Reduction, Schedule
from hybridvlm.config_files import load_model_config
from hybridvlm.estimates.workload import MeshSizes
from hybridvlm.options import override, split


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench train`."""
    add = parser.add_argument
    add("--model", default="nemotron_nano_12b_v2_vl", help="name or JSON file of a model config")
    add("--layers", type=int, help="only the first layers of it, for a first try")
    add("--frames", type=int, default=128, help="frames of the video (default: 128)")
    add("--text", type=int, default=512, help="text tokens, the answer included (default: 512)")
    add("--answer", type=int, default=64, help="of which the last are the answer (default: 64)")
    add("--methods", default="none,str", help="comma list of methods, none is dense (default: none,str)")
    add("--budget", type=float, default=0.25, help="share of visual tokens kept (default: 0.25)")
    add("--kind", choices=BUDGET_KINDS, default="mean", help="how the budget is counted (default: mean)")
    add("--schedule", nargs="+", default=[], metavar="KEY=VALUE", help="changes of the default schedule")
    add("--topology", default="v5p:4x4x4", help="slice to compile for, such as v5e:16x16 (default: v5p:4x4x4)")
    add("--mesh", default="fsdp=64", help="data=, fsdp=, sequence=, tensor=, comma list (default: fsdp=64)")
    add("--batch", type=int, default=64, help="examples; the data and fsdp axes must divide them (default: 64)")
    add(
        "--remat",
        default="layer",
        help="what the backward pass finds kept, a name of nn.decoder.REMAT (default: layer)",
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile, print, and return the rows."""
    from hybridvlm import aot
    from hybridvlm.nn.scan import REMAT

    config = load_model_config(args.model)
    if config.vision is None:
        raise ValueError(f"model {args.model!r} has no vision side, and so no visual tokens to reduce")
    if min(args.frames, args.text, args.batch, args.answer) < 1 or args.answer >= args.text:
        raise ValueError("--frames, --text, --batch, --answer must be at least 1, and the answer shorter than the text")
    if args.remat not in REMAT:
        raise ValueError(f"--remat must be one of {', '.join(REMAT)}, got {args.remat!r}")
    if args.layers is not None:
        config = dataclasses.replace(config, pattern=config.pattern[: args.layers])
    where = aot.target(args.topology)
    mesh = mesh_there(args.mesh, where)
    if args.batch % (mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(f"--batch must be a multiple of data times fsdp of --mesh {args.mesh}, got {args.batch}")
    rows: list[dict[str, Any]] = []
    for method in dict.fromkeys(split(args.methods, "--methods")):
        budget = 1.0 if method == "none" else args.budget
        reduction = Reduction(method, budget, args.kind, schedule=override(Schedule(), args.schedule, "--schedule"))
        plan = plan_there(reduction, config, args.frames, args.text, where)
        timing.say(
            f"compiling {method} {budget:g}, {plan.visual_tokens} visual and {args.text} text tokens, {where.name}"
        )
        reduced = None if method == "none" else plan
        row = _head(args, mesh, plan) | {"hbm_gb": where.chip.hbm_bytes * 1e-9}
        row |= measured(functools.partial(compile_step, where, mesh, config, reduced, args))
        rows.append(row)
        timing.say(", ".join(f"{key} {row[key]:.4g}" for key in ("compile_s", "needed_gb", "cost_s") if key in row))
    return rows


def compile_step(where, mesh, config: ModelConfig, plan, args: argparse.Namespace):
    """The `aot.Compiled` step under a plan (None: dense), all rows exactly full; parameters and moments are donated."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from hybridvlm import aot, sharding
    from hybridvlm.models import nemotron_vl
    from hybridvlm.ops.tokens import Tokens
    from hybridvlm.reduction import score_fn
    from hybridvlm.train.optimizer import decays

    rules, devices = sharding.DEFAULT_RULES, sharding.tensor_size(mesh)
    sharding.local_config(config, devices)
    shapes = jax.eval_shape(
        lambda: sharding.permute_for_tp(nemotron_vl.init(config, jax.random.key(0)), config, devices)
    )
    shapes = {name: part for name, part in shapes.items() if name not in ("vision", "projector")}
    path = lambda keys: "/".join(key.key for key in keys)  # noqa: E731
    mask = jax.tree_util.tree_map_with_path(lambda keys, _: decays(path(keys)), shapes)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.05, mask=mask))

    def with_sharding(tree):
        struct = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
        return jax.tree.map(struct, tree, rules.shardings(mesh, tree))

    over_batch, per_tensor = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(None, "tensor"))
    visual_tokens = args.frames * config.tower.tokens_per_frame
    length = visual_tokens + args.text

    def loss(params, visual, ids):
        # gathered once, in the type that they are used in
        embed = jax.lax.with_sharding_constraint(params["embed"].astype(jnp.bfloat16), NamedSharding(mesh, P()))
        head = jax.lax.with_sharding_constraint(params["lm_head"].astype(jnp.bfloat16), per_tensor)
        x = jnp.concatenate([visual, jnp.take(embed, ids, axis=0)], axis=1)
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), x.shape[:2])
        seen = index < visual_tokens
        frame = jnp.where(seen, index // config.tower.tokens_per_frame, -1)
        tokens = Tokens(x, index, jnp.ones_like(index), seen, ~seen & (index < length - args.answer), index, frame)
        out = sharding.prefill(
            params["decoder"],
            config,
            tokens,
            mesh=mesh,
            plan=plan,
            score_fn=None if plan is None else score_fn(plan),
            query_capacity=args.text - args.answer,
            remat=args.remat,
            caches=False,
        )
        told = jax.lax.with_sharding_constraint(out.tokens.x[:, -args.answer - 1 : -1], over_batch)
        logits = jnp.matmul(told, head, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, -args.answer :]).mean()

    def step(params, moments, visual, ids):
        value, gradient = jax.value_and_grad(loss)(params, visual, ids)
        gradient = jax.lax.with_sharding_constraint(gradient, rules.shardings(mesh, gradient))
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    params, moments = with_sharding(shapes), with_sharding(jax.eval_shape(optimizer.init, shapes))
    visual = jax.ShapeDtypeStruct((args.batch, visual_tokens, config.width), jnp.bfloat16, sharding=over_batch)
    ids = jax.ShapeDtypeStruct((args.batch, args.text), jnp.int32, sharding=over_batch)
    kept = (*(jax.tree.map(lambda a: a.sharding, tree) for tree in (params, moments)), NamedSharding(mesh, P()))
    return aot.compile_for(where, step, params, moments, visual, ids, out_shardings=kept, donate_argnums=(0, 1))


def _head(args: argparse.Namespace, mesh, plan) -> dict[str, Any]:
    """What is compiled."""
    return {
        "topology": args.topology,
        "mesh": str(MeshSizes.of(mesh)),
        "batch": args.batch,
        "remat": args.remat,
        "visual_tokens": plan.visual_tokens,
        "text_tokens": plan.text_tokens,
        "method": plan.method,
        "budget": plan.budget,
        "stages": len(plan.stages),
        "predicted": plan.flop_speedup,
    }
