"""Attention over whole rows, implementation by implementation, with what the device could do at best.

ms              median of interleaved runs; x_fastest: median of the paired ratios to the fastest one of the shape
bytes_ms        q, k and v read once, out and the log-sum-exp written once, over the bandwidth
flops_ms        two products of P multiply-adds for every query and key that see each other, over the peak for the dtype
of_floor        the larger of these two over ms; '-' on a device whose peaks are not known
temp_mb         temporaries, from the compiled program's memory analysis
With --gradient the same for forward and backward together; its FLOPs are 3.5 times the forward pass's (seven products for two).
An implementation that cannot do a shape (segments, indices) is left out, with its reason.

With --aot nothing runs: every implementation is compiled for the target.
gb, cost_ms     bytes to and from HBM, and time, by the compiled program (`bench.hlo`): XLA's own instructions by the compiler's
                estimates, a kernel of ours by what it declares, splash, which declares nothing, by its grid (see
                `splash_work`); a kernel's time is the larger of its bytes and FLOPs over the peaks, which flatters it
launches        for a GPU, whose compiler estimates no time, instead of cost_ms: how many kernels run one after the other; one
                of ours or of a library counts its operands and results once in gb
floor_ms        the larger of bytes_ms and flops_ms there
"""

from __future__ import annotations

import argparse
from typing import Any

from hybridvlm.bench import op_bench as candidates
from hybridvlm.bench import timing

SHAPES = {
    "cpu": ("tiny", "vamba_text"),
    "tpu": ("12b", "12b_packed", "12b_extend"),
    "gpu": ("12b", "12b_packed", "12b_plain", "12b_extend"),
}
IMPLEMENTATIONS = {
    "cpu": ("xla", "reference"),
    "tpu": ("xla", "pallas_tpu", "splash"),
    "gpu": ("xla", "pallas_gpu", "cudnn"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hybridvlm.ops.attention.arg_specs import SPECS

    parser.add_argument("--shapes", nargs="+", choices=list(SPECS), metavar="NAME", help=f"of {', '.join(SPECS)}")
    names = sorted({name for of_platform in IMPLEMENTATIONS.values() for name in of_platform})
    parser.add_argument("--implementations", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--gradient", action="store_true", help="forward and backward, instead of forward alone")
    candidates.add_arguments(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape and implementation."""
    import jax

    from hybridvlm.ops.attention.api import DEFAULTS, default_implementations
    from hybridvlm.ops.attention.arg_specs import SPECS
    from hybridvlm.ops.platforms import compiling_for

    target, platform, dtype = candidates.where(args)
    rows = []
    for shape in args.shapes or SHAPES[platform]:
        spec = SPECS[shape]
        work = candidates.Work(spec.unavoidable_bytes(dtype), spec.flops() * (3.5 if args.gradient else 1))
        if args.gradient:  # besides: cotangents of out read, out read, three gradients written
            work = work._replace(
                moved=2 * work.moved + spec.shapes(dtype)[0].size * spec.shapes(dtype)[0].dtype.itemsize
            )
        shapes = spec.shapes(dtype)
        programs = {}
        for name in args.implementations or IMPLEMENTATIONS[platform]:
            program = _program(spec, name, args.gradient)
            try:
                with compiling_for(platform):
                    jax.eval_shape(program, *shapes)
            except NotImplementedError as reason:
                timing.say(f"{shape}: {reason}")
                continue
            programs[name] = program
        lengths = spec.options().get("one_segment", spec.offset is None)
        with candidates.device_of(target):
            default = default_implementations(DEFAULTS, *shapes, lengths=lengths)[0]
        begin = {
            name: {
                "shape": shape,
                "tokens": spec.keys,
                "dtype": dtype,
                "implementation": name,
                "default": name == default,
            }
            for name in programs
        }
        if target is None:
            arrays = spec.arrays(dtype)
            timed = candidates.measure({n: (p, arrays) for n, p in programs.items()}, work, dtype, args.rounds)
        else:
            timed = {
                n: candidates.compiled(
                    n,
                    p,
                    shapes,
                    target,
                    work,
                    dtype,
                    splash_work(spec, dtype, args.gradient) if n == "splash" else None,
                )
                for n, p in programs.items()
            }
        rows += [begin[name] | timed[name] for name in programs]
    return rows


def splash_work(spec, dtype: str, gradient: bool) -> candidates.Work:
    """What splash's kernels do at the adapter's tiles: every query head walks the tiles under the diagonal and fetches k and v
    of each; the two kernels of the backward pass likewise, with d_out."""
    import jax.numpy as jnp

    from hybridvlm.ops.attention.splash import BLOCK

    item = jnp.dtype(dtype).itemsize
    rows, columns = -(-spec.queries // BLOCK), -(-spec.keys // BLOCK)
    tiles = sum(min(i + 1, columns) for i in range(rows)) if spec.causal else rows * columns
    block = BLOCK * spec.width * item
    heads = spec.batch * spec.heads
    forward = heads * (tiles * 2 * block + rows * 2 * block)
    flops = heads * tiles * BLOCK * BLOCK * spec.width * 2
    if not gradient:
        return candidates.Work(forward, 2 * flops)
    backward = heads * (tiles * 2 * block + 3 * rows * block + tiles * 2 * block + 4 * columns * block)
    return candidates.Work(forward + backward, (2 + 3 + 4) * flops)


def _program(spec, implementation: str, gradient: bool):
    """The op on flat projections; with `gradient`, that of out's sum of squares."""
    import jax
    import jax.numpy as jnp

    from hybridvlm.ops.attention import attention

    options = spec.options()

    def forward(q, k, v):
        out, lse = attention(*spec.split(q, k, v), **options, implementation=implementation)
        return out.reshape(*out.shape[:2], -1), lse

    def loss(q, k, v):
        return jnp.sum(jnp.square(forward(q, k, v)[0].astype(jnp.float32)))

    return jax.grad(loss, (0, 1, 2)) if gradient else forward
