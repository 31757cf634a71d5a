"""What a layer needs to know when several devices hold it together: its own part, and where parts must be summed.

Tensor parallelism (Megatron, arXiv 1909.08053) inside `jax.shard_map`: every device runs the layers' ordinary code on its own
heads, groups and channels (of the MLP, and of every expert: all devices are equally busy, whoever is chosen), described by a
`LocalConfig`, and the products with out_proj, o_proj and down_proj, each a part of the sum over channels, are added up. The residual
stream is whole on every device. hybridvlm/sharding.py cuts.

Devices that work on different examples (or on different sequence shards of a row, hybridvlm/parallel/sequence.py) may each
hold a shard of the parameters that all of them need (FSDP; ZeRO-3, arXiv 1910.02054): a layer's are gathered as it runs, and
each device gets the sum over its own shard of their gradient.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from hybridvlm.config import MAMBA, ModelConfig, VambaConfig


@dataclasses.dataclass(frozen=True)
class LocalConfig(ModelConfig):
    """The part of a model that one of `devices` devices along mesh axis `axis` holds.

    Heads, groups and widths are those of the part. group_devices: devices that hold the heads of one SSM group between
    them (more devices than groups), each with the group's whole B and C. kv_devices: devices that hold the same kv
    heads, with all their queries. vocab_devices: devices that embedding and head are cut over, by token.
    shared: parameters of which a device holds a share, as (path such as "mamba/in_proj", axis of
    one layer's array, mesh axes that it is cut over). row_axis, shards: mesh axis that rows are cut over, and in how many.
    batch_axes: mesh axes that examples are cut over. frame_axes: those that the frames of a video are dealt over.
    """

    axis: str = ""
    devices: int = 1
    group_devices: int = 1
    kv_devices: int = 1
    vocab_devices: int = 1
    shared: tuple[tuple[str, int, tuple[str, ...]], ...] = ()
    row_axis: str = ""
    shards: int = 1
    batch_axes: tuple[str, ...] = ()
    frame_axes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class LocalVambaConfig(VambaConfig, LocalConfig):
    """The part of a VAMBA model that a device holds. group_devices is that of the video's Mamba-2 blocks, kv_devices of the text's
    attention, and of the cross-attention, which has the same heads."""

    @functools.cached_property
    def mixer(self) -> LocalConfig:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(LocalConfig)}
        fields |= {"pattern": MAMBA * self.layers, "norm_eps": self.mamba_norm_eps, "vision": None}
        return LocalConfig(**fields)


def psum_tensor(c: ModelConfig, part: jax.Array) -> jax.Array:
    """The sum over devices of what each has of it."""
    return jax.lax.psum(part, c.axis) if isinstance(c, LocalConfig) and c.devices > 1 else part


def all_gather_params(c: ModelConfig, kind: str, p: dict[str, jax.Array], dtype: jnp.dtype) -> dict[str, jax.Array]:
    """The parameters of one layer of `kind` with those put together, in `dtype`, of which each device holds a share."""
    if not isinstance(c, LocalConfig):
        return p
    # weights of products, which are taken in that type anyway: cast before they travel
    whole = {
        path.removeprefix(f"{kind}/"): (axis, axes)
        for path, axis, axes in c.shared
        if path.startswith(f"{kind}/") and path.removeprefix(f"{kind}/") in p
    }
    # a weight may come in pieces of its columns, for decoding (hybridvlm/nn/linear.py)
    return p | {
        name: jax.tree.map(lambda a, at=at: jax.lax.all_gather(a.astype(dtype), at[1], axis=at[0], tiled=True), p[name])
        for name, at in whole.items()
    }


def all_gather_param(c: ModelConfig, path: str, array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A parameter outside the layers, such as "embed", put together, in `dtype`, of which each device holds a share."""
    found = {name: at for name, *at in c.shared} if isinstance(c, LocalConfig) else {}
    if path not in found:
        return array
    axis, axes = found[path]
    return jax.lax.all_gather(array.astype(dtype), axes, axis=axis, tiled=True)


def all_rows(c: ModelConfig, done: jax.Array) -> jax.Array:
    """Whether [] something holds for all examples [B] bool, those of other devices too."""
    every = jnp.all(done)
    return jax.lax.pmin(every.astype(jnp.int32), c.batch_axes) > 0 if isinstance(c, LocalConfig) else every


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
