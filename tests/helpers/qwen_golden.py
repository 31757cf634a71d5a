"""The stored references of the Qwen families."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from hybridvlm.checkpoints.hf import params_from_tensors
from hybridvlm.models import qwen_vl
from hybridvlm.models.family import family_of

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@functools.cache
def load(name):
    """config, parameters and io of a golden."""
    raw = json.loads((GOLDENS / name / "config.json").read_text())
    tensors = load_file(GOLDENS / name / "weights.safetensors")
    assert family_of(raw) is qwen_vl
    config = qwen_vl.config_from_hf(raw, {key: x.shape for key, x in tensors.items()})
    params = params_from_tensors(qwen_vl.weight_map(config), tensors)
    with np.load(GOLDENS / name / "io.npz") as io:
        return config, jax.tree.map(jnp.asarray, params), dict(io)
