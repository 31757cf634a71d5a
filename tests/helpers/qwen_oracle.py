"""A slow Qwen decoder in float64 NumPy, token by token in its masks and layer by layer in its drops: what the tests compare with."""

import numpy as np

from hybridvlm.config import QwenConfig


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def axes(c: QwenConfig) -> list[int]:
    """The axis that each pair of channels follows."""
    if not c.rope_interleaved:
        return [axis for axis, count in enumerate(c.rope_sections) for _ in range(count)]
    pairs = sum(c.rope_sections)
    return [i % 3 if i < 3 * c.rope_sections[i % 3] else 0 for i in range(pairs)]


def turn(x: np.ndarray, position: np.ndarray, c: QwenConfig) -> np.ndarray:
    """x [L,H,P], position [L,3]."""
    half = x.shape[-1] // 2
    rate = c.rope_theta ** (-np.arange(half) / half)
    angle = (position[:, axes(c)] * rate)[:, None]
    left, right = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def forward(params, c: QwenConfig, x, position, planes=(), keep=None):
    """One example: x [L,D], position [L,3], planes: [L,D] to add after each of the first published layers.

    keep: {pattern index: places, among the tokens still there, that survive after that layer}.
    Returns the final hidden states of the survivors and, per attention layer, the softmax weights [H,L,L] at that layer.
    """
    p = {
        kind: {k: np.asarray(v, np.float64) for k, v in params["decoder"][kind].items()}
        for kind in ("attention", "mlp")
    }
    x, position, planes = np.asarray(x, np.float64), np.asarray(position), [np.asarray(a, np.float64) for a in planes]
    looked = {}
    group = c.attention_heads // c.kv_heads
    for layer, kind in enumerate(c.pattern):
        i = layer // 2
        if kind == "*":
            a = {k: v[i] for k, v in p["attention"].items()}
            h = norm(x, a["norm"], c.norm_eps)
            heads = {}
            for name, count in (("q", c.attention_heads), ("k", c.kv_heads), ("v", c.kv_heads)):
                y = h @ a[f"{name}_proj"] + (a[f"{name}_bias"] if c.attention_bias else 0)
                y = y.reshape(len(x), count, c.head_dim)
                if c.qk_norm and name != "v":
                    y = norm(y, a[f"{name}_norm"], c.norm_eps)
                heads[name] = y if name == "v" else turn(y, position, c)
            out = np.zeros((len(x), c.attention_heads, c.head_dim))
            weights = np.zeros((c.attention_heads, len(x), len(x)))
            for head in range(c.attention_heads):
                scores = heads["q"][:, head] @ heads["k"][:, head // group].T / np.sqrt(c.head_dim)
                scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
                scores = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights[head] = scores / scores.sum(axis=1, keepdims=True)
                out[:, head] = weights[head] @ heads["v"][:, head // group]
            looked[layer] = weights
            x = x + out.reshape(len(x), -1) @ a["o_proj"]
        else:
            m = {k: v[i] for k, v in p["mlp"].items()}
            h = norm(x, m["norm"], c.norm_eps)
            gate = h @ m["gate_proj"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up_proj"])) @ m["down_proj"]
            if i < len(planes):
                x = x + planes[i]
        if keep and layer in keep:
            x, position, planes = x[keep[layer]], position[keep[layer]], [a[keep[layer]] for a in planes]
    return norm(x, np.asarray(params["decoder"]["norm_f"], np.float64), c.norm_eps), looked
