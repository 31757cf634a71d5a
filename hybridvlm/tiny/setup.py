"""How the embedded model starts: aligned queries and keys, values spelt as words, tied b and c, quiet residual branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import ModelConfig
from hybridvlm.models.nemotron_vl import Batch, HybridVLM
from hybridvlm.tiny import codes

QUIET = 0.05  # scale of the other branches' last projection: the directions must stay readable at the start
AMPLITUDE = (
    3.0  # length of a direction in the residual stream: about one per channel of a visual token, so that the first
)
# steps of Adam, which move every weight alike, do not drown it
READ = 0.7  # scale of what attention brings: directions in a normed token are about 4.3 long and come out about as they went in
SHARP = 2.0  # weight of the q and k norms: their product times sqrt(P) multiplies the cosine


def initial_params(config: ModelConfig, tower: dict, seed: int = 0) -> dict:
    """All parameters before training: `tower` from `train_tower`, the rest random but for what the module docstring names."""
    one = jnp.ones((1, 1), jnp.int32)
    batch = Batch(one, one, -one, one[0])
    pixels = jnp.zeros((1, 1, *config.vision.image_size, 3), jnp.uint8)
    params = HybridVLM(config).init(jax.random.key(seed), batch, pixels)["params"]
    params = jax.tree.map(np.array, params) | jax.tree.map(np.array, tower)
    params["projector"] = {name: AMPLITUDE * array for name, array in params["projector"].items()}
    words = codes.word_embeddings(config.width)
    params["embed"] = AMPLITUDE * words
    decoder, rng = params["decoder"], np.random.default_rng([codes.SEED, seed])
    attention, mamba = decoder["attention"], decoder["mamba"]
    for layer in range(config.count("*")):
        for head in range(config.attention_heads):
            columns = slice(head * config.head_dim, (head + 1) * config.head_dim)
            word, visual = codes.projections(config.width, config.head_dim, 100 + 10 * layer + head)
            attention["q_proj"][layer, :, columns] = word
            attention["k_proj"][layer, :, columns] = visual
        # what a word reads off a visual token arrives in the words' own space: o undoes v and turns by R
        value = np.linalg.qr(rng.normal(size=(config.width, config.attention_heads * config.head_dim)))[0]
        attention["v_proj"][layer] = value
        attention["o_proj"][layer] = READ * value.T @ codes.codes(config.width)["R"].T
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
    for name, stack in (("out_proj", mamba), ("down_proj", decoder["mlp"])):
        stack[name] *= QUIET
    params["lm_head"] = words.T.copy()
    return jax.tree.map(jnp.asarray, params)
