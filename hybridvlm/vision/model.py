"""Tower and connector as one: frames in, visual tokens out, a bounded number of frames at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import VisionConfig
from hybridvlm.ops.pack import CHUNK
from hybridvlm.vision.connector import Connector, connect
from hybridvlm.vision.qwen_vit import QwenMerger, QwenTower, qwen_tokens
from hybridvlm.vision.radio import RadioTower, radio_tower, radio_tower_attention
from hybridvlm.vision.stem import StemTower, stem_tower

Params = dict[str, Any]
TOWERS: dict[str, type[nn.Module]] = {"radio": RadioTower, "stem": StemTower, "qwen": QwenTower}
CONNECTORS: dict[str, type[nn.Module]] = {"radio": Connector, "stem": Connector, "qwen": QwenMerger}


class VisionModel(nn.Module):
    """pixels [F,h,w,3] in [0,1] and the frames' positions in their video [F] -> visual tokens [F,m,out_width].

    Its parameters are {"vision": tower, "projector": connector}, as they lie in a model's own dict: so with a model's
    `params`, `encode_frames(params, config, pixels, frame)` is the same computation without the module.
    """

    config: VisionConfig
    out_width: int
    dtype: Any = jnp.float32
    chunk: int = CHUNK

    def setup(self) -> None:
        self.vision = TOWERS[self.config.kind](self.config)
        self.projector = CONNECTORS[self.config.kind](self.config, self.out_width)

    def __call__(self, pixels: jax.Array, frame: jax.Array) -> jax.Array:
        params = {"vision": self.vision.parameters(), "projector": self.projector.parameters()}
        return encode_frames(params, self.config, pixels, frame, dtype=self.dtype, chunk=self.chunk)


def _with_attention(tokens: jax.Array, attention: jax.Array) -> jax.Array:
    """Tokens [F,m,D] and their attention [F,m] fp32 -> [F,m,D + 3], exact in every dtype of the tokens."""
    parts, rest = [], attention
    for _ in range(3):
        parts.append(rest.astype(tokens.dtype))
        rest = rest - parts[-1].astype(jnp.float32)
    return jnp.concatenate([tokens, jnp.stack(parts, axis=-1)], axis=-1)


def encode_frames(
    params: Mapping[str, Any],
    config: VisionConfig,
    pixels: jax.Array,
    frame: jax.Array,
    *,
    dtype: Any = jnp.float32,
    chunk: int = CHUNK,
    attention: bool = False,
) -> jax.Array:
    """Visual tokens [F,m,D] of pixels [F,h,w,3] in [0,1] (or tubelets [F,t,h,w,3]); frame [F] int32: positions in time.

    `params` holds "vision" and "projector". At most `chunk` frames are in the tower at once, one chunk after the other,
    so that memory does not grow with the video; frames do not see each other, so the numbers do not depend on it.
    Activations run in `dtype`, whatever dtype the parameters are stored in. For kind "qwen", D counts the planes too.
    attention: tokens are [F,m,D + 3]: the last three channels add up, in float32, to how much the last block of the tower attends to
    the token's patches. ValueError for a tower without attention.
    """
    if attention and config.kind == "stem":
        raise ValueError("attention: a convolutional stem has none; take a method that reads features, such as vidcom2")
    if pixels.shape[0] != frame.shape[0]:
        raise ValueError(f"frame must have one entry per frame of pixels, got {frame.shape} for pixels {pixels.shape}")

    def encode(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        if config.kind == "qwen":
            tokens, received = qwen_tokens(params["vision"], params["projector"], config, part[0], dtype, attention)
            return tokens if received is None else _with_attention(tokens, received)
        if config.kind == "radio" and attention:
            features, received = radio_tower_attention(params["vision"], config, part[0], dtype)
            side = config.downsample
            received = einops.reduce(received, "f (r a) (c b) -> f (r c)", "mean", a=side, b=side)
            return _with_attention(connect(params["projector"], config, features, part[1]), received)
        if config.kind == "radio":
            features, _ = radio_tower(params["vision"], config, part[0], dtype)
        else:
            features = stem_tower(params["vision"], config, part[0], dtype)
        return connect(params["projector"], config, features, part[1])

    frames = pixels.shape[0]
    if frames <= chunk:
        return encode((pixels, frame))
    parts = -(-frames // chunk)
    size = -(-frames // parts)  # even parts, so that padding costs less than one frame per part
    pad = parts * size - frames
    pixels = jnp.pad(pixels, ((0, pad), *((0, 0),) * (pixels.ndim - 1))).reshape(parts, size, *pixels.shape[1:])
    frame = jnp.pad(frame, (0, pad)).reshape(parts, size)
    tokens = jax.lax.map(encode, (pixels, frame))
    return tokens.reshape(parts * size, *tokens.shape[2:])[:frames]
