"""The two kinds of layers of VAMBA: video tokens through Mamba-2, text with cross-attention to the video."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import VambaConfig
from hybridvlm.nn.attention import extend_cache
from hybridvlm.nn.caches import AttentionCache, MambaCache, attention_cache
from hybridvlm.nn.mamba2 import mamba_layer
from hybridvlm.nn.projections import join_heads, project_heads, swiglu
from hybridvlm.ops.attention import attention
from hybridvlm.ops.attention.api import attend_unmasked
from hybridvlm.ops.attention.reference import EMPTY_LSE
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.norms import rms_norm
from hybridvlm.parallel.tensor import own_channels, psum_tensor

Params = dict[str, Any]


Fetch = Callable[
    [Params], Params
]  # what is done to one layer's parameters before they are used, such as gathering shards


SEGMENT_TOKENS = 4096  # most video tokens that all layers take at once: enough to keep the matrix products busy


_EVERY_KEY = jnp.iinfo(jnp.int32).max  # the position of a query row that stands after all keys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CrossMemory:
    """What n layers read of a video: k, v [n,B,M,K*P], segment [B,M] int32 (0 = nothing there).

    Heads lie side by side, as the projection gives them and as decoding reads them: an axis of a few heads of its own would
    have every compiler turn gigabytes around.
    """

    k: jax.Array
    v: jax.Array
    segment: jax.Array


class CrossStack(nn.Module):
    """The cross-attention of all layers, stacked: q_proj [n,D,H*P] · k_proj, v_proj [n,D,K*P] · o_proj [n,H*P,D] · q_bias, k_bias,
    v_bias · with alpha_balancing alpha [n], the weight of self-attention against cross-attention."""

    config: VambaConfig

    @nn.compact
    def __call__(self) -> Params:
        c = self.config
        n, q_width, kv_width = c.layers, c.attention_heads * c.head_dim, c.kv_heads * c.head_dim
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
        zeros = nn.initializers.zeros
        p = {
            "q_proj": self.param("q_proj", dense, (n, c.width, q_width)),
            "k_proj": self.param("k_proj", dense, (n, c.width, kv_width)),
            "v_proj": self.param("v_proj", dense, (n, c.width, kv_width)),
            "o_proj": self.param("o_proj", dense, (n, q_width, c.width)),
            "q_bias": self.param("q_bias", zeros, (n, q_width)),
            "k_bias": self.param("k_bias", zeros, (n, kv_width)),
            "v_bias": self.param("v_bias", zeros, (n, kv_width)),
        }
        if c.alpha_balancing:
            p["alpha"] = self.param("alpha", nn.initializers.constant(0.5), (n,))
        return p


def layers_of(params: Params, first: int, stop: int) -> Params:
    """Layers first..stop-1 of a dict of stacks."""
    return jax.tree.map(lambda a: a[first:stop], params)


def cross_keys(p: Params, c: VambaConfig, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a layer's cross-attention reads of its video states v [B,M,D], un-normed and without positions: k, v [B,M,K*P]."""
    k, v = (a.reshape(*v.shape[:2], -1) for a in project_heads(p, c, v, names="kv", rope=False))
    return k, v


def _join(p: Params, c: VambaConfig, out: jax.Array) -> jax.Array:
    """Attention's heads [B,T,H,P] -> [B,T,D] through o_proj, of all devices that hold some."""
    return psum_tensor(c, join_heads(p, own_channels(c, out.reshape(*out.shape[:2], -1))))


def start_state(c: VambaConfig, layers: int, batch: int, dtype: Any) -> MambaCache:
    """The state of `layers` Mamba layers before the first token of `batch` videos."""
    m = c.mixer
    return MambaCache(
        jnp.zeros((layers, batch, m.conv_kernel - 1, m.conv_width), dtype),
        jnp.zeros((layers, batch, m.mamba_heads, m.mamba_head_dim, m.ssm_state), jnp.float32),
        jnp.zeros((layers, batch), jnp.int32),
    )


def _here(params: Params) -> Params:
    return params


def _some(params: Params, names: tuple[str, ...]) -> Params:
    return {name: a for name, a in params.items() if name in names}


