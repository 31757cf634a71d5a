"""What all questions about a video share: the layers before the first drop, run once over the prompt up to its last visual token.

Up to there nothing depends on the question, since it stands behind the video and every layer is causal. `decoder.run_prefix` makes
a `Prefix`; `decoder.prefill` goes on from it: the question's tokens run through those layers behind their caches (`continue_rows`),
take their places in the rows, and from the first drop on it is the pass that it would have been.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybridvlm.config import KINDS, MAMBA, ModelConfig
from hybridvlm.nn.caches import AttentionCache, Cache
from hybridvlm.nn.layers import LAYER_KINDS
from hybridvlm.nn.scan import Params, layer_params
from hybridvlm.ops.layer_aux import MambaAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.sequence import row_total, sequence_shards, shard_length, write_rows
from hybridvlm.parallel.tensor import LocalConfig, all_gather_params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """The beginning of V rows, as layers 0..n-1 leave it; the rest of a row is empty and has room for its question.

    Attributes:
        tokens: x [V,L,D] after layer n-1, with what belongs to each token.
        caches: of layers 0..n-1, without slots for new tokens.
        aux: what layer n-1 tells of its scan, for scores; None where it is attention, whose keys are in its cache.
        given: [V,1], visual tokens that each example came with.
        following: [V] int32, position in the unreduced prompt of what comes next.
        videos: how many of the rows are of videos, if the last ones only fill a mesh up (None: all).
        peak_bytes: that the program which made it needed, by its compiler.
    """

    tokens: Tokens
    caches: tuple[Cache, ...]
    aux: MambaAux | None
    given: jax.Array
    following: jax.Array
    videos: int | None = dataclasses.field(default=None, metadata={"static": True})
    peak_bytes: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.given.shape[0]


def prefix_specs(c: LocalConfig, caches: tuple[Any, ...]) -> Prefix:
    """How a Prefix of a device's part `c` lies on the mesh, with that of its `caches`: PartitionSpecs, each for all arrays below it."""
    batch, row = P(c.batch_axes), P(c.batch_axes, c.row_axis)
    aux: Any = P(c.batch_axes, c.row_axis, c.axis) if c.pattern[len(caches) - 1] == MAMBA else None
    specs: dict[str, Any] = {"tokens": row, "caches": caches, "aux": aux, "given": batch, "following": batch}
    return Prefix(**specs)


def continue_rows(
    params: Params, config: ModelConfig, prefix: Prefix, tokens: Tokens, length: int, decode_capacity: int
) -> tuple[Tokens, tuple[Cache, ...], Any]:
    """The layers of a prefix over what comes behind it.

    Args:
        params: the stacks of `Decoder.stacks`.
        config: of the decoder.
        prefix: of V rows of L tokens.
        tokens: V*Q rows of T tokens of text, Q for each row of the prefix, next to each other; of rows that are cut over devices
            every device has them whole.
        length: of the rows that come out, which hold prefix and text; that of the prefix's own where they are cut over devices.
        decode_capacity: empty cache slots for tokens to come.

    Returns:
        Whole rows [V*Q,length] after those layers, the layers' caches, and what the last layer tells for scores: as if the rows had
        been run whole.

    Raises:
        ValueError: the rows are not the same number for each row of the prefix, or cannot be made that long.
    """
    rows = tokens.segment.shape[0]
    if rows % prefix.rows:
        raise ValueError(f"tokens: expected as many questions for each of {prefix.rows} videos, got {rows} in all")
    prefix = _repeated(_lengthened(config, prefix, length), rows // prefix.rows)
    row, x, caches, aux = prefix.tokens, tokens.x, [], None
    at = row_total(config, jnp.sum(row.segment > 0, axis=1, dtype=jnp.int32))
    for layer, cache in enumerate(prefix.caches):
        kind = config.pattern[layer]
        p = all_gather_params(config, KINDS[kind], layer_params(params, config, layer), x.dtype)
        options = {"at": at, "decode_capacity": decode_capacity}
        x, cache, aux = LAYER_KINDS[kind].rest(p, config, x, tokens.segment, tokens.position, cache, **options)
        caches.append(cache)
    write = functools.partial(write_rows, config, at=at)
    if prefix.aux is not None:
        aux = jax.tree.map(write, prefix.aux, aux)
    whole = row.replace(
        x=write(row.x, x),
        position=write(row.position, tokens.position),
        segment=write(row.segment, tokens.segment),
        query=write(row.query, tokens.query),
        index=write(row.index, tokens.index),
    )
    return whole, tuple(caches), aux


def _lengthened(config: ModelConfig, prefix: Prefix, length: int) -> Prefix:
    """A prefix in rows of another length, with more or less padding at their end."""
    shards = sequence_shards(config)
    spare = (length if shards == 1 else shard_length(config, length, shards)) - prefix.tokens.length
    if spare == 0:
        return prefix
    if shards > 1:
        raise ValueError(
            f"prefix: its rows of {prefix.tokens.length * shards} tokens cut over {shards} devices cannot become rows of {length}; "
            "make it under a plan of that bucket"
        )

    def pad(a: jax.Array, empty: int = 0) -> jax.Array:
        return jnp.pad(a[:, :length], ((0, 0), (0, max(0, spare)), *((0, 0),) * (a.ndim - 2)), constant_values=empty)

    def cache(one: Cache) -> Cache:
        if not isinstance(one, AttentionCache):
            return one
        return dataclasses.replace(one, k=pad(one.k), v=pad(one.v), segment=pad(one.segment))

    fields = {field.name: getattr(prefix.tokens, field.name) for field in dataclasses.fields(Tokens)}
    rows = jax.tree.map(pad, fields) | {"index": pad(prefix.tokens.index, -1), "frame": pad(prefix.tokens.frame, -1)}
    caches, aux = tuple(map(cache, prefix.caches)), jax.tree.map(pad, prefix.aux)
    return dataclasses.replace(prefix, tokens=Tokens(**rows), caches=caches, aux=aux)


def _repeated(prefix: Prefix, times: int) -> Prefix:
    """Every row `times` times, next to one another."""
    if times == 1:
        return prefix

    def repeat(a: jax.Array) -> jax.Array:
        b, *rest = a.shape
        return jnp.broadcast_to(a[:, None], (b, times, *rest)).reshape(b * times, *rest)

    # the slot that an attention cache writes next is one number for all rows
    return jax.tree.map(lambda a: repeat(a) if a.ndim else a, prefix)
