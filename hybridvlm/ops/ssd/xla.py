"""Chunked SSD in plain XLA: quadratic within a chunk of tokens, a linear recurrence over states between chunks.

With t the running sum of log-decays inside a chunk, S its incoming state, M[i,j] = (C_i . B_j) exp(t_i - t_j) dt_j for j <= i,

    y_i = sum_j M[i,j] x_j + exp(t_i) C_i S        S' = exp(t_last) S + sum_j dt_j exp(t_last - t_j) B_j x_j^T

Every decay is a function of dt and A alone and small, [B,L,H]: `coefficients_of` computes them all beforehand and JAX
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

from hybridvlm.ops.ssd.chunk import Coefficients, SegmentIds, decayed, gradients, inflow, outputs, state_gradient
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
    coefficients, segment_ids = coefficients_of(sizes, dt, a, reset_index, token_mask)
    d = None if d is None else d.reshape(groups, per_group)
    state = state.reshape(batch, groups, per_group, p, n)
    state = jnp.transpose(state, (0, 1, 4, 2, 3))
    core = _associative if associative else _sequential
    y, state = core(sizes, x, b, c, d, coefficients, segment_ids, state)
    return y, jnp.transpose(state, (0, 1, 3, 4, 2)).reshape(batch, heads, p, n)


# -- decays --


def coefficients_of(sizes: Sizes, dt, a, reset_index, token_mask) -> tuple[Coefficients, SegmentIds | None]:
    """What depends on dt [B,L,H] and A [H] alone, and who sees whom; None for rows of one segment without padding."""
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
    remaining = total[..., -1]
    if reset_index is None:
        return Coefficients(*sums, jnp.exp(total), dt * jnp.exp(to_end), jnp.exp(remaining)), None

    reset_index = windows(reset_index, reset_index[:, sizes.done - 1 : sizes.done])
    ends = reset_index[:, sizes.chunk - 1 :: sizes.chunk]
    before = jnp.pad(ends[:, :-1], [(0, 0), (1, 0)])  # the run to which a chunk's incoming state belongs
    reader = by_step(jnp.where(windows(token_mask, False), reset_index, -1))  # padding reads nothing
    writer = by_step(reset_index)
    before, ends = (
        jnp.moveaxis(v.reshape(batch, sizes.steps, sizes.block), 1, 0).reshape(sizes.steps, -1, 1)
        for v in (before, ends)
    )

    def masked_exp(mask, exponent):
        # the mask comes before exp: no overflow, and no 0 * inf in the gradient
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    over_heads = (slice(None), slice(None), None, None)
    read = masked_exp((reader == before)[over_heads], total)
    write = dt * masked_exp((writer == ends)[over_heads], to_end)
    keep = masked_exp(before == ends, remaining.reshape(sizes.steps, -1, heads)).reshape(remaining.shape)
    return Coefficients(*sums, read, write, keep), SegmentIds(reader, writer)


# -- walking over the steps --


class Saved(NamedTuple):
    """What the backward pass is left with: the arguments, and the state at the start of each chunk (associative: and the last one)."""

    x: jax.Array
    b: jax.Array
    c: jax.Array
    d: jax.Array | None
    coefficients: Coefficients
    segment_ids: SegmentIds | None
    states: jax.Array | None


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
def _sequential(sizes, x, b, c, d, coefficients, segment_ids, state):
    return _sequential_forward(sizes, x, b, c, d, coefficients, segment_ids, state, keep_states=False)[:2]


def _sequential_forward(sizes, x, b, c, d, coefficients, segment_ids, state, keep_states=True):
    def body(step, carry):
        state, y, starts = carry
        xs, bs, cs = _head_window(sizes, x, step), _window(sizes, b, step), _window(sizes, c, step)
        k, ids = _at((coefficients, segment_ids), step)
        if keep_states:
            starts = lax.dynamic_update_index_in_dim(starts, state, step, 0)
        y = _put(sizes, y, outputs(xs, bs, cs, d, k, ids, state), step)
        return decayed(k, state) + inflow(xs, bs, k), y, starts

    starts = jnp.zeros((sizes.steps, *state.shape)) if keep_states else None
    state, y, starts = lax.fori_loop(0, sizes.steps, body, (state, jnp.zeros(x.shape, x.dtype), starts))
    return y, state, Saved(x, b, c, d, coefficients, segment_ids, starts)


def _sequential_fwd(sizes, *args):
    y, state, saved = _sequential_forward(sizes, *args)
    return (y, state), saved


def sequential_backward(sizes: Sizes, saved: Saved, cotangents):
    """The gradients of one chunk after the other, of outputs by whatever forward pass; as `jax.custom_vjp` wants them."""
    (gy, gstate), starts = cotangents, saved.states
    assert starts is not None  # as a forward pass to be differentiated keeps them

    def body(i, carry):
        gstate, out = carry
        step = sizes.steps - 1 - i
        gys = _fresh(sizes, _head_window(sizes, gy, step).astype(jnp.float32), step, 0.0)
        k = _at(saved.coefficients, step)
        out = _one_step_back(sizes, saved, step, starts[step], gys, gstate, out)
        return decayed(k, gstate) + state_gradient(_window(sizes, saved.c, step), k, gys), out

    gstate, out = lax.fori_loop(0, sizes.steps, body, (gstate, _gradient_buffers(saved)))
    return (*out, None, gstate)


def _gradient_buffers(saved):
    x, b, c, d, coefficients, *_ = saved
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), (x, b, c, d, coefficients))


def _one_step_back(sizes, saved, step, start, gy, gstate, out):
    x, b, c, d, coefficients, segment_ids, _ = saved
    xs, bs, cs = _head_window(sizes, x, step), _window(sizes, b, step), _window(sizes, c, step)
    k, ids = _at((coefficients, segment_ids), step)
    gx, gb, gc, gd, gk = gradients(xs, bs, cs, d, k, ids, start, gy, gstate)
    gx, gb, gc = (_put(sizes, buffer, v, step) for buffer, v in zip(out[:3], (gx, gb, gc), strict=True))
    gk = jax.tree.map(lambda buffer, v: lax.dynamic_update_index_in_dim(buffer, v, step, 0), out[4], gk)
    return gx, gb, gc, None if d is None else out[3] + gd, gk


_sequential.defvjp(_sequential_fwd, sequential_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _associative(sizes, x, b, c, d, coefficients, segment_ids, state):
    return _associative_fwd(sizes, x, b, c, d, coefficients, segment_ids, state)[0]


def _associative_fwd(sizes, x, b, c, d, coefficients, segment_ids, state):
    def add(step, states):
        k = _at(coefficients, step)
        return _put_states(sizes, states, inflow(_head_window(sizes, x, step), _window(sizes, b, step), k), step, 1)

    # Element 0 is the incoming state, element i+1 what chunk i adds to one; the prefixes are the states themselves.
    count = sizes.steps * sizes.block
    states = jnp.zeros((count + 1, *state.shape)).at[0].set(state)
    states = lax.fori_loop(0, sizes.steps, add, states)
    keep = _keeps(sizes, coefficients)
    states = _recurrence(jnp.concatenate([jnp.ones_like(keep[:1]), keep]), states)

    def emit(step, y):
        xs, bs, cs = _head_window(sizes, x, step), _window(sizes, b, step), _window(sizes, c, step)
        k, ids = _at((coefficients, segment_ids), step)
        return _put(sizes, y, outputs(xs, bs, cs, d, k, ids, _get_states(sizes, states, step, 0)), step)

    y = lax.fori_loop(0, sizes.steps, emit, jnp.zeros(x.shape, x.dtype))
    return (y, states[-1]), Saved(x, b, c, d, coefficients, segment_ids, states)


def _associative_bwd(sizes, saved, cotangents):
    c, coefficients, states = saved.c, saved.coefficients, saved.states
    gy, gstate = cotangents

    def fresh_gy(step):
        return _fresh(sizes, _head_window(sizes, gy, step).astype(jnp.float32), step, 0.0)

    def add(step, gstates):
        value = state_gradient(_window(sizes, c, step), _at(coefficients, step), fresh_gy(step))
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
