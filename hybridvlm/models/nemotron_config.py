"""ModelConfig and VisionConfig from the config.json of a published Nemotron-H, Mamba-2, C-RADIO or Nemotron VL checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybridvlm.config import MOE, ModelConfig, VisionConfig
from hybridvlm.models.names import Table
from hybridvlm.models.nemotron_names import FUSED, RENAMES

LAYER_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "mlp": "-",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
}
# width, layers, heads and MLP width behind the names by which published vision_configs call their tower
TOWERS = {
    "vit_base": (768, 12, 12, 3072),
    "vit_large": (1024, 24, 16, 4096),
    "vit_huge": (1280, 32, 16, 5120),
}
OMNI = ("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3")  # image and video keep their aspect, frames go in pairs

# What the decoder computes and no other way: key -> values that mean it (a missing key means the first).
FIXED: dict[str, tuple[Any, ...]] = {
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu", "swish"),
    "hidden_act": ("silu", "swish"),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
}
FIXED_VISION: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "use_swiglu_ffn": (False,),
}


def _check(raw: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(f"config.json: {key} = {raw[key]!r} is not supported; supported: {list(allowed)}")


def _number(value: Any) -> float:
    """A float as transformers writes it: infinity is {"__float__": "Infinity"} there."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _pattern(text: Mapping[str, Any]) -> str:
    if text.get("hybrid_override_pattern"):
        return text["hybrid_override_pattern"]
    kinds = text.get("layers_block_type") or ["mamba"] * text["num_hidden_layers"]
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f"config.json: layers_block_type holds {unknown}; supported: {sorted(LAYER_TYPES)}")
    return "".join(LAYER_TYPES[kind] for kind in kinds)


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _by_name(shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]]:
    """Shapes under the names that the table uses."""
    names = Table((), RENAMES, fused=FUSED)
    return {name: shape for stored, shape in (shapes or {}).items() for name in names.canonical(stored)}


