"""Models on a mesh: where arrays lie, and a model's programs as one explicit program of all its devices.

Every function that a model compiles runs inside one `jax.shard_map`: each device executes the ordinary code on its part of the
parameters, described by a `LocalConfig`, and all that passes between devices are the named collectives of hybridvlm/parallel/.
Arguments lie as the specs here say, results as the family's `output_specs`; nothing is left to a partitioner.

Rows (examples) are cut over data and fsdp; a batch is filled up with rows of padding to come out even, which come back at the end of
every result. Of what comes from the host each device is sent its own part alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridvlm import sharding
from hybridvlm.models.family import Family
from hybridvlm.parallel.layout import unpermute_for_tp
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.sharding import INFERENCE_RULES


def check_mesh(family: Family, config: Any, mesh: Mesh) -> Mesh:
    """The mesh with all axes. ValueError for an axis that the family does not run over, or that does not divide its sizes."""
    mesh = sharding.full_mesh(mesh)
    wrong = [f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1 and axis not in family.MESH_AXES]
    if wrong:
        raise ValueError(
            f"mesh: models of family {family.NAME!r} run over {', '.join(family.MESH_AXES)}, got {', '.join(wrong)}"
        )
    sharding.local_config(config, sharding.tensor_size(mesh))
    return mesh


def place_params(config: Any, params: dict[str, Any], mesh: Mesh, *, consume: bool = False) -> dict[str, Any]:
    """The whole model's parameters, wherever they lie, laid out for the mesh and put on its devices; consume as of `shard_params`."""
    if sharding.is_whole_everywhere(mesh):
        placed = jax.device_put(params, NamedSharding(mesh, P()))
    else:
        placed = sharding.shard_params(params, config, mesh, INFERENCE_RULES, consume=consume)
    return row_major(placed, consume=consume)


def row_major(params: dict[str, Any], *, consume: bool = False) -> dict[str, Any]:
    """Parameters in memory as a model's programs read them, see `sharding.row_major`."""
    return jax.tree.map(lambda a: sharding.row_major(a, consume=consume), params)


