"""Tower and connector over chosen tokens alone: the patches of the others never enter.

Of a transformer, the patches that are kept of many frames run packed (`hybridvlm.ops.pack`), each among those of its
own frame and with the frame's class and register tokens, where the tower has them. A convolutional stem sees every
patch by itself anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import VisionConfig
from hybridvlm.ops.pack import Packing, PackSizes, attend_in_frames, pack, pack_sizes
from hybridvlm.ops.platforms import platform
from hybridvlm.ops.rope import axial_angles, rotate_pairs
from hybridvlm.vision.connector import connect_tokens
from hybridvlm.vision.qwen_vit import merge_order, position_rows, qwen_merge
from hybridvlm.vision.radio import position_table, vit_block
from hybridvlm.vision.stem import stem_features

Params = dict[str, Any]

# how the values of a token's patches lie, as the weights of the patch embedding have them
_ORDER = {
    "radio": "f t (r a p) (c b q) ch -> f (r c) (a b t ch p q)",
    "qwen": "f t (r a p) (c b q) ch -> f (r c) (a b ch t p q)",
    "stem": "f t (r a p) (c b q) ch -> f (r c) (a b t p q ch)",
}


def token_values(config: VisionConfig, pixels: Any) -> Any:
    """The values of every token's patches: pixels [N,h,w,3] or [N,t,h,w,3] of any type -> [N,m,V], row-major over the tokens.

    ValueError where the sides are no multiples of a token's.
    """
    step = config.patch_size * config.downsample
    if pixels.ndim not in (4, 5) or pixels.shape[-1] != 3 or any(side % step for side in pixels.shape[-3:-1]):
        raise ValueError(
            f"pixels must be [N,h,w,3] or [N,t,h,w,3] with h and w multiples of {step}, got {pixels.shape}"
        )
    tubelets = pixels if pixels.ndim == 5 else pixels[:, None]
    side, d = config.patch_size, config.downsample
    return einops.rearrange(tubelets, _ORDER[config.kind], a=d, b=d, p=side, q=side)


def packed_sizes(config: VisionConfig, frames: int, cells: int, kept: int, chunk: int, devices: int = 1) -> PackSizes:
    """How `kept` of the tokens of `frames` frames of `cells` tokens are packed for a tower; see `pack_sizes`."""
    patches, prefix = rows_of_tower(config)
    align = 128 if platform() == "tpu" else 1
    return pack_sizes(
        frames, cells, kept, patches=patches, prefix=prefix, chunk_frames=chunk, devices=devices, align=align
    )


def rows_of_tower(config: VisionConfig) -> tuple[int, int]:
    """Rows that a tower has of a token, and those of a frame besides."""
    return config.downsample**2, config.prefix_tokens if config.kind == "radio" else 0


def encode_chosen(
    params: Mapping[str, Any],
    config: VisionConfig,
    values: jax.Array,
    chosen: jax.Array,
    frame: jax.Array,
    grid: tuple[int, int],
    sizes: PackSizes,
    *,
    dtype: Any = jnp.float32,
    part: tuple[Any, int] = (0, 1),
) -> tuple[jax.Array, jax.Array]:
    """Visual tokens of the chosen ones of all frames, a chunk at a time.

    Args:
        params: holds "vision" and "projector".
        config: of the tower.
        values: [N,m,V] uint8, of `token_values`.
        chosen: [N,m] bool, `sizes.kept` of them at most.
        frame: [N] int32, each frame's position in its video.
        grid: rows and columns of tokens in a frame.
        sizes: of `packed_sizes`.
        dtype: of activations.
        part: (i, n): the i-th of n equal parts of the chunks alone.

    Returns:
        tokens [K,D] as `encode_frames` gives them (with their DeepStack planes), and which token of all frames
        (frame * m + cell) each is, [K] int32; N * m: none, the token is then of no use.
    """
    packing = pack(chosen, sizes)
    index, parts = part
    own = sizes.chunks // parts
    if parts > 1:
        packing = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index * own, own, axis=0), packing)
    flat = values.reshape(-1, values.shape[-1])

    def encode(chunk: Packing) -> jax.Array:
        token = jnp.minimum(chunk.token, flat.shape[0] - 1)
        pixels = _normalised(config, flat[token])
        if config.kind == "stem":
            side = config.patch_size
            x = stem_features(params["vision"], config, pixels.reshape(-1, side, side, 3).astype(dtype))
            return connect_tokens(params["projector"], config, x, token % sizes.cells, frame[token // sizes.cells])
        return _transformer(params, config, pixels.astype(dtype), token % sizes.cells, chunk, grid, sizes)

    if own == 1:
        tokens = encode(jax.tree.map(lambda a: a[0], packing))
    else:
        tokens = jax.lax.map(encode, packing)
    return tokens.reshape(-1, tokens.shape[-1]), packing.token.reshape(-1)


def _normalised(config: VisionConfig, values: jax.Array) -> jax.Array:
    """uint8 values [K,V] of tokens -> float32, as `radio.normalise` makes them of pixels."""
    side = config.patch_size * config.downsample
    frames = values.shape[-1] // (3 * side * side)
    mean, std = (
        token_values(config, np.broadcast_to(np.asarray(of, np.float32), (1, frames, side, side, 3)))[0, 0]
        for of in (config.pixel_mean, config.pixel_std)
    )
    return (values.astype(jnp.float32) / 255 - mean) / std


def _transformer(
    params: Mapping[str, Any],
    config: VisionConfig,
    pixels: jax.Array,
    cell: jax.Array,
    chunk: Packing,
    grid: tuple[int, int],
    sizes: PackSizes,
) -> jax.Array:
    """Visual tokens [K,D] of one chunk: pixels [K,V] normalised, cell [K] of each token in its frame."""
    c, p, d = config, params["vision"], config.downsample
    rows, cols = grid[0] * d, grid[1] * d
    patches = pixels.reshape(cell.shape[0], d * d, -1)
    tubelets = c.kind == "radio" and c.temporal_patch > 1 and patches.shape[-1] == p["video_patch_embed"].shape[0]
    x = patches @ p["video_patch_embed" if tubelets else "patch_embed"].astype(pixels.dtype)
    if c.kind == "qwen" and c.patch_bias:
        x = x + p["patch_bias"].astype(x.dtype)
    if c.kind == "radio":
        table = einops.rearrange(position_table(p["position"], rows, cols), "(r a) (c b) w -> (r c) (a b) w", a=d, b=d)
        x = x + table.astype(x.dtype)[cell]
    elif c.position_rows:
        x = x + position_rows(p["position"], rows, cols, d).astype(x.dtype).reshape(-1, d * d, c.width)[cell]
    x = x.reshape(-1, c.width)
    spare = jnp.zeros((1, c.width), x.dtype)
    prefix = [p["prefix"].astype(x.dtype)] if sizes.prefix else []
    x = jnp.concatenate([x, *prefix, spare])[chunk.source][None]
    rope = {}
    if c.kind == "qwen":
        angle = jnp.asarray(axial_angles(merge_order(rows, cols, d), c.width // c.heads))
        of_patch = angle.reshape(-1, d * d, angle.shape[-1])[cell].reshape(-1, angle.shape[-1])
        of_row = of_patch[jnp.minimum(chunk.source, of_patch.shape[0] - 1)][None]
        rope = {"rope_fn": lambda heads: rotate_pairs(heads, of_row)}
    attend = attend_in_frames(chunk, sizes)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return vit_block(layer, c, x, attend=attend, **rope), None

    def tokens_of(x: jax.Array) -> jax.Array:
        """The patches of every token, side by side: [K,d*d,D]."""
        return x[0][chunk.first[:, None] + jnp.arange(d * d)]

    planes: list[jax.Array] = []
    at = 0
    for stop in [*(layer + 1 for layer in c.deepstack), c.layers]:
        x, _ = jax.lax.scan(block, x, jax.tree.map(lambda a, at=at, stop=stop: a[at:stop], p["blocks"]))
        if len(planes) < len(c.deepstack):
            planes.append(tokens_of(x).reshape(1, -1, c.width))
        at = stop
    features = tokens_of(x)
    if c.kind == "qwen":
        return qwen_merge(params["projector"], c, features.reshape(1, -1, c.width), planes)[0]
    return connect_tokens(params["projector"], c, features.reshape(features.shape[0], -1))
