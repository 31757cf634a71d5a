"""Biases of every projection that a published config may ask for: each is applied once, on one device and on several."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
from helpers.biased import biased_config, biased_params

from hybridvlm.checkpoints.folder import expected_shapes
from hybridvlm.models import nemotron_vl
from hybridvlm.models.weights import flatten
from hybridvlm.sharding import DEFAULT_RULES

ROOT = pathlib.Path(__file__).parents[2]


def test_every_bias_has_its_rule_and_its_published_name():
    config = biased_config()
    shapes = expected_shapes(config)
    biases = {name for name in shapes if name.endswith("_bias")}
    assert len(biases) == 15
    for name, shape in shapes.items():
        assert len(DEFAULT_RULES.spec(name, shape)) in (0, len(shape))

    published = {job[1].target for job in nemotron_vl.weight_map(dataclasses.replace(config, output_bias=False)).jobs}
    assert published == set(shapes) - {"decoder/attention/o_bias"}  # which Nemotron-H never has
    assert biases == {name for name in flatten(biased_params(config)) if name.endswith("_bias")}


@pytest.mark.slow
def test_biases_on_several_devices():
    """Two tensor-parallel devices give what one gives, in a process of its own."""
    code = """
import sys
sys.path.insert(0, "tests")
import jax, jax.numpy as jnp, numpy as np
from helpers.biased import biased_config, biased_params
from hybridvlm import sharding
from hybridvlm.nn import decoder
from hybridvlm.ops.tokens import Tokens
jax.config.update("jax_default_matmul_precision", "highest")
config = biased_config()
params = biased_params(config)
x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, config.width)), jnp.float32)
place = jnp.arange(8, dtype=jnp.int32)[None]
flag = jnp.zeros((1, 8), bool)
tokens = Tokens(x, place, jnp.ones_like(place), flag, flag, place, -jnp.ones_like(place))
one = decoder.prefill(params["decoder"], config, tokens).tokens.x
mesh = jax.make_mesh((2,), ("tensor",))
laid = sharding.shard_params(params, config, mesh)
two = sharding.prefill(laid["decoder"], config, tokens, mesh=mesh).tokens.x
scale = float(jnp.abs(one).max())
assert float(jnp.abs(one - two).max()) <= 1e-5 * scale, (float(jnp.abs(one - two).max()), scale)
bare = jax.tree_util.tree_map_with_path(lambda p, a: a * 0 if p[-1].key in ("in_bias", "out_bias", "o_bias") else a, params)
assert float(jnp.abs(one - decoder.prefill(bare["decoder"], config, tokens).tokens.x).max()) > 0.1
print("same")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | flags, capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "same\n", done.stderr[-2000:]
