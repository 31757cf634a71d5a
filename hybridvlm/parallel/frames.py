"""The frames of videos, dealt over all devices of a mesh: each encodes its own, and what it makes goes where the prompt needs it.

Frames do not see each other, so whatever the mesh is cut for later can help to encode. Those of one row are dealt over the sequence
axis first, so that a shard of the row gets that part of the video, and then over the tensor axis. Where a batch has fewer rows
than there are devices for them, its frames are dealt over those devices too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.config import ModelConfig
from hybridvlm.parallel.tensor import LocalConfig


def frame_numbers(c: ModelConfig, frames: int) -> jax.Array:
    """The positions in their video of the `frames` frames of each row that a device encodes."""
    first = jax.lax.axis_index(c.frame_axes) * frames if isinstance(c, LocalConfig) and c.frame_axes else 0
    return first + jnp.arange(frames, dtype=jnp.int32)


def own_part(c: ModelConfig) -> jax.Array | int:
    """Which of the devices that the frames of a row are dealt over this one is."""
    return jax.lax.axis_index(c.frame_axes) if isinstance(c, LocalConfig) and c.frame_axes else 0


def all_frames(c: ModelConfig, array: jax.Array) -> jax.Array:
    """[B,f,...] of a device's frames, or of its part of something else -> [B,F,...] of all that frames are dealt over."""
    if not isinstance(c, LocalConfig) or not c.frame_axes:
        return array
    return jax.lax.all_gather(array, c.frame_axes, axis=1, tiled=True)


def own_frames(c: ModelConfig, visual: jax.Array) -> jax.Array:
    """Visual tokens [B,F,m,D] of all frames, whole on every device -> what `gather_frames` gives of them."""
    if not isinstance(c, LocalConfig):
        return visual
    if c.row_axis and c.row_axis in c.frame_axes:
        frames = visual.shape[1] // c.shards
        start = jax.lax.axis_index(c.row_axis) * frames
        visual = jax.lax.dynamic_slice_in_dim(visual, start, frames, axis=1)
    return _own_row(c, visual)


def gather_frames(c: ModelConfig, visual: jax.Array) -> jax.Array:
    """Visual tokens [B,f,m,D] of a device's frames -> [B,F,m,D] of its rows, of its shard of the video where rows are cut."""
    if not isinstance(c, LocalConfig):
        return visual
    together = tuple(axis for axis in c.frame_axes if axis != c.row_axis)
    visual = jax.lax.all_gather(visual, together, axis=1, tiled=True) if together else visual
    return _own_row(c, visual)


def _own_row(c: LocalConfig, visual: jax.Array) -> jax.Array:
    if not set(c.batch_axes) & set(c.frame_axes):
        return visual
    # every device had frames of all rows, and keeps the row that is its own
    row = jax.lax.axis_index(c.batch_axes)
    own = jax.lax.dynamic_slice_in_dim(visual, jnp.minimum(row, visual.shape[0] - 1), 1, axis=0)
    return jnp.where(row < visual.shape[0], own, 0)
