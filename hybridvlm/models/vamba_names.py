"""The published config.json and tensor names of VAMBA, and their places in our config and parameters.

Text and tower have the names of Qwen2-VL; every layer has cross-attention, a Mamba-2 block on the video and a share beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridvlm.config import VambaConfig
from hybridvlm.models.names import CONV, LINEAR, Row, Shape, Table, Turn, jobs_of
from hybridvlm.models.qwen_names import (
    FUSED,
    PUBLISH,
    RENAMES,
    pixel_limits,
    text_fields,
    text_jobs,
    vision_fields,
    vision_jobs,
)

# alpha [1] <-> one number, brought into [0, 1]: the reference does so in every forward pass
_SHARE = Turn(lambda x, c: np.clip(x[0], 0, 1), lambda x, c: x[None], None)

_C, _M, _L = "decoder/cross/", "decoder/mamba/", "layers.{i}."
_X, _V = f"{_L}cross_attn.", f"{_L}vision_mixer."


def _queries(c: VambaConfig) -> int:
    return c.attention_heads * c.head_dim


def _keys(c: VambaConfig) -> int:
    return c.kv_heads * c.head_dim


LAYER: tuple[Row, ...] = (
    Row(f"{_C}alpha", f"{_L}alpha", lambda c: (1,), _SHARE, when=lambda c: c.alpha_balancing),
    Row(f"{_C}q_proj", f"{_X}q_proj.weight", lambda c: (_queries(c), c.width), LINEAR),
    Row(f"{_C}q_bias", f"{_X}q_proj.bias", lambda c: (_queries(c),)),
    Row(f"{_C}k_proj", f"{_X}k_proj.weight", lambda c: (_keys(c), c.width), LINEAR),
    Row(f"{_C}k_bias", f"{_X}k_proj.bias", lambda c: (_keys(c),)),
    Row(f"{_C}v_proj", f"{_X}v_proj.weight", lambda c: (_keys(c), c.width), LINEAR),
    Row(f"{_C}v_bias", f"{_X}v_proj.bias", lambda c: (_keys(c),)),
    Row(f"{_C}o_proj", f"{_X}o_proj.weight", lambda c: (c.width, _queries(c)), LINEAR),
    Row(f"{_M}norm", f"{_V}norm.weight", lambda c: (c.width,)),
    Row(f"{_M}in_proj", f"{_V}mixer.in_proj.weight", lambda c: (c.in_proj_width, c.width), LINEAR),
    Row(f"{_M}conv_weight", f"{_V}mixer.conv1d.weight", lambda c: (c.conv_width, 1, c.conv_kernel), CONV),
    Row(f"{_M}conv_bias", f"{_V}mixer.conv1d.bias", lambda c: (c.conv_width,), when=lambda c: c.conv_bias),
    Row(f"{_M}A_log", f"{_V}mixer.A_log", lambda c: (c.mamba_heads,)),
    Row(f"{_M}D", f"{_V}mixer.D", lambda c: (c.mamba_heads,)),
    Row(f"{_M}dt_bias", f"{_V}mixer.dt_bias", lambda c: (c.mamba_heads,)),
    Row(f"{_M}gate_norm", f"{_V}mixer.norm.weight", lambda c: (c.mamba_width,)),
    Row(f"{_M}out_proj", f"{_V}mixer.out_proj.weight", lambda c: (c.width, c.mamba_width), LINEAR),
)


def table(c: VambaConfig) -> Table:
    """Published names and our arrays; the last layer's Mamba block, which reaches no output, among them."""
    return Table(
        jobs=(*text_jobs(c, c.layers), *jobs_of(c, LAYER, range(c.layers)), *vision_jobs(c, c.generation)),
        renames=RENAMES,
        publish=PUBLISH[c.generation],
        fused=FUSED,
        idle=lambda name: name == "lm_head.weight" and c.tie_embeddings,
        who=f"the config {c.name}" if c.name else "the config",
    )


# What is computed and no other way: key -> values that mean it (a missing key means the first).
FIXED: dict[str, tuple[Any, ...]] = {
    "cross_attn_use_position_embeddings": (False,),
    "cross_attn_use_layer_norm": (False,),
}
FIXED_MIXER: dict[str, tuple[Any, ...]] = {
    "enable": (True,),
    "norm_type": ("rmsnorm",),
    "residual_in_fp32": (False,),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "D_has_hdim": (False,),
    "bias": (False,),
    "d_ssm": (None,),
    "activation": ("silu", "swish"),
}


def config_from_hf(raw: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> VambaConfig:
    """VambaConfig of a published config.json (parsed).

    shapes: the checkpoint's tensor shapes by name; given, they decide the size of the SSM state (the paper says 64, the code's
    default is 128) and of the vocabulary. ValueError names an option that is not supported.
    """
    mixer = raw.get("vision_mamba_mixer_config")
    if not isinstance(mixer, Mapping):
        raise ValueError(
            "config.json has no vision_mamba_mixer_config: it is not VAMBA's (Qwen2-VL has the same model_type)"
        )
    for where, fixed, prefix in ((raw, FIXED, ""), (mixer, FIXED_MIXER, "vision_mamba_mixer_config.")):
        for key, allowed in fixed.items():
            if where.get(key, allowed[0]) not in allowed:
                raise ValueError(
                    f"config.json: {prefix}{key} = {where[key]!r} is not supported; supported: {list(allowed)}"
                )
    low, high = (float(x) for x in mixer.get("dt_limit", (0.0, float("inf"))))
    if (low, high) != (0.0, float("inf")):
        raise ValueError(f"config.json: dt_limit {[low, high]} is not supported; supported: [0, Infinity]")
    inner = mixer.get("expand", 2) * raw["hidden_size"]
    head, groups = mixer.get("headdim", 64), mixer.get("ngroups", 1)
    state = mixer.get("d_state", 128)
    for stored, shape in (shapes or {}).items():
        if stored.endswith("layers.0.vision_mixer.mixer.conv1d.weight"):
            state = (shape[0] - inner) // (2 * groups)
    if mixer.get("hidden_dim", raw["hidden_size"]) != raw["hidden_size"] or inner % head:
        raise ValueError(
            f"config.json: the video's blocks must have the text's width {raw['hidden_size']} and whole heads, got "
            f"hidden_dim {mixer.get('hidden_dim')}, expand {mixer.get('expand')}, headdim {head}"
        )
    return VambaConfig(
        **text_fields(raw, shapes),
        attention_bias=True,
        mamba_heads=inner // head,
        mamba_head_dim=head,
        ssm_groups=groups,
        ssm_state=state,
        conv_kernel=mixer.get("d_conv", 4),
        conv_bias=mixer.get("conv_bias", True),
        image_pixels=pixel_limits(raw, 2)["image_pixels"],
        alpha_balancing=raw.get("use_alpha_balancing", True),
        vision=vision_fields(raw, 2) if raw.get("vision_config") else None,
        name=raw.get("_name_or_path") or "",
    )
