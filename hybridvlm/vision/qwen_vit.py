"""The vision transformer of Qwen2-VL (arXiv 2409.12191) and Qwen3-VL (arXiv 2511.21631): tubelets -> visual tokens.

A tubelet is `temporal_patch` frames of the video. Its patches see one another and those of no other tubelet, their positions enter as
rotary embeddings of row and column. Four neighbours (2x2) merge into one visual token. Rows of patches lie in merge order:
merged cell by merged cell, row-major, and inside a cell its patches row-major.

Parameters of the tower (n = layers, D here its width, R = 3 * temporal_patch * patch_size^2 values of a patch, in the order channel,
frame, row, column; linear weights [in,out]):
  patch_embed [R,D] · patch_bias [D] (with patch_bias) · position [rows,rows,D] (with position_rows) ·
  blocks: as in radio.py
and of the merger (C = D * downsample^2, E = projector_width, W = the decoder's width):
  norm, norm_bias [D] · fc1 [C,E] fc1_bias [E] fc2 [E,W] fc2_bias [W] ·
  with k deepstack planes also deepstack_norm, deepstack_norm_bias [k,C] · deepstack_fc1 [k,C,E] .. deepstack_fc2_bias [k,W]
"""

from __future__ import annotations

from typing import Any, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hybridvlm.config import VisionConfig
from hybridvlm.ops.norms import layer_norm
from hybridvlm.ops.rope import axial_angles, rotate_pairs
from hybridvlm.vision.radio import RadioBlocks, last_block, normalise, received_attention, vit_block

Params = dict[str, Any]
ArrayT = TypeVar("ArrayT", jax.Array, np.ndarray)


class QwenTower(nn.Module):
    """The tower as a module; `tower.parameters()` hands out its parameters as a dict."""

    config: VisionConfig

    def setup(self) -> None:
        c = self.config
        self.patch_embed = self.param("patch_embed", nn.initializers.lecun_normal(), (patch_values(c), c.width))
        if c.patch_bias:
            self.patch_bias = self.param("patch_bias", nn.initializers.zeros, (c.width,))
        if c.position_rows:
            small = nn.initializers.normal(0.02)
            self.position = self.param("position", small, (c.position_rows, c.position_rows, c.width))
        self.blocks = RadioBlocks(c)

    def parameters(self) -> Params:
        p = {"patch_embed": self.patch_embed, "blocks": self.blocks()}
        if self.config.patch_bias:
            p["patch_bias"] = self.patch_bias
        if self.config.position_rows:
            p["position"] = self.position
        return p


class QwenMerger(nn.Module):
    """The parameters of the merger and, stacked, of those that make the DeepStack planes."""

    config: VisionConfig
    out_width: int

    def setup(self) -> None:
        c, planes = self.config, len(self.config.deepstack)
        merged = c.width * c.downsample**2

        def make(name: str, norm: int, stack: tuple[int, ...]) -> Params:
            axis = len(stack)
            dense = nn.initializers.variance_scaling(
                1.0, "fan_in", "normal", in_axis=axis, out_axis=axis + 1, batch_axis=tuple(range(axis))
            )
            zeros = nn.initializers.zeros
            return {
                "norm": self.param(f"{name}norm", nn.initializers.ones, (*stack, norm)),
                "norm_bias": self.param(f"{name}norm_bias", zeros, (*stack, norm)),
                "fc1": self.param(f"{name}fc1", dense, (*stack, merged, c.projector_width)),
                "fc1_bias": self.param(f"{name}fc1_bias", zeros, (*stack, c.projector_width)),
                "fc2": self.param(f"{name}fc2", dense, (*stack, c.projector_width, self.out_width)),
                "fc2_bias": self.param(f"{name}fc2_bias", zeros, (*stack, self.out_width)),
            }

        self.p = make("", c.width, ())
        if planes:
            stacked = make("deepstack_", merged, (planes,))
            self.p = {**self.p, **{f"deepstack_{name}": value for name, value in stacked.items()}}

    def parameters(self) -> Params:
        return dict(self.p)


def patch_values(config: VisionConfig) -> int:
    """Values of one patch: channels, frames, rows, columns."""
    return 3 * config.temporal_patch * config.patch_size**2


def patch_rows(config: VisionConfig, pixels: ArrayT) -> ArrayT:
    """Tubelets [T,t,h,w,3] -> their patches [T,n,R] in merge order, R values in the order channel, frame, row, column."""
    return einops.rearrange(
        pixels,
        "f t (r a p) (c b q) ch -> f (r c a b) (ch t p q)",
        a=config.downsample,
        b=config.downsample,
        p=config.patch_size,
        q=config.patch_size,
    )


