"""The MLP layer: up, relu squared, down (Nemotron-H), or SwiGLU (Qwen)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import ModelConfig
from hybridvlm.nn.linear import biased, linear
from hybridvlm.nn.projections import swiglu
from hybridvlm.ops.norms import rms_norm
from hybridvlm.parallel.tensor import psum_tensor

Params = dict[str, jax.Array]


class MlpStack(nn.Module):
    """The parameters of all MLP layers, stacked: norm [n,D] · up_proj [n,D,mlp_width] · down_proj [n,mlp_width,D] · with mlp_gated
    also gate_proj [n,D,mlp_width] · with mlp_bias up_bias [n,mlp_width], down_bias [n,D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Params:
        c, n = self.config, self.config.count("-")
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
        p = {
            "norm": self.param("norm", nn.initializers.ones, (n, c.width)),
            "up_proj": self.param("up_proj", dense, (n, c.width, c.mlp_width)),
            "down_proj": self.param("down_proj", dense, (n, c.mlp_width, c.width)),
        }
        if c.mlp_gated:
            p["gate_proj"] = self.param("gate_proj", dense, (n, c.width, c.mlp_width))
        elif c.mlp_bias:
            p["up_bias"] = self.param("up_bias", nn.initializers.zeros, (n, c.mlp_width))
            p["down_bias"] = self.param("down_bias", nn.initializers.zeros, (n, c.width))
        return p


def mlp_layer(p: Params, c: ModelConfig, x: jax.Array) -> jax.Array:
    """x [B,L,D] -> x + down(relu(up(norm(x)))^2), or with mlp_gated x + down(silu(gate(norm(x))) * up(norm(x)))."""
    h = rms_norm(x, p["norm"], c.norm_eps)
    if c.mlp_gated:
        return x + psum_tensor(c, swiglu(p, h)).astype(x.dtype)
    up = jnp.square(nn.relu(linear(h, p["up_proj"], p.get("up_bias"))))
    return x + biased(psum_tensor(c, linear(up, p["down_proj"])), p.get("down_bias")).astype(x.dtype)
