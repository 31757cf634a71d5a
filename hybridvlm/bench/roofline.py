"""What a device can do at most, and so the least time that an amount of work can take on it.

The vendors' figures, of `aot.CHIPS`: dense bf16 FLOP/s and bytes/s of main memory. A TPU multiplies in bf16; a float32 matmul at
"highest" precision takes six bf16 passes, and so does its peak here. NVIDIA's tensor cores have no float32; the figure for
it is that of the plain cores, 67 TFLOP/s.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

from hybridvlm.aot import CHIPS


class Peaks(NamedTuple):
    """flops: operations per second by dtype name, two per multiply-add; bandwidth: bytes per second of main memory."""

    flops: dict[str, float]
    bandwidth: float

    def floor_seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The larger of flops over peak and bytes over bandwidth."""
        return max(flops / self.flops[dtype], moved / self.bandwidth)


KINDS = {  # how JAX names a device -> chip
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA H100": "H100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
}


def peaks(device_kind: str) -> Peaks | None:
    """Of a device as JAX names it (`jax.devices()[0].device_kind`); the CPU's are measured once; None if unknown."""
    if device_kind == "cpu":
        return _measured_cpu()
    return of_chip(KINDS[device_kind]) if device_kind in KINDS else None


def of_chip(name: str) -> Peaks:
    """Of a chip of `aot.CHIPS`."""
    chip = CHIPS[name]
    if name.startswith("v"):
        return Peaks({"bfloat16": chip.flops, "float32": chip.flops / 6}, chip.bandwidth)
    return Peaks({"bfloat16": chip.flops, "float16": chip.flops, "float32": 67e12}, chip.bandwidth)


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
