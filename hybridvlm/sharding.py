"""How a model is cut over devices: logical axes to mesh axes, one table by parameter path, and the sharded prefill.

Tensor parallelism follows the model's own seams: attention is cut by kv head, the SSD by group, the MLP by channel, the
vocabulary by row. Each device then runs the ordinary layers, kernels included, on its part inside one `jax.shard_map`
(hybridvlm/nn/parallel.py), and the residual stream is whole everywhere, so that all devices drop the same tokens.

Packed parameters cannot be cut where they lie: in_proj's columns are z|x|B|C|dt, and an even cut would give the first device
nothing but z. `lay_out` puts columns in the order of the devices first, each with its own z|x|B|C|dt, and writes
down more than once what several devices need: the B and C of a group that they share, the heads of a shared kv head.

The data and fsdp axes cut the batch, the sequence axis cuts every row (hybridvlm/nn/sequence.py). Matrices are also cut over fsdp and
sequence, along a dimension that products sum over or the vocabulary, and put together layer by layer as they run, so that
parameters, gradients and the optimizer's moments all live in shares: give `ShardingRules.shardings` the optimizer's state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridvlm.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig, ScoreOptions
from hybridvlm.nn.caches import AttentionCache, MambaCache
from hybridvlm.nn.decoder import DecoderOutput, visual_counts
from hybridvlm.nn.decoder import prefill as prefill_on_one
from hybridvlm.nn.parallel import LocalConfig
from hybridvlm.nn.sequence import row_start, shard_length, whole_row
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction.plan import ReductionPlan

AXES = ("data", "fsdp", "sequence", "tensor")  # devices of the last one are neighbours

# Methods whose score of a token hangs on the question and that token alone, so that each stretch of a row ranks its own after an
# attention layer. Any other is given the whole row on every device.
LOCAL_SCORES = frozenset(
    ("str", "str-attention", "fastv", "pyramiddrop", "timeviper-td", "oneshot-attention", "random", "uniform")
)

# Path of a parameter -> its logical axes, of which a dimension may have two; "*" ends a path whose every parameter is whole on
# each device.
TABLE: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    "embed": (("vocab", "share"), None),
    "lm_head": ("share", "vocab"),
    "decoder/norm_f": (None,),
    "decoder/mamba/norm": ("layer", None),
    "decoder/mamba/in_proj": ("layer", "share", "ssm"),
    "decoder/mamba/conv_weight": ("layer", None, "ssm"),
    "decoder/mamba/conv_bias": ("layer", "ssm"),
    "decoder/mamba/A_log": ("layer", "ssm"),
    "decoder/mamba/D": ("layer", "ssm"),
    "decoder/mamba/dt_bias": ("layer", "ssm"),
    "decoder/mamba/gate_norm": ("layer", "ssm"),
    "decoder/mamba/out_proj": ("layer", ("ssm", "share"), None),
    "decoder/attention/norm": ("layer", None),
    "decoder/attention/q_proj": ("layer", "share", "heads"),
    "decoder/attention/k_proj": ("layer", "share", "heads"),
    "decoder/attention/v_proj": ("layer", "share", "heads"),
    "decoder/attention/o_proj": ("layer", ("heads", "share"), None),
    "decoder/attention/q_bias": ("layer", "heads"),
    "decoder/attention/k_bias": ("layer", "heads"),
    "decoder/attention/v_bias": ("layer", "heads"),
    "decoder/attention/q_norm": ("layer", None),
    "decoder/attention/k_norm": ("layer", None),
    "decoder/mlp/norm": ("layer", None),
    "decoder/mlp/up_proj": ("layer", "share", "mlp"),
    "decoder/mlp/gate_proj": ("layer", "share", "mlp"),
    "decoder/mlp/down_proj": ("layer", ("mlp", "share"), None),
    "decoder/moe/norm": ("layer", None),
    "decoder/moe/router": ("layer", None, None),
    "decoder/moe/router_bias": ("layer", None),
    "decoder/moe/up": ("layer", "share", None, None),
    "decoder/moe/down": ("layer", "share", None, None),
    "decoder/moe/shared_up_proj": ("layer", "share", None),
    "decoder/moe/shared_down_proj": ("layer", "share", None),
    "decoder/moe/latent_in_proj": ("layer", "share", None),
    "decoder/moe/latent_out_proj": ("layer", "share", None),
    "vision/*": (),
    "projector/*": (),
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> the mesh axes that it is cut over, () for none. An axis of `TABLE`, "batch", or "row": along its tokens.

    share: what devices that need the same matrix hold only a share of; as many of these axes, from the first, as divide it.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    row: tuple[str, ...] = ("sequence",)
    layer: tuple[str, ...] = ()
    share: tuple[str, ...] = ("fsdp", "sequence")
    ssm: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)

    def spec(self, path: str, shape: Sequence[int] | None = None, mesh: Mesh | None = None) -> P:
        """The PartitionSpec of the parameter at `path`, such as "decoder/mamba/in_proj"; ValueError for one not in the table.

        With its shape and a mesh, only axes of the mesh, and no shares where a dimension does not come out even.
        """
        if path.split("/")[0] + "/*" in TABLE:
            return P()
        if path not in TABLE:
            raise ValueError(f"sharding: there is no rule for the parameter {path!r}; add its logical axes to TABLE")
        sizes = [None] * len(TABLE[path]) if shape is None else shape
        cut = zip(TABLE[path], sizes, strict=True)
        return P(*(_one_or_all(self._dimension(logical, size, mesh)) for logical, size in cut))

    def _dimension(self, logical: str | tuple[str, ...] | None, size: int | None, mesh: Mesh | None) -> tuple[str, ...]:
        """The mesh axes that a dimension of `size` is cut over."""
        chosen: tuple[str, ...] = ()
        for name in (logical,) if isinstance(logical, str) else logical or ():
            for axis in getattr(self, name):
                if mesh is not None and axis not in mesh.shape:
                    continue
                together = (*chosen, axis)
                if mesh is not None and name == "share" and size % math.prod(mesh.shape[a] for a in together):
                    break
                chosen = together
        return chosen

    def specs(self, params: Any, mesh: Mesh | None = None) -> Any:
        """A tree like `params` (of the whole model, laid out for the mesh) of PartitionSpecs.

        An optimizer's state is cut as the parameters that its parts belong to, which lie in it under their own paths.
        """

        def spec(path: tuple[Any, ...], leaf: Any) -> P:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            return self.spec("/".join(names), leaf.shape, mesh) if names else P()

        return jax.tree_util.tree_map_with_path(spec, params)

    def shardings(self, mesh: Mesh, params: Any) -> Any:
        """A tree like `params`, as for `specs`, of NamedShardings."""
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(params, mesh), is_leaf=_is_spec)


def _one_or_all(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes[0] if len(axes) == 1 else axes or None


DEFAULT_RULES = ShardingRules()


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp, sequence and tensor over `devices` (default: all there are); one size may be -1: the rest.

    data, fsdp: examples of a batch; fsdp cuts the matrices as well. sequence: stretches of a row. tensor: heads and channels.
    Raises ValueError where the sizes do not fill the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, sequence, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"make_mesh: sizes must be at least 1, one of them may be -1, got {dict(zip(AXES, sizes))}")  # noqa: B905
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // -math.prod(sizes))
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"make_mesh: {'x'.join(map(str, sizes))} ({' x '.join(AXES)}) is not the number of devices, {len(devices)}; "
            "pass `devices` to use some of them"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def tensor_size(mesh: Mesh | None) -> int:
    """Devices along the mesh's tensor axis."""
    return 1 if mesh is None else mesh.shape.get("tensor", 1)


