"""How a model is cut over devices: logical axes to mesh axes, one table by parameter path, and the sharded prefill.

Tensor parallelism follows the model's own seams: attention is cut by kv head, the SSD by group, the MLP by channel, the
vocabulary by row. Each device then runs the ordinary layers, kernels included, on its part inside one `jax.shard_map`
(hybridvlm/nn/parallel.py), and the residual stream is whole everywhere, so that all devices drop the same tokens.

Packed parameters cannot be cut where they lie: in_proj's columns are z|x|B|C|dt, and an even cut would give the first device
nothing but z. `lay_out` puts columns in the order of the devices first, each with its own z|x|B|C|dt, and writes
down more than once what several devices need: the B and C of a group that they share, the heads of a shared kv head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridvlm.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig, ScoreOptions
from hybridvlm.nn.caches import AttentionCache, MambaCache
from hybridvlm.nn.decoder import DecoderOutput
from hybridvlm.nn.decoder import prefill as prefill_on_one
from hybridvlm.nn.parallel import LocalConfig
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction.plan import ReductionPlan

AXES = ("data", "fsdp", "tensor")

# Path of a parameter -> its logical axes; "*" ends a path whose every parameter is whole on each device.
TABLE: dict[str, tuple[str | None, ...]] = {
    "embed": ("vocab", "width"),
    "lm_head": ("width", "vocab"),
    "decoder/norm_f": ("width",),
    "decoder/mamba/norm": ("layer", "width"),
    "decoder/mamba/in_proj": ("layer", "width", "ssm"),
    "decoder/mamba/conv_weight": ("layer", None, "ssm"),
    "decoder/mamba/conv_bias": ("layer", "ssm"),
    "decoder/mamba/A_log": ("layer", "ssm"),
    "decoder/mamba/D": ("layer", "ssm"),
    "decoder/mamba/dt_bias": ("layer", "ssm"),
    "decoder/mamba/gate_norm": ("layer", "ssm"),
    "decoder/mamba/out_proj": ("layer", "ssm", "width"),
    "decoder/attention/norm": ("layer", "width"),
    "decoder/attention/q_proj": ("layer", "width", "heads"),
    "decoder/attention/k_proj": ("layer", "width", "heads"),
    "decoder/attention/v_proj": ("layer", "width", "heads"),
    "decoder/attention/o_proj": ("layer", "heads", "width"),
    "decoder/attention/q_bias": ("layer", "heads"),
    "decoder/attention/k_bias": ("layer", "heads"),
    "decoder/attention/v_bias": ("layer", "heads"),
    "decoder/attention/q_norm": ("layer", None),
    "decoder/attention/k_norm": ("layer", None),
    "decoder/mlp/norm": ("layer", "width"),
    "decoder/mlp/up_proj": ("layer", "width", "mlp"),
    "decoder/mlp/gate_proj": ("layer", "width", "mlp"),
    "decoder/mlp/down_proj": ("layer", "mlp", "width"),
    "decoder/moe/norm": ("layer", "width"),
    "decoder/moe/router": ("layer", "width", None),
    "decoder/moe/router_bias": ("layer", None),
    "decoder/moe/up": ("layer", None, None, None),
    "decoder/moe/down": ("layer", None, None, None),
    "decoder/moe/shared_up_proj": ("layer", "width", None),
    "decoder/moe/shared_down_proj": ("layer", None, "width"),
    "decoder/moe/latent_in_proj": ("layer", "width", None),
    "decoder/moe/latent_out_proj": ("layer", None, "width"),
    "vision/*": (),
    "projector/*": (),
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> the mesh axes that it is cut over, () for none. An axis of `TABLE` or "batch"."""

    batch: tuple[str, ...] = ("data", "fsdp")
    layer: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    ssm: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)

    def spec(self, path: str) -> P:
        """The PartitionSpec of the parameter at `path`, such as "decoder/mamba/in_proj"; ValueError for one not in the table."""
        if path.split("/")[0] + "/*" in TABLE:
            return P()
        if path not in TABLE:
            raise ValueError(f"sharding: there is no rule for the parameter {path!r}; add its logical axes to TABLE")
        return P(*(self._mesh_axes(axis) for axis in TABLE[path]))

    def _mesh_axes(self, logical: str | None) -> str | tuple[str, ...] | None:
        axes = getattr(self, logical) if logical else ()
        return axes[0] if len(axes) == 1 else axes or None

    def specs(self, params: Mapping[str, Any]) -> Any:
        """A tree like `params` (of the whole model) of PartitionSpecs."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self.spec("/".join(k.key for k in path)), params)

    def shardings(self, mesh: Mesh, params: Mapping[str, Any]) -> Any:
        """A tree like `params` (of the whole model, laid out for the mesh) of NamedShardings."""
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(params), is_leaf=_is_spec)


DEFAULT_RULES = ShardingRules()


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over `devices` (default: all there are); one size may be -1: the rest.

    Raises ValueError where the sizes do not fill the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"make_mesh: sizes must be at least 1, one of them may be -1, got {dict(zip(AXES, sizes))}")  # noqa: B905
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -math.prod(sizes))
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"make_mesh: {'x'.join(map(str, sizes))} (data x fsdp x tensor) is not the number of devices, {len(devices)}; "
            "pass `devices` to use some of them"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def tensor_size(mesh: Mesh | None) -> int:
    """Devices along the mesh's tensor axis."""
    return 1 if mesh is None else mesh.shape.get("tensor", 1)


