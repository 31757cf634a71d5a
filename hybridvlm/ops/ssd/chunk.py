"""The work of chunked SSD inside its chunks, b of them at once: outputs, what they add to the state, and the gradients of both.

x, y [b,C,G,R,P]; b, c [b,C,G,N]; coefficients [b,G,R,C]; states [b,G,N,R,P]. xla.py has the formulas, and says why states lie so.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Coefficients(NamedTuple):
    """Everything that depends on dt and A, float32, ordered by step: S steps, b = B * block chunks each.

    whole + total [S,b,G,R,C]: sum of log-decays up to and with a token, apart in an integer and the rest (see
    `decays.log_decays`); less_whole, minus: the same negated, so that exp(t_i - t_j) reads each array at one position (XLA's CPU loops
    that read one array at two are not vectorised: 5 times slower); dt; read: the weight with which a token reads the
    chunk's incoming state; write: that with which it enters the outgoing one. keep [S,b,G,R]: what is left of the incoming state.
    """

    whole: jax.Array
    less_whole: jax.Array
    total: jax.Array
    minus: jax.Array
    dt: jax.Array
    read: jax.Array
    write: jax.Array
    keep: jax.Array


class SegmentIds(NamedTuple):
    """Who may see whom inside a chunk: token i reads token j where reader[i] == writer[j]; [S,b,C] int32."""

    reader: jax.Array
    writer: jax.Array


def _dot(left, right, contract: tuple[int, int], batch: int):
    """Matrix product with `batch` leading batch axes, contracted over one axis of left and one of right, into fp32."""
    axes = tuple(range(batch))
    dimensions = (((contract[0],), (contract[1],)), (axes, axes))
    return lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _by_group(v):
    """[b,C,G,...] <-> [b,G,C,...]"""
    return jnp.swapaxes(v, 1, 2)


def _by_head(v):
    """[b,C,G,R,P] -> [b,G,R,C,P]"""
    return jnp.transpose(v, (0, 2, 3, 1, 4))


def _from_head(v):
    """[b,G,R,C,P] -> [b,C,G,R,P]"""
    return jnp.transpose(v, (0, 3, 1, 2, 4))


def _scaled(v, weight):
    """v [b,C,G,R,P] times weight [b,G,R,C], in fp32."""
    return v * jnp.transpose(weight, (0, 3, 1, 2))[..., None]


def _sum_last(v):
    """Sum over the last axis, as a product with ones: on CPU, XLA's own reductions can be ten times slower."""
    ones = jnp.ones(v.shape[-1], v.dtype)
    return lax.dot_general(v, ones, (((v.ndim - 1,), (0,)), ((), ())), precision=lax.Precision.HIGHEST)


def _sum_heads(v):
    """[b,G,R,...] summed over R, likewise."""
    b, g, r = v.shape[:3]
    ones = jnp.ones((b, g, 1, r), v.dtype)
    axes = (((3,), (2,)), ((0, 1), (0, 1)))
    summed = lax.dot_general(ones, v.reshape(b, g, r, -1), axes, precision=lax.Precision.HIGHEST)
    return summed.reshape(b, g, *v.shape[3:])


def _head_sums(v):
    """[b,C,G,R,P] summed over P -> [b,G,R,C]"""
    return jnp.transpose(_sum_last(v), (0, 2, 3, 1))


def _decays(k: Coefficients, segment_ids: SegmentIds | None):
    """exp(t_i - t_j) where token i may see token j, else 0: [b,G,R,C,C]"""
    size = k.total.shape[-1]
    seen = jnp.tril(jnp.ones((size, size), bool))
    if segment_ids is not None:
        seen = (seen & (segment_ids.reader[:, :, None] == segment_ids.writer[:, None, :]))[:, None, None]
    # The mask comes before exp: above the diagonal the difference is positive and may overflow.
    whole = k.whole[..., :, None] + k.less_whole[..., None, :] + jnp.where(seen, 0.0, -jnp.inf)
    return jnp.exp(whole + (k.total[..., :, None] + k.minus[..., None, :]))


def decayed(k: Coefficients, state):
    """What the chunks leave of their incoming states."""
    return state * k.keep[:, :, None, :, None]


