"""Scores of visual tokens by what a layer tells: attention weights, and the scan's own query-key products.

Unrolled, a Mamba-2 output is a weighted sum of inputs:

    y_t = sum_{s<=t} [(c_t . b_s) dt_s exp(sum_{r=s+1..t} log a_r)] x_s

c plays the query and b the key. arXiv 2603.00198 scores visual tokens by the question's c on their b without the decay,
which is a bias towards late positions; how it aggregates is not public, so `ScoreOptions` leaves the choices open:

1. entry[t,s,g] = (c_t,g . b_s,g) * w[t,s,g]; w is the mean (or max, `heads`) over the heads of group g of
   dt_s (`dt`) and exp(decay from s to t) (`decay`), 1 where both are off;
2. `sign` of the entry: as it is, positive part, or magnitude;
3. `norm` of one query row's entries over the visual tokens it may look at, per group; a z-score of entries that differ by
   no more than rounding (`_ALIKE` of the largest) is 0;
4. `queries`: mean, max or the last of the query rows; then 5. `groups`: mean or max.

Scores rank tokens inside one layer only. Query rows stand after the visual tokens of their segment (earlier text
cannot have seen the video), so no causal mask is needed. All of it is differentiable.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hybridvlm.config import ScoreOptions
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux, MambaAux
from hybridvlm.ops.mix import mix32
from hybridvlm.ops.tokens import Tokens

_DEFAULT = ScoreOptions()
_LOW = -1e30
# A spread below this share of the largest entry is what fp32 makes of products that are equal.
_ALIKE = 64 * float(jnp.finfo(jnp.float32).eps)
_BLOCK_VALUES = 1 << 22  # entries of one block of query rows that are held at once, per example


def mamba_score(
    aux: MambaAux,
    tokens: Tokens,
    options: ScoreOptions = _DEFAULT,
    *,
    segments: int = 1,
    query_rows: int | None = None,
) -> jax.Array:
    """Score of every visual token by a Mamba layer's b and c: [B,L] fp32, 0 elsewhere.

    Raw, unnormalised scores reduced by mean or last are linear in c: the question's c is reduced first, O(M G N), per
    segment 1..`segments`. Other options go block by block over at most `query_rows` (default L) query rows of a batch
    row; of more than that the first ones count.
    """
    linear = options.sign == "raw" and options.norm == "none" and not options.decay and options.queries != "max"
    score = _linear(aux, tokens, options, segments) if linear else _blockwise(aux, tokens, options, query_rows)
    return jnp.where(_visual(tokens), score, 0.0)


def attention_score(aux: AttentionAux, tokens: Tokens, options: ScoreOptions = _DEFAULT) -> jax.Array:
    """Score of every visual token by an attention layer: [B,L] fp32, 0 elsewhere.

    The softmax weight that the question's rows put on it, reduced over `heads` and `queries`. Weights are positive and
    normalised already: `sign`, `norm`, `decay`, `dt` and `groups` belong to the Mamba score.
    """
    from hybridvlm.ops.attention import text_to_visual

    return text_to_visual(
        aux.q,
        aux.k,
        q_mask=aux.q_mask,
        visual=_visual(tokens),
        lse=aux.lse,
        q_segment=aux.q_segment,
        kv_segment=tokens.segment,
        q_index=aux.q_index,
        heads=options.heads,
        queries=options.queries,
    )


def lookahead_score(aux: LookaheadAux, tokens: Tokens, options: ScoreOptions = _DEFAULT) -> jax.Array:
    """Score of every visual token by the attention layers to come: [B,L] fp32, 0 elsewhere.

    The mean over these layers of `attention_score`, of their queries and keys of the tokens as they are.
    """
    total = sum(attention_score(layer, tokens, options) for layer in aux.ahead)
    return jnp.asarray(total, jnp.float32) / len(aux.ahead)


def layer_score(
    aux: MambaAux | AttentionAux | LookaheadAux,
    tokens: Tokens,
    options: ScoreOptions = _DEFAULT,
    *,
    segments: int = 1,
    query_rows: int | None = None,
) -> jax.Array:
    """The score of the attention layers ahead where the aux tells of any, else the layer's own: attention weights or c.b."""
    if isinstance(aux, LookaheadAux):
        return lookahead_score(aux, tokens, options)
    if isinstance(aux, AttentionAux):
        return attention_score(aux, tokens, options)
    return mamba_score(aux, tokens, options, segments=segments, query_rows=query_rows)


