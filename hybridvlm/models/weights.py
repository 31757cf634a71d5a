"""How a family's published tensors and our parameters correspond: the form of the tables, read in both directions.

A `WeightMap` lists, for every array of ours, the published tensor (or the tensors, one per layer and expert) it is made of.
`renames` bring the known spellings of a name to the one that the table uses, `publish` goes back to the published
one, and `fused` says which tensors hold several of the table's in a row. Linear weights are [out,in] in checkpoints and
[in,out] here. Nothing here reads a file: see hybridvlm/checkpoints/hf.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Leaf = Any  # an array of NumPy or of JAX: transforms only take views, transpose and reshape

# Leaves that stay in float32 whatever the model's dtype: what makes decays and steps, gates of single numbers, and the
# correction that decides which experts win.
FLOAT32 = ("A_log", "D", "dt_bias", "alpha", "router_bias")


@dataclasses.dataclass(frozen=True)
class Transform:
    """How a stored tensor becomes ours and back. axis: where the stored first axis lies in ours; None if it is split up there,
    and then the tensor is read whole."""

    into: Callable[[Leaf, Any], Leaf]
    back: Callable[[Leaf, Any], Leaf]
    axis: int | None


SAME = Transform(lambda x, c: x, lambda x, c: x, 0)
LINEAR = Transform(lambda x, c: x.T, lambda x, c: x.T, 1)  # [out,in] <-> [in,out]
CONV = Transform(lambda x, c: x[:, 0].T, lambda x, c: x.T[:, None], 1)  # depthwise [channels,1,W] <-> [W,channels]


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """One of our arrays: its path in the parameters, the tensor it comes from, that tensor's shape, how it is turned.

    `source` may hold {i}, the layer, and {j}, the expert of `experts(config)`: our array then has a leading axis for each, and
    `stacked` is what a tensor with all experts of a layer is called, where some releases have that.
    scale: a tensor that multiplies the outputs (LayerScale), folded in where the checkpoint has one. when: whether a
    config has this array at all.
    """

    target: str
    source: str
    shape: Callable[[Any], Shape]
    turn: Transform = SAME
    scale: str = ""
    when: Callable[[Any], bool] = lambda c: True
    experts: Callable[[Any], int] | None = None
    stacked: str = ""


# (config that the row's functions are given, row, layer numbers to stack or None)
StackedSpec = tuple[Any, WeightSpec, Sequence[int] | None]


@dataclasses.dataclass(frozen=True)
class Fused:
    """A tensor that holds several of the table's, one after another along its first axis; both with {i} for the layer."""

    name: str
    parts: tuple[str, ...]

    def split(self, name: str) -> tuple[str, ...]:
        """The parts of a tensor's name, or () if it is not this one."""
        return tuple(_swap(name, self.name, part) for part in self.parts) if _fits(name, self.name) else ()

    def join(self, name: str) -> str:
        """The tensor whose part `name` is, or ""."""
        return next((_swap(name, part, self.name) for part in self.parts if _fits(name, part)), "")


def _regex(template: str) -> str:
    return re.escape(template).replace(r"\{i\}", r"(\d+)")


def _fits(name: str, template: str) -> bool:
    return re.fullmatch(_regex(template), name) is not None


def _swap(name: str, template: str, to: str) -> str:
    layer = re.fullmatch(_regex(template), name)
    return to.replace("{i}", layer[1]) if layer and layer.groups() else to


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """jobs: every array of a config. renames: (regex, replacement) from any known spelling to the table's; publish: from the
    table's to the published one. idle: whether a tensor that no row asks for may be there unused. who: for messages. tied: the
    table's names of embedding and head, where the config makes them one."""

    jobs: tuple[StackedSpec, ...]
    renames: tuple[tuple[str, str], ...] = ()
    publish: tuple[tuple[str, str], ...] = ()
    fused: tuple[Fused, ...] = ()
    ignored: Callable[[str], bool] = lambda name: False
    who: str = "the config"
    tied: tuple[str, ...] = ()

    def canonical(self, name: str) -> tuple[str, ...]:
        """The table's spelling of a tensor's name (several for a fused tensor, in order); an unknown one stays as it is."""
        for pattern, to in self.renames:
            name = re.sub(pattern, to, name)
        for fused in self.fused:
            if parts := fused.split(name):
                return parts
        return (name,)

    def published(self, name: str) -> str:
        """The published spelling of one of the table's names."""
        for pattern, to in self.publish:
            name = re.sub(pattern, to, name)
        return name

    def pieces(self, job: StackedSpec) -> Iterator[tuple[Shape, str, str]]:
        """Of one job: (position in the stack, the table's name of the tensor, of its scale or "")."""
        c, row, layers = job
        for at, layer in enumerate([None] if layers is None else layers):
            prefix = () if layers is None else (at,)
            for expert in [None] if row.experts is None else range(row.experts(c)):
                stack_index = prefix if expert is None else (*prefix, expert)
                yield stack_index, row.source.format(i=layer, j=expert), row.scale.format(i=layer)

    def target_shape(self, job: StackedSpec) -> Shape:
        """The shape of one job's array."""
        c, row, layers = job
        stack = () if layers is None else (len(layers),)
        experts = () if row.experts is None else (row.experts(c),)
        turned = row.turn.into(np.broadcast_to(np.zeros((), np.int8), row.shape(c)), c)
        return (*stack, *experts, *turned.shape)

    def shapes(self) -> dict[str, Shape]:
        """The shape of every published tensor (fused ones whole), by published name; nothing is read."""
        out: dict[str, Shape] = {}
        for job in self.jobs:
            c, row, _ = job
            for _, source, _ in self.pieces(job):
                whole = next((joined for fused in self.fused if (joined := fused.join(source))), source)
                first, *rest = row.shape(c)
                held = out.get(self.published(whole), (0,))[0] if whole != source else 0
                out[self.published(whole)] = (held + first, *rest)
        return out


def stacked_specs(c: Any, rows: Sequence[WeightSpec], layers: Sequence[int] | None = None) -> list[StackedSpec]:
    """The rows that config `c` has, each as a job over `layers` (none if there are no layers)."""
    if layers is not None and not len(layers):
        return []
    return [(c, row, layers) for row in rows if row.when(c)]


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dict of parameters as {"decoder/mamba/in_proj": leaf, ...}."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `flatten`."""
    params: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        level = params
        for parent in parents:
            level = level.setdefault(parent, {})
        level[name] = value
    return params
