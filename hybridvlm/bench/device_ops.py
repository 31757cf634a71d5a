"""The ops on the device at hand: every implementation against its reference, and against the least that it could take.

Both functions give steps (what is measured, a function that measures it), for `hybridvlm.bench.device` to run as long as there is time.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.bench import attention as bench_attention
from hybridvlm.bench import compact as bench_compact
from hybridvlm.bench import score as bench_score
from hybridvlm.bench import ssd as bench_ssd
from hybridvlm.ops.attention import arg_specs, attention, text_to_visual
from hybridvlm.ops.compact import compact_indices
from hybridvlm.ops.platforms import platform
from hybridvlm.ops.ssd import ssd
from hybridvlm.ops.ssd.arg_specs import ARG_SPECS

Step = tuple[dict[str, Any], Callable[[], Any]]
# largest error over the largest value of the reference, of float32 and of 16 bits
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2}
SPECS = {
    "attention": ("12b", "12b_packed", "12b_extend"),
    "score": ("12b_packed",),
    "ssd": ("12b_prefill", "packed_rows"),
}


def parity(full: bool, rounds: int) -> Iterator[Step]:
    """Every implementation of every op on short rows, forward and then gradient."""
    here = platform()
    names = {
        "attention": bench_attention.IMPLEMENTATIONS[here],
        "score": bench_score.IMPLEMENTATIONS[here],
        "ssd": tuple(name for name in bench_ssd.IMPLEMENTATIONS[here] if name != "reference"),
    }
    length = 2000 if full else 96
    dtypes = ("float32",) if here == "cpu" else ("bfloat16", "float32")
    for gradient in (False, True):
        for op in ("attention", "ssd", "score"):
            for dtype in dtypes:
                for name in (n for n in names[op] if n != "reference"):
                    for shape in SPECS[op] if full else SPECS[op][:1]:
                        if op == "score" and gradient:
                            continue
                        begin = {"op": op, "implementation": name, "shape": shape, "dtype": dtype, "gradient": gradient}
                        yield begin, functools.partial(_compare, op, name, shape, dtype, length, gradient)
    yield {"op": "compact", "implementation": "threshold"}, functools.partial(_compare_compact, 8 * length)


def _compare(op: str, implementation: str, shape: str, dtype: str, length: int, gradient: bool) -> dict[str, Any]:
    """The largest error of each result over the largest value of the reference in float32, and whether all are small enough."""
    call, arrays = {"attention": _attention, "score": _score, "ssd": _ssd}[op](shape, dtype, length, implementation)
    whole = jax.tree.map(lambda a: a.astype(jnp.float32), arrays)

    def outputs(name: str, arrays: Any) -> tuple[jax.Array, ...]:
        if not gradient:
            return call(name, arrays)

        def loss(arrays: Any) -> jax.Array:
            out = call(name, arrays)[0].astype(jnp.float32)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

        return tuple(jax.tree.leaves(jax.grad(loss)(arrays)))

    with jax.default_matmul_precision("highest"):
        got = jax.jit(functools.partial(outputs, implementation))(arrays)
        wanted = jax.jit(functools.partial(outputs, "reference"))(whole)
    errors = [_error(mine, theirs) for mine, theirs in zip(got, wanted, strict=True)]
    return {"error": max(errors), "ok": max(errors) <= ALLOWED[dtype]}


def _error(mine: jax.Array, theirs: jax.Array) -> float:
    a, b = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    seen = b > -1e29  # a row that sees nothing has a log-sum-exp of -1e30
    if not np.isfinite(a[seen]).all():
        return float("inf")
    return float(np.abs(a - b)[seen].max(initial=0.0) / max(np.abs(b[seen]).max(initial=0.0), 1e-30))


def _attention(shape: str, dtype: str, length: int, implementation: str) -> tuple[Callable[..., Any], Any]:
    spec = arg_specs.SPECS[shape].small(length)

    def call(name: str, arrays: Any) -> tuple[jax.Array, ...]:
        both = attention(*spec.split(*arrays), **spec.options(), implementation=name)
        # cuDNN's log-sum-exp is rounded to 16 bits
        return both[:1] if implementation == "cudnn" else both

    return call, spec.arrays(dtype)


def _score(shape: str, dtype: str, length: int, implementation: str) -> tuple[Callable[..., Any], Any]:
    spec = arg_specs.SPECS[shape].small(length)
    arrays, others = spec.score_inputs(dtype)
    rest: dict[str, Any] = dict(others)

    def call(name: str, arrays: Any) -> tuple[jax.Array, ...]:
        q, k = (arrays[n].reshape(*arrays[n].shape[:2], -1, spec.width) for n in "qk")
        return (text_to_visual(q, k, lse=arrays["lse"], implementation=name, **rest),)

    return call, arrays


def _ssd(shape: str, dtype: str, length: int, implementation: str) -> tuple[Callable[..., Any], Any]:
    arrays, others = ARG_SPECS[shape].small(length).arrays(dtype)
    rest: dict[str, Any] = dict(others)
    return (lambda name, arrays: ssd(**arrays, **rest, implementation=name)), arrays


def _compare_compact(length: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    segment = (np.arange(length) < length - 5).astype(np.int32)[None]
    visual = np.arange(length)[None] < length - 64
    score = np.round(rng.standard_normal((1, length)), 2).astype(np.float32)
    keep = np.full((1, 1), length // 4, np.int32)
    run = jax.jit(compact_indices, static_argnums=(4, 5))
    mine, theirs = (run(segment, visual, score, keep, length // 4 + 64, name) for name in ("threshold", "sort"))
    return {"ok": all(bool(jnp.array_equal(a, b)) for a, b in zip(mine, theirs, strict=True))}


def ops(full: bool, rounds: int) -> Iterator[Step]:
    """The benches of the ops, an implementation at a time; the platform's default first."""
    here = platform()
    common = {"dtype": None, "rounds": rounds, "aot": None}
    shape = "12b" if full else "tiny"
    order = {"cpu": ("xla",), "tpu": ("pallas_tpu", "splash", "xla"), "gpu": ("cudnn", "pallas_gpu", "xla")}[here]
    for name in order:
        args = argparse.Namespace(shapes=[shape], implementations=[name], gradient=False, **common)
        yield {"op": "attention"}, functools.partial(_rows, bench_attention.run, args)
    for name in {"cpu": ("sequential",), "tpu": ("pallas_tpu", "sequential"), "gpu": ("sequential", "pallas_gpu")}[
        here
    ]:
        given = {"shapes": ["128,80,8,128" if full else "2,8,1,8"], "length": 32768 if full else 128}
        args = argparse.Namespace(implementations=[name], chunk_sizes=None, gradient_rounds=0, **given, **common)
        yield {"op": "ssd"}, functools.partial(_rows, bench_ssd.run, args)
    for name in (n for n in order if n not in ("cudnn", "splash")):
        args = argparse.Namespace(shapes=[shape], implementations=[name], heads="mean", **common)
        yield {"op": "score"}, functools.partial(_rows, bench_score.run, args)
    args = argparse.Namespace(shapes=["1,33280,8704" if full else "1,128,32"], width=5120 if full else 8, **common)
    yield {"op": "compact"}, functools.partial(_rows, bench_compact.run, args)


def _rows(
    bench: Callable[[argparse.Namespace], list[dict[str, Any]]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = bench(args)
    return rows or [{"implementation": args.implementations[0], "refused": "see stderr"}]