def saliency_score(tokens: Tokens, segments: int = 1) -> jax.Array:
    """Distance of every visual token's features from its segment's mean visual feature: [B,L] fp32, no query in it."""
    x, score = tokens.x.astype(jnp.float32), jnp.zeros(tokens.segment.shape, jnp.float32)
    for segment in range(1, segments + 1):
        mine = tokens.visual & (tokens.segment == segment)
        count = jnp.maximum(mine.sum(-1), 1)[:, None]
        mean = jnp.einsum("bl,bld->bd", mine.astype(jnp.float32), x) / count
        score = jnp.where(mine, jnp.sqrt(jnp.sum((x - mean[:, None]) ** 2, axis=-1)), score)
    return score


def spread_score(index: jax.Array) -> jax.Array:
    """Scores whose k highest lie evenly spread for every k: multiples of the golden ratio modulo 1, by `index`, fp32.

    A fixed stride would fall on the same columns of every frame; this never does, and a smaller choice lies in a
    larger one.
    """
    return _unit(index.astype(jnp.uint32) * jnp.uint32(2654435769))


def random_score(index: jax.Array, seed: int, layer: int) -> jax.Array:
    """Uniform scores in [0, 1) fp32 that depend on nothing but (seed, layer, index): alone or in a batch, the same."""
    key = (seed * 0x9E3779B1 + (layer + 1) * 0x85EBCA6B) & 0xFFFFFFFF
    h = index.astype(jnp.uint32) ^ mix32(jnp.uint32(key))
    return _unit(mix32(mix32(h) + jnp.uint32(0x6C62272E)))


