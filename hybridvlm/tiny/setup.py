"""How the embedded model starts: aligned queries and keys, values spelt as words, tied b and c, quiet residual branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.config import ATTENTION, MAMBA, ModelConfig
from hybridvlm.config_files import load_model_config
from hybridvlm.models.nemotron_vl.model import Batch, HybridVLM
from hybridvlm.tiny import codes

QUIET = 0.05  # scale of the other branches' last projection: the directions must stay readable at the start
AMPLITUDE = (
    3.0  # length of a direction in the residual stream: about one per channel of a visual token, so that the first
)
# steps of Adam, which move every weight alike, do not drown it
READ = 0.7  # scale of what attention brings: directions in a normed token are about 4.3 long and come out about as they went in
WORDS = 10.0  # weight of being a word, relative to a random projection of unit variance, in `words_see_words`
MIX = 0.3  # scale of what a question's words bring one another there
SHARP = 2.0  # weight of the q and k norms: their product times sqrt(P) multiplies the cosine


def reading_layers(config: ModelConfig) -> set[int]:
    """Which attention layers, counted among themselves, read at full strength from the start: all of a hybrid's; of the Transformer
    twin those that stand where the hybrid has attention. The others start as quiet as Mamba layers do."""
    if config.count(MAMBA):
        return set(range(config.count(ATTENTION)))
    layers = [layer for layer, kind in enumerate(load_model_config("tiny").pattern) if kind == ATTENTION]
    return {config.kind_index(layer)[1] for layer in layers if layer < len(config.pattern)}


def words_see_words(config: ModelConfig, rng: np.random.Generator) -> np.ndarray:
    """A projection [D,P], of queries and keys alike, under which the words of a question find one another among the video: what a Mamba
    layer's convolution and decay bring along, attention without positions would have to discover among a thousand tokens."""
    mixed = rng.normal(size=(config.width, config.head_dim)) / np.sqrt(config.width)
    to = rng.normal(size=config.head_dim)
    return mixed + WORDS * np.outer(codes.codes(config.width)["word"], to / np.linalg.norm(to))


def initial_params(config: ModelConfig, tower: dict, seed: int = 0) -> dict:
    """All parameters before training: `tower` from `train_tower`, the rest random but for what the module docstring names."""
    one = jnp.ones((1, 1), jnp.int32)
    batch = Batch(one, one, -one, one[0])
    pixels = jnp.zeros((1, 1, *config.tower.image_size, 3), jnp.uint8)
    params = HybridVLM(config).init(jax.random.key(seed), batch, pixels)["params"]
    params = jax.tree.map(np.array, params) | jax.tree.map(np.array, tower)
    params["projector"] = {name: AMPLITUDE * array for name, array in params["projector"].items()}
    words = codes.word_embeddings(config.width)
    params["embed"] = AMPLITUDE * words
    if not config.count(MAMBA):
        params["embed"] += AMPLITUDE * codes.codes(config.width)["word"]
    decoder, rng = params["decoder"], np.random.default_rng([codes.SEED, seed])
    attention, mamba = decoder["attention"], decoder.get("mamba", {})
    reads = reading_layers(config)
    for layer in range(config.count("*")):
        for head in range(config.attention_heads):
            columns = slice(head * config.head_dim, (head + 1) * config.head_dim)
            word, visual = codes.projections(config.width, config.head_dim, 100 + 10 * layer + head)
            attention["q_proj"][layer, :, columns] = word
            attention["k_proj"][layer, :, columns] = visual
        # what a word reads off a visual token arrives in the words' own space: o undoes v and turns by R
        value = np.linalg.qr(rng.normal(size=(config.width, config.attention_heads * config.head_dim)))[0]
        attention["v_proj"][layer] = value
        strength = READ if layer in reads else QUIET
        attention["o_proj"][layer] = strength * value.T @ codes.codes(config.width)["R"].T
        if layer not in reads:
            own = slice(config.head_dim)
            both = words_see_words(config, rng)
            attention["q_proj"][layer, :, own] = attention["k_proj"][layer, :, own] = both
            attention["o_proj"][layer, own] = MIX * value.T[own]
    attention["q_norm"][:] = SHARP
    attention["k_norm"][:] = SHARP
    first = 2 * config.mamba_width
    size = config.ssm_groups * config.ssm_state
    for layer in range(config.count("M")):
        word, visual = codes.projections(config.width, size, 200 + layer)
        mamba["in_proj"][layer, :, first : first + size] = visual
        mamba["in_proj"][layer, :, first + size : first + 2 * size] = word
    if mamba:
        # b and c start as this token's own, without its neighbours
        mamba["conv_weight"][:, :, config.mamba_width :] = 0
        mamba["conv_weight"][:, -1, config.mamba_width :] = 1
        mamba["out_proj"] *= QUIET
    decoder["mlp"]["down_proj"] *= QUIET
    params["lm_head"] = words.T.copy()
    return jax.tree.map(jnp.asarray, params)