def local_config(config: ModelConfig, devices: int) -> LocalConfig:
    """What each of `devices` tensor-parallel devices holds of the decoder. ValueError, with the sizes, if it cannot be cut so."""
    c = config
    if c.count(MOE):
        raise ValueError("sharding: layers of experts (E) have no tensor-parallel rule; use tensor=1 and the data axis")
    kv_parts, ssm_parts = min(devices, c.kv_heads), min(devices, c.ssm_groups)
    cut = {"vocab_size": c.vocab_size}
    if c.count(ATTENTION):
        cut |= {"attention_heads * head_dim": c.attention_heads * c.head_dim}
        _whole_heads("kv_heads", c.kv_heads, devices)
    if c.count(MAMBA):
        cut |= {"mamba_heads": c.mamba_heads}
        _whole_heads("ssm_groups", c.ssm_groups, devices)
    if c.count(MLP):
        cut |= {"mlp_width": c.mlp_width}
    for name, size in cut.items():
        if size % devices:
            raise ValueError(f"sharding: tensor={devices} does not divide {name} {size}")
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(ModelConfig)}
    fields |= {
        "attention_heads": c.attention_heads // kv_parts,
        "kv_heads": c.kv_heads // kv_parts,
        "mamba_heads": c.mamba_heads // devices,
        "ssm_groups": c.ssm_groups // ssm_parts,
        "mlp_width": max(1, c.mlp_width // devices),
    }
    parts = {"group_devices": devices // ssm_parts, "kv_devices": devices // kv_parts}
    return LocalConfig(**fields, axis="tensor", devices=devices, **parts)


def _whole_heads(name: str, count: int, devices: int) -> None:
    if count % devices and devices % count:
        raise ValueError(f"sharding: tensor={devices} must divide {name} {count}, or be a multiple of it")


def lay_out(params: dict[str, Any], config: ModelConfig, devices: int) -> dict[str, Any]:
    """The whole model's parameters with packed and shared columns in the order of `devices` tensor-parallel devices.

    Cut evenly along their sharded axes they then give every device what `local_config` describes. A tree like `params`; what
    needs no reordering is the same array.
    """
    if devices == 1:
        return params
    order = {
        ("mamba", "in_proj"): _packed(config, devices, ("z", "x", "b", "c", "dt")),
        ("mamba", "conv_weight"): _packed(config, devices, ("x", "b", "c")),
        ("mamba", "conv_bias"): _packed(config, devices, ("x", "b", "c")),
    }
    sharing = devices // min(devices, config.kv_heads)
    if sharing > 1:
        for name, heads in (("q", config.attention_heads), ("k", config.kv_heads), ("v", config.kv_heads)):
            columns = np.arange(heads * config.head_dim).reshape(devices // sharing, -1)
            columns = np.repeat(columns, sharing, axis=0).ravel()
            order |= {("attention", f"{name}_{part}"): columns for part in ("proj", "bias")}
    decoder = {
        kind: {name: a[..., order[kind, name]] if (kind, name) in order else a for name, a in stack.items()}
        if isinstance(stack, Mapping)
        else stack
        for kind, stack in params["decoder"].items()
    }
    return params | {"decoder": decoder}


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


def shard_params(
    params: dict[str, Any], config: ModelConfig, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, Any]:
    """The whole model's parameters, laid out for the mesh and put on its devices."""
    local_config(config, tensor_size(mesh))
    params = lay_out(params, config, tensor_size(mesh))
    return jax.device_put(params, rules.shardings(mesh, params))


def prefill(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Tokens,
    *,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    plan: ReductionPlan | None = None,
    score_fn: Callable[[int, Any, Tokens], jax.Array] | None = None,
    counts: jax.Array | None = None,
    **options: Any,
) -> DecoderOutput:
    """`hybridvlm.nn.decoder.prefill` over a mesh: the decoder's parameters laid out for it, tokens cut over the batch.

    Arguments and results as there; `config` is that of the whole model. Caches stay cut: keys and values by kv head, states
    by head, convolution states by the devices' own channels (x|B|C each); heads and groups that several devices hold appear once per
    device. Scores are joined across devices before anything is dropped.
    """
    local = local_config(config, tensor_size(mesh))
    if score_fn is not None:
        score_fn = _joined(score_fn, config, local, ScoreOptions() if plan is None else plan.score)
    batch = rules._mesh_axes("batch")
    heads, ssm = rules._mesh_axes("heads"), rules._mesh_axes("ssm")
    caches = {
        MAMBA: MambaCache(P(batch, None, ssm), P(batch, ssm), P(batch)),
        ATTENTION: AttentionCache(
            *(P(batch, None, heads), P(batch, None, heads), P(batch)),
            *(P(batch, None, heads), P(batch, None, heads), P(batch), P()),
        ),
        MLP: None,
    }
    out_specs = DecoderOutput(
        tokens=P(batch),
        caches=tuple(caches[kind] for kind in config.pattern),
        survivors=P(batch),
        kept=P(None, batch),
        scores=P(batch),
    )
    specs = rules.specs({"decoder": params})["decoder"]

    def part(params, tokens, counts):
        return prefill_on_one(params, local, tokens, plan=plan, score_fn=score_fn, counts=counts, **options)

    # what is whole on every device is so by construction (sums over the axis); the checker cannot see into kernels
    sharded = jax.shard_map(part, mesh=mesh, in_specs=(specs, P(batch), P(batch)), out_specs=out_specs, check_vma=False)
    return sharded(params, tokens, counts)


def _joined(score_fn: Callable, config: ModelConfig, local: LocalConfig, options: ScoreOptions) -> Callable:
    """score_fn on a device's own heads and groups, then the mean or the largest over devices, as the options ask for."""
    if local.group_devices > 1 and (options.dt or options.decay):
        raise ValueError(
            f"scores with dt or decay average over the heads of a group, and tensor={local.devices} cuts the "
            f"{config.ssm_groups} groups; use tensor={config.ssm_groups} or less"
        )
    rows_first = {"mean": ("mean", "last"), "max": ("max", "last")}[options.heads]  # what commutes with that over heads
    if ATTENTION in config.pattern and local.devices > 1 and options.queries not in rows_first:
        raise ValueError(
            f"scores with heads={options.heads!r} and queries={options.queries!r} need all heads before rows are reduced, "
            f"and tensor={local.devices} cuts the heads; queries may be one of {rows_first}"
        )
    over = {MAMBA: options.groups, ATTENTION: options.heads}

    def score(layer: int, aux: Any, tokens: Tokens) -> jax.Array:
        join = jax.lax.pmax if over[config.pattern[layer]] == "max" else jax.lax.pmean
        return join(score_fn(layer, aux, tokens), local.axis)

    return score


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
