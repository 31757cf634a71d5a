"""Memory and seconds of a workload on a slice, as one result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybridvlm.config import Reduction
from hybridvlm.estimates.memory import Memory, memory
from hybridvlm.estimates.seconds import Phase, phases
from hybridvlm.estimates.workload import MeshSizes, Workload
from hybridvlm.hardware import Slice, of_chip, parse_slice


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a workload takes on each device of a slice.

    Attributes:
        work: what is run.
        slice: the devices.
        mesh: how the model is cut over them.
        memory: bytes of one device, by part.
        phases: "tower", "prefill", "further" (the prefill of a further question) and "decode" (one token), with least seconds.
    """

    work: Workload
    slice: Slice
    mesh: MeshSizes
    memory: Memory
    phases: dict[str, Phase]

    @property
    def limit(self) -> int:
        """Bytes of memory of one device."""
        return self.slice.chip.hbm_bytes

    @property
    def needed(self) -> int:
        """Bytes that the largest program needs on one device."""
        return self.memory.peak(self.limit)

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit

    @property
    def tight(self) -> bool:
        """Whether it fits only where the compiler computes some activations again."""
        return self.fits and self.memory.peak() > self.limit

    def seconds(self, tokens: int = 0) -> float:
        """Least seconds of tower and prefill, and of so many decoded tokens."""
        first = sum(phase.seconds for name, phase in self.phases.items() if name in ("tower", "prefill"))
        return first + tokens * self.phases["decode"].seconds


def estimate(
    config: Any,
    *,
    frames: int,
    topology: str | Slice,
    mesh: Mapping[str, int] | MeshSizes | Any = None,
    text: int = 512,
    batch: int = 1,
    max_new: int = 256,
    dtype: str = "bfloat16",
    reduction: Reduction | None = None,
) -> Estimate:
    """What inference takes on each device of a slice, without compiling and without the devices.

    Args:
        config: of the model.
        frames: of the video.
        topology: a slice such as "v5e:4x4" or "H200:8".
        mesh: axes and sizes, or a mesh; as many devices as the slice has, or fewer (default: one device).
        text: tokens of the prompt around the frames.
        batch: prompts at once.
        max_new: tokens of an answer.
        dtype: of weights and activations.
        reduction: what is dropped (default: nothing).

    Raises:
        ValueError: for a slice that is none, or a mesh that the model cannot be cut over or that has more devices.
    """
    where = parse_slice(topology) if isinstance(topology, str) else topology
    work = Workload(config, frames, text, batch, max_new, dtype, reduction)
    return estimate_on(work, where, mesh if isinstance(mesh, MeshSizes) else MeshSizes.of(mesh))


def estimate_on(work: Workload, where: Slice, sizes: MeshSizes) -> Estimate:
    """`estimate` of a workload that is put together already."""
    if sizes.devices > where.chips:
        raise ValueError(f"mesh: {sizes} takes {sizes.devices} devices, {where.name} has {where.chips}")
    work = dataclasses.replace(work, platform=where.platform)
    found = phases(work, sizes, where.chip, of_chip(where.generation))
    return Estimate(work, where, sizes, memory(work, sizes), found)
