"""Parts of a Transformer layer that stand alone, as Qwen2-VL and Qwen3-VL have them: heads with M-RoPE, and SwiGLU.

They take hidden states that are already normed and give back what is to be added to the residual stream, so that a layer with one
branch (hybridvlm/nn/attention.py) and one with several (VAMBA) are wired from the same parts. `c` is a ModelConfig; one layer's
parameters `p` are those of AttentionStack and MlpStack, cut at that layer.
"""

from __future__ import annotations

import jax
from flax import linen as nn

from hybridvlm.config import ModelConfig
from hybridvlm.nn.linear import linear
from hybridvlm.ops.norms import rms_norm
from hybridvlm.ops.rope import apply_rope

Params = dict[str, jax.Array]


def project_heads(
    p: Params, c: ModelConfig, h: jax.Array, position: jax.Array | None = None, names: str = "qkv", *, rope: bool = True
) -> tuple[jax.Array, ...]:
    """h [B,L,D], normed -> q [B,L,H,P], k and v [B,L,K,P], those named in `names` in that order.

    With c.attention_bias the biases are added, with c.qk_norm q and k are normed per head, and with c.rope_theta both are turned
    by position [B,L] or [B,L,3], unless `rope` is False (cross-attention). ValueError if a position is needed and missing.
    """
    heads = []
    for name in names:
        x = linear(h, p[f"{name}_proj"])
        if c.attention_bias:
            x = x + p[f"{name}_bias"].astype(h.dtype)
        x = x.reshape(*h.shape[:2], c.attention_heads if name == "q" else c.kv_heads, c.head_dim)
        if name != "v":
            if c.qk_norm:
                x = rms_norm(x, p[f"{name}_norm"], c.norm_eps)
            if rope and c.rope_theta:
                if position is None:
                    raise ValueError(
                        f"position: a model with rotary embedding (rope_theta {c.rope_theta:g}) needs the tokens' "
                        "positions [B,L] or [B,L,3], got None"
                    )
                x = apply_rope(x, position, c.rope_theta, sections=c.rope_sections, interleaved=c.rope_interleaved)
        heads.append(x)
    return tuple(heads)


def join_heads(p: Params, out: jax.Array) -> jax.Array:
    """out [B,L,H,P] or [B,L,H*P] -> [B,L,D] through o_proj."""
    return linear(out.reshape(*out.shape[:2], -1), p["o_proj"])


def swiglu(p: Params, h: jax.Array) -> jax.Array:
    """h [B,L,D], normed -> down(silu(gate(h)) * up(h)) [B,L,D]."""
    return linear(nn.silu(linear(h, p["gate_proj"])) * linear(h, p["up_proj"]), p["down_proj"])