def merge_order(rows: int, cols: int, factor: int) -> np.ndarray:
    """(row, column) of every patch of a rows x cols grid, in merge order: [n,2] int."""
    position = np.stack(np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"), axis=-1)
    return einops.rearrange(position, "(r a) (c b) position -> (r c a b) position", a=factor, b=factor)


def position_rows(table: jax.Array, rows: int, cols: int, factor: int) -> jax.Array:
    """Learned positions [side,side,D] for a grid, in merge order: [rows*cols,D] fp32.

    Bilinear with the corners of table and grid on each other; a grid of one row or column takes the table's first.
    """
    side = table.shape[0]

    def weights(size: int) -> np.ndarray:
        at = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.floor(at).astype(int)
        out = np.zeros((size, side), np.float32)
        out[np.arange(size), low] = 1 - (at - low)
        out[np.arange(size), np.minimum(low + 1, side - 1)] += at - low
        return out

    spread = jnp.einsum(
        "rs,ct,std->rcd",
        weights(rows),
        weights(cols),
        table.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return einops.rearrange(spread, "(r a) (c b) d -> (r c a b) d", a=factor, b=factor)


def qwen_tower(
    p: Params, config: VisionConfig, rows: jax.Array, grid: tuple[int, int], dtype: Any = jnp.float32
) -> tuple[jax.Array, list[jax.Array]]:
    """Normalised patches [T,n,R] in merge order, of a grid of n = grid[0] * grid[1] patches -> features [T,n,D].

    Returns also the features after each block of config.deepstack. ValueError if the shapes do not fit the config.
    """
    c = config
    if rows.ndim != 3 or rows.shape[1:] != (grid[0] * grid[1], patch_values(c)) or any(g % c.downsample for g in grid):
        raise ValueError(
            f"rows: expected [T,n,R] with n = {grid[0]} * {grid[1]} patches, both multiples of {c.downsample}, and "
            f"R = {patch_values(c)} values, got {rows.shape}"
        )
    return _run_tower(p, c, rows, grid, dtype, attention=False)[:2]


def _run_tower(
    p: Params, config: VisionConfig, rows: jax.Array, grid: tuple[int, int], dtype: Any, attention: bool
) -> tuple[jax.Array, list[jax.Array], jax.Array | None]:
    """As `qwen_tower`, and with `attention` what the last block gives each patch [T,n] fp32, in merge order."""
    c = config
    x = rows.astype(dtype) @ p["patch_embed"].astype(dtype)
    if c.patch_bias:
        x = x + p["patch_bias"].astype(dtype)
    if c.position_rows:
        x = x + position_rows(p["position"], *grid, c.downsample).astype(dtype)
    angle = axial_angles(merge_order(*grid, c.downsample), c.width // c.heads)

    def block(x: jax.Array, layer: Params) -> tuple[jax.Array, None]:
        return vit_block(layer, c, x, rope_fn=lambda heads: rotate_pairs(heads, jnp.asarray(angle))), None

    planes: list[jax.Array] = []
    received: jax.Array | None = None
    at = 0
    for stop in [*(layer + 1 for layer in c.deepstack), c.layers]:
        run = jax.tree.map(lambda a, at=at, stop=stop: a[at:stop], p["blocks"])
        if attention and stop == c.layers and at < stop:
            run, last = last_block(run)
            x, _ = jax.lax.scan(block, x, run)
            received = received_attention(last, c, x, lambda heads: rotate_pairs(heads, jnp.asarray(angle)))
            x, _ = block(x, last)
        else:
            x, _ = jax.lax.scan(block, x, run)
        if len(planes) < len(c.deepstack):
            planes.append(x)
        at = stop
    return x, planes, received


def qwen_merge(p: Params, config: VisionConfig, features: jax.Array, planes: list[jax.Array]) -> jax.Array:
    """Features [T,n,D] in merge order -> visual tokens [T,m,W], row-major; with planes [T,m,W * (1 + planes)], theirs after."""
    c = config
    cells = features.shape[1] // c.downsample**2

    def gather(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], cells, -1)

    def project(x: jax.Array, q: Params) -> jax.Array:
        x = jax.nn.gelu(x @ q["fc1"].astype(x.dtype) + q["fc1_bias"].astype(x.dtype), approximate=False)
        return x @ q["fc2"].astype(x.dtype) + q["fc2_bias"].astype(x.dtype)

    tokens = [project(gather(layer_norm(features, p["norm"], p["norm_bias"], c.norm_eps)), p)]
    for k, plane in enumerate(planes):
        q = {name.removeprefix("deepstack_"): a[k] for name, a in p.items() if name.startswith("deepstack_")}
        tokens.append(project(layer_norm(gather(plane), q["norm"], q["norm_bias"], c.norm_eps), q))
    return jnp.concatenate(tokens, axis=-1)


def qwen_tokens(
    vision: Params,
    projector: Params,
    config: VisionConfig,
    pixels: jax.Array,
    dtype: Any = jnp.float32,
    attention: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Tubelets [T,t,h,w,3] in [0,1] -> visual tokens, and planes, as `qwen_merge` gives them, and with `attention` what the last
    block gives the patches of each token [T,m] fp32, on average. ValueError for another shape."""
    step = config.patch_size * config.downsample
    if pixels.ndim != 5 or pixels.shape[1] != config.temporal_patch or any(side % step for side in pixels.shape[2:4]):
        raise ValueError(
            f"pixels: expected tubelets [T,{config.temporal_patch},h,w,3] with h and w multiples of {step}, "
            f"got {pixels.shape}"
        )
    grid = pixels.shape[2] // config.patch_size, pixels.shape[3] // config.patch_size
    rows = patch_rows(config, normalise(config, pixels))
    features, planes, received = _run_tower(vision, config, rows, grid, dtype, attention)
    if received is not None:
        received = received.reshape(received.shape[0], -1, config.downsample**2).mean(-1)
    return qwen_merge(projector, config, features, planes), received
