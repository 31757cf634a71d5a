"""A convolutional stem for the tiny model: a frame is cut into separate cells, and each cell becomes one token.

Parameters: conv{i} [3,3,in,out] and conv{i}_bias [out] for every entry of stem_channels · proj [h*w*channels, width]
and proj_bias [width]. A cell sees nothing of its neighbours, so a token holds what its cell shows and no more.
"""

from __future__ import annotations

from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import VisionConfig
from hybridvlm.vision.radio import normalise

Params = dict[str, Any]


class StemTower(nn.Module):
    """The stem as a module. `tower(pixels)` runs it; `tower.parameters()` hands out its parameters as a dict."""

    config: VisionConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        kernel, zeros = nn.initializers.he_normal(), nn.initializers.zeros
        p, channels, side = {}, 3, c.patch_size
        for i, out in enumerate(c.stem_channels):
            p[f"conv{i}"] = self.param(f"conv{i}", kernel, (3, 3, channels, out))
            p[f"conv{i}_bias"] = self.param(f"conv{i}_bias", zeros, (out,))
            channels, side = out, -(-side // 2)
        p["proj"] = self.param("proj", nn.initializers.lecun_normal(), (side * side * channels, c.width))
        p["proj_bias"] = self.param("proj_bias", zeros, (c.width,))
        self.p = p

    def parameters(self) -> Params:
        return dict(self.p)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return stem_tower(self.parameters(), self.config, pixels, self.dtype)


def stem_tower(p: Params, config: VisionConfig, pixels: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """pixels [F,h,w,3] in [0,1] -> features [F,rows,cols,width], one per patch_size x patch_size cell.

    Stride-2 3x3 convolutions with SAME padding and ReLU inside each cell, then one linear map of what is left.
    ValueError if h or w is not a multiple of patch_size.
    """
    size = config.patch_size
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.shape[1] % size or pixels.shape[2] % size:
        raise ValueError(f"pixels must be [F,h,w,3] with h and w multiples of {size}, got {pixels.shape}")
    f, rows, cols = pixels.shape[0], pixels.shape[1] // size, pixels.shape[2] // size
    x = einops.rearrange(normalise(config, pixels).astype(dtype), "f (r p) (c q) ch -> (f r c) p q ch", p=size, q=size)
    return stem_features(p, config, x).reshape(f, rows, cols, -1)


def stem_features(p: Params, config: VisionConfig, x: jax.Array) -> jax.Array:
    """Cells by themselves: x [n,p,p,3], normalised -> features [n,width]."""
    dtype = x.dtype
    for i in range(len(config.stem_channels)):
        x = jax.lax.conv_general_dilated(
            x, p[f"conv{i}"].astype(dtype), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + p[f"conv{i}_bias"].astype(dtype))
    x = x.reshape(x.shape[0], -1)
    return x @ p["proj"].astype(dtype) + p["proj_bias"].astype(dtype)
