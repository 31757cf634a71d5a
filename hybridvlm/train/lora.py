"""Low-rank updates (LoRA, arXiv 2106.09685) of stacked projections: W + (alpha / rank) A B, one A and B per layer.

The update is added to the weight before the forward pass, so that every layer, kernel and sharding rule sees an ordinary model; what
is trained, kept in optimizer state and saved apart are the small factors alone.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.checkpoints.atomic import whole_folder
from hybridvlm.train.config import Lora

A, B = "/lora_a", "/lora_b"  # after the path of the parameter that they update
FILE, ABOUT = "adapter.safetensors", "adapter.json"
Flat = dict[str, jax.Array]


def paths(lora: Lora, flat: Mapping[str, jax.Array]) -> list[str]:
    """The parameters that `targets` find; ValueError for a pattern that finds nothing, or a parameter that is no projection."""
    for pattern in lora.targets:
        if not any(re.search(pattern, path) for path in flat):
            raise ValueError(f"Lora.targets: {pattern!r} finds no parameter")
    found = [path for path in sorted(flat) if any(re.search(pattern, path) for pattern in lora.targets)]
    for path in found:
        shape = flat[path].shape
        if len(shape) < 2 or min(shape[-2:]) < lora.rank:
            raise ValueError(f"Lora: {path} {shape} is no projection of rank {lora.rank} or more")
    return found


def init(lora: Lora, flat: Mapping[str, jax.Array], key: jax.Array) -> Flat:
    """Factors of `paths`: A [...,in,rank] random, B [...,rank,out] zero, so that nothing changes yet."""
    out: Flat = {}
    number = {path: i for i, path in enumerate(sorted(flat))}
    for path in paths(lora, flat):
        shape = flat[path].shape
        scale = shape[-2] ** -0.5
        out[path + A] = scale * jax.random.normal(jax.random.fold_in(key, number[path]), (*shape[:-1], lora.rank))
        out[path + B] = jnp.zeros((*shape[:-2], lora.rank, shape[-1]))
    return out


def target(path: str) -> str:
    """The parameter that a factor belongs to; any other path as it is."""
    return path.removesuffix(A).removesuffix(B)


def merge(lora: Lora, base: Mapping[str, jax.Array], factors: Mapping[str, jax.Array]) -> Flat:
    """The base parameters with the updates added; those sums are float32, whatever the base is, in whose bfloat16 they could drown."""
    out = dict(base)
    for path in sorted({target(name) for name in factors}):
        update = jnp.matmul(factors[path + A], factors[path + B], precision="highest") * (lora.alpha / lora.rank)
        out[path] = base[path].astype(jnp.float32) + update
    return out


def rounded(a: jax.Array, dtype: jnp.dtype, key: jax.Array) -> jax.Array:
    """Float32 `a` in `dtype`; its gradient passes as it is. bfloat16: up or down by fixed noise, in the mean the number itself.

    Rounded to the nearest, a frozen bfloat16 weight would swallow every update below half its last digit, and LoRA's are small.
    """
    if dtype != jnp.bfloat16:
        return a.astype(dtype)
    noise = jax.random.bits(key, a.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(a), jnp.uint32) + noise
    value = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), dtype)
    return value + (a - jax.lax.stop_gradient(a)).astype(dtype)  # the second is zero, and passes the gradient


def save(folder: pathlib.Path, lora: Lora, factors: Mapping[str, jax.Array], model: str) -> None:
    """The factors as a folder of their own, whole or not at all."""
    from safetensors.numpy import save_file

    with whole_folder(folder, lambda old: (old / ABOUT).is_file()) as new:
        about = {"model": model, "rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)}
        (new / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        save_file({name: np.ascontiguousarray(jax.device_get(a)) for name, a in factors.items()}, new / FILE)


def load(folder: pathlib.Path) -> tuple[Lora, dict[str, np.ndarray]]:
    """What `save` wrote."""
    from safetensors.numpy import load_file

    about = json.loads((folder / ABOUT).read_text())
    return Lora(about["rank"], about["alpha"], tuple(about["targets"])), load_file(folder / FILE)
