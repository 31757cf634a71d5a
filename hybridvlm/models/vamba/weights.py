"""The published config.json and tensor names of VAMBA, and their positions in our config and parameters.

Text and tower have the names of Qwen2-VL; every layer has cross-attention, a Mamba-2 block on the video and a share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridvlm.config import VambaConfig
from hybridvlm.models import config_defaults as defaults
from hybridvlm.models.config_fields import Fields, section, shown
from hybridvlm.models.qwen_vl.config import pixel_limits, text_fields, vision_fields
from hybridvlm.models.qwen_vl.weights import (
    FUSED,
    PUBLISH,
    RENAMES,
    text_jobs,
    vision_jobs,
)
from hybridvlm.models.weights import CONV, LINEAR, Shape, Transform, WeightMap, WeightSpec, stacked_specs

# alpha [1] <-> one number, brought into [0, 1]: the reference does so in every forward pass
_SHARE = Transform(lambda x, c: np.clip(x[0], 0, 1), lambda x, c: x[None], None)

_C, _M, _L = "decoder/cross/", "decoder/mamba/", "layers.{i}."
_X, _V = f"{_L}cross_attn.", f"{_L}vision_mixer."


def _queries(c: VambaConfig) -> int:
    return c.attention_heads * c.head_dim


def _keys(c: VambaConfig) -> int:
    return c.kv_heads * c.head_dim


LAYER: tuple[WeightSpec, ...] = (
    WeightSpec(f"{_C}alpha", f"{_L}alpha", lambda c: (1,), _SHARE, when=lambda c: c.alpha_balancing),
    WeightSpec(f"{_C}q_proj", f"{_X}q_proj.weight", lambda c: (_queries(c), c.width), LINEAR),
    WeightSpec(f"{_C}q_bias", f"{_X}q_proj.bias", lambda c: (_queries(c),)),
    WeightSpec(f"{_C}k_proj", f"{_X}k_proj.weight", lambda c: (_keys(c), c.width), LINEAR),
    WeightSpec(f"{_C}k_bias", f"{_X}k_proj.bias", lambda c: (_keys(c),)),
    WeightSpec(f"{_C}v_proj", f"{_X}v_proj.weight", lambda c: (_keys(c), c.width), LINEAR),
    WeightSpec(f"{_C}v_bias", f"{_X}v_proj.bias", lambda c: (_keys(c),)),
    WeightSpec(f"{_C}o_proj", f"{_X}o_proj.weight", lambda c: (c.width, _queries(c)), LINEAR),
    WeightSpec(f"{_M}norm", f"{_V}norm.weight", lambda c: (c.width,)),
    WeightSpec(f"{_M}in_proj", f"{_V}mixer.in_proj.weight", lambda c: (c.in_proj_width, c.width), LINEAR),
    WeightSpec(f"{_M}conv_weight", f"{_V}mixer.conv1d.weight", lambda c: (c.conv_width, 1, c.conv_kernel), CONV),
    WeightSpec(f"{_M}conv_bias", f"{_V}mixer.conv1d.bias", lambda c: (c.conv_width,), when=lambda c: c.conv_bias),
    WeightSpec(f"{_M}A_log", f"{_V}mixer.A_log", lambda c: (c.mamba_heads,)),
    WeightSpec(f"{_M}D", f"{_V}mixer.D", lambda c: (c.mamba_heads,)),
    WeightSpec(f"{_M}dt_bias", f"{_V}mixer.dt_bias", lambda c: (c.mamba_heads,)),
    WeightSpec(f"{_M}gate_norm", f"{_V}mixer.norm.weight", lambda c: (c.mamba_width,)),
    WeightSpec(f"{_M}out_proj", f"{_V}mixer.out_proj.weight", lambda c: (c.width, c.mamba_width), LINEAR),
)


def weight_map(config: VambaConfig) -> WeightMap:
    """Published names and our arrays; the last layer's Mamba block, which reaches no output, among them."""
    return WeightMap(
        jobs=(
            *text_jobs(config, config.layers),
            *stacked_specs(config, LAYER, range(config.layers)),
            *vision_jobs(config, config.generation),
        ),
        renames=RENAMES,
        publish=PUBLISH[config.generation],
        fused=FUSED,
        tied=("embed_tokens.weight", "lm_head.weight") if config.tie_embeddings else (),
        who=f"the config {config.name}" if config.name else "the config",
    )


# What is computed and no other way, and what else means it.
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
    declared = section(raw, "vision_mamba_mixer_config")
    if declared is None:
        raise ValueError(
            "config.json has no vision_mamba_mixer_config: it is not VAMBA's (Qwen2-VL has the same model_type)"
        )
    text, own = text_fields(raw, shapes), Fields({"": raw}, defaults.VAMBA)
    width = text["width"]
    mixer = Fields({"vision_mamba_mixer_config.": declared}, defaults.VAMBA_MIXER | {"hidden_dim": width})
    for fields, fixed in ((own, FIXED), (mixer, FIXED_MIXER)):
        for key, allowed in fixed.items():
            fields.only(key, *allowed)
    if mixer.numbers("dt_limit", 2) != (0.0, math.inf):
        given = shown(mixer.get("dt_limit")[1])
        raise ValueError(f"config.json: dt_limit {given} is not supported; supported: [0, Infinity]")
    head, groups, expand = mixer.count("headdim"), mixer.count("ngroups"), mixer.count("expand", 1, 64)
    inner, state = expand * width, mixer.count("d_state")
    for stored, shape in (shapes or {}).items():
        if stored.endswith("layers.0.vision_mixer.mixer.conv1d.weight") and shape:
            state = (shape[0] - inner) // (2 * groups)
    if mixer.count("hidden_dim") != width or inner % head:
        raise ValueError(
            f"config.json: the video's blocks must have the text's width {width} and whole heads, got "
            f"hidden_dim {mixer.count('hidden_dim')}, expand {expand}, headdim {head}"
        )
    return VambaConfig(
        **text,
        attention_bias=True,
        mamba_heads=inner // head,
        mamba_head_dim=head,
        ssm_groups=groups,
        ssm_state=state,
        conv_kernel=mixer.count("d_conv", 1, 64),
        conv_bias=mixer.flag("conv_bias"),
        image_pixels=pixel_limits(raw, 2)["image_pixels"],
        alpha_balancing=own.flag("use_alpha_balancing"),
        vision=vision_fields(raw, 2, shapes),
        name=raw["_name_or_path"] if isinstance(raw.get("_name_or_path"), str) else "",
    )
