"""What a layer needs to know when several devices hold it together: its own part, and where parts must be summed.

Tensor parallelism (Megatron, arXiv 1909.08053) inside `jax.shard_map`: every device runs the layers' ordinary code on its own
heads, groups and MLP channels, described by a `LocalConfig`, and the products with out_proj, o_proj and down_proj, each
a part of the sum over channels, are added up. The residual stream is whole on every device. hybridvlm/sharding.py cuts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from hybridvlm.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class LocalConfig(ModelConfig):
    """The part of a model that one of `devices` devices along mesh axis `axis` holds.

    Heads, groups and widths are those of the part. group_devices: devices that hold the heads of one SSM group between
    them (more devices than groups), each with the group's whole B and C. kv_devices: devices that hold the same kv
    heads, with all their queries.
    """

    axis: str = ""
    devices: int = 1
    group_devices: int = 1
    kv_devices: int = 1


def total(c: ModelConfig, part: jax.Array) -> jax.Array:
    """The sum over devices of what each has of it."""
    return jax.lax.psum(part, c.axis) if isinstance(c, LocalConfig) else part


def group_mean(c: ModelConfig, mean: jax.Array) -> jax.Array:
    """Means over a device's channels of its groups [...,G] -> means over all channels of those groups."""
    if not isinstance(c, LocalConfig) or c.group_devices == 1:
        return mean
    groups = c.devices // c.group_devices
    mine = jnp.arange(groups) == jax.lax.axis_index(c.axis) // c.group_devices
    every = jax.lax.psum(jnp.where(mine, mean, 0.0), c.axis)  # one number per group and token: no need to pick partners
    return jnp.sum(jnp.where(mine, every, 0.0), axis=-1, keepdims=True) / c.group_devices


def own_channels(c: ModelConfig, out: jax.Array) -> jax.Array:
    """Attention's channels [...,H*P] -> those that this device multiplies with its rows of o_proj."""
    if not isinstance(c, LocalConfig) or c.kv_devices == 1:
        return out
    width = out.shape[-1] // c.kv_devices
    return jax.lax.dynamic_slice_in_dim(out, jax.lax.axis_index(c.axis) % c.kv_devices * width, width, axis=-1)
