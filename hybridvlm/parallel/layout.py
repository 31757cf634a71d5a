"""What each device of several holds of a layer, and where its columns lie so that an even cut gives it just that.

Packed parameters cannot be cut where they lie: in_proj's columns are z|x|B|C|dt, and an even cut would give the first device
nothing but z. `permute_for_tp` puts columns in the order of the devices first, each with its own z|x|B|C|dt, and writes
down more than once what several devices need: the B and C of a group that they share, the heads of a shared kv head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybridvlm.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig, VambaConfig
from hybridvlm.parallel.tensor import LocalConfig, LocalVambaConfig


def local_config(config: ModelConfig, devices: int) -> LocalConfig:
    """What each of `devices` tensor-parallel devices holds of the decoder. ValueError, with the sizes, if it cannot be cut so."""
    c = config
    kind = LocalVambaConfig if isinstance(c, VambaConfig) else LocalConfig
    fields: dict[str, Any] = {f.name: getattr(c, f.name) for f in dataclasses.fields(kind) if hasattr(c, f.name)}
    group_devices = kv_devices = 1
    cut: dict[str, int] = {}
    if c.count(ATTENTION):
        cut |= {"attention_heads * head_dim": c.attention_heads * c.head_dim}
        _whole_heads("kv_heads", c.kv_heads, devices)
        kv_parts = min(devices, c.kv_heads)
        fields |= {"attention_heads": c.attention_heads // kv_parts, "kv_heads": c.kv_heads // kv_parts}
        kv_devices = devices // kv_parts
    if c.count(MAMBA) or isinstance(c, VambaConfig):
        cut |= {"mamba_heads": c.mamba_heads}
        _whole_heads("ssm_groups", c.ssm_groups, devices)
        ssm_parts = min(devices, c.ssm_groups)
        fields |= {"ssm_groups": c.ssm_groups // ssm_parts}
        group_devices = devices // ssm_parts
    if c.count(MLP):
        cut |= {"mlp_width": c.mlp_width}
    if c.count(MOE):
        cut |= {"expert_width": c.expert_width, "shared_width": c.shared_width}
    for name, size in cut.items():
        if size % devices:
            raise ValueError(f"sharding: tensor={devices} does not divide {name} {size}")
    fields |= {name: size // devices for name, size in cut.items() if name in fields}
    fields |= {"axis": "tensor", "devices": devices, "group_devices": group_devices, "kv_devices": kv_devices}
    return kind(**fields)


def _whole_heads(name: str, count: int, devices: int) -> None:
    if count % devices and devices % count:
        raise ValueError(f"sharding: tensor={devices} must divide {name} {count}, or be a multiple of it")


def permute_for_tp(params: dict[str, Any], config: ModelConfig, devices: int) -> dict[str, Any]:
    """The whole model's parameters with packed and shared columns in the order of `devices` tensor-parallel devices.

    Cut evenly along their sharded axes they then give every device what `local_config` describes. A tree like `params`; what
    needs no reordering is the same array.
    """
    return _reordered(params, config, devices, lambda a, columns: a[..., columns])


def _reordered(
    params: dict[str, Any], config: ModelConfig, devices: int, change: Callable[[Any, np.ndarray], Any]
) -> dict:
    """params with `change(array, columns)` where `permute_for_tp` takes these columns of an array."""
    order = column_order(config, devices)
    decoder = {
        kind: {
            name: change(a, order[path]) if (path := f"decoder/{kind}/{name}") in order else a
            for name, a in stack.items()
        }
        if isinstance(stack, Mapping)
        else stack
        for kind, stack in params["decoder"].items()
    }
    return params | {"decoder": decoder}


def column_order(config: ModelConfig, devices: int) -> dict[str, np.ndarray]:
    """Of each parameter, by its path, whose columns `permute_for_tp` puts in the order of the devices: which it takes."""
    sharing = local_config(config, devices).kv_devices
    order: dict[tuple[str, str], np.ndarray] = {}
    if devices == 1:
        return {}
    if config.count(MAMBA) or isinstance(config, VambaConfig):
        order["mamba", "in_proj"] = order["mamba", "in_bias"] = _packed(config, devices, ("z", "x", "b", "c", "dt"))
        order["mamba", "conv_weight"] = order["mamba", "conv_bias"] = _packed(config, devices, ("x", "b", "c"))
    if sharing > 1:
        for name, heads in (("q", config.attention_heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            parts = np.arange(heads * config.head_dim).reshape(devices // sharing, -1)
            columns = np.repeat(parts, sharing, axis=0).ravel()
            order |= {(kind, f"{name}_{part}"): columns for part in ("proj", "bias") for kind in ("attention", "cross")}
    return {f"decoder/{kind}/{name}": columns for (kind, name), columns in order.items()}


def _packed(c: ModelConfig, devices: int, parts: tuple[str, ...]) -> np.ndarray:
    """Columns of a packed parameter, in the order of the devices."""
    widths = {"z": c.mamba_width, "x": c.mamba_width, "dt": c.mamba_heads}
    widths |= dict.fromkeys("bc", c.ssm_groups * c.ssm_state)
    ssm_parts, start, cut = min(devices, c.ssm_groups), 0, []
    for part in parts:
        columns = np.arange(start, start + widths[part])
        start += widths[part]
        if part in "bc":  # whole groups, the same for all devices of a group
            columns = np.repeat(columns.reshape(ssm_parts, -1), devices // ssm_parts, axis=0)
        cut.append(columns.reshape(devices, -1))
    return np.concatenate(cut, axis=1).ravel()


def unpermute_for_tp(laid: dict[str, Any], config: ModelConfig, devices: int, *, join: str = "first") -> dict[str, Any]:
    """The inverse of `permute_for_tp`: parameters in the order of the whole model, to be saved or laid out for another mesh.

    What is written down more than once counts as it stands first (join="first": parameters, moments), or is added up
    ("sum": gradients, of which every copy has a part). permute_for_tp(unpermute_for_tp(gradients, ..., join="sum"), ...) keeps copies
    equal; training needs it where the tensor axis is longer than there are SSM groups or kv heads, else there are no copies.
    """
    if join not in ("first", "sum"):
        raise ValueError(f"unpermute_for_tp: join must be 'first' or 'sum', got {join!r}")

    def back(a: Any, columns: np.ndarray) -> Any:
        width = int(columns.max()) + 1
        if join == "first":
            return a[..., np.unique(columns, return_index=True)[1]]
        return jnp.zeros((*a.shape[:-1], width), a.dtype).at[..., columns].add(a)

    return _reordered(laid, config, devices, back)
