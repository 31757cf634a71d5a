"""How a model is cut over devices: logical axes to mesh axes, one table by parameter path, and the sharded prefill.

Tensor parallelism follows the model's own seams: attention is cut by kv head, the SSD by group, the MLP and every expert by channel,
the vocabulary by row. Each device then runs the ordinary layers, kernels included, on its part inside one `jax.shard_map`
(hybridvlm/parallel/tensor.py), and the residual stream is whole everywhere, so that all devices drop the same tokens. For that,
packed columns are first put in the order of the devices: `permute_for_tp` (hybridvlm/parallel/layout.py).

The data and fsdp axes cut the batch, the sequence axis cuts every row (hybridvlm/parallel/sequence.py). Matrices are also
cut over fsdp and sequence, along a dimension that products sum over or the vocabulary, and gathered layer by layer as they
run, so that parameters, gradients and the optimizer's moments all live in shares: give `ShardingRules.shardings` the optimizer's state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridvlm.config import ATTENTION, MAMBA, MLP, MOE, ModelConfig, ScoreOptions
from hybridvlm.nn import decoder
from hybridvlm.nn.caches import AttentionCache, Cache, MambaCache
from hybridvlm.nn.decoder import DecoderOutput, visual_counts
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.layout import local_config, permute_for_tp
from hybridvlm.parallel.layout import unpermute_for_tp as unpermute_for_tp
from hybridvlm.parallel.sequence import NO_CACHES, gather_sequence, row_start, shard_length
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction import methods
from hybridvlm.reduction.plan import ReductionPlan

# devices of the last one are neighbours
AXES = ("data", "fsdp", "sequence", "tensor")
Axes = str | tuple[str, ...] | None

# Path of a parameter -> its logical axes, of which a dimension may have two; "*" ends a path whose every parameter is whole on
# each device.
TABLE: dict[str, tuple[str | tuple[str, ...] | None, ...]] = {
    "embed": (("vocab", "share"), None),
    "lm_head": ("share", "vocab"),
    "decoder/norm_f": (None,),
    "decoder/mamba/norm": ("layer", None),
    "decoder/mamba/in_proj": ("layer", "share", "ssm"),
    "decoder/mamba/in_bias": ("layer", "ssm"),
    "decoder/mamba/out_bias": ("layer", None),
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
    "decoder/attention/o_bias": ("layer", None),
    "decoder/attention/q_norm": ("layer", None),
    "decoder/attention/k_norm": ("layer", None),
    "decoder/mlp/norm": ("layer", None),
    "decoder/mlp/up_proj": ("layer", "share", "mlp"),
    "decoder/mlp/gate_proj": ("layer", "share", "mlp"),
    "decoder/mlp/down_proj": ("layer", ("mlp", "share"), None),
    "decoder/mlp/up_bias": ("layer", "mlp"),
    "decoder/mlp/down_bias": ("layer", None),
    "decoder/moe/norm": ("layer", None),
    "decoder/moe/router": ("layer", None, None),
    "decoder/moe/router_bias": ("layer", None),
    "decoder/moe/up": ("layer", "share", None, "mlp"),
    "decoder/moe/down": ("layer", "share", "mlp", None),
    "decoder/moe/shared_up_proj": ("layer", "share", "mlp"),
    "decoder/moe/shared_down_proj": ("layer", ("mlp", "share"), None),
    "decoder/moe/latent_in_proj": ("layer", "share", None),
    "decoder/moe/latent_out_proj": ("layer", "share", None),
    "decoder/moe/shared_up_bias": ("layer", "mlp"),
    "decoder/moe/shared_down_bias": ("layer", None),
    "decoder/moe/latent_in_bias": ("layer", None),
    "decoder/moe/latent_out_bias": ("layer", None),
    "vision/*": (),
    "projector/*": (),
}


# what mesh axes may serve for, where there is a choice
_SERVES = {"batch": AXES[:2], "row": ("sequence",), "share": AXES[:3], "vocab": ("tensor",)}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> the mesh axes that it is cut over, () for none. An axis of `TABLE`, "batch", or "row": along its tokens.

    share: what devices that need the same matrix hold only a share of; as many of these axes, from the first, as divide it.
    vocab: where it divides the vocabulary. ssm, heads, mlp and layer are as the layers' code has them (hybridvlm/parallel/tensor.py).
    ValueError for an axis that there is not, or that cannot serve.
    """

    batch: tuple[str, ...] = ("data", "fsdp")
    row: tuple[str, ...] = ("sequence",)
    layer: tuple[str, ...] = ()
    share: tuple[str, ...] = ("fsdp", "sequence")
    ssm: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)

    def __post_init__(self) -> None:
        for name, allowed in _SERVES.items():
            axes = getattr(self, name)
            if not isinstance(axes, tuple) or len(set(axes)) < len(axes) or not set(axes) <= set(allowed):
                raise ValueError(f"ShardingRules.{name}: expected a tuple of axes out of {allowed}, got {axes!r}")
        for field in dataclasses.fields(self):
            if field.name not in _SERVES and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"ShardingRules.{field.name} can only be {field.default}, since the layers' code counts on it, got "
                    f"{getattr(self, field.name)!r}"
                )

    def spec(self, path: str, shape: Sequence[int] | None = None, mesh: Mesh | None = None) -> P:
        """The PartitionSpec of the parameter at `path`, such as "decoder/mamba/in_proj"; ValueError for one not in the table.

        With its shape and a mesh, only axes of the mesh, and neither shares nor a cut vocabulary that do not come out even.
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
                if (
                    mesh is not None
                    and name in ("share", "vocab")
                    and size % math.prod(mesh.shape[a] for a in together)
                ):
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
        mesh = auto_mesh(mesh)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs(params, mesh), is_leaf=_is_spec)


def _one_or_all(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return axes[0] if len(axes) == 1 else axes or None


def _with_specs(node: Callable[..., Any], *specs: Any, **named: Any) -> Any:
    """A node of a tree with partition specs in the positions of its arrays, as `jax.shard_map` takes them."""
    return node(*specs, **named)


DEFAULT_RULES = ShardingRules()


def sharding_of(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where the parameter at `path` lies on the mesh, its columns in the whole model's order; a dimension that does not come out even,
    and anything that no rule is for, is whole on every device."""
    mesh = auto_mesh(mesh)
    try:
        spec = DEFAULT_RULES.spec(path, shape, mesh)
    except ValueError:
        spec = P()
    cut = []
    for size, axes in zip(shape, spec, strict=False):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        cut.append(axes if size % math.prod(mesh.shape.get(name, 1) for name in names) == 0 else None)
    return NamedSharding(mesh, P(*cut))


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


