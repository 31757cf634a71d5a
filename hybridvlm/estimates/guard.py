"""What the commands ask before they load or compile: whether the device at hand can hold what is wanted of it."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hybridvlm.config import Buckets, Reduction
from hybridvlm.estimates.choose import DoesNotFit, MeshChoice, check_fits, choose_mesh
from hybridvlm.estimates.memory import training_memory
from hybridvlm.estimates.workload import MeshSizes, Workload
from hybridvlm.hardware import memory_limit
from hybridvlm.parallel.mesh import make_mesh, mesh_sizes

if TYPE_CHECKING:
    from hybridvlm.checkpoints.describe import Description

# of a checkpoint, once it is clear what it is
FromModel = Callable[["Description"], Any]


def refuse_too_large(
    name_or_path: str | os.PathLike[str],
    *,
    frames: int | FromModel | None = None,
    batch: int = 1,
    dtype: Any = None,
    revision: str | None = None,
    reduction: Reduction | FromModel | None = None,
    buckets: Buckets | FromModel | None = None,
    reducible: bool = True,
    mesh: Any = None,
) -> None:
    """Refuse a model that this machine's devices cannot hold with the smallest prompt of so many frames, before it is loaded.

    Frames, reduction and buckets may be functions of what the model is, its `Description`.

    Args:
        name_or_path: as `hybridvlm.load` takes it.
        frames: of a video (default: as many as a question looks at).
        batch: prompts at once.
        dtype: of weights and activations (default: as the model is loaded).
        revision: on the hub.
        reduction: what is dropped (default: nothing).
        buckets: instead of the model's own.
        reducible: whether a reduction is a way out; it is none of who asks without one in any case.
        mesh: that the model is loaded onto, None for one device.

    Raises:
        DoesNotFit: with what it needs and what would do. Where the device's memory is not known, as on CPU, nothing is refused.
    """
    devices = jax.local_devices()
    limit = memory_limit(devices[0])
    if limit is not None:
        _, work = _works(name_or_path, frames, batch, dtype, revision, reduction, buckets)
        check_fits(work, mesh, len(devices), limit, devices[0].device_kind, reducible=reducible)


def mesh_option(
    text: str | None, name_or_path: str | os.PathLike[str], *, across: bool = False, **work: Any
) -> Mesh | None:
    """The mesh that a command's `--mesh` asks for, over this process's devices, once it is clear that the model fits there.

    Args:
        text: such as "data=4,tensor=2"; None or "auto": what `choose_here` finds, which is said on stderr.
        name_or_path: the model.
        across: whether the mesh may be over the devices of all processes: where the text has as many as there are of them in all, or
            where a process's own do not hold the model.
        work: as of `refuse_too_large`.

    Returns:
        The mesh; None for one device.

    Raises:
        DoesNotFit: the devices have no memory for it.
        ValueError: the text is no mesh, or not one of so many devices.
    """
    if text not in (None, "auto"):
        mesh = _mesh_of(text, across and jax.process_count() > 1)
        refuse_too_large(name_or_path, mesh=mesh, **work)
        return mesh
    devices = jax.local_devices()
    try:
        choice = choose_here(name_or_path, **work)
    except DoesNotFit:
        if not across or jax.process_count() == 1:
            raise
        devices = jax.devices()
        choice = choose_here(name_or_path, devices=devices, **work)
    if choice is None:
        return None
    print(f"mesh: {choice.why}", file=sys.stderr)
    return make_mesh(**dataclasses.asdict(choice.mesh), devices=devices)


def _mesh_of(text: str, across: bool) -> Mesh:
    """The mesh of a text over this process's devices, or with `across` over those of all processes where it takes as many.

    ValueError, for who writes options, where it is of another number.
    """
    sizes, devices = mesh_sizes(text), jax.local_devices()
    taken = math.prod(size for size in sizes.values() if size != -1)
    if across and -1 not in sizes.values() and taken == jax.device_count():
        return make_mesh(**sizes, devices=jax.devices())
    if len(devices) % taken if -1 in sizes.values() else taken != len(devices):
        several = "a multiple of " if -1 in sizes.values() else ""
        visible = {"gpu": "CUDA_VISIBLE_DEVICES", "tpu": "TPU_VISIBLE_CHIPS"}.get(devices[0].platform)
        fewer = f", or set {visible or 'CUDA_VISIBLE_DEVICES or TPU_VISIBLE_CHIPS'}" if taken < len(devices) else ""
        raise ValueError(
            f"--mesh {text} takes {several}{taken} devices, and this process has {len(devices)}; "
            f"one axis may be -1: the rest{fewer}" + (f"; all processes have {jax.device_count()}" if across else "")
        )
    return make_mesh(**sizes, devices=devices)


def choose_here(
    name_or_path: str | os.PathLike[str],
    *,
    frames: int | FromModel | None = None,
    batch: int = 1,
    dtype: Any = None,
    revision: str | None = None,
    reduction: Reduction | FromModel | None = None,
    buckets: Buckets | FromModel | None = None,
    reducible: bool = True,
    devices: Sequence[Any] | None = None,
) -> MeshChoice | None:
    """The mesh of this machine's devices for a model, before it is loaded: the smallest tensor x sequence that fits, the rest data.

    Arguments as of `refuse_too_large`; devices: instead of this process's. The longest text is counted where it fits, else the
    shortest.

    Returns:
        The mesh, and why; None where one device is all there is, or where their memory is not known, as on CPU.

    Raises:
        DoesNotFit: these devices have no memory for it; the message names the smallest slice that would do.
    """
    limit = memory_limit(jax.local_devices()[0])
    if limit is None:
        return None
    devices = jax.local_devices() if devices is None else devices
    longest, shortest = _works(name_or_path, frames, batch, dtype, revision, reduction, buckets)
    try:
        choice = choose_mesh(longest, len(devices), limit)
    except DoesNotFit:
        # a short question may fit where the longest one does not
        choice = choose_mesh(shortest, len(devices), limit, devices[0].device_kind, reducible=reducible)
    return None if len(devices) == 1 else choice


def _works(
    name_or_path: str | os.PathLike[str],
    frames: int | FromModel | None,
    batch: int,
    dtype: Any,
    revision: str | None,
    reduction: Reduction | FromModel | None,
    buckets: Buckets | FromModel | None,
) -> tuple[Workload, Workload]:
    """Prompts of the bucket of so many frames, with the longest text and with the shortest."""
    # here, since estimates by themselves take none of the packages that reading a checkpoint takes
    from hybridvlm.checkpoints.describe import describe
    from hybridvlm.video import default_frames

    found = describe(name_or_path, revision)
    own = _of(buckets, found)
    found = found if own is None else dataclasses.replace(found, buckets=own)
    sizes, shown = found.buckets, 0
    if found.config.vision is not None:
        patch = found.config.vision.temporal_patch
        shown = _of(frames, found) or default_frames(found.config, sizes)
        # what is over the largest bucket is refused by name once the model is loaded
        shown = next((n * patch for n in sizes.frames if n * patch >= shown), shown)
    kind = found.dtype if dtype is None else dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    where = "tpu" if jax.local_devices()[0].platform == "tpu" else "gpu"
    text = [max(1, sizes.text[end]) for end in (-1, 0)]
    work = Workload(found.config, shown, text[0], batch, sizes.max_new, kind, _of(reduction, found), where)
    return work, dataclasses.replace(work, text=text[1])


def _of(value: Any, found: Description) -> Any:
    return value(found) if callable(value) else value


def refuse_training(work: Workload, mesh: Any, trained: int) -> None:
    """Refuse a training whose steps this machine's devices cannot hold even where activations are computed again.

    Raises:
        DoesNotFit: with what it needs and the way out.
    """
    limit, sizes = memory_limit(jax.local_devices()[0]), MeshSizes.of(mesh)
    if limit is None:
        return
    needed = training_memory(work, sizes, trained, least=True)
    if needed > limit:
        raise DoesNotFit(
            f"a step of {work.batch} rows of {work.visual_tokens + work.text:,} tokens with {trained:,} trained parameters needs "
            f"{needed / 1e9:.1f} GB on each device, which has {limit / 1e9:.1f} GB ({sizes}); use a mesh with a longer fsdp axis "
            "(mesh.fsdp), fewer rows or frames, a smaller budget, or LoRA (lora.rank)",
            sizes,
        )
