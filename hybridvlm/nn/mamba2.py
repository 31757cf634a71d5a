"""The Mamba-2 mixer (Nemotron-H's form: gate first, then a grouped RMSNorm)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental.layout import Layout, with_layout_constraint

from hybridvlm.config import ModelConfig
from hybridvlm.nn.caches import MambaCache
from hybridvlm.nn.linear import biased, linear
from hybridvlm.ops.conv1d import causal_conv1d
from hybridvlm.ops.layer_aux import MambaAux
from hybridvlm.ops.norms import gated_rms_norm, rms_norm
from hybridvlm.ops.platforms import platform
from hybridvlm.ops.ssd import ssd, ssd_step
from hybridvlm.parallel.sequence import after_last_token, halo, incoming_state, row_is_cut
from hybridvlm.parallel.tensor import group_mean, psum_tensor

Params = dict[str, jax.Array]
_BLOCK_BYTES = 1 << 22  # float32 projections of one block of tokens, on CPU: what stays in the caches of two cores


class MambaStack(nn.Module):
    """The parameters of all Mamba-2 layers, stacked on a leading axis; calling it returns them as a dict.

    norm [n,D] · in_proj [n,D,z+x+B+C+dt] · conv_weight [n,W,channels] · conv_bias · A_log, D, dt_bias [n,H] ·
    gate_norm [n,H*P] · out_proj [n,H*P,D] · with mamba_bias in_bias [n,z+x+B+C+dt], out_bias [n,D]
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Params:
        c, n = self.config, self.config.count("M")
        dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=(0,))
        ones = nn.initializers.ones

        def a_log(key, shape):
            return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))

        def dt_bias(key, shape):  # dt log-uniform in [1e-3, 0.1] at the start, through the inverse of softplus
            dt = jnp.exp(jax.random.uniform(key, shape) * (jnp.log(0.1) - jnp.log(1e-3)) + jnp.log(1e-3))
            return dt + jnp.log(-jnp.expm1(-dt))

        def conv(key, shape):
            bound = 1 / jnp.sqrt(shape[1])
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        p = {
            "norm": self.param("norm", ones, (n, c.width)),
            "in_proj": self.param("in_proj", dense, (n, c.width, c.in_proj_width)),
            "conv_weight": self.param("conv_weight", conv, (n, c.conv_kernel, c.conv_width)),
            "A_log": self.param("A_log", a_log, (n, c.mamba_heads)),
            "D": self.param("D", ones, (n, c.mamba_heads)),
            "dt_bias": self.param("dt_bias", dt_bias, (n, c.mamba_heads)),
            "gate_norm": self.param("gate_norm", ones, (n, c.mamba_width)),
            "out_proj": self.param("out_proj", dense, (n, c.mamba_width, c.width)),
        }
        if c.conv_bias:
            p["conv_bias"] = self.param("conv_bias", nn.initializers.zeros, (n, c.conv_width))
        if c.mamba_bias:
            p["in_bias"] = self.param("in_bias", nn.initializers.zeros, (n, c.in_proj_width))
            p["out_bias"] = self.param("out_bias", nn.initializers.zeros, (n, c.width))
        return p


def _project(p: Params, c: ModelConfig, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B,L,D] -> gate z [B,L,H*P], the convolution's input [B,L,channels], raw dt [B,L,H]."""
    h, weight = rms_norm(x, p["norm"], c.norm_eps), p["in_proj"]
    cuts = (c.mamba_width, c.mamba_width + c.conv_width)
    if platform() != "tpu" or x.shape[1] == 1:
        z, channels, dt = jnp.split(linear(h, weight, p.get("in_bias")), cuts, axis=-1)
        return z, channels, dt
    # A cut of the result is a copy of it, a cut of the weight is read in place: a third less memory for a layer on TPU. Left to
    # itself the compiler turns the whole stack of weights about before the first layer (6.5 GB of the 12B model, and 21 ms).
    weight = with_layout_constraint(weight, Layout((0, 1)))
    biases = jnp.split(p["in_bias"], cuts) if c.mamba_bias else (None, None, None)
    z, channels, dt = (linear(h, *pair) for pair in zip(jnp.split(weight, cuts, axis=-1), biases, strict=True))
    return z, channels, dt


