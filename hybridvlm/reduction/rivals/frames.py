"""Fewer frames: the baseline that costs nothing, and beats many methods (VTC-Bench, arXiv 2510.07143).

The others never enter the tower: it encodes the frames that stay and no other.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from hybridvlm.reduction.choose import frames_of
from hybridvlm.reduction.methods import _register
from hybridvlm.reduction.pixels import PixelSelection


def frames_kept(frames: int, share: float) -> int:
    """Frames that stay of `frames`: the nearest to the share, a half upwards, and one at least."""
    return max(1, math.floor(frames * share + 0.5)) if frames else 0


@_register(
    "frames",
    "input",
    count=lambda frames, m, share: frames_kept(frames, share) * m,
    floor=lambda frames, m: 1 / frames,
    keeps="whole frames",
    encodes=frames_kept,
    needs=("pixels",),
)
def frames(values: jax.Array, frame_count: jax.Array, keep: PixelSelection) -> jax.Array:
    """whole frames, evenly spread; the others never enter the tower"""
    count, m = values.shape[1:3]
    kept = jnp.asarray([keep.frames(n) for n in range(count + 1)], jnp.int32)[frame_count]
    return jnp.repeat(frames_score(frame_count, kept, count), m, axis=1)


def frames_score(frame_count: jax.Array, kept: jax.Array, frames: int) -> jax.Array:
    """1 for the `kept` [B] of frame_count [B] frames that lie evenly, 0 for the others: [B,F] fp32.

    A frame that stays keeps its time, its position and what the prompt says before it: the others leave gaps.
    Towers see each frame by itself, so that leaving frames out before the tower gives the same tokens.
    """
    whole, kept = jnp.maximum(frame_count, 1)[:, None], kept[:, None]
    edges = (jnp.arange(frames + 1, dtype=jnp.int32)[None] * kept + whole // 2) // whole
    return ((edges[:, 1:] > edges[:, :-1]) & frames_of(frame_count, frames)).astype(jnp.float32)
