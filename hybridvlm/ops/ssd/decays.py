"""Logarithms of decays in a form whose running sums lose nothing: what every chunked implementation of the SSD starts from."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

LEAST = -128.0  # exp of it is 0 in float32: a logarithm of a decay need not be less


def log_decays(dt, a):
    """dt * a in an integer (without gradient) and the rest, within half of 0; not below LEAST.

    One strong decay makes running sums so large that differences of sums after it, which are small, lose their bits. Sums of
    integers lose none, and those of the rest stay small.
    """
    log = jnp.maximum(dt * a, LEAST)
    whole = jnp.round(lax.stop_gradient(log))
    return whole, log - whole
