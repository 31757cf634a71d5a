"""Which mesh a model fits on: the smallest tensor x sequence, the rest of the devices for more examples at once."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from hybridvlm.estimates.memory import Memory, memory
from hybridvlm.estimates.result import Estimate, estimate_on
from hybridvlm.estimates.workload import MeshSizes, Workload, local_part
from hybridvlm.hardware import KINDS, SLICES, usual_slices

HEADROOM = 0.05  # of a device's memory, which a mesh that is chosen leaves free


class DoesNotFit(ValueError):
    """A model and its inputs need more memory than the devices have; the message says how much, and what would do.

    Attributes:
        nearest: the mesh that needed least.
    """

    def __init__(self, text: str, nearest: MeshSizes):
        super().__init__(text)
        self.nearest = nearest


@dataclasses.dataclass(frozen=True)
class MeshChoice:
    """A mesh, what it takes on each device, and why it was chosen: a sentence for people."""

    mesh: MeshSizes
    memory: Memory
    why: str


def candidates(work: Workload, devices: int) -> Iterator[MeshSizes]:
    """Meshes of so many devices that the model can be cut over: the smallest tensor x sequence first, then the longest tensor axis."""
    for size in (n for n in range(1, devices + 1) if devices % n == 0):
        for tensor in (n for n in range(size, 0, -1) if size % n == 0):
            mesh = MeshSizes(data=devices // size, sequence=size // tensor, tensor=tensor)
            try:
                local_part(work.config, mesh)
            except ValueError:
                continue
            yield mesh


def choose_mesh(work: Workload, devices: int, limit: int, name: str = "", *, reducible: bool = True) -> MeshChoice:
    """The mesh to run a workload on.

    Args:
        work: of the largest bucket that will be asked for.
        devices: how many there are.
        limit: bytes of memory of each.
        name: of the devices for messages, such as "v5e:4x4" or "TPU v5 lite"; of a known generation, the smallest slice that
            would do is named where these are too few.
        reducible: whether a reduction is a way out that may be named.

    Raises:
        DoesNotFit: no mesh of so many devices has memory enough.
    """
    found = _smallest(work, devices, limit)
    if found is not None:
        return MeshChoice(*found, _why(work, *found, limit, devices))
    tried = [(memory(work, mesh), mesh) for mesh in candidates(work, devices)]
    nearest, mesh = min(tried, key=lambda pair: pair[0].peak(limit))
    raise DoesNotFit(_too_large(work, mesh, nearest, limit, devices, name, reducible), mesh)


def _smallest(work: Workload, devices: int, limit: int) -> tuple[MeshSizes, Memory] | None:
    """A mesh of the smallest tensor x sequence that has memory enough and leaves some free, else of one that has just enough.

    Of several of one size, the first that takes no recomputing of activations. None: none has memory enough.
    """
    by_size = itertools.groupby(candidates(work, devices), key=lambda mesh: mesh.tensor * mesh.sequence)
    found = [[(mesh, memory(work, mesh)) for mesh in meshes] for _, meshes in by_size]
    for room in (int(limit * (1 - HEADROOM)), limit):
        for pairs in found:
            comfortable = (pair for pair in pairs if pair[1].peak() <= room)
            tight = (pair for pair in pairs if pair[1].fits(room))
            if (first := next(itertools.chain(comfortable, tight), None)) is not None:
                return first
    return None


def first_that_fits(work: Workload, generation: str, *, one_host: bool = False) -> Estimate | None:
    """The smallest usual slice of a generation on which a workload fits, on the mesh that is chosen there; None: none does.

    Args:
        work: what is to be run.
        generation: of `hybridvlm.hardware.SLICES`.
        one_host: leave out slices of several hosts.
    """
    for where in usual_slices(generation):
        work = dataclasses.replace(work, platform=where.platform)
        if one_host and where.hosts > 1:
            break
        found = _smallest(work, where.chips, where.chip.hbm_bytes)
        if found is not None:
            return estimate_on(work, where, found[0])
    return None


def check_fits(
    work: Workload, mesh: Any, devices: int, limit: int | None, name: str = "", *, reducible: bool = True
) -> None:
    """Refuse a workload that the devices at hand have no memory for.

    Args:
        work: of the largest bucket that will be asked for.
        mesh: of the model, None for one device.
        devices: how many devices there are, for the way out.
        limit: bytes of memory of each; None is not known, and refuses nothing.
        name: of the devices, as JAX has it.
        reducible: whether a reduction is a way out that may be named.

    Raises:
        DoesNotFit: with what it needs, part by part, and what would do.
    """
    if limit is None:
        return
    sizes = MeshSizes.of(mesh)
    found = memory(work, sizes)
    if not found.fits(limit):
        raise DoesNotFit(_too_large(work, sizes, found, limit, devices, name, reducible), sizes)


def _why(work: Workload, mesh: MeshSizes, found: Memory, limit: int, devices: int) -> str:
    if devices == 1:
        return f"one device: {_gb(found.peak(limit))} of {_gb(limit)}"
    needs = f"{_gb(found.peak(limit))} of {_gb(limit)} on each of {devices} devices for {_asked(work)}"
    cut = mesh.tensor * mesh.sequence
    if cut == 1:
        return f"mesh {mesh}: the model fits on one device, and every device has prompts of its own ({needs})"
    return f"mesh {mesh}: fewer than {cut} devices do not hold a prompt ({needs})"


def _too_large(
    work: Workload, mesh: MeshSizes, found: Memory, limit: int, devices: int, name: str, reducible: bool
) -> str:
    program = max(("tower", "prefill", "decode"), key=lambda p: found.program(p, least=True))
    parts = {"weights": found.weights, "caches": found.caches + found.states, "visual tokens": found.visual}
    parts |= {"tower": {"tower": found.tower}, "prefill": {"activations": found.least_activations}}.get(
        program, {"decoding": found.decode}
    )
    listed = ", ".join(f"{part} {_gb(size)}" for part, size in parts.items() if size)
    text = (
        f"{work.config.name or 'the model'} with {_asked(work)} needs {_gb(found.peak(limit))} on each device ({listed}), "
        f"and {'each has' if devices > 1 else 'it has'} {_gb(limit)} ({mesh})"
    )
    return f"{text}; {_way_out(work, devices, limit, name, reducible)}"


def _way_out(work: Workload, devices: int, limit: int, name: str, reducible: bool) -> str:
    generation = KINDS.get(name, name.partition(":")[0])
    found = _smallest(work, devices, limit) if devices > 1 else None
    if found is not None:
        return f"--mesh {found[0]} would do"
    # the commands cut a model over the devices of one host
    enough = first_that_fits(work, generation, one_host=True) if generation in SLICES else None
    less = _less(work, reducible)
    if enough is None:
        return f"take {_one_of([*less, 'more devices (python -m hybridvlm.plan lists those that would do)'])}"
    out = f"the smallest slice that would do is {enough.slice.name} with --mesh {enough.mesh}"
    return f"{out}; or take {_one_of(less)}" if less else out


def _one_of(ways: list[str]) -> str:
    *others, last = ways
    return f"{', '.join(others)} or {last}" if others else last


def _less(work: Workload, reducible: bool) -> list[str]:
    """What of a workload may be made less: that of it which is not as little as can be already."""
    ways = {
        "fewer frames": work.frames > 1,
        "a smaller --batch-size": work.batch > 1,
        "bfloat16": work.dtype == "float32",
        "a reduction": reducible and work.frames > 0 and work.reduction is None,
        "a smaller budget": work.reduction is not None,
    }
    return [way for way, open_ in ways.items() if open_]


def _asked(work: Workload) -> str:
    budget = "" if work.reduction is None else f" at {work.reduction.budget:.0%}"
    batch = f", {work.batch} at once" if work.batch > 1 else ""
    return f"{work.frames} frames and {work.text} text tokens{budget}{batch}, {work.dtype}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
