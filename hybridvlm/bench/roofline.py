"""What a device can do at most, and so the least time that an amount of work can take on it.

The makers' figures of accelerators are in hybridvlm/hardware.py; those of a CPU are measured here.
"""

from __future__ import annotations

import functools
import time

from hybridvlm.hardware import KINDS, Peaks, of_chip


def peaks(device_kind: str) -> Peaks | None:
    """Of a device as JAX names it (`jax.devices()[0].device_kind`); the CPU's are measured once; None if unknown."""
    if device_kind == "cpu":
        return _measured_cpu()
    return of_chip(KINDS[device_kind]) if device_kind in KINDS else None


@functools.cache
def _measured_cpu() -> Peaks:
    """The best of some float32 and bfloat16 matmuls of 2048^3, and of some copies of 256 MiB (read and written)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def best(call, rounds: int) -> float:
        seconds = []
        for _ in range(rounds + 1):  # the first compiles and warms
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    multiply = jax.jit(jnp.matmul)
    flops = {}
    for dtype in ("float32", "bfloat16"):
        square = jnp.ones((2048, 2048), dtype)
        flops[dtype] = 2 * 2048**3 / best(functools.partial(multiply, square, square), 3)
    source, target = np.ones(2**28, np.uint8), np.zeros(2**28, np.uint8)
    return Peaks(flops, 2 * source.nbytes / best(lambda: np.copyto(target, source), 3))
