"""A VAMBA out of the Transformer that it is to replace (arXiv 2503.11579, section 3.3): config and parameters.

Every layer's cross-attention starts as a copy of its self-attention, the share between them at a half, and the video's Mamba-2
blocks are drawn as the published code draws them; all else stays as it is. A layer of attention without an MLP after it gets one
whose last projection is zero, which computes nothing until it is trained.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import ATTENTION, MLP, ModelConfig, QwenConfig, VambaConfig
from hybridvlm.models.weights import FLOAT32

DT_RANGE, DT_LEAST = (1e-3, 0.1), 1e-4  # of the steps dt at the start
SHARE = 0.5
ShardingFor = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def vamba_config(
    config: ModelConfig, *, ssm_state: int = 128, mamba_head_dim: int = 64, expand: int = 2
) -> VambaConfig:
    """The config of the VAMBA that a Transformer becomes.

    Args:
        config: of the Transformer: attention layers, each with an MLP after it or none.
        ssm_state: N of the video's Mamba-2 blocks.
        mamba_head_dim: width of their heads.
        expand: their inner width, in widths of the model.

    Raises:
        ValueError: for layers or parts that VAMBA's text layers do not have, with their name.
    """
    text = config.pattern.replace(ATTENTION + MLP, ATTENTION)
    if set(text) != {ATTENTION}:
        raise ValueError(
            f"init_vamba_from: expected a Transformer, attention layers (*) with an MLP (-) after them or none, got the pattern "
            f"{config.pattern!r}"
        )
    if isinstance(config, VambaConfig):
        raise ValueError(f"init_vamba_from: {config.name!r} is a VAMBA already; train it as it is")
    if config.output_bias or (isinstance(config, QwenConfig) and config.generation != 2):
        part = "a bias on o_proj" if config.output_bias else "Qwen3-VL's time stamps and planes"
        raise ValueError(f"init_vamba_from: {config.name!r} has {part}, which VAMBA has no place for; take a Qwen2-VL")
    inner = expand * config.width
    if inner % mamba_head_dim:
        raise ValueError(f"init_vamba_from: mamba_head_dim {mamba_head_dim} does not divide {expand} x {config.width}")
    fields: dict[str, Any] = {
        f.name: getattr(config, f.name) for f in dataclasses.fields(QwenConfig) if hasattr(config, f.name)
    }
    fields |= {
        "pattern": (ATTENTION + MLP) * len(text),
        # the video takes no positions of the text, whose three axes are then one
        "rope_sections": (),
        "mamba_heads": inner // mamba_head_dim,
        "mamba_head_dim": mamba_head_dim,
        "ssm_groups": 1,
        "ssm_state": ssm_state,
        "name": f"vamba-{config.name}" if config.name else "vamba",
    }
    if config.vision is not None and config.vision.kind != "qwen":
        # a tower of one size takes its frames at that size
        fields |= {"shortest_edge": min(config.vision.image_size), "longest_edge": max(config.vision.image_size)}
    return VambaConfig(**fields)


def vamba_params(
    params: Mapping[str, Any],
    config: ModelConfig,
    target: VambaConfig,
    key: jax.Array,
    sharding_for: ShardingFor | None = None,
) -> dict[str, Any]:
    """Parameters of `target`, of those of the Transformer that it was made from.

    Args:
        params: the Transformer's, by `config`.
        config: of the Transformer.
        target: of `vamba_config`.
        key: of what is new.
        sharding_for: where a new parameter (its path, its shape) is put; None for the default device.
    """
    decoder, dtype = params["decoder"], params["embed"].dtype
    cross = {name: jnp.array(a, copy=True) for name, a in decoder["attention"].items() if name != "norm"}
    if target.alpha_balancing:
        cross["alpha"] = jnp.full((target.layers,), SHARE, jnp.float32)
    mixer_key, mlp_key = jax.random.split(key)
    mamba = _drawn(lambda k: init_mixers(target, k), mixer_key, "decoder/mamba/", dtype, sharding_for)
    new = {
        "attention": dict(decoder["attention"]),
        "cross": cross,
        "mlp": _mlps(decoder.get("mlp", {}), config, target, mlp_key, dtype),
        "mamba": mamba,
        "norm_f": decoder["norm_f"],
    }
    return {name: part for name, part in params.items() if name != "decoder"} | {"decoder": new}


def init_mixers(c: VambaConfig, key: jax.Array) -> dict[str, jax.Array]:
    """The video's Mamba-2 blocks as the published code draws them, stacked over layers; see `nn.mamba2.MambaStack`."""
    m, n = c.mixer, c.layers
    keys = jax.random.split(key, 6)

    def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    low, high = (math.log(end) for end in DT_RANGE)
    dt = jnp.maximum(jnp.exp(jax.random.uniform(keys[4], (n, m.mamba_heads), minval=low, maxval=high)), DT_LEAST)
    taps = 1 / math.sqrt(m.conv_kernel)
    p = {
        "norm": jnp.ones((n, c.width)),
        "in_proj": 0.02 * jax.random.normal(keys[0], (n, c.width, m.in_proj_width)),
        "conv_weight": uniform(keys[1], (n, m.conv_kernel, m.conv_width), taps),
        "A_log": jnp.log(jax.random.uniform(keys[3], (n, m.mamba_heads), minval=1.0, maxval=16.0)),
        "D": jnp.ones((n, m.mamba_heads)),
        # the inverse of softplus
        "dt_bias": dt + jnp.log(-jnp.expm1(-dt)),
        "gate_norm": jnp.ones((n, m.mamba_width)),
        "out_proj": uniform(keys[2], (n, m.mamba_width, c.width), 1 / math.sqrt(m.mamba_width * n)),
    }
    return p | ({"conv_bias": uniform(keys[5], (n, m.conv_width), taps)} if m.conv_bias else {})


