"""A hybrid with every bias that there is, none of them 0."""

import dataclasses

import jax
import numpy as np

from hybridvlm.checkpoints import samples
from hybridvlm.models import nemotron_vl

BIASES = {"mamba_bias": True, "mlp_bias": True, "attention_bias": True, "output_bias": True, "dt_ceiling": 0.5}


def biased_config():

    raw = samples.raw_config("nemotron_h_moe") | {"moe_latent_size": 12}
    raw["layers_block_type"] = ["mamba", "moe", "attention", "mlp"]
    return dataclasses.replace(nemotron_vl.config_from_hf(raw), **BIASES)


def biased_params(config):
    rng = np.random.default_rng(0)
    params = jax.jit(lambda key: nemotron_vl.init(config, key))(jax.random.key(0))

    def moved(path, leaf):
        scale = 0.3 if "bias" in path[-1].key else 0.0
        return np.asarray(leaf) + scale * rng.standard_normal(leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(moved, params)