def _unit(h: jax.Array) -> jax.Array:
    return (h >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def _visual(tokens: Tokens) -> jax.Array:
    return tokens.visual & (tokens.segment > 0)


def _group_factor(values: jax.Array, groups: int, options: ScoreOptions) -> jax.Array:
    """[...,H] -> [...,G]: mean or max over the heads of each group."""
    by_group = values.reshape(*values.shape[:-1], groups, -1)
    return by_group.max(-1) if options.heads == "max" else by_group.mean(-1)


def _over_groups(score: jax.Array, options: ScoreOptions) -> jax.Array:
    return score.max(-1) if options.groups == "max" else score.mean(-1)


def _counted_queries(tokens: Tokens, options: ScoreOptions) -> jax.Array:
    """The query rows that count, [B,L] bool: all of them, or each segment's last."""
    query = tokens.query & (tokens.segment > 0)
    if options.queries != "last":
        return query
    index = jnp.arange(tokens.segment.shape[1])
    # a query row is its segment's last where the next query row, if any, belongs to another segment
    after = jnp.where(query, index, query.shape[1])
    following = jnp.flip(jax.lax.cummin(jnp.flip(after, -1), axis=1), -1)
    following = jnp.concatenate([following[:, 1:], jnp.full_like(following[:, :1], query.shape[1])], axis=1)
    padded = jnp.pad(tokens.segment, ((0, 0), (0, 1)))
    return query & (jnp.take_along_axis(padded, following, axis=1) != tokens.segment)


def _linear(aux: MambaAux, tokens: Tokens, options: ScoreOptions, segments: int) -> jax.Array:
    query = _counted_queries(tokens, options)
    score = jnp.zeros(tokens.segment.shape, jnp.float32)
    for segment in range(1, segments + 1):
        mine = tokens.segment == segment
        rows = (query & mine).astype(jnp.float32)
        c = jnp.einsum("bl,blgn->bgn", rows, aux.c.astype(jnp.float32)) / jnp.maximum(rows.sum(-1), 1.0)[:, None, None]
        entry = jnp.einsum("bgn,blgn->blg", c, aux.b, preferred_element_type=jnp.float32)
        if options.dt:
            entry = entry * _group_factor(aux.dt.astype(jnp.float32), aux.b.shape[2], options)
        score = jnp.where(mine, _over_groups(entry, options), score)
    return score


def _blockwise(aux: MambaAux, tokens: Tokens, options: ScoreOptions, query_rows: int | None) -> jax.Array:
    batch, length, groups, _ = aux.b.shape
    query, visual = _counted_queries(tokens, options), _visual(tokens)
    rows = min(length, query_rows or length)
    per_row = length * (aux.dt.shape[-1] if options.decay else groups)
    size = max(1, min(16, rows, _BLOCK_VALUES // per_row))
    blocks = -(-rows // size)
    chosen = jnp.argsort(~query, axis=1, stable=True)[:, :rows]  # query rows first, in their order
    chosen = jnp.pad(chosen, ((0, 0), (0, blocks * size - rows)), constant_values=length)
    chosen = jnp.moveaxis(chosen.reshape(batch, blocks, size), 1, 0)
    counts = jnp.pad(query, ((0, 0), (0, 1)))  # position `length` stands for no row

    b = aux.b.astype(jnp.float32)
    # the decay from s to t is a difference of sums over what comes after: small, hence exact, near the question
    after = jnp.flip(jnp.cumsum(jnp.flip(aux.log_decay[:, 1:].astype(jnp.float32), 1), axis=1), 1)
    after = jnp.pad(after, ((0, 0), (0, 1), (0, 0)))
    dt = aux.dt.astype(jnp.float32)
    still = _group_factor(dt, groups, options) if options.dt else None

    def block(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        at = jnp.minimum(index, length - 1)
        c = jnp.take_along_axis(aux.c, at[:, :, None, None], axis=1).astype(jnp.float32)
        segment = jnp.take_along_axis(tokens.segment, at, axis=1)
        sees = jnp.take_along_axis(counts, index, axis=1)[:, :, None] & visual[:, None]
        sees &= segment[:, :, None] == tokens.segment[:, None]
        entry = jnp.einsum("brgn,blgn->brlg", c, b)
        if options.decay:
            reach = after[:, None] - jnp.take_along_axis(after, at[:, :, None], axis=1)[:, :, None]
            weight = jnp.exp(jnp.minimum(reach, 0.0))
            entry = entry * _group_factor(weight * dt[:, None] if options.dt else weight, groups, options)
        elif still is not None:
            entry = entry * still[:, None]
        return _signed_and_normed(entry, sees[..., None], options), sees

    largest = options.queries == "max"

    def add(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        def run(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total, seen = carry
            entry, sees = block(index)
            if largest:
                total = jnp.maximum(total, jnp.where(sees[..., None], entry, _LOW).max(1))
            else:
                total = total + jnp.where(sees[..., None], entry, 0.0).sum(1)
            return total, seen + sees.sum(1, dtype=jnp.int32)

        wanted = jnp.take_along_axis(counts, index, axis=1).any()
        return jax.lax.cond(wanted, run, lambda carry: carry, carry), None

    empty = jnp.full((batch, length, groups), _LOW if largest else 0.0, jnp.float32)
    (total, seen), _ = jax.lax.scan(add, (empty, jnp.zeros((batch, length), jnp.int32)), chosen)
    if not largest:
        total = total / jnp.maximum(seen, 1)[..., None]
    return jnp.where(seen > 0, _over_groups(total, options), 0.0)


def _signed_and_normed(entry: jax.Array, sees: jax.Array, options: ScoreOptions) -> jax.Array:
    """Steps 2 and 3: entry [B,R,L,G] and sees [B,R,L,1] bool -> entries, normed over L."""
    if options.sign == "relu":
        entry = jnp.maximum(entry, 0.0)
    elif options.sign == "abs":
        entry = jnp.abs(entry)
    if options.norm == "l1":
        return entry / jnp.maximum(jnp.where(sees, jnp.abs(entry), 0.0).sum(2, keepdims=True), 1e-12)
    if options.norm == "softmax":
        return jax.nn.softmax(jnp.where(sees, entry, _LOW), axis=2)
    if options.norm == "zscore":
        count = jnp.maximum(sees.sum(2, keepdims=True), 1)
        mean = jnp.where(sees, entry, 0.0).sum(2, keepdims=True) / count
        square = jnp.where(sees, (entry - mean) ** 2, 0.0).sum(2, keepdims=True) / count
        largest = jnp.where(sees, jnp.abs(entry), 0.0).max(2, keepdims=True)
        differ = square > (_ALIKE * largest) ** 2
        return jnp.where(differ, (entry - mean) * jax.lax.rsqrt(square + 1e-12), 0.0)
    return entry
