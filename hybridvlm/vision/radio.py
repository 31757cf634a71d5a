"""The RADIO vision transformer (C-RADIOv2-H and its kin): frames -> patch features, every frame by itself.

Parameters (n = layers, D here the tower's width, linear weights [in,out]):
  patch_embed [3*p*p, D] (channel-major patches) · position [rows, rows, D] · prefix [prefix_tokens, D] ·
  video_patch_embed [temporal_patch*3*p*p, D] (only with temporal_patch > 1) ·
  blocks: norm1, norm1_bias, norm2, norm2_bias [n,D] · q_proj, k_proj, v_proj, o_proj [n,D,D], q_bias .. o_bias [n,D] ·
          fc1 [n,D,mlp] fc1_bias [n,mlp] fc2 [n,mlp,D] fc2_bias [n,D]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import VisionConfig
from hybridvlm.ops.attention import attention
from hybridvlm.ops.norms import layer_norm

Params = dict[str, Any]


class RadioBlocks(nn.Module):
    """The parameters of all transformer blocks, stacked on a leading layer axis; calling it returns them as a dict."""

    config: VisionConfig

    @nn.compact
    def __call__(self) -> Params:
        c, n = self.config, self.config.layers
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
        p = {}
        for name in ("norm1", "norm2"):
            p[name] = self.param(name, nn.initializers.ones, (n, c.width))
            p[f"{name}_bias"] = self.param(f"{name}_bias", nn.initializers.zeros, (n, c.width))
        for name, bias, sizes in (
            ("q_proj", "q_bias", (c.width, c.width)),
            ("k_proj", "k_bias", (c.width, c.width)),
            ("v_proj", "v_bias", (c.width, c.width)),
            ("o_proj", "o_bias", (c.width, c.width)),
            ("fc1", "fc1_bias", (c.width, c.mlp_width)),
            ("fc2", "fc2_bias", (c.mlp_width, c.width)),
        ):
            p[name] = self.param(name, dense, (n, *sizes))
            p[bias] = self.param(bias, nn.initializers.zeros, (n, sizes[1]))
        return p


class RadioTower(nn.Module):
    """The tower as a module. `tower(pixels)` runs it; `tower.parameters()` hands out its parameters as a dict."""

    config: VisionConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        dense, small = nn.initializers.lecun_normal(), nn.initializers.normal(0.02)
        patch = 3 * c.patch_size**2
        self.patch_embed = self.param("patch_embed", dense, (patch, c.width))
        if c.temporal_patch > 1:
            self.video_patch_embed = self.param("video_patch_embed", dense, (c.temporal_patch * patch, c.width))
        self.position = self.param("position", small, (c.position_rows, c.position_rows, c.width))
        self.prefix = self.param("prefix", small, (c.prefix_tokens, c.width))
        self.blocks = RadioBlocks(c)

    def parameters(self) -> Params:
        p = {"patch_embed": self.patch_embed, "position": self.position, "prefix": self.prefix, "blocks": self.blocks()}
        if self.config.temporal_patch > 1:
            p["video_patch_embed"] = self.video_patch_embed
        return p

    def __call__(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        return radio_tower(self.parameters(), self.config, pixels, self.dtype)


def normalise(config: VisionConfig, pixels: jax.Array) -> jax.Array:
    """pixels [...,3] in [0,1] -> (pixels - mean) / std per channel, in float32."""
    mean, std = jnp.asarray(config.pixel_mean, jnp.float32), jnp.asarray(config.pixel_std, jnp.float32)
    return (pixels.astype(jnp.float32) - mean) / std


def position_table(table: jax.Array, rows: int, cols: int) -> jax.Array:
    """Position embeddings [rows,cols,D] for a grid: the whole square table resized to the longer side, then cropped.

    Bilinear, pixel centres at half, no antialiasing, in float32: as the tower was trained.
    """
    side = max(rows, cols)
    resized = jax.image.resize(table.astype(jnp.float32), (side, side, table.shape[-1]), "bilinear", antialias=False)
    return resized[:rows, :cols]


def patchify(pixels: jax.Array, patch_size: int) -> jax.Array:
    """pixels [F,h,w,3] or [F,t,h,w,3] -> patches [F,rows,cols,(t*)3*p*p]: frame-major, then channel, row, column."""
    if pixels.ndim == 4:
        pixels = pixels[:, None]
    return einops.rearrange(pixels, "f t (r p) (c q) ch -> f r c (t ch p q)", p=patch_size, q=patch_size)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def whole_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Every row of a frame sees every other: q, k, v [F,S,H,P] -> [F,S,H,P]."""
    return attention(q, k, v, causal=False, return_lse=False)[0]


