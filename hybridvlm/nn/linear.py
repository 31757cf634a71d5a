"""Matrix products with weights [in,out], whole or cut into pieces by columns."""

from __future__ import annotations

import os

import jax
import jax.numpy as jnp

from hybridvlm.ops.platforms import platform

Weight = jax.Array | tuple[jax.Array, ...]
_CUT_BYTES = 1 << 20  # a smaller weight is read before a second thread has started
_CUT_MULTIPLE = 16  # columns: whole vector registers


def linear(x: jax.Array, weight: Weight, bias: jax.Array | None = None) -> jax.Array:
    """x [...,D] times weight [D,W], or the pieces of one that `cut_columns` gave, in x.dtype; with bias [W] that is added."""
    pieces = weight if isinstance(weight, tuple) else (weight,)
    return biased(jnp.concatenate([x @ w.astype(x.dtype) for w in pieces], axis=-1), bias)


def biased(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x [...,W] plus bias [W] in x.dtype, or x where there is none."""
    return x if bias is None else x + bias.astype(x.dtype)


def cut_columns(weight: jax.Array) -> Weight:
    """A weight [D,W] for products with single rows, as decoding has them: on CPU a piece for every core, else as it is.

    XLA gives a matrix-vector product on CPU to one thread, but runs independent ones side by side; such a product is bound
    by reading the weight, and one core alone cannot saturate memory (19 against 35 GB/s on 2 cores).
    """
    if platform() != "cpu" or weight.size * weight.dtype.itemsize < _CUT_BYTES:
        return weight
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    step = _CUT_MULTIPLE * -(-weight.shape[1] // (_CUT_MULTIPLE * cores))
    return tuple(weight[:, at : at + step] for at in range(0, weight.shape[1], step))
