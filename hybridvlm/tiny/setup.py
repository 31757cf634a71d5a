"""How the embedded model starts: aligned queries and keys, tied b and c, quiet residual branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import ModelConfig
from hybridvlm.models.nemotron_vl import Batch, HybridVLM
from hybridvlm.tiny import codes

QUIET = 0.05  # scale of every residual branch's last projection: the directions must stay readable at the start
SHARP = 2.0  # weight of the q and k norms: their product times sqrt(P) multiplies the cosine


def initial_params(config: ModelConfig, tower: dict, seed: int = 0) -> dict:
    """All parameters before training: `tower` from `train_tower`, the rest random but for what the module docstring names."""
    one = jnp.ones((1, 1), jnp.int32)
    batch = Batch(one, one, -one, one[0])
    pixels = jnp.zeros((1, 1, *config.vision.image_size, 3), jnp.uint8)
    params = HybridVLM(config).init(jax.random.key(seed), batch, pixels)["params"]
    params = jax.tree.map(np.array, params) | jax.tree.map(np.array, tower)
    params["embed"] = codes.word_embeddings(config.width)
    decoder = params["decoder"]
    attention, mamba = decoder["attention"], decoder["mamba"]
    for layer in range(config.count("*")):
        for head in range(config.attention_heads):
            columns = slice(head * config.head_dim, (head + 1) * config.head_dim)
            word, visual = codes.projections(config.width, config.head_dim, 100 + 10 * layer + head)
            attention["q_proj"][layer, :, columns] = word
            attention["k_proj"][layer, :, columns] = visual
    attention["q_norm"][:] = SHARP
    attention["k_norm"][:] = SHARP
    first = 2 * config.mamba_width
    size = config.ssm_groups * config.ssm_state
    for layer in range(config.count("M")):
        word, visual = codes.projections(config.width, size, 200 + layer)
        mamba["in_proj"][layer, :, first : first + size] = visual
        mamba["in_proj"][layer, :, first + size : first + 2 * size] = word
    mamba["conv_weight"][:, :, config.mamba_width :] = 0  # b and c start as this token's own, without its neighbours
    mamba["conv_weight"][:, -1, config.mamba_width :] = 1
    for name, stack in (("out_proj", mamba), ("o_proj", attention), ("down_proj", decoder["mlp"])):
        stack[name] *= QUIET
    return jax.tree.map(jnp.asarray, params)
