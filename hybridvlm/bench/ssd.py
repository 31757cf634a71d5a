"""The SSD op, implementation by implementation, in float32.

forward_ms         median of interleaved runs; x_fastest: median of the paired ratios to the fastest one of the shape
gradient_ms        forward and backward, with respect to x, dt, A, B, C and the initial state
gradient_speedup   how many times faster than the token scan's gradient, median of paired ratios
temp_mb            temporaries of forward and backward, from the compiled program's memory analysis
temp_share         the same relative to a float32 array [L,H,P,N], what a scan over tokens would store
The token scan's gradient stores every token's state: it is skipped, with a message, where memory is too short for it.
"""

from __future__ import annotations

import argparse
import functools
import sys
from typing import Any

SHAPES = ("8,64,1,64", "32,80,4,128")
IMPLEMENTATIONS = ("reference", "associative", "sequential")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="H,P,G,N", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--length", type=_positive, default=8192, metavar="L", help="tokens (default: 8192)")
    parser.add_argument("--rounds", type=_positive, default=9, help="measured forward runs of each (default: 9)")
    parser.add_argument(
        "--gradient-rounds", type=int, default=3, help="measured gradient runs of each, 0 for none (default: 3)"
    )
    parser.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS, metavar="NAME",
        help=f"default: {' '.join(IMPLEMENTATIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--chunk-sizes", nargs="+", type=_positive, metavar="C", help="chunk sizes to try (default: the platform's)"
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape, implementation and chunk size."""
    shapes = [_shape(text) for text in args.shapes]
    return [row for shape in shapes for row in _measure(shape, args)]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[0]) % int(parts[2]):
        print(f"bench ssd: a shape is H,P,G,N with G dividing H, for example 8,64,1,64; got {text!r}", file=sys.stderr)
        raise SystemExit(2)
    return tuple(int(part) for part in parts)


def _measure(shape: tuple[int, ...], args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax

    from hybridvlm.bench.timing import interleaved, median_ms, paired_ratio
    from hybridvlm.ops.ssd.api import default_choice

    heads, p, _, n = shape
    arrays, cotangents = _inputs(args.length, *shape)
    default = default_choice()
    state_bytes = 4 * args.length * heads * p * n
    rows, forward, gradient = {}, {}, {}
    for implementation in args.implementations:
        chunks = [None] if implementation == "reference" else args.chunk_sizes or [default.chunk_for(implementation)]
        for chunk in chunks:
            name = implementation if chunk is None else f"{implementation}/{chunk}"
            rows[name] = {
                "shape": ",".join(map(str, shape)),
                "length": args.length,
                "implementation": implementation,
                "chunk_size": chunk,
                "default": (implementation, chunk) == default[:2],
            }
            op = functools.partial(_forward, implementation=implementation, chunk_size=chunk)
            program = jax.jit(op).lower(*arrays).compile()
            forward[name] = functools.partial(program, *arrays)
            if args.gradient_rounds > 0:
                program = jax.jit(functools.partial(_gradient, op)).lower(arrays, cotangents).compile()
                temporary = program.memory_analysis().temp_size_in_bytes
                rows[name] |= {"temp_mb": temporary / 1e6, "temp_share": temporary / state_bytes}
                if _fits(name, rows[name]["shape"], temporary):
                    gradient[name] = functools.partial(program, arrays, cotangents)

    seconds = interleaved(forward, rounds=args.rounds)
    fastest = min(seconds, key=lambda name: median_ms(seconds[name]))
    for name, mine in seconds.items():
        rows[name] |= {"forward_ms": median_ms(mine), "x_fastest": paired_ratio(mine, seconds[fastest])}
    seconds = interleaved(gradient, rounds=args.gradient_rounds) if gradient else {}
    scan = seconds.get("reference")
    for name, mine in seconds.items():
        rows[name] |= {"gradient_ms": median_ms(mine), "gradient_speedup": scan and 1 / paired_ratio(mine, scan)}
    order = ("shape", "length", "implementation", "chunk_size", "default", "forward_ms", "x_fastest",
             "gradient_ms", "gradient_speedup", "temp_mb", "temp_share")  # fmt: skip
    return [{key: row.get(key) for key in order} for row in rows.values()]


def _inputs(length: int, heads: int, p: int, groups: int, n: int):
    """One row as a trained layer might see it (dt around 0.02, A in -16..-1), and cotangents of the results."""
    import jax
    import jax.numpy as jnp

    keys = iter(jax.random.split(jax.random.key(0), 8))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.float32)

    x, dt = normal(1, length, heads, p), jax.nn.softplus(normal(1, length, heads) - 4)
    a = -jax.random.uniform(next(keys), (heads,), jnp.float32, 1.0, 16.0)
    arrays = (x, dt, a, normal(1, length, groups, n), normal(1, length, groups, n), jnp.zeros((1, heads, p, n)))
    return arrays, (normal(1, length, heads, p), normal(1, heads, p, n))


def _forward(x, dt, a, b, c, state, *, implementation: str, chunk_size: int | None):
    from hybridvlm.ops.ssd import ssd

    return ssd(x, dt, a, b, c, initial_state=state, implementation=implementation, chunk_size=chunk_size)


def _gradient(op, arrays, cotangents):
    import jax

    return jax.vjp(op, *arrays)[1](cotangents)


def _fits(name: str, shape: str, need: int) -> bool:
    import jax

    from hybridvlm.bench.timing import available_bytes

    free = available_bytes() if jax.default_backend() == "cpu" else None
    if free is None or need < 0.8 * free:
        return True
    print(f"gradient of {name} at {shape} skipped: it needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free")
    return False
