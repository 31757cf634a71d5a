"""What the GPU kernels need of Pallas's Mosaic backend in a form that every supported JAX takes."""

from __future__ import annotations

import inspect
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# JAX 0.11 made the index of `plgpu.load` optional and 0.12 took it out: what is read is said by the reference alone.
_index = inspect.signature(plgpu.load).parameters.get("idx")
_NOTHING = ((),) if _index is not None and _index.default is inspect.Parameter.empty else ()


def load_as(ref: Any, *, layout: Any, optimized: bool = True) -> jax.Array:
    """The whole of a reference in shared or global memory as an array of this layout. optimized: refuse a slow way to read it."""
    return plgpu.load(ref, *_NOTHING, layout=layout, optimized=optimized)