def whole_params(config: Any, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The inverse of `place_params`: NumPy arrays on this host."""
    return unpermute_for_tp(to_host(params), config, sharding.tensor_size(mesh))


def part_of(config: Any, params: Mapping[str, Any], mesh: Mesh) -> LocalConfig:
    """What one device of the mesh holds of a model with these parameters, laid out for it."""
    specs = jax.tree.map(lambda a: a.sharding.spec, dict(params))
    return sharding.local_part(config, mesh, specs, INFERENCE_RULES)


def row_parts(mesh: Mesh) -> int:
    """In how many parts the rows of a batch are cut."""
    return math.prod(mesh.shape[axis] for axis in INFERENCE_RULES.batch)


def to_host(tree: Any) -> Any:
    """Arrays as NumPy's, whole on every host; those that lie on several hosts take an exchange between them."""

    def fetch(a: Any) -> Any:
        if not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated:
            return np.asarray(a)
        return multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(fetch, tree)


def put(array: Any, mesh: Mesh, spec: P) -> jax.Array:
    """An array on the mesh; of one of NumPy, the same on every host, each device is sent its part alone."""
    where = NamedSharding(mesh, spec)
    if isinstance(array, jax.Array):
        return array if array.sharding == where else jax.device_put(array, where)
    return jax.make_array_from_callback(np.shape(array), where, lambda index: np.asarray(array)[index])


def filled(size: int, multiple: int) -> int:
    """The next multiple."""
    return size + -size % multiple


def fill(array: Any, axis: int, multiple: int) -> Any:
    """An array with zeros at the end of an axis, up to a multiple."""
    spare = filled(array.shape[axis], multiple) - array.shape[axis]
    if not spare:
        return array
    width = [(0, spare if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, width) if isinstance(array, jax.Array) else np.pad(array, width)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B,...], filled up to a number of rows that is cut evenly."""
    spec, parts = P(INFERENCE_RULES.batch), row_parts(mesh)
    on_mesh = lambda a: fill(a if isinstance(a, jax.Array) else np.asarray(a), 0, parts)  # noqa: E731
    return jax.tree.map(lambda a: put(on_mesh(a), mesh, spec), tree)


def check_visual(batch: Any, visual: Any, mesh: Mesh | None) -> None:
    """ValueError for visual tokens that a batch has no use for, or that it lacks."""
    frames = int(np.max(to_host(batch.frame_count), initial=0))
    if visual is None and frames:
        raise ValueError(f"visual is None, but the batch has visual tokens of {frames} frames; pass encode(frames)")
    if visual is None or not hasattr(visual, "shape"):
        return
    rows = len(batch.input_ids)
    most = rows if mesh is None else rows + -rows % row_parts(mesh)
    if not rows <= visual.shape[0] <= most or visual.shape[1] < frames:
        raise ValueError(
            f"visual must be [B,F,m,D] with B = {rows} and at least {frames} frames, as the batch has, "
            f"got {visual.shape}"
        )
    needed = int(np.max(np.sum(to_host(getattr(batch, "frame", -1)) >= 0, axis=-1), initial=0))
    if needed > visual.shape[1] * visual.shape[2]:
        raise ValueError(
            f"the batch has indices for {needed} visual tokens, and visual holds {visual.shape[1]} frames of "
            f"{visual.shape[2]} tokens; encode frames of the size that the prompt was laid out for"
        )


def put_visual(visual: Any, mesh: Mesh) -> jax.Array:
    """Visual tokens [B,F,m,D], filled up likewise, and in frames to be cut over the sequence axis."""
    visual = fill(fill(visual, 0, row_parts(mesh)), 1, mesh.shape["sequence"])
    return put(visual, mesh, P(INFERENCE_RULES.batch, INFERENCE_RULES.row))


def frame_dealing(rows: int, mesh: Mesh) -> tuple[int, tuple[str, ...], P]:
    """How pixels [B,F,...] of `rows` examples are dealt: what B is filled up to a multiple of, the axes that F is cut over, their spec.

    A batch with a row for every device along the batch axes is cut by rows; of a smaller one all devices take frames.
    """
    parts = row_parts(mesh)
    by_row = rows >= parts
    axes = (*INFERENCE_RULES.row, *(() if by_row else INFERENCE_RULES.batch), "tensor")
    return (parts if by_row else 1), axes, P(INFERENCE_RULES.batch if by_row else None, axes)


def put_frames(pixels: np.ndarray, mesh: Mesh, local: LocalConfig) -> tuple[jax.Array, LocalConfig]:
    """Pixels [B,F,...] on the devices that encode them, and what these devices are, for `encode`."""
    multiple, axes, spec = frame_dealing(len(pixels), mesh)
    pixels = fill(fill(pixels, 0, multiple), 1, math.prod(mesh.shape[axis] for axis in axes))
    return put(pixels, mesh, spec), dataclasses.replace(local, frame_axes=axes)


def frame_counts(pixels: Any, given: Any = None) -> np.ndarray:
    """The real frames [B] of pixels [B,F,...]; all of them where none are given. ValueError where they do not fit."""
    rows, frames = pixels.shape[:2]
    counts = np.full(rows, frames, np.int32) if given is None else np.asarray(given, np.int32)
    if counts.shape != (rows,) or counts.min() < 0 or counts.max() > frames:
        raise ValueError(f"frame_count: expected [B] = [{rows}] of 0 to {frames}, the frames of pixels, got {counts}")
    return counts


def put_counts(counts: np.ndarray, mesh: Mesh) -> jax.Array:
    """One number for each example [B], where `put_frames` puts its pixels."""
    multiple, _, spec = frame_dealing(len(counts), mesh)
    return put(fill(counts, 0, multiple), mesh, P(spec[0]))


def arguments_specs(args: Any) -> tuple[P, ...]:
    """Where the arrays of a program's arguments lie on the mesh, leaf by leaf; plain numbers are the same everywhere."""

    def spec(leaf: Any) -> P:
        where = getattr(leaf, "sharding", None)
        return where.spec if isinstance(where, NamedSharding) else P()

    return tuple(spec(leaf) for leaf in jax.tree.leaves(args))


def over_mesh(
    *args: Any,
    phase: Callable[..., Any],
    results: Callable[..., Any],
    mesh: Mesh,
    specs: tuple[P, ...],
    family: Family,
    config: LocalConfig,
    **static: Any,
) -> Any:
    """`phase(*args, family=, config=, **static)`, of functions.py, on every device of the mesh, each with its part.

    specs: of `arguments_specs`. results: how what it returns lies on the mesh, see `functions.RESULTS`.
    """

    def part(*args: Any) -> Any:
        return phase(*args, family=family, config=config, **static)

    in_specs = jax.tree.unflatten(jax.tree.structure(args), specs)
    out_specs = results(family, config, in_specs, static)
    # what is whole on every device is so by construction (sums over an axis); the checker cannot see into kernels
    return jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)