def _drawn(
    draw: Callable[[jax.Array], dict[str, jax.Array]],
    key: jax.Array,
    path: str,
    dtype: Any,
    sharding_for: ShardingFor | None,
) -> dict[str, jax.Array]:
    """draw(key) in the model's dtype, but for the leaves that stay in float32, each where it belongs."""

    def cast(key: jax.Array) -> dict[str, jax.Array]:
        return {name: a if name in FLOAT32 else a.astype(dtype) for name, a in draw(key).items()}

    where = None
    if sharding_for is not None:
        where = {name: sharding_for(path + name, a.shape) for name, a in jax.eval_shape(cast, key).items()}
    return jax.jit(cast, out_shardings=where)(key)


def _mlps(
    stack: Mapping[str, jax.Array], config: ModelConfig, target: VambaConfig, key: jax.Array, dtype: Any
) -> dict[str, jax.Array]:
    """The MLPs of all layers, those of layers without any computing nothing."""
    has = [config.pattern[i + 1 : i + 2] == MLP for i, kind in enumerate(config.pattern) if kind == ATTENTION]
    if all(has):
        return dict(stack)
    names = ("up_proj", "gate_proj") if config.mlp_gated else ("up_proj",)
    shape = (target.width, target.mlp_width)
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    empty = {
        "norm": jnp.ones((len(has), target.width), dtype),
        "down_proj": jnp.zeros((len(has), *reversed(shape)), dtype),
    }
    empty |= {
        name: (jax.random.normal(k, (len(has), *shape)) / math.sqrt(target.width)).astype(dtype)
        for name, k in keys.items()
    }
    if config.mlp_bias and not config.mlp_gated:
        empty |= {
            "up_bias": jnp.zeros((len(has), shape[1]), dtype),
            "down_bias": jnp.zeros((len(has), shape[0]), dtype),
        }
    at = jnp.asarray([i for i, own in enumerate(has) if own], jnp.int32)
    return {name: a.at[at].set(stack[name]) if len(at) else a for name, a in empty.items()}
