"""Chunked SSD in plain XLA: quadratic within a chunk of tokens, a linear recurrence over states between chunks.

With t the running sum of log-decays inside a chunk, S its incoming state, M[i,j] = (C_i . B_j) exp(t_i - t_j) dt_j for j <= i,

    y_i = sum_j M[i,j] x_j + exp(t_i) C_i S        S' = exp(t_last) S + sum_j dt_j exp(t_last - t_j) B_j x_j^T

Every decay is a function of dt and A alone and small, [B,L,H]: `_coefficients` computes them all beforehand and JAX
differentiates it. What remains is bilinear matmul work on x, B and C, done a few chunks at a time inside a loop, so
that the [C,C] masks of all heads exist for those chunks only; its backward pass is written out here and keeps nothing
but the state at the start of each chunk. States are held as [G,N,R,P] (R = H/G heads per group), so that reading and
writing them are plain matrix products for which x and y keep the layout that the caller has.

A length that is no multiple of the step is not padded (that would copy x): the last step looks at the last full window,
and the tokens in it that were done before are made inert by dt = 0.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybridvlm.ops.ssd.decays import log_decays


class Sizes(NamedTuple):
    """How a row is cut: `steps` windows of `block` chunks of `chunk` tokens; and the heads: into `groups`."""

    length: int
    chunk: int
    block: int
    steps: int
    groups: int

    @property
    def window(self) -> int:
        return self.block * self.chunk

    @property
    def done(self) -> int:
        """Tokens before the last step."""
        return (self.steps - 1) * self.window

    @property
    def stale(self) -> int:
        """Tokens at the front of the last window that the step before has done already."""
        return self.steps * self.window - self.length


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


class Runs(NamedTuple):
    """Who may see whom inside a chunk: token i reads token j where reader[i] == writer[j]; [S,b,C] int32."""

    reader: jax.Array
    writer: jax.Array


def ssd_chunked(x, dt, a, b, c, d, reset_index, token_mask, state, *, chunk_size: int, block: int, associative: bool):
    """Chunked SSD; arguments and results as `ssd_reference`, at padding dt must be 0.

    associative: chunk states are combined by `jax.lax.associative_scan`, and all other work is done for `block` chunks
    at once; otherwise one chunk comes after the other.
    Returns y [B,L,H,P] in x.dtype, 0 at padding, and the final state [B,H,P,N] fp32.
    """
    batch, length, heads, p = x.shape
    groups, n = b.shape[2:]
    per_group = heads // groups
    chunk = min(chunk_size, length)
    block = min(block, length // chunk) if associative else 1
    sizes = Sizes(length, chunk, block, -(-length // (block * chunk)), groups)
    coefficients, runs = _coefficients(sizes, dt, a, reset_index, token_mask)
    d = None if d is None else d.reshape(groups, per_group)
    state = state.reshape(batch, groups, per_group, p, n)
    state = jnp.transpose(state, (0, 1, 4, 2, 3))
    core = _associative if associative else _sequential
    y, state = core(sizes, x, b, c, d, coefficients, runs, state)
    return y, jnp.transpose(state, (0, 1, 3, 4, 2)).reshape(batch, heads, p, n)


# -- decays --


def _coefficients(sizes: Sizes, dt, a, reset_index, token_mask) -> tuple[Coefficients, Runs | None]:
    batch, _, heads = dt.shape
    groups = sizes.groups

    def windows(v, stale_value):
        """[B,L,...] -> [B,S*W,...]: the windows side by side, the stale positions of the last one replaced."""
        if not sizes.stale:
            return v
        stale = jnp.broadcast_to(stale_value, (batch, sizes.stale, *v.shape[2:])).astype(v.dtype)
        return jnp.concatenate([v[:, : sizes.done], stale, v[:, sizes.done :]], axis=1)

    def by_step(v):
        """[B,S*W,...] -> [S,b,C,...]"""
        v = v.reshape(batch, sizes.steps, sizes.block, sizes.chunk, *v.shape[2:])
        return jnp.moveaxis(v, 1, 0).reshape(sizes.steps, batch * sizes.block, sizes.chunk, *v.shape[4:])

    dt = by_step(windows(dt, 0.0).reshape(batch, -1, groups, heads // groups))
    dt = jnp.moveaxis(dt, 2, -1)  # [S,b,G,R,C]
    whole, total = (jnp.cumsum(v, axis=-1) for v in log_decays(dt, a.reshape(groups, heads // groups, 1)))
    # The last token's own distance is 0 whatever t is; written so, its two gradients need not cancel.
    to_end = (whole[..., -1:] - whole[..., :-1]) + (total[..., -1:] - total[..., :-1])
    to_end = jnp.concatenate([to_end, jnp.zeros_like(total[..., -1:])], axis=-1)
    sums = (whole, -whole, total, -total, dt)
    total = whole + total
    kept = total[..., -1]
    if reset_index is None:
        return Coefficients(*sums, jnp.exp(total), dt * jnp.exp(to_end), jnp.exp(kept)), None

    reset_index = windows(reset_index, reset_index[:, sizes.done - 1 : sizes.done])
    ends = reset_index[:, sizes.chunk - 1 :: sizes.chunk]
    before = jnp.pad(ends[:, :-1], [(0, 0), (1, 0)])  # the run to which a chunk's incoming state belongs
    reader = by_step(jnp.where(windows(token_mask, False), reset_index, -1))  # padding reads nothing
    writer = by_step(reset_index)
    before, ends = (
        jnp.moveaxis(v.reshape(batch, sizes.steps, sizes.block), 1, 0).reshape(sizes.steps, -1, 1)
        for v in (before, ends)
    )

    def masked_exp(mask, exponent):  # the mask comes before exp: no overflow, and no 0 * inf in the gradient
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    over_heads = (slice(None), slice(None), None, None)
    read = masked_exp((reader == before)[over_heads], total)
    write = dt * masked_exp((writer == ends)[over_heads], to_end)
    keep = masked_exp(before == ends, kept.reshape(sizes.steps, -1, heads)).reshape(kept.shape)
    return Coefficients(*sums, read, write, keep), Runs(reader, writer)


# -- one step --
# b chunks: x, y [b,C,G,R,P]; b, c [b,C,G,N]; coefficients [b,G,R,C]; states [b,G,N,R,P].


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


def _decays(k: Coefficients, runs: Runs | None):
    """exp(t_i - t_j) where token i may see token j, else 0: [b,G,R,C,C]"""
    size = k.total.shape[-1]
    seen = jnp.tril(jnp.ones((size, size), bool))
    if runs is not None:
        seen = (seen & (runs.reader[:, :, None] == runs.writer[:, None, :]))[:, None, None]
    # The mask comes before exp: above the diagonal the difference is positive and may overflow.
    whole = k.whole[..., :, None] + k.less_whole[..., None, :] + jnp.where(seen, 0.0, -jnp.inf)
    return jnp.exp(whole + (k.total[..., :, None] + k.minus[..., None, :]))


def _kept(k: Coefficients, state):
    return state * k.keep[:, :, None, :, None]


def _inflow(x, b, k: Coefficients):
    """What the chunks add to the state: [b,G,N,R,P]"""
    return _dot(jnp.transpose(b, (0, 2, 3, 1)), _by_group(_scaled(x, k.write).astype(x.dtype)), (3, 2), 2)


def _skip(x, d, runs: Runs | None):
    y = d[..., None] * x
    return y if runs is None else jnp.where((runs.reader >= 0)[:, :, None, None, None], y, 0.0)


def _outputs(x, b, c, d, k: Coefficients, runs: Runs | None, state):
    b, c = _by_group(b), _by_group(c)
    mixed = _dot(c, b, (3, 3), 2)[:, :, None] * _decays(k, runs) * k.dt[..., None, :]
    y = _from_head(_dot(mixed.astype(x.dtype), _by_head(x), (4, 3), 3))
    y = y + _scaled(_by_group(_dot(c.astype(jnp.float32), state, (3, 2), 2)), k.read)
    return y if d is None else y + _skip(x, d, runs)


def _state_gradient(c, k: Coefficients, gy):
    """Gradient that reaches the incoming states through the outputs: [b,G,N,R,P]"""
    return _dot(jnp.transpose(c, (0, 2, 3, 1)).astype(jnp.float32), _by_group(_scaled(gy, k.read)), (3, 2), 2)


def _gradients(x, b, c, d, k: Coefficients, runs: Runs | None, state, gy, gstate):
    """Gradients of x, b, c, d and the coefficients, given those of the outputs gy and of the outgoing states gstate."""
    kind = x.dtype
    b, c = _by_group(b), _by_group(c)
    b32, c32 = b.astype(jnp.float32), c.astype(jnp.float32)

    # Within the chunk: y = M x, M = scores * decays * dt.
    scores = _dot(c, b, (3, 3), 2)[:, :, None]
    decays = _decays(k, runs)
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
        gx = gx + _skip(gy, d, runs)
        gd = _skip(gy * x, jnp.ones_like(d), runs).sum((0, 1, 4))
    return gx, _by_group(gb), _by_group(gc), gd, Coefficients(none, none, gtotal, gminus, gdt, gread, gwrite, gkeep)


def _dot_heads(v, state):
    """v [b,G,C,R,P] and state [b,G,N,R,P] -> [b,G,C,N], summed over the heads of the group."""
    return _dot(v.reshape(*v.shape[:3], -1), state.reshape(*state.shape[:3], -1), (3, 3), 2)


# -- walking over the steps --


def _window(sizes: Sizes, v, step):
    """The chunks of one step: [B,L,...] -> [b,C,...]"""
    start = jnp.minimum(step * sizes.window, sizes.length - sizes.window)
    v = lax.dynamic_slice_in_dim(v, start, sizes.window, axis=1)
    return v.reshape(-1, sizes.chunk, *v.shape[2:])


def _head_window(sizes: Sizes, v, step):
    """[B,L,H,P] -> [b,C,G,R,P]. Heads are split here and not before the loop: XLA would copy all of x for it."""
    v = _window(sizes, v, step)
    return v.reshape(*v.shape[:2], sizes.groups, -1, v.shape[-1])


def _fresh(sizes: Sizes, v, step, otherwise):
    """v [b,C,...] with the stale tokens of the last step replaced."""
    if not sizes.stale:
        return v
    position = jnp.arange(sizes.window).reshape(sizes.block, sizes.chunk)
    fresh = (step < sizes.steps - 1) | (position >= sizes.stale)
    fresh = jnp.tile(fresh, (v.shape[0] // sizes.block, 1))
    return jnp.where(fresh.reshape(*fresh.shape, *[1] * (v.ndim - 2)), v, otherwise)


def _put(sizes: Sizes, buffer, v, step):
    """Write the chunks of one step back: v [b,C,...] into [B,L,...]; stale tokens keep what is there."""
    v = v.astype(buffer.dtype)
    if sizes.stale:
        v = _fresh(sizes, v, step, _window(sizes, buffer, step).reshape(v.shape))
    start = jnp.minimum(step * sizes.window, sizes.length - sizes.window)
    return lax.dynamic_update_slice_in_dim(buffer, v.reshape(buffer.shape[0], -1, *buffer.shape[2:]), start, axis=1)


def _at(tree, step):
    return jax.tree.map(lambda v: lax.dynamic_index_in_dim(v, step, keepdims=False), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sequential(sizes, x, b, c, d, coefficients, runs, state):
    return _sequential_forward(sizes, x, b, c, d, coefficients, runs, state, keep_states=False)[:2]


def _sequential_forward(sizes, x, b, c, d, coefficients, runs, state, keep_states=True):
    def body(step, carry):
        state, y, starts = carry
        xs, bs, cs = _head_window(sizes, x, step), _window(sizes, b, step), _window(sizes, c, step)
        k, segment_ids = _at((coefficients, runs), step)
        if keep_states:
            starts = lax.dynamic_update_index_in_dim(starts, state, step, 0)
        y = _put(sizes, y, _outputs(xs, bs, cs, d, k, segment_ids, state), step)
        return _kept(k, state) + _inflow(xs, bs, k), y, starts

    starts = jnp.zeros((sizes.steps, *state.shape)) if keep_states else None
    state, y, starts = lax.fori_loop(0, sizes.steps, body, (state, jnp.zeros(x.shape, x.dtype), starts))
    return y, state, (x, b, c, d, coefficients, runs, starts)


def _sequential_fwd(sizes, *args):
    y, state, saved = _sequential_forward(sizes, *args)
    return (y, state), saved


def _sequential_bwd(sizes, saved, gradients):
    c, coefficients, starts = saved[2], saved[4], saved[6]
    gy, gstate = gradients

    def body(i, carry):
        gstate, out = carry
        step = sizes.steps - 1 - i
        gys = _fresh(sizes, _head_window(sizes, gy, step).astype(jnp.float32), step, 0.0)
        k = _at(coefficients, step)
        out = _one_step_back(sizes, saved, step, starts[step], gys, gstate, out)
        return _kept(k, gstate) + _state_gradient(_window(sizes, c, step), k, gys), out

    gstate, out = lax.fori_loop(0, sizes.steps, body, (gstate, _gradient_buffers(saved)))
    return (*out, None, gstate)


def _gradient_buffers(saved):
    x, b, c, d, coefficients = saved[:5]
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), (x, b, c, d, coefficients))


def _one_step_back(sizes, saved, step, start, gy, gstate, out):
    x, b, c, d, coefficients, runs = saved[:6]
    xs, bs, cs = _head_window(sizes, x, step), _window(sizes, b, step), _window(sizes, c, step)
    k, segment_ids = _at((coefficients, runs), step)
    gx, gb, gc, gd, gk = _gradients(xs, bs, cs, d, k, segment_ids, start, gy, gstate)
    gx, gb, gc = (_put(sizes, buffer, v, step) for buffer, v in zip(out[:3], (gx, gb, gc), strict=True))
    gk = jax.tree.map(lambda buffer, v: lax.dynamic_update_index_in_dim(buffer, v, step, 0), out[4], gk)
    return gx, gb, gc, None if d is None else out[3] + gd, gk


_sequential.defvjp(_sequential_fwd, _sequential_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _associative(sizes, x, b, c, d, coefficients, runs, state):
    return _associative_fwd(sizes, x, b, c, d, coefficients, runs, state)[0]


def _associative_fwd(sizes, x, b, c, d, coefficients, runs, state):
    def add(step, states):
        k = _at(coefficients, step)
        return _put_states(sizes, states, _inflow(_head_window(sizes, x, step), _window(sizes, b, step), k), step, 1)

    # Element 0 is the incoming state, element i+1 what chunk i adds to one; the prefixes are the states themselves.
    count = sizes.steps * sizes.block
    states = jnp.zeros((count + 1, *state.shape)).at[0].set(state)
    states = lax.fori_loop(0, sizes.steps, add, states)
    keep = _keeps(sizes, coefficients)
    states = _recurrence(jnp.concatenate([jnp.ones_like(keep[:1]), keep]), states)

    def emit(step, y):
        xs, bs, cs = _head_window(sizes, x, step), _window(sizes, b, step), _window(sizes, c, step)
        k, segment_ids = _at((coefficients, runs), step)
        return _put(sizes, y, _outputs(xs, bs, cs, d, k, segment_ids, _get_states(sizes, states, step, 0)), step)

    y = lax.fori_loop(0, sizes.steps, emit, jnp.zeros(x.shape, x.dtype))
    return (y, states[-1]), (x, b, c, d, coefficients, runs, states)


def _associative_bwd(sizes, saved, gradients):
    c, coefficients, states = saved[2], saved[4], saved[6]
    gy, gstate = gradients

    def fresh_gy(step):
        return _fresh(sizes, _head_window(sizes, gy, step).astype(jnp.float32), step, 0.0)

    def add(step, gstates):
        value = _state_gradient(_window(sizes, c, step), _at(coefficients, step), fresh_gy(step))
        return _put_states(sizes, gstates, value, step, 0)

    # The same recurrence, run backwards: element i is what reaches the start of chunk i directly.
    gstates = jnp.zeros(states.shape).at[-1].set(gstate)
    gstates = lax.fori_loop(0, sizes.steps, add, gstates)
    keep = _keeps(sizes, coefficients)
    gstates = _recurrence(jnp.concatenate([keep, jnp.ones_like(keep[:1])]), gstates, reverse=True)

    def body(step, out):
        start, end = _get_states(sizes, states, step, 0), _get_states(sizes, gstates, step, 1)
        return _one_step_back(sizes, saved, step, start, fresh_gy(step), end, out)

    out = lax.fori_loop(0, sizes.steps, body, _gradient_buffers(saved))
    return (*out, None, gstates[0])


_associative.defvjp(_associative_fwd, _associative_bwd)


def _keeps(sizes: Sizes, coefficients: Coefficients):
    """[S,b,G,R] -> one row per chunk in reading order [S*block,B,G,R]"""
    keep = coefficients.keep
    keep = keep.reshape(sizes.steps, -1, sizes.block, *keep.shape[2:])
    return jnp.swapaxes(keep, 1, 2).reshape(sizes.steps * sizes.block, keep.shape[1], *keep.shape[3:])


def _put_states(sizes: Sizes, states, v, step, offset: int):
    """Write the states [b,G,N,R,P] of one step into [chunks+1,B,G,N,R,P]."""
    v = jnp.swapaxes(v.reshape(-1, sizes.block, *v.shape[1:]), 0, 1)
    return lax.dynamic_update_slice_in_dim(states, v, step * sizes.block + offset, axis=0)


def _get_states(sizes: Sizes, states, step, offset: int):
    v = lax.dynamic_slice_in_dim(states, step * sizes.block + offset, sizes.block, axis=0)
    return jnp.swapaxes(v, 0, 1).reshape(-1, *v.shape[2:])


def _recurrence(keep, states, reverse: bool = False):
    """s_i <- keep_i s_(i-1) + s_i (reverse: s_(i+1)) over axis 0: keep [chunks,B,G,R], states [chunks,B,G,N,R,P]."""

    def combine(left, right):
        (left_keep, left_state), (right_keep, right_state) = left, right
        return left_keep * right_keep, left_state * right_keep[:, :, :, None, :, None] + right_state

    return lax.associative_scan(combine, (keep, states), reverse=reverse)[1]