def local_config(config: ModelConfig, devices: int) -> LocalConfig:
    """What each of `devices` tensor-parallel devices holds of the decoder. ValueError, with the sizes, if it cannot be cut so."""
    c = config
    if c.count(MOE) and devices > 1:
        raise ValueError(
            "sharding: layers of experts (E) have no tensor-parallel rule; use tensor=1 and the other axes"
        )
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
    return _reordered(params, config, devices, lambda a, columns: a[..., columns])


def _reordered(
    params: dict[str, Any], config: ModelConfig, devices: int, change: Callable[[Any, np.ndarray], Any]
) -> dict:
    """params with `change(array, columns)` where `lay_out` takes these columns of an array."""
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
        kind: {name: change(a, order[kind, name]) if (kind, name) in order else a for name, a in stack.items()}
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


def in_one_piece(laid: dict[str, Any], config: ModelConfig, devices: int, *, join: str = "first") -> dict[str, Any]:
    """The inverse of `lay_out`: parameters in the order of the whole model, to be saved or laid out for another mesh.

    What is written down more than once counts as it stands first (join="first": parameters, moments), or is added up
    ("sum": gradients, of which every copy has a part). lay_out(in_one_piece(gradients, ..., join="sum"), ...) keeps copies
    equal; training needs it where the tensor axis is longer than there are SSM groups or kv heads, else there are no copies.
    """
    if join not in ("first", "sum"):
        raise ValueError(f"in_one_piece: join must be 'first' or 'sum', got {join!r}")

    def back(a: Any, columns: np.ndarray) -> Any:
        width = int(columns.max()) + 1
        if join == "first":
            return a[..., np.unique(columns, return_index=True)[1]]
        return jnp.zeros((*a.shape[:-1], width), a.dtype).at[..., columns].add(a)

    return _reordered(laid, config, devices, back)


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
    segments: int = 1,
    caches: bool = True,
    **options: Any,
) -> DecoderOutput:
    """`hybridvlm.nn.decoder.prefill` over a mesh: the decoder's parameters laid out for it, tokens cut over the batch.

    Arguments and results as there, gradients too; `config` is that of the whole model. Caches stay cut: keys and values by kv head,
    states by head, convolution states by the devices' own channels (x|B|C each); heads and groups that several devices hold appear
    once per device. Scores are joined across devices before anything is dropped. A sequence axis of more than one device takes
    caches=False; rows of any length are filled up to be cut evenly, and come back without.

    For a backward pass take remat="dots" or "layer": with "none", matrices that fsdp cuts are kept whole from layer to layer.
    """
    local = local_config(config, tensor_size(mesh))
    batch, row, heads, ssm = (
        _one_or_all(tuple(axis for axis in getattr(rules, name) if axis in mesh.shape))
        for name in ("batch", "row", "heads", "ssm")
    )
    specs = rules.specs({"decoder": params}, mesh)["decoder"]
    shards = mesh.shape[row] if row else 1
    local = dataclasses.replace(local, shared=_shared(specs, rules, mesh), row_axis=row or "", shards=shards)
    if score_fn is not None:
        method = "" if plan is None else plan.decoder_method
        score_fn = _joined(score_fn, config, local, ScoreOptions() if plan is None else plan.score, method)
    if counts is None:
        counts = visual_counts(tokens, segments)
    length = tokens.length
    tokens = _filled(tokens, shards * shard_length(config, length, shards) if shards > 1 else length)
    entries = {
        MAMBA: MambaCache(P(batch, None, ssm), P(batch, ssm), P(batch)),
        ATTENTION: AttentionCache(
            *(P(batch, None, heads), P(batch, None, heads), P(batch)),
            *(P(batch, None, heads), P(batch, None, heads), P(batch), P()),
        ),
        MLP: None,
        MOE: None,
    }
    out_specs = DecoderOutput(
        tokens=P(batch, row),
        caches=tuple(entries[kind] for kind in config.pattern) if caches else (),
        survivors=P(batch, row),
        kept=P(None, batch),
        scores=P(batch, row),
    )

    def part(params, tokens, counts):
        return prefill_on_one(
            params,
            local,
            tokens,
            plan=plan,
            score_fn=score_fn,
            counts=counts,
            segments=segments,
            caches=caches,
            **options,
        )

    # what is whole on every device is so by construction (sums over the axis); the checker cannot see into kernels
    in_specs = (specs, P(batch, row), P(batch))
    out = jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        params, tokens, counts
    )
    if shards == 1:
        return out
    lengths = [length, *(plan.row_length(layer + 1) for layer in (plan.drops if plan is not None else ()))]
    cut = lambda tree, n: jax.tree.map(lambda a: a[:, :n], tree)  # noqa: E731
    entering = {
        layer: lengths[sum(drop < layer for drop in plan.drops) if plan is not None else 0] for layer in out.scores
    }
    return dataclasses.replace(
        out,
        tokens=cut(out.tokens, lengths[-1]),
        survivors=tuple(cut(pair, n) for pair, n in zip(out.survivors, lengths[1:], strict=True)),
        scores={layer: cut(score, entering[layer]) for layer, score in out.scores.items()},
    )