def auto_mesh(mesh: Mesh) -> Mesh:
    """The mesh with axes that XLA cuts by, as the layers count on; those of `jax.make_mesh` take every cut written out.

    Raises:
        TypeError: it is no mesh.
    """
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, as make_mesh gives it, got {type(mesh).__name__}")
    types = (AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == types:
        return mesh
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=types)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def tensor_size(mesh: Mesh | None) -> int:
    """Devices along the mesh's tensor axis. ValueError for a mesh with an axis that no rule knows."""
    if mesh is None:
        return 1
    unknown = [axis for axis, size in mesh.shape.items() if axis not in AXES and size > 1]
    if unknown:
        raise ValueError(f"mesh: expected axes out of {AXES}, as make_mesh gives them, got {tuple(mesh.shape)}")
    return mesh.shape.get("tensor", 1)


def shard_params(
    params: dict[str, Any], config: ModelConfig, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, Any]:
    """The whole model's parameters, laid out for the mesh and put on its devices."""
    mesh = auto_mesh(mesh)
    params = permute_for_tp(params, config, tensor_size(mesh))
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
    score: ScoreOptions | None = None,
    counts: jax.Array | None = None,
    segments: int = 1,
    caches: bool = True,
    **options: Any,
) -> DecoderOutput:
    """`hybridvlm.nn.decoder.prefill` over a mesh: the decoder's parameters laid out for it, tokens cut over the batch.

    Arguments and results as there, gradients too; `config` is that of the whole model. Caches stay cut: keys and values by kv head,
    states by head, convolution states by the devices' own channels (x|B|C each); heads and groups that several devices hold appear
    once per device. Scores are joined across devices before anything is dropped, over heads and groups as `score` says (default: the
    plan's options, without a plan those by default): it must be what score_fn itself goes by. A sequence axis of more than one device
    takes caches=False; rows of any length are filled up to be cut evenly, and come back without.
    ValueError, before anything runs, for sizes that the mesh cannot cut.

    For a backward pass take remat="dots" or "layer": with "none", matrices that fsdp cuts are kept whole from layer to layer.
    """
    mesh = auto_mesh(mesh)
    local = local_config(config, tensor_size(mesh))
    batch, heads, ssm = (
        _one_or_all(tuple(axis for axis in getattr(rules, name) if axis in mesh.shape))
        for name in ("batch", "heads", "ssm")
    )
    rows = [axis for axis in rules.row if axis in mesh.shape]
    if len(rows) > 1:
        raise ValueError(f"sharding: rows are cut over one mesh axis, the rules name {', '.join(rows)}")
    row = rows[0] if rows else None
    parts = math.prod(mesh.shape.get(axis, 1) for axis in rules.batch)
    if tokens.x.shape[0] % parts:
        raise ValueError(
            f"sharding: {' x '.join(rules.batch)} = {parts} devices do not divide a batch of {tokens.x.shape[0]}; fill it up "
            "with rows of padding (segment 0), or use a mesh with a smaller data axis"
        )
    specs = rules.specs({"decoder": params}, mesh)["decoder"]
    shards = mesh.shape[row] if row else 1
    if shards > 1 and caches:
        raise ValueError(NO_CACHES)
    local = dataclasses.replace(local, shared=_shared(specs, rules, mesh), row_axis=row or "", shards=shards)
    if score_fn is not None:
        score = score or (ScoreOptions() if plan is None else plan.score)
        score_fn = reduce_scores(score_fn, config, local, score, getattr(score_fn, "method", None))
    if counts is None:
        counts = visual_counts(tokens, segments)
    length = tokens.length
    tokens = pad_to(tokens, shards * shard_length(config, length, shards) if shards > 1 else length)
    out_specs = _output_specs(config, batch, row, heads, ssm, caches)

    def part(params: Any, tokens: Tokens, counts: jax.Array) -> DecoderOutput[tuple[Cache, ...]]:
        return decoder.prefill(
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
    return out if shards == 1 else _without_padding(out, plan, length)


def _output_specs(config: ModelConfig, batch: Axes, row: Axes, heads: Axes, ssm: Axes, caches: bool) -> Any:
    """How what `prefill` returns lies on the mesh: PartitionSpecs instead of arrays."""
    kv = P(batch, None, heads)
    entries = {
        MAMBA: _with_specs(MambaCache, P(batch, None, ssm), P(batch, ssm), P(batch)),
        ATTENTION: _with_specs(AttentionCache, kv, kv, P(batch), kv, kv, P(batch), P()),
        MLP: None,
        MOE: None,
    }
    return _with_specs(
        DecoderOutput,
        tokens=P(batch, row),
        caches=tuple(entries[kind] for kind in config.pattern) if caches else (),
        survivors=P(batch, row),
        kept=P(None, batch),
        scores=P(batch, row),
        hidden_states=P(batch, row),
    )


def _without_padding(out: DecoderOutput, plan: ReductionPlan | None, length: int) -> DecoderOutput:
    """Rows that were padded to be cut evenly, at the lengths of the plan; `length` is that of layer 0."""
    drops = plan.drops if plan is not None else ()
    lengths = [length] if plan is None else [length, *(plan.row_length(layer + 1) for layer in drops)]
    cut = lambda tree, n: jax.tree.map(lambda a: a[:, :n], tree)  # noqa: E731
    at_layer = lambda found: {i: cut(a, lengths[sum(drop < i for drop in drops)]) for i, a in found.items()}  # noqa: E731
    return dataclasses.replace(
        out,
        tokens=cut(out.tokens, lengths[-1]),
        survivors=tuple(cut(pair, n) for pair, n in zip(out.survivors, lengths[1:], strict=True)),
        scores=at_layer(out.scores),
        hidden_states=at_layer(out.hidden_states),
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


def pad_to(tokens: Tokens, length: int) -> Tokens:
    """Padding after every row, up to `length`."""
    more = length - tokens.length
    if not more:
        return tokens
    pad = lambda a, empty=0: jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2), constant_values=empty)  # noqa: E731
    filled = jax.tree.map(pad, tokens)
    return filled.replace(index=pad(tokens.index, -1), frame=pad(tokens.frame, -1))


