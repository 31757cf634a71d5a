"""The SSD op, implementation by implementation, with what the device could do at best.

forward_ms         median of interleaved runs; x_fastest: median of the paired ratios to the fastest one of the shape
bytes_ms           x, dt, B and C read once, y and the final state written once, over the bandwidth
flops_ms           two per multiply-add of the chunked form at 128 tokens per chunk, over the peak for the dtype
of_floor           the larger of these two over forward_ms; '-' on a device whose peaks are not known
gradient_ms        forward and backward, with respect to x, dt, A, B, C and the initial state
gradient_speedup   how many times faster than the token scan's gradient, median of paired ratios
temp_mb            temporaries of forward and backward, from the compiled program's memory analysis
temp_share         the same relative to a float32 array [L,H,P,N], what a scan over tokens would store
The token scan's gradient stores every token's state: it is skipped, with a message, where memory is too short for it.

With --aot nothing runs: every implementation is compiled for the target, forward and (gradient_) forward and backward.
gb                 bytes to and from HBM by the compiled program (`bench.hlo`), a kernel with what it declares; x_min_bytes: over
                   the least
cost_ms            time by the compiler's estimates of cycles, a kernel as the larger of its bytes and FLOPs over the peaks, which
                   flatters it. The compiler for GPUs estimates no time; for such a target there is instead
launches           how many kernels run one after the other; a kernel of ours counts its operands and results once
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

from hybridvlm.bench.op_bench import positive

SHAPES = {"cpu": ("8,64,1,64", "32,80,4,128"), "tpu": ("128,80,8,128",), "gpu": ("128,80,8,128",)}
LENGTHS = {"cpu": 8192, "tpu": 32768, "gpu": 32768}
IMPLEMENTATIONS = {
    "cpu": ("reference", "associative", "sequential"),
    "tpu": ("associative", "sequential", "pallas_tpu"),
    "gpu": ("associative", "sequential", "pallas_gpu"),
}
DTYPES = ("float32", "bfloat16", "float16")
FLOOR_CHUNK = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shapes", nargs="+", metavar="H,P,G,N", help="default: two small ones on CPU, the 12B's elsewhere")
    add("--length", type=positive, metavar="L", help="tokens (default: 8192 on CPU, 32768 elsewhere)")
    add("--dtype", choices=DTYPES, help="of x, B and C (default: float32 on CPU, bfloat16 elsewhere)")
    add("--rounds", type=positive, default=9, help="measured forward runs of each (default: 9)")
    add("--gradient-rounds", type=int, default=3, help="measured gradient runs of each, 0 for none (default: 3)")
    names = sorted({name for of_platform in IMPLEMENTATIONS.values() for name in of_platform})
    add("--implementations", nargs="+", choices=names, metavar="NAME", help="default: those that the platform has")
    add("--chunk-sizes", nargs="+", type=positive, metavar="C", help="chunk sizes to try (default: the platform's)")
    add("--aot", metavar="TARGET", help="compile for a device that need not be there, like v5e:2x2, v5p:2x2x1 or H200")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape, implementation and chunk size."""
    from hybridvlm.ops.platforms import platform

    where = None
    if args.aot:
        from hybridvlm import aot

        where = aot.target(args.aot)
    name = where.platform if where else platform()
    length = args.length or LENGTHS[name]
    dtype = args.dtype or ("float32" if name == "cpu" else "bfloat16")
    specs = [_spec(text, length) for text in args.shapes or SHAPES[name]]
    implementations = args.implementations or IMPLEMENTATIONS[name]
    rows = []
    for spec in specs:
        if where:
            rows += _compile(spec, dtype, implementations, where, args)
        else:
            rows += _measure(spec, dtype, implementations, args)
    return rows


def _spec(text: str, length: int):
    from hybridvlm.ops.ssd.arg_specs import SsdSpec

    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[0]) % int(parts[2]):
        print(f"bench ssd: a shape is H,P,G,N with G dividing H, for example 8,64,1,64; got {text!r}", file=sys.stderr)
        raise SystemExit(2)
    heads, p, groups, n = map(int, parts)
    return SsdSpec(1, length, heads, p, groups, n, initial=True, skip=False)


def _candidates(spec, implementations, chunk_sizes):
    """name -> the start of its row."""
    from hybridvlm.ops.ssd.api import default_choice

    default = default_choice()
    rows = {}
    for implementation in implementations:
        own = None if implementation == "reference" else default.chunk_for(implementation)
        for chunk in [own] if own is None else chunk_sizes or [own]:
            rows[implementation if chunk is None else f"{implementation}/{chunk}"] = {
                "shape": f"{spec.heads},{spec.p},{spec.groups},{spec.n}",
                "length": spec.length,
                "implementation": implementation,
                "chunk_size": chunk,
                "default": (implementation, chunk) == default[:2],
            }
    return rows


def _programs(spec, dtype: str, row: dict[str, Any]):
    """Forward pass and gradient of a row's implementation, and the shapes of their arguments: x flat, as the model has it."""
    import jax

    arrays, _ = spec.shapes(dtype)
    op = functools.partial(_forward, implementation=row["implementation"], chunk_size=row["chunk_size"])
    return op, functools.partial(_gradient, op), arrays, jax.eval_shape(_outputs, arrays)


def _outputs(arrays):
    return arrays["x"], arrays["initial_state"]


