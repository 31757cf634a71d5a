"""Normalisations; statistics always in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from hybridvlm.typing import Array, Float


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float = 1e-5) -> Float[Array, "... D"]:
    """Root-mean-square norm over the last axis: x [...,D], weight [D] -> [...,D] in x.dtype; multiplied in float32."""
    _check_width("rms_norm", x, weight=weight)
    u = x.astype(jnp.float32)
    u = u * jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + eps)
    return _times(u, weight.astype(jnp.float32)).astype(x.dtype)


def gated_rms_norm(
    y: jax.Array,
    z: jax.Array,
    weight: jax.Array,
    groups: int = 1,
    eps: float = 1e-5,
    whole: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Gate, then normalise within each group: y [...,D], z [...,D], weight [D] -> [...,D] in y.dtype.

    u = y * silu(z) in float32; each of the `groups` equal parts of D is divided by its own root mean square; the
    result is cast to y.dtype and multiplied by the weight there, as Mamba-2 checkpoints expect. whole: where y is only a
    part of its groups' channels, the function from its mean squares [...,groups] to those of all channels.
    """
    _check_width("gated_rms_norm", y, weight=weight)
    if y.shape != z.shape:
        raise ValueError(f"gated_rms_norm: z must have the shape of y, expected {y.shape}, got {z.shape}")
    width = y.shape[-1]
    if groups < 1 or width % groups:
        raise ValueError(
            f"gated_rms_norm: groups must divide the width of y, expected a divisor of {width}, got {groups}"
        )
    u = y.astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    u = u.reshape(*y.shape[:-1], groups, width // groups)
    square = jnp.mean(u * u, axis=-1)
    u = u * jax.lax.rsqrt((square if whole is None else whole(square))[..., None] + eps)
    return _times(u.reshape(y.shape).astype(y.dtype), weight.astype(y.dtype))


def layer_norm(
    x: Float[Array, "... D"], weight: Float[Array, " D"], bias: Float[Array, " D"], eps: float = 1e-5
) -> Float[Array, "... D"]:
    """Layer norm over the last axis: x [...,D], weight [D], bias [D] -> [...,D] in x.dtype; computed in float32."""
    _check_width("layer_norm", x, weight=weight, bias=bias)
    u = x.astype(jnp.float32)
    u = u - jnp.mean(u, axis=-1, keepdims=True)
    u = u * jax.lax.rsqrt(jnp.mean(u * u, axis=-1, keepdims=True) + eps)
    return (_times(u, weight.astype(jnp.float32)) + bias.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def _times(u: jax.Array, weight: jax.Array) -> jax.Array:
    """u [...,D] * weight [D]. The weight's gradient is summed over all tokens at once and in float32: as autodiff writes
    that sum, XLA's CPU backend takes several times as long for it as for the whole norm."""
    return u * weight


def _times_forward(u: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return u * weight, (u, weight)


def _times_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    u, weight = saved
    gweight = jnp.sum(g.astype(jnp.float32) * u.astype(jnp.float32), axis=tuple(range(u.ndim - 1)))
    return g * weight, gweight.astype(weight.dtype)


_times.defvjp(_times_forward, _times_backward)


def _check_width(name: str, x: jax.Array, **vectors: jax.Array) -> None:
    for argument, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: {argument} must have one value per channel of the last axis, "
                f"expected {x.shape[-1:]}, got {vector.shape}"
            )
