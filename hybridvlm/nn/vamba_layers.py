"""The two kinds of layers of VAMBA: video tokens through Mamba-2, text with cross-attention to the video."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from hybridvlm.config import VambaConfig
from hybridvlm.nn.attention import extend_cache
from hybridvlm.nn.caches import AttentionCache, MambaCache, attention_cache
from hybridvlm.nn.mamba2 import mamba_layer
from hybridvlm.nn.mlp import mlp_layer
from hybridvlm.nn.projections import join_heads, project_heads
from hybridvlm.nn.scan import REMAT
from hybridvlm.ops.attention import attention
from hybridvlm.ops.attention.api import attend_unmasked
from hybridvlm.ops.attention.reference import EMPTY_LSE
from hybridvlm.ops.layer_aux import AttentionAux
from hybridvlm.ops.norms import rms_norm
from hybridvlm.parallel.sequence import join_keys, row_is_cut, whole_rows
from hybridvlm.parallel.tensor import all_gather_params, own_channels, psum_tensor

Params = dict[str, Any]
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

# most video tokens that all layers take at once: enough to keep the matrix products busy
SEGMENT_TOKENS = 4096
# the position of a query row that stands after all keys; a shard's first position is added to it
_EVERY_KEY = jnp.iinfo(jnp.int32).max // 2


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
    v_bias (with attention_bias) · q_norm, k_norm [n,P] (with qk_norm) · with alpha_balancing alpha [n], the weight of
    self-attention against cross-attention."""

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
        }
        if c.attention_bias:
            p["q_bias"] = self.param("q_bias", zeros, (n, q_width))
            p["k_bias"] = self.param("k_bias", zeros, (n, kv_width))
            p["v_bias"] = self.param("v_bias", zeros, (n, kv_width))
        if c.qk_norm:
            p["q_norm"] = self.param("q_norm", nn.initializers.ones, (n, c.head_dim))
            p["k_norm"] = self.param("k_norm", nn.initializers.ones, (n, c.head_dim))
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


def _some(params: Params, names: tuple[str, ...]) -> Params:
    return {name: a for name, a in params.items() if name in names}


def _rematerialised(body: FunctionT, remat: str) -> FunctionT:
    """The body of a scan, of whose inside the backward pass finds kept what `remat`, a name of `REMAT`, says."""
    policy = REMAT[remat]
    return body if policy is None else jax.checkpoint(body, policy=policy, prevent_cse=False)  # type: ignore[return-value]