def config_from_hf(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelConfig:
    """ModelConfig of a Nemotron-H, Mamba-2 or Nemotron VL `config.json` (already parsed).

    shapes: the checkpoint's tensor shapes by name. Given, they decide the sizes that published configs leave out or round:
    vocabulary rows, prefix tokens, the position table. ValueError names an option that the decoder lacks.
    """
    by_name = _by_name(shapes)
    text = raw.get("llm_config") or raw.get("text_config") or raw
    _check(text, FIXED)
    low, high = (_number(v) for v in text.get("time_step_limit", (0.0, math.inf)))
    if not math.isinf(high):
        raise ValueError(
            f"config.json: time_step_limit with an upper end ({high}) is not supported; supported: infinity"
        )
    embed = by_name.get("backbone.embeddings.weight", (text["vocab_size"],))
    pattern = _pattern(text)
    common = {
        "width": text["hidden_size"],
        "vocab_size": embed[0],
        "ssm_groups": text["n_groups"],
        "conv_kernel": text["conv_kernel"],
        "conv_bias": text.get("use_conv_bias", True),
        "chunk_size": text.get("chunk_size", 128),
        "dt_floor": low,
        "norm_eps": text.get("layer_norm_epsilon", 1e-5),
        "tie_embeddings": text.get("tie_word_embeddings", False),
        "eos_ids": _ids(text.get("eos_token_id")),
        "pad_id": text.get("pad_token_id") or 0,
        "pattern": pattern,
    }
    if text.get("model_type") == "mamba2":
        # Mamba-2 alone: no attention or MLP layer, so their sizes say nothing
        return ModelConfig(
            mamba_heads=text["num_heads"],
            mamba_head_dim=text["head_dim"],
            ssm_state=text["state_size"],
            attention_heads=1,
            kv_heads=1,
            head_dim=1,
            mlp_width=1,
            **common,
        )
    if MOE in pattern:
        common |= {
            "experts": text["n_routed_experts"],
            "experts_per_token": text["num_experts_per_tok"],
            "expert_width": text["moe_intermediate_size"],
            "shared_width": text["moe_shared_expert_intermediate_size"] * text.get("n_shared_experts", 1),
            "expert_latent": text.get("moe_latent_size") or 0,
            "router_groups": text.get("n_group", 1),
            "router_top_groups": text.get("topk_group", 1),
            "router_norm": text.get("norm_topk_prob", True),
            "router_scale": text.get("routed_scaling_factor", 1.0),
        }
    if text.get("num_nextn_predict_layers"):
        raise ValueError("config.json: num_nextn_predict_layers: layers that predict further tokens are not supported")
    return ModelConfig(
        mamba_heads=text["mamba_num_heads"],
        mamba_head_dim=text["mamba_head_dim"],
        ssm_state=text["ssm_state_size"],
        attention_heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        mlp_width=text.get("intermediate_size") or 1,
        attention_bias=text.get("attention_bias", False),
        vision=vision_from_hf(raw, shapes) if "vision_config" in raw else None,
        **common,
    )


def vision_from_hf(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> VisionConfig:
    """VisionConfig of a RADIO `config.json`, or of the `vision_config` and the projector's fields of a VLM's.

    shapes: the checkpoint's tensor shapes by name; they decide what published configs leave out.
    """
    by_name = _by_name(shapes)
    vision = raw.get("vision_config", raw)
    _check(vision, FIXED_VISION)
    sizes = _tower_sizes(vision)
    width, patch = sizes["hidden_size"], vision.get("patch_size") or raw["patch_size"]
    prefix = by_name.get(
        "patch_generator.cls_token.token", (vision.get("num_cls_tokens", 3) + vision.get("num_registers", 7),)
    )
    table = by_name.get("patch_generator.pos_embed", (1, (vision.get("max_img_size", 2048) // patch) ** 2))
    fc1 = by_name.get("blocks.0.mlp.fc1.weight", (int(width * vision.get("mlp_ratio", 4.0)),))
    side = raw.get("force_image_size") or vision.get("image_size") or 512
    mean = vision.get("norm_mean", raw.get("norm_mean", VisionConfig.pixel_mean))
    std = vision.get("norm_std", raw.get("norm_std", VisionConfig.pixel_std))
    if raw.get("ps_version", "v2") != "v2":
        raise ValueError(f"config.json: ps_version {raw['ps_version']!r} is not supported; supported: 'v2'")
    omni = {raw.get("model_type"), *(raw.get("architectures") or ())} & set(OMNI)
    return VisionConfig(
        kind="radio",
        image_size=(side, side),
        patch_size=patch,
        width=width,
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        mlp_width=fc1[0],
        position_rows=math.isqrt(table[1]),
        prefix_tokens=prefix[0],
        temporal_patch=raw.get("video_temporal_patch_size") or vision.get("video_temporal_patch_size") or 1,
        max_tiles=0 if omni else raw.get("max_num_tiles", 12),
        image_patches=(raw.get("min_num_patches", 1024), raw.get("max_num_patches", 13312)) if omni else (0, 0),
        video_patches=raw.get("video_target_num_patches", 1024) if omni else 0,
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        downsample=round(1 / raw.get("downsample_ratio", 0.5)),
        projector_width=raw.get("projector_hidden_size", VisionConfig.projector_width),
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
    )


def _tower_sizes(vision: Mapping[str, Any]) -> Mapping[str, int]:
    """hidden_size, num_hidden_layers and num_attention_heads: as written, or by the tower's name in `args.model`."""
    if "hidden_size" in vision:
        return vision
    name = str((vision.get("args") or {}).get("model", ""))
    for tower, (width, layers, heads, _) in TOWERS.items():
        if name.startswith(tower):
            return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    raise ValueError(
        f"config.json: vision_config has no hidden_size and its tower {name!r} is unknown; known: {sorted(TOWERS)}"
    )