def _inputs(p: Params, c: ModelConfig, convolved: jax.Array, raw_dt: jax.Array, real: jax.Array):
    """Convolved channels -> x [...,H*P], B, C [...,G,N]; raw dt -> dt after softplus, 0 at padding; A [H].

    x stays flat: on a TPU heads of 80 as an axis of their own would be padded to 128.
    """
    channels = nn.silu(convolved)
    groups = (c.ssm_groups, c.ssm_state)
    x, b, cc = jnp.split(channels, (c.mamba_width, c.mamba_width + c.ssm_groups * c.ssm_state), axis=-1)
    lead = x.shape[:-1]
    dt = jax.nn.softplus(raw_dt.astype(jnp.float32) + p["dt_bias"].astype(jnp.float32))
    if c.dt_floor:
        dt = jnp.maximum(dt, c.dt_floor)
    if c.dt_ceiling:
        dt = jnp.minimum(dt, c.dt_ceiling)
    dt = jnp.where(real[..., None], dt, 0.0)
    decay = -jnp.exp(p["A_log"].astype(jnp.float32))
    return x, b.reshape(*lead, *groups), cc.reshape(*lead, *groups), dt, decay


def _output(p: Params, c: ModelConfig, residual: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    whole = functools.partial(group_mean, c)
    y = gated_rms_norm(y, z, p["gate_norm"], c.ssm_groups, c.norm_eps, whole)
    return residual + biased(psum_tensor(c, linear(y, p["out_proj"])), p.get("out_bias")).astype(residual.dtype)


def mamba_layer(
    p: Params, c: ModelConfig, x: jax.Array, segment: jax.Array, cache: MambaCache | None = None
) -> tuple[jax.Array, MambaCache, MambaAux]:
    """One residual Mamba-2 layer over a row of tokens.

    x [B,L,D], segment [B,L] int32 (0 = padding), cache: what came before, or None. A cache of fewer rows than x is shared:
    row b of the cache is the past of rows b*Q .. b*Q+Q-1 (many questions on one video).
    Returns x after the residual, the cache after the last real token, and what the scores need. Where rows are cut over devices
    without one, x is a shard of the row, and the cache is that after the row, on every device; what comes after a cache is whole.
    """
    b, length, _ = x.shape
    if cache is not None and cache.ssm.shape[0] != b:
        times = b // cache.ssm.shape[0]
        # a broadcast, not a repeat: its gradient is a sum over the questions, where repeat's would be a scatter
        cache = jax.tree.map(
            lambda a: jnp.broadcast_to(a[:, None], (a.shape[0], times, *a.shape[1:])).reshape(-1, *a.shape[1:]), cache
        )
    blocks, size = (1, length) if cache is None and row_is_cut(c) else _blocks(c, b, length)
    if blocks == 1:
        return _whole(p, c, x, segment, cache)
    if cache is None:
        cache = MambaCache(
            jnp.zeros((b, c.conv_kernel - 1, c.conv_width), x.dtype),
            jnp.zeros((b, c.mamba_heads, c.mamba_head_dim, c.ssm_state), jnp.float32),
            jnp.zeros((b,), segment.dtype),
        )

    def split(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, 0), (0, blocks * size - length)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, blocks, size, *a.shape[2:]), 1, 0)

    def join(a: jax.Array) -> jax.Array:
        return jnp.moveaxis(a, 0, 1).reshape(b, blocks * size, *a.shape[3:])[:, :length]

    def block(cache: MambaCache, part: tuple[jax.Array, jax.Array]):
        out, cache, aux = _whole(p, c, *part, cache)
        return cache, (out, aux)

    last, out = jax.lax.scan(block, cache, (split(x), split(segment)))
    x, aux = jax.tree.map(join, out)
    return x, last, aux


