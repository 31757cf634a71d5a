"""Meshes of devices: their four axes, how they are made, and how people write them down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

# devices of the last one are neighbours
AXES = ("data", "fsdp", "sequence", "tensor")


def mesh_sizes(text: str) -> dict[str, int]:
    """The sizes in a text such as "data=-1,tensor=2", for `make_mesh`. ValueError for anything else."""
    sizes: dict[str, int] = {}
    for pair in text.split(","):
        axis, _, size = (part.strip() for part in pair.partition("="))
        known = axis in AXES and axis not in sizes
        if not known or not (size == "-1" or (size.isascii() and size.isdigit() and int(size) > 0)):
            raise ValueError(
                f"--mesh takes a comma list of {', '.join(f'{a}=N' for a in AXES)}, one N may be -1 (the rest); got {pair!r}"
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"--mesh takes one -1, the rest of the devices, got {text!r}")
    return sizes


def with_rest(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The sizes of a mesh over so many devices, one that is -1 being the rest of them (at least 1)."""
    fixed = math.prod(size for size in sizes.values() if size != -1)
    return {axis: max(1, devices // fixed) if size == -1 else size for axis, size in sizes.items()}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, sequence and tensor over `devices` (default: all there are); one size may be -1: the rest.

    data, fsdp: examples of a batch; fsdp cuts the matrices as well. sequence: shards of a row. tensor: heads and channels.
    Raises ValueError where the sizes do not fill the devices.
    """
    devices = jax.devices() if devices is None else devices
    asked = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
    if list(asked.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in asked.values()):
        raise ValueError(f"make_mesh: sizes must be at least 1, one of them may be -1, got {asked}")
    sizes = tuple(with_rest(asked, len(devices)).values())
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"make_mesh: {'x'.join(map(str, sizes))} ({' x '.join(AXES)}) is not the number of devices, {len(devices)}; "
            "pass `devices` to use some of them"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def auto_mesh(mesh: Mesh) -> Mesh:
    """The mesh with axes that XLA cuts by, as the layers count on; those of `jax.make_mesh` take every cut written out.

    Raises:
        TypeError: it is no mesh.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, as make_mesh gives it, got {type(mesh).__name__}")
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == types:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether a mesh has devices of several processes, so that all of them have to run the same programs in the same order."""
    return mesh is not None and len({device.process_index for device in mesh.devices.flat}) > 1


def tensor_size(mesh: Mesh | None) -> int:
    """Devices along the mesh's tensor axis. ValueError for a mesh with an axis that no rule knows."""
    if mesh is None:
        return 1
    unknown = [axis for axis, size in mesh.shape.items() if axis not in AXES and size > 1]
    if unknown:
        raise ValueError(f"mesh: expected axes out of {AXES}, as make_mesh gives them, got {tuple(mesh.shape)}")
    return mesh.shape.get("tensor", 1)


def full_mesh(mesh: Mesh) -> Mesh:
    """The mesh with all of `AXES`, in that order; those that it leaves out are of one device."""
    mesh = auto_mesh(mesh)
    tensor_size(mesh)  # refuses an axis that no rule knows
    if mesh.axis_names == AXES:
        return mesh
    sizes = tuple(mesh.shape.get(axis, 1) for axis in AXES)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    known = [axis for axis in AXES if axis in mesh.shape]
    order = [mesh.axis_names.index(axis) for axis in known]
    unknown = [i for i, axis in enumerate(mesh.axis_names) if axis not in AXES]
    devices = np.transpose(mesh.devices, (*order, *unknown)).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