def _piece(
    params: Params,
    c: VambaConfig,
    first: int,
    stop: int,
    x: jax.Array,
    segment: jax.Array,
    state: MambaCache,
    all_gather_params: Fetch = _here,
) -> tuple[jax.Array, jax.Array, jax.Array, MambaCache]:
    """Layers first..stop-1 over one piece of the video: x [B,S,D] -> x, k and v [n,B,S,K*P], state."""

    def layer(x, parts):
        number, p, cache = parts
        p = all_gather_params(p)
        k, v = cross_keys(p["cross"], c, x)

        def mix(x, cache):
            x, cache, _ = mamba_layer(p["mamba"], c.mixer, x, segment, cache)
            return x, cache

        # the stacks go into the scan whole: a slice without the last layer would be a copy of all the others
        mixed = (
            mix if stop < c.layers else lambda *now: jax.lax.cond(number < c.layers - 1, mix, lambda *now: now, *now)
        )
        x, cache = mixed(x, cache)
        return x, (k, v, cache)

    cross = _some(params["cross"], ("k_proj", "k_bias", "v_proj", "v_bias"))
    stacks = layers_of({"cross": cross, "mamba": params["mamba"]}, first, stop)
    body = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    x, (k, v, state) = jax.lax.scan(body, x, (jnp.arange(first, stop), stacks, state))
    return x, k, v, state


