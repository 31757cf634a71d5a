"""Scores of tokens where several devices hold the heads, or shards of a row: what they must be before anything is dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import ATTENTION, MAMBA, ScoreOptions
from hybridvlm.ops.fold import Selection
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.sequence import gather_sequence, row_start
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction import methods


def reduce_scores(
    score_fn: Callable[..., Any],
    local: LocalConfig,
    options: ScoreOptions,
    method: methods.Method | None = None,
) -> Callable[..., jax.Array]:
    """score_fn on a device's own heads and groups, then the mean or the largest over devices, as the options ask for; and of
    a row that is cut, on the whole of it where the score of `method` (None: any function, which may look at anything) needs that."""
    reads = methods.QUERIES if method is None else method.reads
    if method is not None and method.score is not None:
        options = method.score
    elif reads == methods.LAST_QUERY:
        options = ScoreOptions(queries="last")  # whatever the plan's are
    if method is not None and method.all_heads and local.devices > 1:
        raise ValueError(
            f"{method.name} chooses by all heads at once, and tensor={local.devices} cuts them; use a mesh of tensor=1"
        )
    by_head = local.devices > 1 and reads in (methods.QUERIES, methods.LAST_QUERY, methods.NEXT_ATTENTION)
    if by_head and MAMBA in local.pattern and local.group_devices > 1 and (options.dt or options.decay):
        groups = local.ssm_groups * local.devices // local.group_devices
        raise ValueError(
            f"scores with dt or decay average over the heads of a group, and tensor={local.devices} cuts the "
            f"{groups} groups; use tensor={groups} or less"
        )
    rows_first = {"mean": ("mean", "last"), "max": ("max", "last")}[options.heads]  # what commutes with that over heads
    if by_head and ATTENTION in local.pattern and options.queries not in rows_first:
        raise ValueError(
            f"scores with heads={options.heads!r} and queries={options.queries!r} need all heads before rows are reduced, "
            f"and tensor={local.devices} cuts the heads; queries may be one of {rows_first}"
        )

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
        if isinstance(score, Selection):
            raise ValueError("merging inside the decoder needs whole rows, and these are cut; use a mesh of sequence=1")
        return jax.lax.dynamic_slice_in_dim(score, start, tokens.length, axis=1)

    def score(layer: int, aux: Any, tokens: Tokens) -> jax.Array:
        mine = of_row(layer, aux, tokens)
        if not by_head:
            return mine
        if (options.heads if isinstance(aux, AttentionAux | LookaheadAux) else options.groups) == "max":
            return jnp.max(jax.lax.all_gather(mine, local.axis), axis=0)  # JAX has no derivative of pmax
        return jax.lax.pmean(mine, local.axis)

    score.ahead = getattr(score_fn, "ahead", None)  # type: ignore[attr-defined]
    return score
