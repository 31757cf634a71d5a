"""What the benches of single ops share: candidates timed here against their lower bound, or compiled ahead of time for a device."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from hybridvlm.bench import timing

DTYPES = ("float32", "bfloat16", "float16")


class Work(NamedTuple):
    """The least that a call must do: bytes to and from main memory, and FLOPs, two per multiply-add."""

    moved: float
    flops: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that all these benches have."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, help="of the operands (default: float32 on CPU, bfloat16 elsewhere)")
    add("--rounds", type=positive, default=9, help="measured runs of each (default: 9)")
    add("--aot", metavar="TARGET", help="compile for a device that need not be there, like v5e:2x2, v5p:2x2x1 or H200")


def positive(text: str) -> int:
    """An option's whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def where(args: argparse.Namespace) -> tuple[Any, str, str]:
    """(target or None, platform, dtype) that the options ask for."""
    from hybridvlm import aot
    from hybridvlm.ops.platforms import platform

    target = aot.target(args.aot) if args.aot else None
    name = target.platform if target else platform()
    return target, name, args.dtype or ("float32" if name == "cpu" else "bfloat16")


def device_of(target: Any) -> contextlib.AbstractContextManager[Any]:
    """What is traced inside chooses as on a target that need not be there; None: here."""
    import jax

    return contextlib.nullcontext() if target is None else jax.default_device(target.devices[0])


def measure(
    calls: Mapping[str, tuple[Callable, tuple]], work: Work, dtype: str, rounds: int, prefix: str = ""
) -> dict[str, dict[str, Any]]:
    """name -> {ms, x_fastest, temp_mb, bytes_ms, flops_ms, of_floor} of functions with their arguments, taking turns."""
    import jax

    from hybridvlm import aot

    compiled = {}
    for name, (function, arrays) in calls.items():
        timing.say(f"compiling {name}")
        compiled[name] = jax.jit(function).lower(*arrays).compile()
    bound = {name: functools.partial(compiled[name], *arrays) for name, (_, arrays) in calls.items()}
    seconds = timing.interleaved(bound, rounds=rounds)
    fastest = min(seconds, key=lambda name: timing.median_ms(seconds[name]))
    limits = floor(work, dtype)
    rows = {}
    for name, mine in seconds.items():
        ms = timing.median_ms(mine)
        row: dict[str, float | None] = {"ms": ms, "x_fastest": timing.paired_ratio(mine, seconds[fastest]), **limits}
        row["of_floor"] = max(limits.values()) / ms if limits else None
        row["temp_mb"] = aot.memory_analysis(compiled[name]).temp_size_in_bytes / 1e6
        rows[name] = {prefix + key: value for key, value in row.items()}
    return rows


def floor(work: Work, dtype: str) -> dict[str, float]:
    """Milliseconds that this device needs at least, by bytes and by FLOPs; empty, with a message, if its peaks are unknown."""
    import jax

    from hybridvlm.bench.roofline import peaks

    kind = jax.devices()[0].device_kind
    timing.say(f"the least in {dtype}: {work.moved / 1e9:.4g} GB and {work.flops / 1e9:.4g} GFLOP; device {kind}")
    peak = peaks(kind)
    if peak is None or dtype not in peak.flops:
        timing.say(f"no peaks for {dtype} on {kind!r}, so no floor (hybridvlm.hardware lists those known)")
        return {}
    return {"bytes_ms": 1e3 * work.moved / peak.bandwidth, "flops_ms": 1e3 * work.flops / peak.flops[dtype]}


def compiled(
    name: str, function: Callable, shapes: tuple, target: Any, work: Work, dtype: str, library: Work | None = None
) -> dict[str, Any]:
    """One function compiled for a target: {gb, cost_ms, floor_ms, temp_mb, compile_s}; for a GPU launches instead of cost_ms.

    library: bytes and FLOPs of a kernel in it that declares nothing; they are added, its time as the larger share.
    """
    from hybridvlm import aot
    from hybridvlm.bench.hlo import program_cost
    from hybridvlm.hardware import of_chip

    timing.say(f"compiling {name} for {target.name}")
    program = aot.compile_for(target, function, *shapes)
    limit = of_chip(target.name.partition(":")[0])
    text = aot.hlo_text(program.executable)
    cost = program_cost(text, target.chip)
    row: dict[str, Any] = {"target": target.name}
    if target.platform == "tpu":
        extra = limit.floor_seconds(library.flops, library.moved, dtype) if library else 0.0
        # What a kernel fetches again and again only its declaration knows, and the compiler's own count, which is right where
        # there is no loop, has that in it.
        moved = cost.bytes if " while(" in text or program.bytes_accessed is None else program.bytes_accessed
        row |= {"gb": (moved + (library.moved if library else 0)) / 1e9, "cost_ms": 1e3 * (cost.seconds + extra)}
    else:
        row |= {"gb": cost.bytes / 1e9, "launches": cost.launches}
    row["floor_ms"] = 1e3 * limit.floor_seconds(work.flops, work.moved, dtype)
    return row | {"temp_mb": program.temporaries / 1e6, "compile_s": program.compile_seconds}
