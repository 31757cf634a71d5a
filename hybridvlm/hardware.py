"""What accelerators are, as their makers state it: chips, the slices that they are rented in, and what JAX calls them."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

_GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        kind: its name, for people.
        hbm_bytes: memory.
        bandwidth: of that memory, bytes per second.
        flops: bfloat16 operations per second, dense.
        clock: in Hz.
        link: bytes per second to and from other chips of its slice or host, all links and both directions together.
        per_host: chips of a host of a slice that has several hosts.
    """

    kind: str
    hbm_bytes: int
    bandwidth: float
    flops: float
    clock: float
    link: float
    per_host: int


# cloud.google.com/tpu/docs (v5e, v5p, v6e), and NVIDIA's data sheets (dense, no sparsity; NVLink).
CHIPS = {
    "v5e": Chip("TPU v5e", 16 * _GIB, 819e9, 197e12, 1.5e9, 200e9, 4),
    "v5p": Chip("TPU v5p", 95 * _GIB, 2765e9, 459e12, 1.75e9, 600e9, 4),
    "v6e": Chip("TPU v6e", 32 * _GIB, 1640e9, 918e12, 1.75e9, 448e9, 4),
    "H100": Chip("NVIDIA H100 SXM", 80 * 10**9, 3.35e12, 989e12, 1.98e9, 900e9, 8),
    "H200": Chip("NVIDIA H200 SXM", 141 * 10**9, 4.8e12, 989e12, 1.98e9, 900e9, 8),
}

# how JAX names a device -> its chip
KINDS = {
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

# shapes of slices that can be had, from one chip to a pod
SLICES = {
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "H100": ("1", "2", "4", "8", "16", "32"),
    "H200": ("1", "2", "4", "8", "16", "32"),
}
_ONE_HOST = {"v5e": 8, "v6e": 8}  # v5e and v6e slices of up to eight chips also come as one host


class Slice(NamedTuple):
    """Devices that are rented together: "v5e:4x4" is generation "v5e", 16 chips on 4 hosts."""

    name: str
    generation: str
    chips: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def platform(self) -> str:
        """ "tpu" or "gpu", as JAX has it."""
        return "tpu" if self.generation.startswith("v") else "gpu"

    @property
    def hosts(self) -> int:
        if self.chips <= _ONE_HOST.get(self.generation, self.chip.per_host):
            return 1
        return -(-self.chips // self.chip.per_host)


def parse_slice(name: str) -> Slice:
    """The slice of a name such as "v5e:4x4", "v5p:2x2x1", "H200:8" or, one card, "H200".

    Raises:
        ValueError: for a generation that is not in `CHIPS`, or a shape that is none.
    """
    generation, _, shape = name.partition(":")
    if generation not in CHIPS:
        raise ValueError(
            f"topology: expected one of {sorted(CHIPS)} with a slice, like v5e:2x2 or H200:8, got {name!r}"
        )
    axes = {"v5p": 3, "v5e": 2, "v6e": 2}.get(generation, 1)
    if not shape and axes == 1:
        shape = "1"
    sizes = shape.split("x")
    if len(sizes) != axes or not all(re.fullmatch("[1-9][0-9]*", size) for size in sizes):
        example = f"{generation}:{SLICES[generation][2]}"
        raise ValueError(f"topology: {name!r} needs the shape of its slice, like {example}")
    return Slice(name, generation, math.prod(map(int, sizes)))


def usual_slices(generation: str) -> list[Slice]:
    """The slices of a generation that can be had, by number of chips."""
    return [parse_slice(f"{generation}:{shape}") for shape in SLICES[generation]]


class Peaks(NamedTuple):
    """flops: operations per second by dtype name, two per multiply-add; bandwidth: bytes per second of main memory."""

    flops: dict[str, float]
    bandwidth: float

    def floor_seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The larger of flops over peak and bytes over bandwidth."""
        return max(flops / self.flops[dtype], moved / self.bandwidth)


def of_chip(name: str) -> Peaks:
    """The peaks of a chip of `CHIPS`.

    A TPU multiplies in bf16; a float32 matmul at "highest" precision takes six bf16 passes, and so does its peak here. NVIDIA's
    tensor cores have no float32; the figure for it is that of the plain cores, 67 TFLOP/s.
    """
    chip = CHIPS[name]
    if name.startswith("v"):
        return Peaks({"bfloat16": chip.flops, "float32": chip.flops / 6}, chip.bandwidth)
    return Peaks({"bfloat16": chip.flops, "float16": chip.flops, "float32": 67e12}, chip.bandwidth)


def memory_limit(device: Any) -> int | None:
    """Bytes of memory that a program may use on a device; None where there is no known limit, as on CPU.

    What the device's own allocator says, else what its maker states of a chip of its kind.
    """
    if device.platform == "cpu":
        return None
    try:
        stats = device.memory_stats() or {}
    except Exception:  # a backend without such figures raises whatever it likes
        stats = {}
    if stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    name = KINDS.get(device.device_kind)
    return None if name is None else CHIPS[name].hbm_bytes