def _shared(specs: Mapping[str, Any], rules: ShardingRules, mesh: Mesh) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
    """`LocalConfig.shared` of the decoder's PartitionSpecs."""
    found = []
    for kind, stack in specs.items():
        for name, spec in stack.items() if isinstance(stack, Mapping) else ():
            for dimension, axes in enumerate(spec):
                axes = (axes,) if isinstance(axes, str) else axes or ()
                share = tuple(axis for axis in axes if axis in rules.share and mesh.shape[axis] > 1)
                if share:
                    found.append((f"{kind}/{name}", dimension - 1, share))
    return tuple(found)


def _filled(tokens: Tokens, length: int) -> Tokens:
    """Padding behind every row, up to `length`."""
    more = length - tokens.length
    if not more:
        return tokens
    pad = lambda a, empty=0: jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2), constant_values=empty)  # noqa: E731
    filled = jax.tree.map(pad, tokens)
    return filled.replace(index=pad(tokens.index, -1), frame=pad(tokens.frame, -1))


def _joined(
    score_fn: Callable, config: ModelConfig, local: LocalConfig, options: ScoreOptions, method: str = ""
) -> Callable:
    """score_fn on a device's own heads and groups, then the mean or the largest over devices, as the options ask for; and of
    a row that is cut, on the whole of it where the score of `method` needs that."""
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

    def of_row(layer: int, aux: Any, tokens: Tokens) -> jax.Array:
        if local.shards == 1 or (isinstance(aux, AttentionAux) and method in LOCAL_SCORES):
            return score_fn(layer, aux, tokens)
        start = row_start(local, tokens.length)
        gather = lambda a: whole_row(local, a)  # noqa: E731
        if isinstance(aux, AttentionAux):
            whole = dataclasses.replace(aux, q_index=aux.q_index + start, k=gather(aux.k))
        else:
            whole = jax.tree.map(gather, aux)
        score = score_fn(layer, whole, jax.tree.map(gather, tokens))  # what it does not look at is never gathered
        return jax.lax.dynamic_slice_in_dim(score, start, tokens.length, axis=1)

    def score(layer: int, aux: Any, tokens: Tokens) -> jax.Array:
        mine = of_row(layer, aux, tokens)
        if local.devices == 1:
            return mine
        if over[config.pattern[layer]] == "max":
            return jax.lax.pmax(jax.lax.stop_gradient(mine), local.axis)  # JAX has no derivative of it
        return jax.lax.pmean(mine, local.axis)

    return score


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
