"""What the GPU kernels need of Pallas's Mosaic backend in a form that every supported JAX takes."""

from __future__ import annotations

import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# JAX 0.12 took the index out of `plgpu.load`: what is read is said by the reference alone.
_NOTHING = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def load_as(ref: Any, *, layout: Any, optimized: bool = True) -> jax.Array:
    """The whole of a reference in shared or global memory as an array of this layout. optimized: refuse a slow way to read it."""
    return plgpu.load(ref, *_NOTHING, layout=layout, optimized=optimized)
