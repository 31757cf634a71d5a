"""The MLP layer: up, relu squared, down; no gate, no bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import ModelConfig
from hybridvlm.nn.linear import linear
from hybridvlm.ops.norms import rms_norm

Params = dict[str, jax.Array]


class MlpStack(nn.Module):
    """The parameters of all MLP layers, stacked: norm [n,D] · up_proj [n,D,mlp_width] · down_proj [n,mlp_width,D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Params:
        c, n = self.config, self.config.count("-")
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
        return {
            "norm": self.param("norm", nn.initializers.ones, (n, c.width)),
            "up_proj": self.param("up_proj", dense, (n, c.width, c.mlp_width)),
            "down_proj": self.param("down_proj", dense, (n, c.mlp_width, c.width)),
        }


def mlp_layer(p: Params, c: ModelConfig, x: jax.Array) -> jax.Array:
    """x [B,L,D] -> x + down(relu(up(norm(x)))^2)."""
    h = rms_norm(x, p["norm"], c.norm_eps)
    up = jnp.square(nn.relu(linear(h, p["up_proj"])))
    return x + linear(up, p["down_proj"]).astype(x.dtype)
