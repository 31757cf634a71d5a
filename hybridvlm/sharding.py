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
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from hybridvlm.config import ModelConfig, ScoreOptions
from hybridvlm.nn import decoder
from hybridvlm.nn.caches import Cache
from hybridvlm.nn.decoder import DecoderOutput, visual_counts
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.layout import column_order, local_config
from hybridvlm.parallel.layout import permute_for_tp as permute_for_tp
from hybridvlm.parallel.layout import unpermute_for_tp as unpermute_for_tp
from hybridvlm.parallel.mesh import AXES, auto_mesh, full_mesh, tensor_size
from hybridvlm.parallel.mesh import make_mesh as make_mesh
from hybridvlm.parallel.scores import reduce_scores as reduce_scores
from hybridvlm.parallel.sequence import shard_length
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction.plan import ReductionPlan

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
    "decoder/cross/q_proj": ("layer", "share", "heads"),
    "decoder/cross/k_proj": ("layer", "share", "heads"),
    "decoder/cross/v_proj": ("layer", "share", "heads"),
    "decoder/cross/o_proj": ("layer", ("heads", "share"), None),
    "decoder/cross/q_bias": ("layer", "heads"),
    "decoder/cross/k_bias": ("layer", "heads"),
    "decoder/cross/v_bias": ("layer", "heads"),
    "decoder/cross/q_norm": ("layer", None),
    "decoder/cross/k_norm": ("layer", None),
    "decoder/cross/alpha": ("layer",),
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


DEFAULT_RULES = ShardingRules()
# Decoding reads every weight for every token: shards of a row hold all of them, and only fsdp, which is asked for, gathers.
INFERENCE_RULES = ShardingRules(share=("fsdp",))


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


def is_whole_everywhere(mesh: Mesh) -> bool:
    """Whether a mesh cuts nothing but examples, so that parameters are whole on every device."""
    return all(size == 1 for axis, size in mesh.shape.items() if axis != "data")


def row_major_format(where: Sharding, ndim: int) -> Format:
    """Where an array lies, with its last axis innermost in memory."""
    return Format(Layout(tuple(range(ndim))), where)


def row_major(array: jax.Array, *, consume: bool = False) -> jax.Array:
    """The array with its last axis innermost in memory, as programs read weights; the same array where it lies so.

    Left to itself a TPU puts that axis innermost which fills its tiles best: of a stack [n,D,C] whose C is no multiple of 128 that
    is D. Every prefill then begins with a copy of the stack, 1.5 GB of it for the Mamba layers of a 12B on four chips.
    consume: the array given is let go where it has to be copied.
    """
    lies = array.format.layout  # type: ignore[attr-defined]  # jax.Array's stub lacks it
    if not isinstance(lies, Layout) or tuple(lies.major_to_minor) == tuple(range(array.ndim)):
        return array
    placed = jax.device_put(array, row_major_format(array.sharding, array.ndim))
    if consume:
        jax.block_until_ready(placed)
        array.delete()
    return placed


def shard_params(
    params: dict[str, Any],
    config: ModelConfig,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    consume: bool = False,
) -> dict[str, Any]:
    """The whole model's parameters, laid out for the mesh and put on its devices, one array after another.

    They may lie on one device or, cut by these or other rules, on the mesh. Nothing that is cut is ever whole on a device, but for
    the columns of one layer that are put in the order of the devices. consume: each of the arrays given is let go once it is placed.
    """
    mesh = full_mesh(mesh)
    devices = tensor_size(mesh)
    order = column_order(config, devices)

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = "/".join(key.key for key in path)
        columns, spec = order.get(name), rules.spec(name, leaf.shape, mesh)
        even = columns is None or leaf.shape[-1] % devices == 0
        where = NamedSharding(mesh, spec if even else P(*spec[:-1]))
        placed = whole = jax.device_put(leaf, where)
        if columns is not None:
            placed = _in_device_order(whole, columns, mesh, spec, even)
        moved = columns is not None or not leaf.sharding.is_equivalent_to(where, leaf.ndim) if consume else False
        if moved:
            jax.block_until_ready(placed)
            leaf.delete()
        return placed

    return jax.tree_util.tree_map_with_path(place, params)


def _in_device_order(whole: jax.Array, columns: np.ndarray, mesh: Mesh, spec: P, even: bool) -> jax.Array:
    """A stack's columns [n,...,C] as its devices need them, layer by layer. even: whether they lie cut over the devices."""

    def layer(a: jax.Array, mine: jax.Array) -> jax.Array:
        return jnp.take(jax.lax.all_gather(a, "tensor", axis=a.ndim - 1, tiled=True) if even else a, mine, axis=-1)

    def part(stack: jax.Array, mine: jax.Array) -> jax.Array:
        return jax.lax.map(lambda a: layer(a, mine), stack)

    before = spec if even else P(*spec[:-1])
    run = jax.shard_map(part, mesh=mesh, in_specs=(before, P("tensor")), out_specs=spec, check_vma=False)
    return jax.jit(run)(whole, jax.device_put(columns.astype(np.int32), NamedSharding(mesh, P("tensor"))))


