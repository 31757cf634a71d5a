"""Encoding the tokens that were chosen by their pixels, and those alone, on one device and on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import ModelConfig
from hybridvlm.ops.pack import CHUNK
from hybridvlm.parallel.frames import all_frames, frame_numbers, gather_frames, own_frames, own_part
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.vision import encode_chosen, encode_frames, packed_sizes, token_values


def encode_kept(
    params: Mapping[str, Any], config: ModelConfig, pixels: jax.Array, keep: PixelSelection, frame_count: jax.Array
) -> jax.Array:
    """Visual tokens [B,F,m,D + 1], those that `keep` chooses: their last channel is 1; the others are NaN, and 0 there.

    pixels [B,F,h,w,3] uint8, or tubelets [B,F,t,h,w,3], of which frame_count [B] are real.
    On a mesh every device looks at all frames of its rows to choose, and encodes an even part of what was chosen.
    """
    if pixels.dtype != jnp.uint8:
        raise ValueError(f"pixels: {keep.method} compares whole values, uint8, got {pixels.dtype}")
    if keep.shrinks != (1, 1):
        return _shrunk(params, config, pixels, keep.shrinks)
    tower, here = config.tower, pixels.shape[1]
    pixels = all_frames(config, pixels)
    b, frames = pixels.shape[:2]
    index, devices = own_part(config), frames // here
    if keep.whole_frames:
        return own_frames(config, _whole_frames(params, config, pixels, keep, frame_count, (index, devices)))
    values = token_values(tower, pixels.reshape(b * frames, *pixels.shape[2:]))
    cells, step = values.shape[1], tower.patch_size * tower.downsample
    chosen = keep.choose(values.reshape(b, frames, cells, -1), frame_count).reshape(b * frames, cells)
    sizes = packed_sizes(tower, b * frames, cells, b * keep.count(frames, cells), CHUNK, devices)
    number = jnp.tile(jnp.arange(frames, dtype=jnp.int32), b)
    grid = pixels.shape[-3] // step, pixels.shape[-2] // step
    tokens, place = encode_chosen(
        params, tower, values, chosen, number, grid, sizes, dtype=params["embed"].dtype, part=(index, devices)
    )
    tokens, place = (all_frames(config, a[None])[0] for a in (tokens, place))
    row = jnp.full((b * frames * cells,), len(tokens), jnp.int32)
    row = row.at[place].set(jnp.arange(len(tokens), dtype=jnp.int32), mode="drop")
    tokens = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=1)
    # what was not encoded must not be taken for a token: a plan that keeps more than this encoding gives no numbers
    absent = jnp.full((1, tokens.shape[1]), jnp.nan, tokens.dtype).at[0, -1].set(0)
    visual = jnp.concatenate([tokens, absent])[row].reshape(b, frames, cells, -1)
    return own_frames(config, visual)


def _shrunk(params: Mapping[str, Any], config: ModelConfig, pixels: jax.Array, by: tuple[int, int]) -> jax.Array:
    """Visual tokens [B,F,m',D + 1] of frames whose pixels are averaged over blocks of by[0] x by[1]; the last channel is 1."""
    b, f, *inner, height, width, channels = pixels.shape
    shown = pixels.reshape(b * f, *inner, height // by[0], by[0], width // by[1], by[1], channels)
    shown = jnp.mean(shown.astype(jnp.float32), axis=(-4, -2)) / 255
    frame = jnp.tile(frame_numbers(config, f), b)
    tokens = encode_frames(params, config.tower, shown, frame, dtype=params["embed"].dtype)
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    return gather_frames(config, tokens.reshape(b, f, *tokens.shape[1:]))


def _whole_frames(
    params: Mapping[str, Any],
    config: ModelConfig,
    pixels: jax.Array,
    keep: PixelSelection,
    frame_count: jax.Array,
    part: tuple[jax.Array | int, int],
) -> jax.Array:
    """`encode_kept` of whole frames, all pixels [B,F,...] given: those that stay go through the tower as they are, an even part of them
    on each of the devices of `part` (which, how many)."""
    tower, (index, devices) = config.tower, part
    b, frames = pixels.shape[:2]
    # of every frame one value: what is chosen does not depend on pixels
    chosen = keep.choose(jnp.zeros((b, frames, 1, 0), jnp.uint8), frame_count)[..., 0]
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, : keep.frames(frames)]
    number = jnp.arange(b, dtype=order.dtype)[:, None] * frames + order
    real = jnp.take_along_axis(chosen, order, axis=1).reshape(-1)
    spare = -real.shape[0] % devices
    number, real = jnp.pad(number.reshape(-1), (0, spare)), jnp.pad(real, (0, spare))
    size = number.shape[0] // devices
    own = jax.lax.dynamic_slice_in_dim(number, index * size, size)
    shown = pixels.reshape(b * frames, *pixels.shape[2:])[own].astype(jnp.float32) / 255
    tokens = encode_frames(params, tower, shown, own % frames, dtype=params["embed"].dtype)
    tokens = all_frames(config, tokens[None])[0]
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, 1)), constant_values=1)
    absent = jnp.full((b * frames, *tokens.shape[1:]), jnp.nan, tokens.dtype).at[..., -1].set(0)
    visual = absent.at[jnp.where(real, number, b * frames)].set(tokens, mode="drop")
    return visual.reshape(b, frames, *tokens.shape[1:])


def check_kept(config: ModelConfig, visual: jax.Array | None, plan: ReductionPlan | None) -> None:
    """ValueError for visual tokens that were encoded for a plan of another kind: chosen ones alone, or all."""
    if visual is None:
        return
    planes = 0 if config.vision is None else len(config.vision.deepstack)
    partial = visual.shape[-1] == config.width * (1 + planes) + 1
    keep = None if plan is None else plan.pixel_selection
    if partial and keep is None:
        name = "a dense pass" if plan is None else repr(plan.method)
        raise ValueError(
            f"visual: encoded for a method that spares the tower, {name} needs all tokens; encode without `keep`"
        )
    if keep is not None and not partial:
        raise ValueError(
            f"visual: {keep.method} chooses by pixels, before the tower; encode with keep=plan.pixel_selection"
        )
    if keep is not None and keep.shrinks != (1, 1):
        assert plan is not None
        m = plan.decoder_tokens // plan.decoder_frames
        if visual.shape[2] != m:
            raise ValueError(
                f"visual: {keep.method} has {m} tokens of a frame here, got {visual.shape[2]}; encode for this plan"
            )