def reduce_scores(
    score_fn: Callable,
    config: ModelConfig,
    local: LocalConfig,
    options: ScoreOptions,
    method: methods.Method | None = None,
) -> Callable:
    """score_fn on a device's own heads and groups, then the mean or the largest over devices, as the options ask for; and of
    a row that is cut, on the whole of it where the score of `method` (None: any function, which may look at anything) needs that."""
    reads = methods.QUERIES if method is None else method.reads
    if reads == methods.LAST_QUERY:
        options = ScoreOptions(queries="last")  # whatever the plan's are
    by_head = local.devices > 1 and reads in (methods.QUERIES, methods.LAST_QUERY, methods.NEXT_ATTENTION)
    if by_head and MAMBA in config.pattern and local.group_devices > 1 and (options.dt or options.decay):
        raise ValueError(
            f"scores with dt or decay average over the heads of a group, and tensor={local.devices} cuts the "
            f"{config.ssm_groups} groups; use tensor={config.ssm_groups} or less"
        )
    rows_first = {"mean": ("mean", "last"), "max": ("max", "last")}[options.heads]  # what commutes with that over heads
    if by_head and ATTENTION in config.pattern and options.queries not in rows_first:
        raise ValueError(
            f"scores with heads={options.heads!r} and queries={options.queries!r} need all heads before rows are reduced, "
            f"and tensor={local.devices} cuts the heads; queries may be one of {rows_first}"
        )
    over = {MAMBA: options.groups, ATTENTION: options.heads}

    def whole(aux: Any, start: jax.Array | int) -> Any:
        """What a layer tells of the whole row."""
        if isinstance(aux, LookaheadAux):
            return LookaheadAux(whole(aux.own, start), tuple(whole(layer, start) for layer in aux.ahead))
        if isinstance(aux, AttentionAux):
            return dataclasses.replace(aux, q_index=aux.q_index + start, k=gather_sequence(local, aux.k))
        return jax.tree.map(lambda a: gather_sequence(local, a), aux)

    def of_row(layer: int, aux: Any, tokens: Tokens) -> jax.Array:
        by_attention = isinstance(aux, AttentionAux | LookaheadAux)
        if local.shards == 1 or (by_attention and method is not None and method.token_local):
            return score_fn(layer, aux, tokens)
        start = row_start(local, tokens.length)
        gathered = jax.tree.map(lambda a: gather_sequence(local, a), tokens)
        score = score_fn(layer, whole(aux, start), gathered)  # what it does not look at is never gathered
        return jax.lax.dynamic_slice_in_dim(score, start, tokens.length, axis=1)

    def score(layer: int, aux: Any, tokens: Tokens) -> jax.Array:
        mine = of_row(layer, aux, tokens)
        if not by_head:
            return mine
        if over[ATTENTION if isinstance(aux, LookaheadAux) else config.pattern[layer]] == "max":
            return jnp.max(jax.lax.all_gather(mine, local.axis), axis=0)  # JAX has no derivative of pmax
        return jax.lax.pmean(mine, local.axis)

    score.ahead = getattr(score_fn, "ahead", None)  # type: ignore[attr-defined]
    return score


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