def video_stage(
    params: Params,
    c: VambaConfig,
    first: int,
    stop: int,
    x: jax.Array,
    segment: jax.Array,
    state: MambaCache | None = None,
    segment_tokens: int = SEGMENT_TOKENS,
    all_gather_params: Fetch = _here,
) -> tuple[jax.Array | None, CrossMemory, MambaCache]:
    """Layers first..stop-1 over a whole row of video tokens, piece by piece.

    x [B,M,D], segment [B,M]. Returns x [B,M,D] after these layers (None after the last layer of all, where nothing reads it), the
    memory of n = stop - first layers (its rows are M filled up to whole pieces), and the states.
    """
    b, length, width = x.shape
    if state is None:
        state = start_state(c, stop - first, b, x.dtype)
    pieces = -(-length // segment_tokens)
    size = length if pieces == 1 else 8 * -(-length // (8 * pieces))
    if pieces == 1:
        x, k, v, state = _piece(params, c, first, stop, x, segment, state, all_gather_params)
        return (None if stop == c.layers else x), CrossMemory(k, v, segment), state
    fill = pieces * size - length
    x, segment = jnp.pad(x, ((0, 0), (0, fill), (0, 0))), jnp.pad(segment, ((0, 0), (0, fill)))

    def walk(carry, part):
        k, v, state, at = carry
        piece, piece_segment = part
        piece, *new, state = _piece(params, c, first, stop, piece, piece_segment, state, all_gather_params)
        k, v = (jax.lax.dynamic_update_slice_in_dim(a, n, at, axis=2) for a, n in zip((k, v), new, strict=True))
        return (k, v, state, at + size), (None if stop == c.layers else piece)

    decode_capacity = jnp.zeros((stop - first, b, pieces * size, c.kv_heads * c.head_dim), x.dtype)
    parts = x.reshape(b, pieces, size, width).swapaxes(0, 1), segment.reshape(b, pieces, size).swapaxes(0, 1)
    body = jax.checkpoint(walk, policy=jax.checkpoint_policies.nothing_saveable)
    (k, v, last, _), out = jax.lax.scan(body, (decode_capacity, decode_capacity, state, jnp.int32(0)), parts)
    if out is not None:
        out = out.swapaxes(0, 1).reshape(b, pieces * size, width)[:, :length]
    return out, CrossMemory(k, v, segment), last


def blend(c: VambaConfig, p: Params, x: jax.Array, own: jax.Array, seen: jax.Array, reads: jax.Array) -> jax.Array:
    """x + a own + (1 - a) seen: x, own, seen [B,T,D]; reads [B,T] bool, whether a row has a video to read.

    Without balancing x + own + seen. Rows without a video: seen is 0, and `text_only` says whether self-attention keeps its
    share a ("balanced", as the weights were trained) or counts whole ("whole"); there is no reference for either.
    """
    if not c.alpha_balancing:
        return x + own + seen
    alpha = jnp.broadcast_to(p["alpha"].astype(jnp.float32), reads.shape)
    share = alpha if c.text_only == "balanced" else jnp.where(reads, alpha, 1.0)
    return x + (share[..., None].astype(x.dtype) * own + (1 - alpha)[..., None].astype(x.dtype) * seen)


def cross_attention(
    p: Params, c: VambaConfig, h: jax.Array, segment: jax.Array, k: jax.Array, v: jax.Array, video_segment: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every text token over every video token of its segment, without positions or order: h [B*Q,T,D], k and v [B,M,K*P].

    Q questions on each video read its keys where they lie. Returns what is to be added to the residual [B*Q,T,D], the rows' q
    [B*Q,T,H,P] and their log-sum-exp [B*Q,H,T].
    """
    (q,) = project_heads(p, c, h, names="q", rope=False)
    rows, t, heads, width = q.shape
    b = k.shape[0]
    if k.shape[1] == 0:
        out, lse = jnp.zeros_like(q), jnp.full((rows, heads, t), EMPTY_LSE, jnp.float32)
    else:
        folded = q.reshape(b, rows // b * t, heads, width)
        k, v = (a.reshape(b, -1, c.kv_heads, width) for a in (k, v))
        out, lse = attend_unmasked(
            folded, k, v, q_segment=segment.reshape(b, -1), kv_segment=video_segment, causal=False
        )
        lse = lse.reshape(b, heads, rows // b, t).swapaxes(1, 2).reshape(rows, heads, t)
    return _join(p, c, out.reshape(rows, t, heads, width)), q, lse


def text_layer(
    p: Params,
    c: VambaConfig,
    x: jax.Array,
    segment: jax.Array,
    position: jax.Array,
    memory: CrossMemory,
    past: AttentionCache | None = None,
    decode_capacity: int = 0,
) -> tuple[jax.Array, AttentionCache, tuple[jax.Array, jax.Array]]:
    """One layer of the text stream: p of one layer, x [B,T,D], segment and position [B,T], memory of this layer (k, v [B,M,K*P]).

    past: the self-attention's cache that x comes after, with slots for it; None: x is the whole prompt, and
    `decode_capacity` slots are left after it. Returns x, the cache, and q [B,T,H,P] with log-sum-exp [B,H,T] of the cross-attention.
    """
    h = rms_norm(x, p["attention"]["norm"], c.norm_eps)
    q, k, v = project_heads(p["attention"], c, h, position)
    if past is None:
        own, _ = attention(q, k, v, q_segment=segment, kv_segment=segment)
        cache = attention_cache(k, v, segment, decode_capacity)
    else:
        own, cache = extend_cache(c, q, k, v, segment, past)
    seen, q, lse = cross_attention(p["cross"], c, h, segment, memory.k, memory.v, memory.segment)
    x = blend(c, p["cross"], x, _join(p["attention"], c, own), seen, lse[:, 0] > EMPTY_LSE / 2)
    x = x + psum_tensor(c, swiglu(p["mlp"], rms_norm(x, p["mlp"]["norm"], c.norm_eps))).astype(x.dtype)
    return x, cache, (q, lse)


def _text_stage(
    params: Params,
    c: VambaConfig,
    first: int,
    x: jax.Array,
    segment: jax.Array,
    position: jax.Array,
    memory: CrossMemory,
    past: AttentionCache | None = None,
    decode_capacity: int = 0,
    question: tuple[jax.Array, jax.Array] | None = None,
    all_gather_params: Fetch = _here,
):
    """The layers that share `memory`, from `first` on: x, their caches (stacked), the last layer's AttentionAux.

    question: (index [B,R], mask [B,R]) of the rows that come back in the aux; None: no aux.
    """
    stop = first + memory.k.shape[0]
    cross = _some(params["cross"], ("q_proj", "q_bias", "o_proj", "alpha"))
    stacks = layers_of({"attention": params["attention"], "cross": cross, "mlp": params["mlp"]}, first, stop)

    def layer(x, parts):
        p, k, v, past = parts
        x, cache, (q, lse) = text_layer(
            all_gather_params(p), c, x, segment, position, CrossMemory(k, v, memory.segment), past, decode_capacity
        )
        queries = None
        if question is not None:
            index = question[0]
            queries = (
                jnp.take_along_axis(q, index[:, :, None, None], axis=1),
                jnp.take_along_axis(lse, index[:, None, :], axis=2),
            )
        return x, (cache, queries)

    body = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    x, (caches, queries) = jax.lax.scan(body, x, (stacks, memory.k, memory.v, past))
    if question is None:
        return x, caches, None
    index, mask = question
    aux = AttentionAux(
        q=queries[0][-1],
        q_mask=mask,
        q_segment=jnp.where(mask, jnp.take_along_axis(segment, index, axis=1), 0),
        q_index=jnp.full_like(index, _EVERY_KEY),
        k=memory.k[-1].reshape(*memory.segment.shape, c.kv_heads, c.head_dim),
        lse=queries[1][-1],
    )
    return x, caches, aux
