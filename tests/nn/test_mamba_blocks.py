"""A Mamba layer that walks through its row in blocks gives what the whole row gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import trees_close

from hybridvlm.config import ModelConfig
from hybridvlm.nn import mamba2
from hybridvlm.nn.caches import empty_caches

CONFIG = ModelConfig(
    pattern="M",
    width=12,
    vocab_size=8,
    mamba_heads=4,
    mamba_head_dim=4,
    ssm_groups=2,
    ssm_state=6,
    attention_heads=1,
    kv_heads=1,
    head_dim=4,
    mlp_width=4,
    chunk_size=16,
)
LENGTH = 150


@pytest.fixture
def layer():
    tree = jax.jit(mamba2.MambaStack(CONFIG).init)(jax.random.key(0))["params"]
    keys = iter(jax.random.split(jax.random.key(1), len(tree)))
    p = {name: a[0] + 0.1 * jax.random.normal(next(keys), a.shape[1:]) for name, a in tree.items()}
    return p, jax.random.normal(jax.random.key(2), (2, LENGTH, CONFIG.width))


def both(monkeypatch, function, *args):
    """function(*args) for the row in one piece and in blocks."""
    out = []
    for budget in (1 << 40, 1):
        monkeypatch.setattr(mamba2, "_BLOCK_BYTES", budget)
        with jax.default_matmul_precision("highest"):
            out.append(jax.jit(lambda *a: function(*a))(*args))  # a new function: nothing is taken from jit's memory
    return out


@pytest.mark.parametrize("past", [False, True])
def test_blocks_equal_the_whole(layer, monkeypatch, past):
    p, x = layer
    segment = jnp.asarray(np.repeat([[1, 2, 0], [3, 0, 0]], 50, axis=1), jnp.int32)
    cache = None
    if past:
        start = empty_caches(CONFIG, 2, 0)[0]
        cache = jax.tree.map(lambda a: jax.random.normal(jax.random.key(3), a.shape), (start.conv, start.ssm))
        cache = dataclasses.replace(start, conv=cache[0], ssm=cache[1], segment=jnp.asarray([1, 2], jnp.int32))
    run = lambda p, x, segment: mamba2.mamba_layer(p, CONFIG, x, segment, cache)  # noqa: E731
    assert mamba2._blocks(CONFIG, 2, LENGTH) == (1, LENGTH)
    whole, blocks = both(monkeypatch, run, p, x, segment)
    assert mamba2._blocks(CONFIG, 2, LENGTH)[0] >= 2
    trees_close(blocks, whole)


def test_blocks_have_the_gradient_of_the_whole(layer, monkeypatch):
    p, x = layer
    segment = jnp.ones(x.shape[:2], jnp.int32)

    def loss(p, x):
        out, cache, aux = mamba2.mamba_layer(p, CONFIG, x, segment)
        return jnp.sum(jnp.sin(out)) + jnp.sum(cache.ssm**2) + jnp.sum(aux.b * aux.c)

    whole, blocks = both(monkeypatch, jax.grad(loss, argnums=(0, 1)), p, x)
    trees_close(blocks, whole)


@pytest.mark.parametrize("length", [1000, 2802, 4918, 6776, 7972, 8320, 100_003])
def test_few_places_are_added_to_fill_the_blocks(length):
    config = dataclasses.replace(CONFIG, mamba_heads=24, mamba_head_dim=64, ssm_state=128)
    blocks, size = mamba2._blocks(config, 1, length)
    assert 0 <= blocks * size - length <= 0.02 * length
    assert blocks == 1 or 4 * (size // 3) * config.in_proj_width <= mamba2._BLOCK_BYTES
