"""Running a range of layers: repeated units as `jax.lax.scan`, rematerialisation, and gradients of stacked parameters.

A pattern such as M-M-M*-M-M-M*- repeats units of layers. A unit that repeats compiles once and runs as a scan, and scans
may lie in one another. The scan reads each layer's parameters out of the stack of its kind, by index: slicing the stack for
it would copy the weights. Under differentiation it is the other way round (the gradient of reading by index is as large as
the whole stack, for every layer), so that the forward pass under `jax.vjp` scans over slices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import ATTENTION, KINDS, ModelConfig
from hybridvlm.nn.attention import LOOK_PARAMS, attention_look
from hybridvlm.nn.layers import LAYER_KINDS
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.parallel.tensor import all_gather_params
from hybridvlm.pattern import repeats

Params = dict[str, Any]

# What the backward pass finds of a layer's inside (the residual stream before each layer is kept in any case); the rest is
# computed again. None: all of it is kept.
REMAT: dict[str, Callable[..., bool] | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layer": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class LayerRange:
    """Layers start..stop-1 of a decoder, and how they run.

    Attributes:
        decode_capacity: empty cache slots for tokens to come.
        remat: a name of `REMAT`.
        caches: whether caches are returned.
        slice_params: repeated units scan over slices of their parameters instead of reading the stack by index.
        in_scan: these layers are the body of a scan.
        one_segment: a promise that each row is one segment, padded at its end.
    """

    config: ModelConfig
    start: int
    stop: int
    decode_capacity: int = 0
    remat: str = "none"
    caches: bool = True
    slice_params: bool = False
    in_scan: bool = False
    one_segment: bool = False


def index_params(stack: dict[str, jax.Array], index: int | jax.Array) -> dict[str, jax.Array]:
    """The parameters of one layer of a stack; `index` may be a traced int32."""
    if isinstance(index, int):
        return jax.tree.map(lambda a: a[index], stack)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stack)


def layer_params(params: Params, config: ModelConfig, layer: int) -> dict[str, jax.Array]:
    """The parameters of one layer, out of the stack of its kind."""
    name, index = config.kind_index(layer)
    return index_params(params[name], index)


def run_layer(layers: LayerRange, layer: int, stack: Params, index, x, segment, position, query=None, **options):
    """One layer over whole rows, the `index`-th of its kind's `stack`: (x, its cache or None, what scores read)."""
    config, kind = layers.config, layers.config.pattern[layer]

    def run(stack, index, x, segment, position, query):
        p = all_gather_params(config, KINDS[kind], index_params(stack, index), x.dtype)
        static = {"decode_capacity": layers.decode_capacity, "one_segment": layers.one_segment} | options
        x, cache, aux = LAYER_KINDS[kind].forward(p, config, x, segment, position, query=query, **static)
        return x, cache if layers.caches else None, aux

    if REMAT[layers.remat] is None:
        return run(stack, index, x, segment, position, query)
    # What enters is kept, so a layer's parameters are picked and gathered inside. The body of a scan is compiled apart from
    # its backward pass: XLA finds nothing there that it could merge with the second computation.
    static = (1,) if isinstance(index, int) else ()
    again = jax.checkpoint(run, policy=REMAT[layers.remat], prevent_cse=not layers.in_scan, static_argnums=static)
    return again(stack, index, x, segment, position, query)


def look_ahead(
    layers: LayerRange, layer: int, params: Params, x, segment, position, query, query_capacity: int
) -> AttentionAux:
    """How attention layer `layer` would look at the residual stream of these layers, which come before it."""
    config, kind = layers.config, KINDS[ATTENTION]
    index = config.kind_index(layer)[1]

    def run(stack, x):
        p = all_gather_params(config, kind, index_params(stack, index), x.dtype)
        return attention_look(p, config, x, segment, position=position, query=query, query_capacity=query_capacity)

    stack = {name: a for name, a in params[kind].items() if name in LOOK_PARAMS}
    if REMAT[layers.remat] is None:
        return run(stack, x)
    return jax.checkpoint(run, policy=REMAT[layers.remat])(stack, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_layers(layers: LayerRange, params: Params, x, segment, position):
    """x [B,L,D] after a range of layers that neither drop nor score, and their caches."""
    return _run_layers(layers, params, x, segment, position)


def _run_layers(layers: LayerRange, params: Params, x, segment, position):
    first = {kind: layers.config.pattern[: layers.start].count(kind) for kind in KINDS}
    return _run_units(layers, params, first, x, segment, position)


def _run_layers_forward(layers: LayerRange, params: Params, x, segment, position):
    sliced = dataclasses.replace(layers, slice_params=True)
    return jax.vjp(lambda params, x: _run_layers(sliced, params, x, segment, position), params, x)


def _run_layers_backward(layers: LayerRange, pull, gradient):
    return (*pull(gradient), None, None)


run_layers.defvjp(_run_layers_forward, _run_layers_backward)


def _run_units(layers: LayerRange, params: Params, first: dict[str, Any], x, segment, position):
    """`run_layers`, with first[kind]: the index in its stack of the first layer of a kind in this range."""
    pattern, first, caches = layers.config.pattern, dict(first), []
    for start, unit, times in repeats(pattern, layers.start, layers.stop):
        kinds = pattern[start : start + unit]
        if times > 1:
            body = dataclasses.replace(layers, start=start, stop=start + unit, in_scan=True)
            x, entries = scan_layers(body, times, params, first, x, segment, position)
            caches += entries
        else:
            x, cache, _ = run_layer(layers, start, params[KINDS[kinds]], first[kinds], x, segment, position)
            caches.append(cache)
        first = {kind: index + times * kinds.count(kind) for kind, index in first.items()}
    return x, caches


def scan_layers(unit: LayerRange, times: int, params: Params, first: dict[str, Any], x, segment, position):
    """`times` units of the same kinds of layers as one scan (see the head of this file): x, and the caches in order."""
    kinds = unit.config.pattern[unit.start : unit.stop]
    per_unit = {kind: kinds.count(kind) for kind in first}

    def slices(kind: str) -> Params:
        at, n = first[kind], per_unit[kind]
        take = lambda a: a[at : at + times * n].reshape(times, n, *a.shape[1:])  # noqa: E731
        return jax.tree.map(take, params[KINDS[kind]])

    def step(x, part):
        i, own = part
        if unit.slice_params:
            return _run_units(unit, own, dict.fromkeys(first, 0), x, segment, position)
        at = {kind: first[kind] + i * per_unit[kind] for kind in first}
        return _run_units(unit, params, at, x, segment, position)

    own = {KINDS[kind]: slices(kind) for kind in sorted(set(kinds))} if unit.slice_params else {}
    x, stacked = jax.lax.scan(step, x, (jnp.arange(times, dtype=jnp.int32), own))
    return x, [jax.tree.map(lambda a, i=i: a[i], cache) for i in range(times) for cache in stacked]
