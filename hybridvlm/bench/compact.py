"""Dropping tokens from a row: which survive, and where they are, by sorting or by counting; and with the gather of x.

ms              median of interleaved runs; x_fastest: median of the paired ratios to the fastest one of the shape
bytes_ms        segment, flags and score read once, indices written once; with --width x of the survivors read and written too
of_floor        bytes_ms over ms; '-' on a device whose bandwidth is not known. There is no FLOP floor: it is all bytes
temp_mb         temporaries, from the compiled program's memory analysis

With --aot nothing runs: every implementation is compiled for the target.
gb, cost_ms     bytes to and from HBM, and time, by the compiler's estimates for the program's instructions (`bench.hlo`); for a
                GPU, whose compiler estimates no time, launches instead of cost_ms: kernels that run one after the other
"""

from __future__ import annotations

import argparse
from typing import Any

from hybridvlm.bench import op_bench as candidates

SHAPES = ("1,33280,8704", "1,131584,33280", "8,1040,272")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="B,L,C", help=f"rows, length, capacity ({' '.join(SHAPES)})"
    )
    parser.add_argument(
        "--width", type=int, default=0, metavar="D", help="gather x [B,L,D] too (default: indices alone)"
    )
    candidates.add_arguments(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per shape and implementation."""
    import jax
    import jax.numpy as jnp

    from hybridvlm.ops.compact import DEFAULTS, IMPLEMENTATIONS

    target, platform, dtype = candidates.where(args)
    rows = []
    for text in args.shapes:
        b, length, capacity = _shape(text)
        item = jnp.dtype(dtype).itemsize
        moved = b * (length * (4 + 1 + 4) + capacity * (4 + 1) + 2 * capacity * args.width * item)
        work = candidates.Work(moved, 0.0)
        keys = jax.random.split(jax.random.key(0), 2)
        question = capacity // 16
        index = jnp.broadcast_to(jnp.arange(length), (b, length))
        arrays = (
            (index < length - 3).astype(jnp.int32),
            index < length - 3 - question,
            jax.random.normal(keys[0], (b, length)),
            jnp.full((b, 1), capacity - question, jnp.int32),
            jax.random.normal(keys[1], (b, length, args.width), dtype),
        )

        programs = {name: _program(capacity, name) for name in IMPLEMENTATIONS}
        if target is None:
            timed = candidates.measure({n: (p, arrays) for n, p in programs.items()}, work, dtype, args.rounds)
        else:
            shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
            timed = {n: candidates.compiled(n, p, shapes, target, work, dtype) for n, p in programs.items()}
        for name in IMPLEMENTATIONS:
            default = name == DEFAULTS.get(platform, "sort")
            begin = {"shape": text, "width": args.width, "dtype": dtype, "implementation": name, "default": default}
            rows.append(begin | timed[name])
    return rows


def _program(capacity: int, name: str):
    from hybridvlm.ops.compact import compact_indices, gather_rows

    def program(segment, visual, score, keep, x):
        indices, valid = compact_indices(segment, visual, score, keep, capacity, name)
        return indices, valid, gather_rows(x, indices)

    return program


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[2]) > int(parts[1]):
        raise ValueError(
            f"--shapes: expected B,L,C with a capacity C of at most L, for example 1,33280,8704; got {text!r}"
        )
    return int(parts[0]), int(parts[1]), int(parts[2])