def inflow(x, b, k: Coefficients):
    """What the chunks add to the state: [b,G,N,R,P]"""
    return _dot(jnp.transpose(b, (0, 2, 3, 1)), _by_group(_scaled(x, k.write).astype(x.dtype)), (3, 2), 2)


def _skip(x, d, segment_ids: SegmentIds | None):
    y = d[..., None] * x
    return y if segment_ids is None else jnp.where((segment_ids.reader >= 0)[:, :, None, None, None], y, 0.0)


def outputs(x, b, c, d, k: Coefficients, segment_ids: SegmentIds | None, state):
    """What the chunks answer, each from its own tokens and the state that it is handed: [b,C,G,R,P] in fp32."""
    b, c = _by_group(b), _by_group(c)
    mixed = _dot(c, b, (3, 3), 2)[:, :, None] * _decays(k, segment_ids) * k.dt[..., None, :]
    y = _from_head(_dot(mixed.astype(x.dtype), _by_head(x), (4, 3), 3))
    y = y + _scaled(_by_group(_dot(c.astype(jnp.float32), state, (3, 2), 2)), k.read)
    return y if d is None else y + _skip(x, d, segment_ids)


def state_gradient(c, k: Coefficients, gy):
    """Gradient that reaches the incoming states through the outputs: [b,G,N,R,P]"""
    return _dot(jnp.transpose(c, (0, 2, 3, 1)).astype(jnp.float32), _by_group(_scaled(gy, k.read)), (3, 2), 2)


def gradients(x, b, c, d, k: Coefficients, segment_ids: SegmentIds | None, state, gy, gstate):
    """Gradients of x, b, c, d and the coefficients, given those of the outputs gy and of the outgoing states gstate."""
    kind = x.dtype
    b, c = _by_group(b), _by_group(c)
    b32, c32 = b.astype(jnp.float32), c.astype(jnp.float32)

    # Within the chunk: y = M x, M = scores * decays * dt.
    scores = _dot(c, b, (3, 3), 2)[:, :, None]
    decays = _decays(k, segment_ids)
    weights = decays * k.dt[..., None, :]
    gyh = _by_head(gy.astype(kind))
    gmixed = _dot(gyh, _by_head(x), (4, 4), 3)
    gx = _from_head(_dot((scores * weights).astype(kind), gyh, (3, 3), 3))
    gscores = _sum_heads(gmixed * weights)
    gc = _dot(gscores, b32, (3, 2), 2)
    gb = _dot(gscores, c32, (2, 2), 2)
    gweights = gmixed * scores * decays
    gdt = gweights.sum(-2)
    # The exponent t_i - t_i is 0 whatever t is; left in, its two gradients would cancel only up to rounding.
    size = x.shape[1]
    gexponent = gweights * k.dt[..., None, :] * jnp.tril(jnp.ones((size, size), jnp.float32), -1)
    gtotal, gminus = gexponent.sum(-1), gexponent.sum(-2)
    none = jnp.zeros_like(gtotal)  # integers have none

    # Reading the incoming state.
    gread = _head_sums(gy * _by_group(_dot(c32, state, (3, 2), 2)))
    gc = gc + _dot_heads(_by_group(_scaled(gy, k.read)), state)

    # Writing the outgoing one.
    gweighted = _by_group(_dot(b32, gstate, (3, 2), 2))
    gwrite = _head_sums(x * gweighted)
    gx = gx + _scaled(gweighted, k.write)
    gb = gb + _dot_heads(_by_group(_scaled(x, k.write)), gstate)
    gkeep = _sum_last(state * gstate).sum(2)

    gd = None
    if d is not None:
        gx = gx + _skip(gy, d, segment_ids)
        gd = _skip(gy * x, jnp.ones_like(d), segment_ids).sum((0, 1, 4))
    return gx, _by_group(gb), _by_group(gc), gd, Coefficients(none, none, gtotal, gminus, gdt, gread, gwrite, gkeep)


def _dot_heads(v, state):
    """v [b,G,C,R,P] and state [b,G,N,R,P] -> [b,G,C,N], summed over the heads of the group."""
    return _dot(v.reshape(*v.shape[:3], -1), state.reshape(*state.shape[:3], -1), (3, 3), 2)
