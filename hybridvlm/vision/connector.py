"""From tower features to visual tokens of the decoder's width.

Parameters, kind "radio" (after pixel shuffle C = width * downsample^2): norm [C] · up_proj [C,projector_width] ·
down_proj [projector_width,D]. Kind "stem": proj [width,D] · proj_bias [D] · cell [rows*cols,D] · time [max_frames,D].
"""

from __future__ import annotations

from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import VisionConfig
from hybridvlm.ops.norms import rms_norm

Params = dict[str, Any]


def pixel_shuffle(x: jax.Array, factor: int) -> jax.Array:
    """Merge each factor x factor neighbourhood into channels: x [n,h,w,c] -> [n,h/factor,w/factor,factor*factor*c].

    Channel order (row offset, column offset, c), "v2" of the Nemotron checkpoints. ValueError if a side does not fit.
    """
    if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(f"pixel_shuffle needs x [n,h,w,c] with h and w multiples of {factor}, got {x.shape}")
    return einops.rearrange(x, "n (h a) (w b) c -> n h w (a b c)", a=factor, b=factor)


class Connector(nn.Module):
    """The connector as a module. `connector(features, frame)` runs it; `connector.parameters()` hands out the dict."""

    config: VisionConfig
    out_width: int

    def setup(self) -> None:
        c, d = self.config, self.out_width
        dense, small = nn.initializers.lecun_normal(), nn.initializers.normal(0.02)
        if c.kind == "radio":
            merged = c.width * c.downsample**2
            self.p = {
                "norm": self.param("norm", nn.initializers.ones, (merged,)),
                "up_proj": self.param("up_proj", dense, (merged, c.projector_width)),
                "down_proj": self.param("down_proj", dense, (c.projector_width, d)),
            }
        else:
            self.p = {
                "proj": self.param("proj", dense, (c.width, d)),
                "proj_bias": self.param("proj_bias", nn.initializers.zeros, (d,)),
                "cell": self.param("cell", small, (c.tokens_per_frame, d)),
                "time": self.param("time", small, (c.max_frames, d)),
            }

    def parameters(self) -> Params:
        return dict(self.p)

    def __call__(self, features: jax.Array, frame: jax.Array) -> jax.Array:
        return connect(self.parameters(), self.config, features, frame)


def connect(p: Params, config: VisionConfig, features: jax.Array, frame: jax.Array) -> jax.Array:
    """features [F,rows,cols,width], frame [F] int32 -> visual tokens [F,m,D], row-major over the merged grid.

    `frame`, the position of each frame in its video, matters for kind "stem" alone; a negative one (no frame) counts as 0.
    """
    if config.kind == "radio":
        x = pixel_shuffle(features, config.downsample)
        return connect_tokens(p, config, x.reshape(x.shape[0], -1, x.shape[-1]))
    x = features.reshape(features.shape[0], -1, features.shape[-1])
    return connect_tokens(p, config, x, jnp.arange(x.shape[1]), frame[:, None])


def connect_tokens(
    p: Params,
    config: VisionConfig,
    merged: jax.Array,
    cell: jax.Array | None = None,
    frame: jax.Array | None = None,
) -> jax.Array:
    """Features of tokens wherever they stand, of kind "radio" after the pixel shuffle: merged [...,C] -> visual tokens [...,D].

    cell and frame, int32 that broadcast to [...]: where each stands, for kind "stem".
    """
    dtype = merged.dtype
    if config.kind == "radio":
        x = rms_norm(merged, p["norm"], config.projector_norm_eps)
        return jnp.square(jax.nn.relu(x @ p["up_proj"].astype(dtype))) @ p["down_proj"].astype(dtype)
    assert cell is not None and frame is not None  # as its callers have it
    x = merged @ p["proj"].astype(dtype) + p["proj_bias"].astype(dtype)
    time = jnp.take(p["time"], jnp.clip(frame, 0, config.max_frames - 1), axis=0)
    return x + jnp.take(p["cell"], cell, axis=0).astype(dtype) + time.astype(dtype)