def vit_block(
    p: Params,
    config: VisionConfig,
    x: jax.Array,
    rope_fn: Callable[[jax.Array], jax.Array] = lambda heads: heads,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = whole_attention,
) -> jax.Array:
    """One pre-norm block, full attention inside each frame: x [F,S,D] -> [F,S,D]. `p` holds one layer's parameters.

    rope_fn: what is done to queries and keys [F,S,H,P], a rotary embedding for towers that have one. attend: the attention, where rows
    are not those of one whole frame each (`hybridvlm.ops.pack`).
    """
    f, length, width = x.shape

    def linear(h: jax.Array, weight: str, bias: str) -> jax.Array:
        return h @ p[weight].astype(h.dtype) + p[bias].astype(h.dtype)

    def heads(h: jax.Array, name: str) -> jax.Array:
        return linear(h, f"{name}_proj", f"{name}_bias").reshape(f, length, config.heads, width // config.heads)

    h = layer_norm(x, p["norm1"], p["norm1_bias"], config.norm_eps)
    mixed = attend(rope_fn(heads(h, "q")), rope_fn(heads(h, "k")), heads(h, "v"))
    x = x + linear(mixed.reshape(f, length, width), "o_proj", "o_bias")
    h = layer_norm(x, p["norm2"], p["norm2_bias"], config.norm_eps)
    h = ACTIVATIONS[config.activation](linear(h, "fc1", "fc1_bias"))
    return x + linear(h, "fc2", "fc2_bias")


def received_attention(
    p: Params, config: VisionConfig, x: jax.Array, rope_fn: Callable[[jax.Array], jax.Array] = lambda heads: heads
) -> jax.Array:
    """How much a block attends to each of its inputs: x [F,S,D] -> [F,S] fp32, each row's weights averaged over heads and rows.

    The softmax of the block's own queries and keys is made once more, a frame at a time, and no values with it. `p`, rope_fn: as
    of `vit_block`.
    """
    f, length, width = x.shape
    h = layer_norm(x, p["norm1"], p["norm1_bias"], config.norm_eps)

    def heads(name: str) -> jax.Array:
        h_out = h @ p[f"{name}_proj"].astype(h.dtype) + p[f"{name}_bias"].astype(h.dtype)
        return rope_fn(h_out.reshape(f, length, config.heads, width // config.heads))

    def one(frame: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, k = frame
        logits = jnp.einsum("qhp,khp->hqk", q, k, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits / (q.shape[-1] ** 0.5), axis=-1).mean((0, 1))

    return jax.lax.map(one, (heads("q"), heads("k")))


def last_block(blocks: Params) -> tuple[Params, Params]:
    """Stacked blocks as all but the last, and the last."""
    return jax.tree.map(lambda a: a[:-1], blocks), jax.tree.map(lambda a: a[-1], blocks)


def radio_tower(
    p: Params, config: VisionConfig, pixels: jax.Array, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Pixels [F,h,w,3] in [0,1] -> patch features [F,rows,cols,D] and prefix tokens [F,prefix_tokens,D].

    pixels [F,temporal_patch,h,w,3] are tubelets and go through `video_patch_embed`: one grid of features per tubelet.
    h and w are any multiples of patch_size. There is no final norm; the first of the prefix tokens are the summaries.
    ValueError if the shape does not fit the config.
    """
    x, _ = jax.lax.scan(
        lambda h, layer: (vit_block(layer, config, h), None), _embedded(p, config, pixels, dtype), p["blocks"]
    )
    return _patches(config, x, pixels), x[:, : config.prefix_tokens]


def radio_tower_attention(
    p: Params, config: VisionConfig, pixels: jax.Array, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """As `radio_tower`: patch features, and the attention [F,rows,cols] fp32 that the last block gives each patch."""
    before, last = last_block(p["blocks"])
    x = _embedded(p, config, pixels, dtype)
    x, _ = jax.lax.scan(lambda h, layer: (vit_block(layer, config, h), None), x, before)
    attention = received_attention(last, config, x)
    return _patches(config, vit_block(last, config, x), pixels), _patches(config, attention[..., None], pixels)[..., 0]


def _patches(config: VisionConfig, x: jax.Array, pixels: jax.Array) -> jax.Array:
    """Rows of the tower [F,S,C] without the prefix, as a grid [F,rows,cols,C]."""
    rows, cols = (side // config.patch_size for side in pixels.shape[-3:-1])
    return x[:, config.prefix_tokens :].reshape(x.shape[0], rows, cols, x.shape[-1])


def _embedded(p: Params, config: VisionConfig, pixels: jax.Array, dtype: Any) -> jax.Array:
    """Prefix and patches as the first block sees them: [F,S,D]. ValueError for a shape that does not fit."""
    size, t = config.patch_size, config.temporal_patch
    tubelets = pixels.ndim == 5
    fits = pixels.ndim in (4, 5) and pixels.shape[-1] == 3 and not any(side % size for side in pixels.shape[-3:-1])
    if not fits or (tubelets and (t == 1 or pixels.shape[1] != t)):
        expected = "[F,h,w,3]" + (f" or [F,{t},h,w,3]" if t > 1 else "")
        raise ValueError(f"pixels must be {expected} with h and w multiples of {size}, got {pixels.shape}")
    patches = patchify(normalise(config, pixels).astype(dtype), size)
    embed = p["video_patch_embed" if tubelets else "patch_embed"].astype(dtype)
    f, rows, cols, _ = patches.shape
    x = patches @ embed + position_table(p["position"], rows, cols).astype(dtype)
    prefix = jnp.broadcast_to(p["prefix"].astype(dtype), (f, config.prefix_tokens, config.width))
    return jnp.concatenate([prefix, x.reshape(f, rows * cols, config.width)], axis=1)