def _forward(arrays, *, implementation: str, chunk_size: int | None):
    from hybridvlm.ops.ssd import ssd

    return ssd(**arrays, implementation=implementation, chunk_size=chunk_size)


def _gradient(op, arrays, cotangents):
    import jax

    return jax.vjp(op, arrays)[1](cotangents)


# -- compiled for a target --


def _compile(spec, dtype: str, implementations, where, args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax

    from hybridvlm import aot
    from hybridvlm.bench.hlo import program_cost
    from hybridvlm.bench.timing import say
    from hybridvlm.ops.platforms import compiling_for

    least = spec.unavoidable_bytes(dtype)
    say(
        f"at {spec.length} tokens in {dtype}, x, dt, B and C read once, y and the final state written: {least / 1e9:.3f} GB"
    )
    with compiling_for(where.platform):
        rows = _candidates(spec, implementations, args.chunk_sizes)
    for name, row in rows.items():
        forward, gradient, arrays, cotangents = _programs(spec, dtype, row)
        row["target"] = where.name
        for prefix, program, inputs in (("", forward, (arrays,)), ("gradient_", gradient, (arrays, cotangents))):
            say(f"compiling {name} {'with its gradient ' if prefix else ''}for {where.name}")
            try:
                compiled = aot.compile_for(where, program, *inputs)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                say(f"{name} {'with its gradient ' if prefix else ''}does not fit: {str(error).splitlines()[0]}")
                continue
            cost = program_cost(aot.hlo_text(compiled.executable), where.chip)
            row[f"{prefix}gb"] = cost.bytes / 1e9
            if where.platform == "tpu":
                row[f"{prefix}cost_ms"] = 1e3 * cost.seconds
            else:
                row[f"{prefix}launches"] = cost.launches
            if not prefix:
                row["x_min_bytes"] = cost.bytes / least
            row[f"{prefix}temp_mb"] = compiled.temporaries / 1e6
            row[f"{prefix}compile_s"] = compiled.compile_seconds
    return list(rows.values())


# -- measured here --


def _measure(spec, dtype: str, implementations, args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax

    from hybridvlm import aot
    from hybridvlm.bench.timing import interleaved, median_ms, paired_ratio

    arrays, _ = spec.arrays(dtype)
    keys = jax.random.split(jax.random.key(1), 2)
    cotangents = tuple(jax.random.normal(key, v.shape, v.dtype) for key, v in zip(keys, _outputs(arrays), strict=True))
    state_bytes = 4 * spec.length * spec.heads * spec.p * spec.n
    rows, forward, gradient = _candidates(spec, implementations, args.chunk_sizes), {}, {}
    for name, row in rows.items():
        op, with_gradient, _, _ = _programs(spec, dtype, row)
        forward[name] = functools.partial(jax.jit(op).lower(arrays).compile(), arrays)
        if args.gradient_rounds > 0:
            program = jax.jit(with_gradient).lower(arrays, cotangents).compile()
            temporary = aot.memory_analysis(program).temp_size_in_bytes
            row |= {"temp_mb": temporary / 1e6, "temp_share": temporary / state_bytes}
            if _fits(name, row["shape"], temporary):
                gradient[name] = functools.partial(program, arrays, cotangents)

    seconds = interleaved(forward, rounds=args.rounds)
    fastest = min(seconds, key=lambda name: median_ms(seconds[name]))
    floor = _floor(spec, dtype)
    for name, mine in seconds.items():
        rows[name] |= {"forward_ms": median_ms(mine), "x_fastest": paired_ratio(mine, seconds[fastest]), **floor}
        if floor:
            rows[name]["of_floor"] = max(floor.values()) / median_ms(mine)
    seconds = interleaved(gradient, rounds=args.gradient_rounds) if gradient else {}
    scan = seconds.get("reference")
    for name, mine in seconds.items():
        rows[name] |= {"gradient_ms": median_ms(mine), "gradient_speedup": scan and 1 / paired_ratio(mine, scan)}
    order = ("shape", "length", "implementation", "chunk_size", "default", "forward_ms", "x_fastest", "bytes_ms",
             "flops_ms", "of_floor", "gradient_ms", "gradient_speedup", "temp_mb", "temp_share")  # fmt: skip
    return [{key: row.get(key) for key in order} for row in rows.values()]


def _floor(spec, dtype: str) -> dict[str, float]:
    """Milliseconds that the device needs at least, by bytes and by FLOPs; empty where its peaks are not known."""
    import jax

    from hybridvlm.bench.roofline import peaks
    from hybridvlm.bench.timing import say

    kind = jax.devices()[0].device_kind
    moved, flops = spec.unavoidable_bytes(dtype), spec.flops(FLOOR_CHUNK)
    say(f"at {spec.length} tokens in {dtype}: {moved / 1e9:.3f} GB and {flops / 1e9:.1f} GFLOP on {kind}")
    peak = peaks(kind)
    if peak is None or dtype not in peak.flops:
        say(f"unknown device: no peaks for {dtype} on {kind!r}, so no floor (hybridvlm.hardware lists those known)")
        return {}
    return {"bytes_ms": 1e3 * moved / peak.bandwidth, "flops_ms": 1e3 * flops / peak.flops[dtype]}


def _fits(name: str, shape: str, need: int) -> bool:
    import jax

    from hybridvlm.bench.timing import available_bytes

    free = available_bytes() if jax.default_backend() == "cpu" else None
    if free is None or need < 0.8 * free:
        return True
    print(f"gradient of {name} at {shape} skipped: it needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    return False
