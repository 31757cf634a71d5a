"""Rotary position embedding: one axis, three axes (M-RoPE), and the two axes of a picture."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Float


def apply_rope(
    x: Float[Array, "B L H P"],
    position: jax.Array,
    theta: float = 10000.0,
    fraction: float = 1.0,
    sections: tuple[int, ...] = (),
    interleaved: bool = False,
) -> Float[Array, "B L H P"]:
    """Turn each pair (i, i + R/2) of the first R = fraction * P channels by position * theta ** (-2i/R) radians.

    x [B,L,H,P] queries or keys; position [B,L] int32 or float, in tokens; channels from R on pass through.
    M-RoPE (arXiv 2409.12191): position [B,L,3] gives time, row and column, and `sections` how many of the R/2 pairs follow each:
    one section after the other, or `interleaved` (arXiv 2511.21631) as time, row, column, time, ..., until a section is used up and
    time takes the rest. A position [B,L] then stands for three equal ones, as text has them.
    Angles and rotation in fp32; returns [B,L,H,P] in x.dtype. Raises ValueError if R is not an even number of channels, or the
    sections do not add up to R/2.
    """
    three = position.ndim == 3 and position.shape[-1] == 3 and bool(sections)
    if x.ndim != 4 or position.shape[:2] != x.shape[:2] or not (three or position.ndim == 2):
        expected = "[B,L] or [B,L,3]" if sections else "[B,L]"
        raise ValueError(f"position: expected {expected} for x [B,L,H,P], got {position.shape} for x {x.shape}")
    width = x.shape[-1]
    rotated = round(fraction * width)
    if not 0 <= rotated <= width or rotated % 2 or abs(rotated - fraction * width) > 1e-6:
        raise ValueError(
            f"fraction: expected an even number of the {width} channels to rotate, got {fraction} ({fraction * width})"
        )
    if rotated == 0:
        return x
    rate = theta ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    axis_position = position.astype(jnp.float32)
    if sections:
        axes = pair_axes(sections, interleaved)
        if len(axes) != rotated // 2:
            raise ValueError(f"sections: expected a sum of {rotated // 2} pairs, got {sections} ({len(axes)})")
        axis_position = axis_position[..., axes] if three else axis_position[..., None]
    else:
        axis_position = axis_position[..., None]
    return rotate_pairs(x, axis_position * rate)


def rotate_pairs(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Turn pair (i, i + R/2) of x [...,L,H,P] by angle [...,L,R/2] radians, the same for all heads; P - R channels pass through."""
    rotated = 2 * angle.shape[-1]
    angle = angle.astype(jnp.float32)[..., None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = jnp.split(x[..., :rotated].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
    return turned if rotated == x.shape[-1] else jnp.concatenate([turned, x[..., rotated:]], axis=-1)


@functools.cache
def pair_axes(sections: tuple[int, ...], interleaved: bool) -> np.ndarray:
    """Which of the axes (0 time, 1 row, 2 column) each pair follows: [sum of sections] int."""
    if len(sections) != 3 or min(sections) < 0:
        raise ValueError(f"sections: expected three counts of pairs (time, row, column), got {sections}")
    pairs = sum(sections)
    if not interleaved:
        return np.repeat(np.arange(3), sections)
    axes = np.zeros(pairs, int)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    if np.bincount(axes, minlength=3).tolist() != list(sections):
        raise ValueError(
            f"sections: {sections} cannot be interleaved; time must have at least as many as row and column"
        )
    return axes


def axial_angles(position: np.ndarray, width: int, theta: float = 10000.0) -> np.ndarray:
    """Angles for a picture: position [n,2] (row, column) -> [n,width/2] fp32, the first half by the row, the second by the column.

    Each axis has its own full range of rates, theta ** (-4j/width) for j < width/4; use with `rotate_pairs`.
    """
    if width % 4:
        raise ValueError(f"width: expected head channels divisible by 4 for two axes of pairs, got {width}")
    rate = theta ** (-np.arange(0, width // 2, 2, dtype=np.float32) / np.float32(width // 2))
    angle = np.asarray(position, np.float32)[..., None] * rate.astype(np.float32)
    return angle.reshape(*angle.shape[:-2], width // 2)
