"""VAMBA's decoder in numpy float64, one sample, one token of the scan at a time: what the library's is measured against."""

import math

import numpy as np


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x, theta):
    """x [T,H,P], positions 0..T-1."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    left, right = x[..., :half], x[..., half:]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def heads(p, name, x, c):
    x = x @ p[f"{name}_proj"] + (p[f"{name}_bias"] if c.attention_bias else 0)
    x = x.reshape(len(x), -1, c.head_dim)
    return rms(x, p[f"{name}_norm"], c.norm_eps) if c.qk_norm and name != "v" else x


def attend(q, k, v, causal):
    """q [T,H,P], k and v [L,K,P] -> out [T,H*P], weights [H,T,L]."""
    k, v = (np.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
    score = np.einsum("thp,lhp->htl", q, k) / np.sqrt(q.shape[-1])
    if causal:
        score = np.where(np.tri(len(q), dtype=bool), score, -np.inf)
    weight = softmax(score)
    return np.einsum("htl,lhp->thp", weight, v).reshape(len(q), -1), weight


def mamba(p, c, v):
    """The video's block without its residual: v [M,D] -> [M,D]."""
    inner, n = c.mamba_width, c.ssm_state
    z, xbc, dt = np.split(rms(v, p["norm"], c.mamba_norm_eps) @ p["in_proj"], [inner, inner + c.conv_width], axis=-1)
    padded = np.concatenate([np.zeros((c.conv_kernel - 1, c.conv_width)), xbc])
    taps = [padded[j : j + len(v)] * p["conv_weight"][j] for j in range(c.conv_kernel)]
    x, b, cc = np.split(silu(sum(taps) + p["conv_bias"]), [inner, inner + n], axis=-1)
    x = x.reshape(len(v), c.mamba_heads, c.mamba_head_dim)
    dt = np.logaddexp(0, dt + p["dt_bias"])
    state, out = np.zeros((c.mamba_heads, c.mamba_head_dim, n)), []
    for t in range(len(v)):
        decay = np.exp(-dt[t] * np.exp(p["A_log"]))[:, None, None]
        state = decay * state + (dt[t][:, None] * x[t])[:, :, None] * b[t]
        out.append(state @ cc[t] + p["D"][:, None] * x[t])
    y = np.stack(out).reshape(len(v), inner)
    return rms(y * silu(z), p["gate_norm"], c.mamba_norm_eps) @ p["out_proj"]


def forward(params, c, x, v, query=None, keep=None):
    """Text x [T,D] and video v [M,D] through all layers: (final states [T,D], activations {name: array}, places kept [layers]).

    keep: {layer: tokens that enter it}; after the layer before, those stay that the rows of `query` [T] look at most.
    """
    acts, place, kept = {}, np.arange(len(v)), []
    for i in range(c.layers):
        own, cross, mlp, mixer = (
            {name: a[i] for name, a in params[part].items()} for part in ("attention", "cross", "mlp", "mamba")
        )
        kept.append(place)
        h = rms(x, own["norm"], c.norm_eps)
        q, k, values = (heads(own, name, h, c) for name in "qkv")
        q, k = (rope(a, c.rope_theta) if c.rope_theta else a for a in (q, k))
        sa = attend(q, k, values, True)[0] @ own["o_proj"]
        ca, weight = np.zeros_like(sa), None
        if len(v):
            ca, weight = attend(heads(cross, "q", h, c), *(heads(cross, n, v, c) for n in "kv"), False)
            ca = ca @ cross["o_proj"]
        x = x + cross["alpha"] * sa + (1 - cross["alpha"]) * ca
        h = rms(x, mlp["norm"], c.norm_eps)
        up = h @ mlp["up_proj"]
        out = (silu(h @ mlp["gate_proj"]) * up if c.mlp_gated else np.maximum(up, 0) ** 2) @ mlp["down_proj"]
        x = x + out
        acts |= {f"{i}.self_attn": sa, f"{i}.cross_attn": ca, f"{i}.mlp": out}
        if len(v):
            mixed = mamba(mixer, c, v)
            acts |= {f"{i}.mixer": mixed, f"{i}.vision_mixer": v + mixed}
            v = v + mixed
        if keep and i + 1 in keep:
            score = weight[:, query].mean((0, 1))
            stay = np.sort(np.argsort(-score, kind="stable")[: keep[i + 1]])
            v, place = v[stay], place[stay]
    return rms(x, params["norm_f"], c.norm_eps), acts, kept


def merger(p, vision, patches):
    """Qwen2-VL's: the tower's patches [F,n,D], those of a cell behind one another, -> visual tokens [F*n/4,W]."""
    centred = patches - patches.mean(-1, keepdims=True)
    x = centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + vision.norm_eps) * p["norm"] + p["norm_bias"]
    x = x.reshape(-1, vision.downsample**2 * patches.shape[-1]) @ p["fc1"] + p["fc1_bias"]
    normal = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * normal @ p["fc2"] + p["fc2_bias"]
