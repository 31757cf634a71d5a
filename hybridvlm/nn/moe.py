"""The layer of experts of Nemotron 3: a sigmoid router, relu^2 MLPs of which each token takes a few, and one that all take.

Router (arXiv 2412.19437, as Nemotron-H has it): scores = sigmoid(gate(h)) in float32; who is chosen goes by score plus a
correction bias, the weights are the bare scores of the chosen ones, made to add up to one and scaled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import MOE, ModelConfig
from hybridvlm.nn.linear import biased, linear
from hybridvlm.ops.norms import rms_norm
from hybridvlm.parallel.tensor import psum_tensor

Params = dict[str, jax.Array]
# Most pairs of a token and its expert that are written out one by one.
UNROLLED = 16


class MoeStack(nn.Module):
    """The parameters of all E layers, stacked (n layers, E experts, I = expert_latent or D):

    norm [n,D] · router [n,D,E] · router_bias [n,E] · up [n,E,I,expert_width] · down [n,E,expert_width,I] ·
    shared_up_proj [n,D,shared_width] · shared_down_proj [n,shared_width,D] · with expert_latent also
    latent_in_proj [n,D,I], latent_out_proj [n,I,D] · with mlp_bias shared_up_bias, shared_down_bias, latent_in_bias, latent_out_bias.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Params:
        c, n = self.config, self.config.count(MOE)
        inside = c.expert_latent or c.width
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
        each = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=2, out_axis=3, batch_axis=(0, 1))
        p = {
            "norm": self.param("norm", nn.initializers.ones, (n, c.width)),
            "router": self.param("router", dense, (n, c.width, c.experts)),
            "router_bias": self.param("router_bias", nn.initializers.zeros, (n, c.experts)),
            "up": self.param("up", each, (n, c.experts, inside, c.expert_width)),
            "down": self.param("down", each, (n, c.experts, c.expert_width, inside)),
            "shared_up_proj": self.param("shared_up_proj", dense, (n, c.width, c.shared_width)),
            "shared_down_proj": self.param("shared_down_proj", dense, (n, c.shared_width, c.width)),
        }
        if c.expert_latent:
            p["latent_in_proj"] = self.param("latent_in_proj", dense, (n, c.width, inside))
            p["latent_out_proj"] = self.param("latent_out_proj", dense, (n, inside, c.width))
        if c.mlp_bias:
            widths = {"shared_up_bias": c.shared_width, "shared_down_bias": c.width}
            widths |= {"latent_in_bias": inside, "latent_out_bias": c.width} if c.expert_latent else {}
            for name, wide in widths.items():
                p[name] = self.param(name, nn.initializers.zeros, (n, wide))
        return p


def route(p: Params, c: ModelConfig, h: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h [T,D] -> the experts of each token [T,k] int32 and their weights [T,k] float32."""
    scores = jax.nn.sigmoid(jnp.matmul(h.astype(jnp.float32), p["router"].astype(jnp.float32)))
    ranks = scores + p["router_bias"].astype(jnp.float32)
    if c.router_groups > 1:
        grouped = ranks.reshape(-1, c.router_groups, c.experts // c.router_groups)
        best = jnp.sum(jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
        _, kept = jax.lax.top_k(best, c.router_top_groups)
        allowed = jnp.any(kept[:, :, None] == jnp.arange(c.router_groups), axis=1)
        ranks = jnp.where(allowed[:, :, None], grouped, -jnp.inf).reshape(ranks.shape)
    _, chosen = jax.lax.top_k(ranks, c.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=1)
    if c.router_norm:
        weights = weights / (jnp.sum(weights, axis=1, keepdims=True) + 1e-20)
    return chosen, weights * c.router_scale


def _relu2(x: jax.Array) -> jax.Array:
    return jnp.square(nn.relu(x))


def experts(p: Params, c: ModelConfig, h: jax.Array, chosen: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of each token's experts: h [T,I], chosen and weights [T,k] -> [T,I] in h.dtype.

    Many tokens are sorted by expert, so that every expert is one product over its own rows; for few (decoding) the weights of
    the chosen experts alone are read.
    """
    t, k = chosen.shape
    if t * k <= c.experts:

        def one(_: None, of: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
            expert, token = of
            up, down = (jax.lax.dynamic_index_in_dim(p[name], expert, keepdims=False) for name in ("up", "down"))
            return None, _relu2(h[token] @ up.astype(h.dtype)) @ down.astype(h.dtype)

        # one after another: of a gather of whole experts a TPU's compiler copies all of the layer's in pieces
        pairs = (chosen.T.reshape(-1), jnp.tile(jnp.arange(t), k))
        out = jax.lax.scan(one, None, pairs, unroll=t * k if t * k <= UNROLLED else 1)[1].reshape(k, t, -1)
    else:
        flat = chosen.T.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        # a bincount would scatter, for which TPU compilers estimate no time
        sizes = jnp.sum(flat[:, None] == jnp.arange(c.experts), axis=0, dtype=jnp.int32)
        rows = h[order % t]
        inner = _relu2(jax.lax.ragged_dot(rows, p["up"].astype(h.dtype), sizes))
        sorted_out = jax.lax.ragged_dot(inner, p["down"].astype(h.dtype), sizes)
        out = sorted_out.at[jnp.argsort(order)].get(unique_indices=True).reshape(k, t, -1)
    # what is gathered stays in its own type, and the sum reads it as it is: XLA would gather in fp32, and write a product out
    out = jax.lax.optimization_barrier(out)
    return jnp.sum(out.astype(jnp.float32) * weights.T[:, :, None], axis=0).astype(h.dtype)


def moe_layer(p: Params, c: ModelConfig, x: jax.Array) -> jax.Array:
    """x [B,L,D] -> x + the chosen experts + the shared one, of norm(x).

    Tensor-parallel devices hold some channels each of every expert and of the shared one; they choose alike, by the whole router.
    """
    h = rms_norm(x, p["norm"], c.norm_eps).reshape(-1, x.shape[-1])
    chosen, weights = route(p, c, h)
    inside = linear(h, p["latent_in_proj"], p.get("latent_in_bias")) if c.expert_latent else h
    out = experts(p, c, inside, chosen, weights)
    if c.expert_latent:
        out = linear(out, p["latent_out_proj"])
    out = out + linear(_relu2(linear(h, p["shared_up_proj"], p.get("shared_up_bias"))), p["shared_down_proj"])
    # what every device has whole comes after the sum over them
    out = biased(biased(psum_tensor(c, out), p.get("latent_out_bias")), p.get("shared_down_bias"))
    return x + out.reshape(x.shape).astype(x.dtype)
