"""The layer of experts against a loop over tokens and experts, with few tokens and many, grouped and latent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridvlm.config import ModelConfig
from hybridvlm.nn.moe import moe_layer, route
from hybridvlm.reduction.cost import moe_flops

CONFIG = ModelConfig(
    pattern="ME",
    width=16,
    vocab_size=8,
    mamba_heads=2,
    mamba_head_dim=8,
    ssm_groups=1,
    ssm_state=4,
    attention_heads=1,
    kv_heads=1,
    head_dim=8,
    mlp_width=1,
    experts=8,
    experts_per_token=3,
    expert_width=12,
    shared_width=20,
    router_scale=2.5,
)
VARIANTS = {
    "plain": CONFIG,
    "groups": dataclasses.replace(CONFIG, router_groups=4, router_top_groups=2),
    "latent": dataclasses.replace(CONFIG, expert_latent=6, router_norm=False),
}


def parameters(c, seed=0):
    rng = np.random.default_rng(seed)
    inside = c.expert_latent or c.width
    shapes = {
        "norm": (c.width,),
        "router": (c.width, c.experts),
        "router_bias": (c.experts,),
        "up": (c.experts, inside, c.expert_width),
        "down": (c.experts, c.expert_width, inside),
        "shared_up_proj": (c.width, c.shared_width),
        "shared_down_proj": (c.shared_width, c.width),
    }
    if c.expert_latent:
        shapes |= {"latent_in_proj": (c.width, inside), "latent_out_proj": (inside, c.width)}
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def oracle(p, c, x):
    """In float64, one token and one expert at a time."""
    p = {name: a.astype(np.float64) for name, a in p.items()}

    def mlp(h, up, down):
        return np.maximum(h @ up, 0) ** 2 @ down

    out = np.array(x, np.float64)
    for b, t in np.ndindex(x.shape[:2]):
        row = out[b, t].copy()
        h = row / np.sqrt((row**2).mean() + c.norm_eps) * p["norm"]
        scores = 1 / (1 + np.exp(-(h @ p["router"])))
        ranks = scores + p["router_bias"]
        groups = ranks.reshape(c.router_groups, -1)
        best = np.argsort(-np.sort(groups, axis=1)[:, -2:].sum(1))[: c.router_top_groups]
        allowed = np.repeat(np.isin(np.arange(c.router_groups), best), groups.shape[1])
        chosen = np.argsort(-np.where(allowed, ranks, -np.inf))[: c.experts_per_token]
        weights = scores[chosen] / (scores[chosen].sum() if c.router_norm else 1) * c.router_scale
        inside = h @ p["latent_in_proj"] if c.expert_latent else h
        mixed = sum(w * mlp(inside, p["up"][e], p["down"][e]) for w, e in zip(weights, chosen, strict=True))
        mixed = mixed @ p["latent_out_proj"] if c.expert_latent else mixed
        out[b, t] = row + mixed + mlp(h, p["shared_up_proj"], p["shared_down_proj"])
    return out


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 13)])
def test_against_a_loop(name, shape):
    """(1, 1) and (2, 1) read chosen experts alone, (2, 13) sorts rows by expert."""
    c, p = VARIANTS[name], parameters(VARIANTS[name])
    x = np.random.default_rng(1).normal(0, 1, (*shape, c.width)).astype(np.float32)
    got = jax.jit(lambda p, x: moe_layer(p, c, x))(p, x)
    want = oracle(p, c, x)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_gradients_of_both_ways_agree():
    """The same tokens one at a time and all at once."""
    c, p = CONFIG, parameters(CONFIG)
    x = np.random.default_rng(2).normal(0, 1, (1, 9, c.width)).astype(np.float32)

    def whole(p):
        return jnp.sum(jnp.sin(moe_layer(p, c, x)))

    def single(p):
        return sum(jnp.sum(jnp.sin(moe_layer(p, c, x[:, t : t + 1]))) for t in range(x.shape[1]))

    together, apart = jax.jit(jax.grad(whole))(p), jax.jit(jax.grad(single))(p)
    for name, want in apart.items():
        np.testing.assert_allclose(together[name], want, atol=1e-5 * max(1.0, float(np.abs(want).max())), err_msg=name)
    assert float(np.abs(apart["router"]).max()) > 0


def test_an_expert_that_nobody_takes():
    c = CONFIG
    p = parameters(c)
    p["router_bias"] = np.array([9, 9, 9, 0, 0, 0, 0, -9], np.float32)
    h = np.random.default_rng(3).normal(0, 1, (20, c.width)).astype(np.float32)
    chosen, weights = route(p, c, h)
    assert set(np.asarray(chosen).ravel()) == {0, 1, 2}
    np.testing.assert_allclose(np.sum(weights, axis=1), c.router_scale, rtol=1e-6)
    x = h[None]
    np.testing.assert_allclose(moe_layer(p, c, x), oracle(p, c, x), atol=2e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"experts": 0}, "experts must be"),
        ({"router_groups": 3}, "cut evenly"),
        ({"router_groups": 4, "router_top_groups": 1}, "more than can be chosen"),
    ],
)
def test_configs_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)


def test_flops():
    """Two operations per multiply-add: router, three experts of up and down, the shared one."""
    assert moe_flops(CONFIG, 10) == 10 * 2 * (16 * 8 + 3 * 2 * 16 * 12 + 2 * 16 * 20)
