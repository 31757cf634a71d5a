"""Text-to-visual scores: the question's rows against all keys, with the log-sum-exp of the layer's attention.

ms              median of interleaved runs; x_fastest: median of the paired ratios to the fastest one of the shape
bytes_ms        keys, query rows and their log-sum-exp read once, the score written once, over the bandwidth
flops_ms        one product of P multiply-adds for every query row and key of every head, over the peak for the dtype
of_floor        the larger of these two over ms; '-' on a device whose peaks are not known
temp_mb         temporaries, from the compiled program's memory analysis

With --aot nothing runs: every implementation is compiled for the target.
gb, cost_ms     bytes to and from HBM, and time, by the compiled program (`bench.hlo`): XLA's own instructions by the compiler's
                estimates, our kernel by what it declares, its time the larger of bytes and FLOPs over the peaks,
                which flatters it; for a GPU, whose compiler estimates no time, there is instead of cost_ms
launches        how many kernels run one after the other; one of ours counts its operands and results once in gb
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from hybridvlm.bench import op_bench as candidates

SHAPES = {"cpu": ("tiny",), "tpu": ("12b", "12b_packed", "vamba_cross"), "gpu": ("12b", "12b_packed", "vamba_cross")}
IMPLEMENTATIONS = {"cpu": ("xla", "reference"), "tpu": ("xla", "pallas_tpu"), "gpu": ("xla", "pallas_gpu")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from hybridvlm.ops.attention.arg_specs import SPECS

    parser.add_argument("--shapes", nargs="+", choices=list(SPECS), metavar="NAME", help=f"of {', '.join(SPECS)}")
    names = sorted({name for of_platform in IMPLEMENTATIONS.values() for name in of_platform})
    parser.add_argument("--implementations", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--heads", choices=("mean", "max"), default="mean", help="reduction over heads (default: mean)")
    candidates.add_arguments(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape and implementation."""
    import jax

    from hybridvlm.ops.attention.api import default_implementations
    from hybridvlm.ops.attention.arg_specs import SPECS
    from hybridvlm.ops.attention.visual import DEFAULTS

    target, platform, dtype = candidates.where(args)
    rows = []
    for shape in args.shapes or SHAPES[platform]:
        spec = SPECS[shape]
        work = candidates.Work(spec.score_bytes(dtype), spec.score_flops())
        names = args.implementations or IMPLEMENTATIONS[platform]
        arrays, rest = spec.score_inputs(dtype)
        programs = {name: _program(spec, rest, name, args.heads) for name in names}
        if target is None:
            timed = candidates.measure({n: (p, (arrays,)) for n, p in programs.items()}, work, dtype, args.rounds)
        else:
            shapes = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays),)
            timed = {n: candidates.compiled(n, p, shapes, target, work, dtype) for n, p in programs.items()}
        with candidates.device_of(target):
            default_name = default_implementations(DEFAULTS, *jax.eval_shape(functools.partial(_heads, spec), arrays))[
                0
            ]
        for name in names:
            default = name == default_name
            begin = {"shape": shape, "tokens": spec.keys, "rows": spec.rows, "dtype": dtype, "implementation": name}
            rows.append(begin | {"default": default} | timed[name])
    return rows


def _program(spec, rest: dict[str, Any], implementation: str, heads: str):
    from hybridvlm.ops.attention import text_to_visual

    def score(arrays):
        q, k = _heads(spec, arrays)
        return text_to_visual(q, k, lse=arrays["lse"], heads=heads, implementation=implementation, **rest)

    return score


def _heads(spec, arrays):
    return tuple(arrays[name].reshape(*arrays[name].shape[:2], -1, spec.width) for name in "qk")