def prefill(
    params: dict[str, Any],
    config: ModelConfig,
    tokens: Tokens,
    *,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    plan: ReductionPlan | None = None,
    score_fn: Callable[[int, Any, Tokens], Any] | None = None,
    score: ScoreOptions | None = None,
    counts: jax.Array | None = None,
    segments: int = 1,
    caches: bool = False,
    **options: Any,
) -> DecoderOutput:
    """`hybridvlm.nn.decoder.prefill` over a mesh, for training: the decoder's parameters laid out for it, tokens cut over the batch.

    Arguments and results as there, without caches, gradients too; `config` is that of the whole model. Scores are joined across devices
    before anything is dropped, over heads and groups as `score` says (default: the
    plan's options, without a plan those by default): it must be what score_fn itself goes by. Rows of any length are filled up to
    be cut evenly, and come back without.
    ValueError, before anything runs, for sizes that the mesh cannot cut.

    For a backward pass take remat="dots" or "layer": with "none", matrices that fsdp cuts are kept whole from layer to layer.
    """
    if caches:
        raise ValueError(
            "sharding.prefill is for training and leaves no caches; a Model on a mesh does (Model.to_mesh)"
        )
    mesh, specs, local = mesh_part(params, config, mesh, tokens.x.shape[0], rules)
    if score_fn is not None:
        score = score or (ScoreOptions() if plan is None else plan.score)
        score_fn = reduce_scores(score_fn, local, score, getattr(score_fn, "method", None))
    if counts is None:
        counts = visual_counts(tokens, segments)
    length, shards = tokens.length, local.shards
    tokens = pad_to(tokens, shards * shard_length(config, length, shards) if shards > 1 else length)
    out_specs = dataclasses.replace(decoder.output_specs(local), caches=())

    def part(params: Any, tokens: Tokens, counts: jax.Array) -> DecoderOutput[tuple[Cache, ...]]:
        return decoder.prefill(
            params,
            local,
            tokens,
            plan=plan,
            score_fn=score_fn,
            counts=counts,
            segments=segments,
            caches=False,
            **options,
        )

    # what is whole on every device is so by construction (sums over the axis); the checker cannot see into kernels
    in_specs = (specs, P(local.batch_axes, local.row_axis), P(local.batch_axes))
    out = jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        params, tokens, counts
    )
    return out if shards == 1 else _without_padding(out, plan, length)


def mesh_part(
    params: dict[str, Any], config: ModelConfig, mesh: Mesh, rows: int, rules: ShardingRules = DEFAULT_RULES
) -> tuple[Mesh, Any, LocalConfig]:
    """What a decoder over a mesh goes by: the mesh with all axes, the PartitionSpecs of its parameters, and a device's part.

    ValueError for sizes that the mesh cannot cut, or a number of rows that its batch axes do not divide.
    """
    mesh = full_mesh(mesh)
    specs = rules.specs({"decoder": params}, mesh)
    local = local_part(config, mesh, specs, rules)
    parts = math.prod(mesh.shape[axis] for axis in local.batch_axes)
    if rows % parts:
        raise ValueError(
            f"sharding: {' x '.join(local.batch_axes)} = {parts} devices do not divide a batch of {rows}; fill it up "
            "with rows of padding (segment 0), or use a mesh with a smaller data axis"
        )
    return mesh, specs["decoder"], local


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


def local_part(
    config: ModelConfig, mesh: Mesh, specs: Mapping[str, Any], rules: ShardingRules = DEFAULT_RULES
) -> LocalConfig:
    """What one device of a mesh with all axes (`full_mesh`) holds of a model whose parameters lie by `specs`.

    ValueError for a tensor axis that does not divide the model's sizes, or rules that cut rows over several axes.
    """
    local = local_config(config, tensor_size(mesh))
    if len(rules.row) > 1:
        raise ValueError(f"sharding: rows are cut over one mesh axis, the rules name {', '.join(rules.row)}")
    row = rules.row[0] if rules.row else ""
    vocab = specs.get("embed", P())
    cut = bool(vocab) and "tensor" in ((vocab[0],) if isinstance(vocab[0], str) else vocab[0] or ())
    return dataclasses.replace(
        local,
        shared=_shared(specs, rules, mesh),
        vocab_devices=local.devices if cut else 1,
        row_axis=row,
        shards=mesh.shape[row] if row else 1,
        batch_axes=rules.batch,
    )


def _shared(specs: Mapping[str, Any], rules: ShardingRules, mesh: Mesh) -> tuple[tuple[str, int, tuple[str, ...]], ...]:
    """`LocalConfig.shared` of a model's PartitionSpecs."""
    found = []
    for path, spec in flatten_specs(specs):
        for dimension, axes in enumerate(spec):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            share = tuple(axis for axis in axes if axis in rules.share and mesh.shape[axis] > 1)
            if share:
                stacked = path.startswith("decoder/")  # of a stack of layers one is gathered at a time
                found.append((path.removeprefix("decoder/"), dimension - stacked, share))
    return tuple(found)


def flatten_specs(specs: Mapping[str, Any], prefix: str = "") -> list[tuple[str, P]]:
    """A tree of PartitionSpecs by the parameters' paths."""
    found: list[tuple[str, P]] = []
    for name, spec in specs.items():
        found += flatten_specs(spec, f"{prefix}{name}/") if isinstance(spec, Mapping) else [(prefix + name, spec)]
    return found


def pad_to(tokens: Tokens, length: int) -> Tokens:
    """Padding after every row, up to `length`."""
    more = length - tokens.length
    if not more:
        return tokens
    pad = lambda a, empty=0: jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2), constant_values=empty)  # noqa: E731
    filled = jax.tree.map(pad, tokens)
    return filled.replace(index=pad(tokens.index, -1), frame=pad(tokens.frame, -1))


def _is_spec(x: Any) -> bool:
    return isinstance(x, P)