def _blocks(c: ModelConfig, batch: int, length: int) -> tuple[int, int]:
    """How many blocks a row is walked through in, and their size.

    On CPU a layer is bound by what passes through memory between its matmuls, unless that stays in the cache: 60 against
    86 GFLOP/s on one core at 4,096 tokens. Elsewhere, and where it all fits, the row is one block.
    """
    widest = 4 * batch * c.in_proj_width  # bytes of one token of all examples, at its widest
    if platform() != "cpu" or length * widest <= 2 * _BLOCK_BYTES:
        return 1, length
    least = max(64, _BLOCK_BYTES // widest)

    def padded(blocks: int) -> int:
        return blocks * 8 * -(-length // (8 * blocks))

    counts = range(max(2, length // (2 * least)), max(2, length // least) + 1)
    blocks = min(counts, key=lambda n: (padded(n), n))
    return blocks, padded(blocks) // blocks


def _whole(
    p: Params, c: ModelConfig, x: jax.Array, segment: jax.Array, cache: MambaCache | None
) -> tuple[jax.Array, MambaCache, MambaAux]:
    z, channels, raw_dt = _project(p, c, x)
    past: jax.Array | None = None
    owner: jax.Array | None = None
    if cache is None and row_is_cut(c):
        past, owner = halo(c, channels, segment)
    if cache is not None:
        past, owner = cache.conv, cache.segment
    convolved, conv_state = causal_conv1d(
        channels,
        p["conv_weight"],
        p.get("conv_bias"),
        segment=segment,
        initial_state=past,
        initial_segment=owner,
    )
    xs, b, cc, dt, decay = _inputs(p, c, convolved, raw_dt, segment > 0)
    before = jnp.zeros_like(segment[:, 0]) if owner is None else owner
    initial = None if cache is None else cache.ssm
    if cache is None and row_is_cut(c):
        initial = incoming_state(c, xs, dt, decay, b, segment, before)
    y, state = ssd(
        xs,
        dt,
        decay,
        b,
        cc,
        D=p["D"],
        segment=segment,
        initial_state=initial,
        initial_segment=owner,
        chunk_size=c.chunk_size or None,
    )
    # segments of one row rise or stay; the last real one is found by its position, since padding (0) ends the row
    count = jnp.sum(segment > 0, axis=1)
    last = jnp.take_along_axis(segment, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
    new = MambaCache(conv_state, state, jnp.where(count > 0, last, before))
    if cache is None and row_is_cut(c):
        new = after_last_token(c, new, segment)
    return _output(p, c, x, y, z), new, MambaAux(b=b, c=cc, dt=dt, log_decay=dt * decay)


def mamba_step(p: Params, c: ModelConfig, x: jax.Array, cache: MambaCache) -> tuple[jax.Array, MambaCache]:
    """One new token per example: x [B,1,D] -> x after the residual, and the cache moved on by one."""
    z, channels, raw_dt = _project(p, c, x)
    window = jnp.concatenate([cache.conv.astype(channels.dtype), channels], axis=1)  # [B,W,channels]
    convolved = jnp.einsum("bwd,wd->bd", window, p["conv_weight"].astype(channels.dtype))
    if c.conv_bias:
        convolved = convolved + p["conv_bias"].astype(channels.dtype)
    real = jnp.ones(x.shape[:1], bool)
    xs, b, cc, dt, decay = _inputs(p, c, convolved, raw_dt[:, 0], real)
    y, state = ssd_step(xs.reshape(*dt.shape, -1), dt, decay, b, cc, cache.ssm, D=p["D"])
    new = MambaCache(window[:, 1:].astype(cache.conv.dtype), state, cache.segment)
    return _output(p, c, x, y.reshape(z.shape), z), new