def _piece(
    params: Params,
    c: VambaConfig,
    first: int,
    stop: int,
    x: jax.Array,
    segment: jax.Array,
    state: MambaCache | None,
    remat: str,
) -> tuple[jax.Array, jax.Array, jax.Array, MambaCache]:
    """Layers first..stop-1 over one piece of the video: x [B,S,D] -> x, k and v [n,B,S,K*P], state.

    state None: x is a device's shard of rows that are cut, and what comes in is asked of the shards before.
    """

    def layer(x, parts):
        number, p, cache = parts
        k, v = cross_keys(all_gather_params(c, "cross", p["cross"], x.dtype), c, x)

        def mix(x, cache):
            own = all_gather_params(c, "mamba", p["mamba"], x.dtype)
            x, cache, _ = mamba_layer(own, c.mixer, x, segment, cache)
            return x, cache

        def skip(x, cache):
            return x, jax.tree.map(lambda a: a[0], start_state(c, 1, x.shape[0], x.dtype)) if cache is None else cache

        # the stacks go into the scan whole: a slice without the last layer would be a copy of all the others
        mixed = mix if stop < c.layers else lambda *now: jax.lax.cond(number < c.layers - 1, mix, skip, *now)
        x, cache = mixed(x, cache)
        return x, (k, v, cache)

    cross = _some(params["cross"], ("k_proj", "k_bias", "k_norm", "v_proj", "v_bias"))
    stacks = layers_of({"cross": cross, "mamba": params["mamba"]}, first, stop)
    x, (k, v, state) = jax.lax.scan(_rematerialised(layer, remat), x, (jnp.arange(first, stop), stacks, state))
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
    remat: str = "layer",
) -> tuple[jax.Array | None, CrossMemory, MambaCache]:
    """Layers first..stop-1 over a whole row of video tokens, piece by piece.

    x [B,M,D], segment [B,M]; where rows are cut over devices a shard of them, which is one piece. Returns x [B,M,D] after these
    layers (None after the last layer of all, where nothing reads it), the memory of n = stop - first layers (its rows are M filled
    up to whole pieces), and the states. ValueError for a state where rows are cut: such a video is encoded whole.
    """
    b, length, width = x.shape
    cut = row_is_cut(c)
    if cut and state is not None:
        raise ValueError("state: rows that are cut over devices are encoded whole; use a mesh of sequence=1")
    if state is None and not cut:
        state = start_state(c, stop - first, b, x.dtype)
    pieces = 1 if cut else -(-length // segment_tokens)
    size = length if pieces == 1 else 8 * -(-length // (8 * pieces))
    if pieces == 1:
        x, k, v, last = _piece(params, c, first, stop, x, segment, state, remat)
        return (None if stop == c.layers else x), CrossMemory(k, v, segment), last
    # rows that are cut are one piece
    assert state is not None
    fill = pieces * size - length
    x, segment = jnp.pad(x, ((0, 0), (0, fill), (0, 0))), jnp.pad(segment, ((0, 0), (0, fill)))

    def walk(carry, part):
        k, v, state, at = carry
        piece, piece_segment = part
        piece, *new, state = _piece(params, c, first, stop, piece, piece_segment, state, remat)
        k, v = (jax.lax.dynamic_update_slice_in_dim(a, n, at, axis=2) for a, n in zip((k, v), new, strict=True))
        return (k, v, state, at + size), (None if stop == c.layers else piece)

    empty = jnp.zeros((stop - first, b, pieces * size, c.kv_heads * c.head_dim), x.dtype)
    parts = x.reshape(b, pieces, size, width).swapaxes(0, 1), segment.reshape(b, pieces, size).swapaxes(0, 1)
    start = (empty, empty, state, jnp.int32(0))
    (k, v, last, _), out = jax.lax.scan(_rematerialised(walk, remat), start, parts)
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

    segment [B*Q,T]: that of the video which a token reads. Q questions on each video read its keys where they lie, and where these
    are cut over devices each device reads its own. Returns what is to be added to the residual [B*Q,T,D], the rows' q
    [B*Q,T,H,P] and their log-sum-exp over the whole video [B*Q,H,T].
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
        out, lse = join_keys(c, out, lse)
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
    reads: jax.Array | None = None,
) -> tuple[jax.Array, AttentionCache, tuple[jax.Array, jax.Array]]:
    """One layer of the text stream: p of one layer, x [B,T,D], segment and position [B,T], memory of this layer (k, v [B,M,K*P]).

    past: the self-attention's cache that x comes after, with slots for it; None: x is the whole prompt, and `decode_capacity` slots
    are left after it. reads [B,T]: the segment of the video that each token reads (default: its own). Returns x, the cache, and
    q [B,T,H,P] with log-sum-exp [B,H,T] of the cross-attention.
    """
    h = rms_norm(x, p["attention"]["norm"], c.norm_eps)
    q, k, v = project_heads(p["attention"], c, h, position)
    if past is None:
        own, _ = attention(q, k, v, q_segment=segment, kv_segment=segment)
        cache = attention_cache(k, v, segment, decode_capacity)
    else:
        own, cache = extend_cache(whole_rows(c), q, k, v, segment, past)
    reads = segment if reads is None else reads
    seen, q, lse = cross_attention(p["cross"], c, h, reads, memory.k, memory.v, memory.segment)
    x = blend(c, p["cross"], x, _join(p["attention"], c, own), seen, lse[:, 0] > EMPTY_LSE / 2)
    return mlp_layer(p["mlp"], c, x), cache, (q, lse)


def text_stage(
    params: Params,
    c: VambaConfig,
    first: int,
    x: jax.Array,
    segment: jax.Array,
    position: jax.Array,
    memory: CrossMemory,
    past: AttentionCache | None = None,
    decode_capacity: int = 0,
    reads: jax.Array | None = None,
    question: tuple[jax.Array, jax.Array] | None = None,
    remat: str = "layer",
) -> tuple[jax.Array, AttentionCache, AttentionAux | None]:
    """The layers that share `memory`, from `first` on: x, their caches (stacked), the last layer's AttentionAux.

    Arguments as of `text_layer`; where rows are cut over devices, text is whole on each. question: (index [B,R], mask [B,R]) of
    the rows that come back in the aux; None: no aux.
    """
    stop = first + memory.k.shape[0]
    cross = _some(params["cross"], ("q_proj", "q_bias", "q_norm", "o_proj", "alpha"))
    stacks = layers_of({"attention": params["attention"], "cross": cross, "mlp": params["mlp"]}, first, stop)
    reads = segment if reads is None else reads

    def layer(x, parts):
        p, k, v, past = parts
        p = {kind: all_gather_params(c, kind, own, x.dtype) for kind, own in p.items()}
        own_memory = CrossMemory(k, v, memory.segment)
        x, cache, (q, lse) = text_layer(p, c, x, segment, position, own_memory, past, decode_capacity, reads)
        queries = None
        if question is not None:
            index = question[0]
            queries = (
                jnp.take_along_axis(q, index[:, :, None, None], axis=1),
                jnp.take_along_axis(lse, index[:, None, :], axis=2),
            )
        return x, (cache, queries)

    x, (caches, queries) = jax.lax.scan(_rematerialised(layer, remat), x, (stacks, memory.k, memory.v, past))
    if question is None:
        return x, caches, None
    index, mask = question
    aux = AttentionAux(
        q=queries[0][-1],
        q_mask=mask,
        q_segment=jnp.where(mask, jnp.take_along_axis(reads, index, axis=1), 0),
        q_index=jnp.full_like(index, _EVERY_KEY),
        k=memory.k[-1].reshape(*memory.segment.shape, c.kv_heads, c.head_dim),
        lse=queries[1][-1],
    )
    return x, caches, aux
