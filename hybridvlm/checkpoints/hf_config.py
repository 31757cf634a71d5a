"""ModelConfig and VisionConfig from the config.json of a published checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybridvlm.checkpoints.names import canonical
from hybridvlm.config import ModelConfig, VisionConfig

LAYER_TYPES = {"linear_attention": "M", "mamba": "M", "mlp": "-", "full_attention": "*", "attention": "*"}

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


def _check(hf: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, allowed in fixed.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise ValueError(f"config.json: {key} = {hf[key]!r} is not supported; supported: {list(allowed)}")


def _number(value: Any) -> float:
    """A float as transformers writes it: infinity is {"__float__": "Infinity"} there."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _pattern(hf: Mapping[str, Any]) -> str:
    if "hybrid_override_pattern" in hf:
        return hf["hybrid_override_pattern"]
    kinds = hf.get("layers_block_type") or ["mamba"] * hf["num_hidden_layers"]
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f"config.json: layers_block_type holds {unknown}; supported: {sorted(LAYER_TYPES)}")
    return "".join(LAYER_TYPES[kind] for kind in kinds)


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def config_from_hf(hf: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> ModelConfig:
    """ModelConfig of a Nemotron-H, Mamba-2 or Nemotron VL `config.json` (already parsed).

    shapes: the checkpoint's tensor shapes by name (TensorFolder.shapes()). Given, they decide the sizes that published
    configs leave out or round: vocabulary rows, prefix tokens, the position table. ValueError names an option that the
    decoder lacks.
    """
    by_name = {name: shape for stored, shape in (shapes or {}).items() for name in canonical(stored)}
    text = hf.get("llm_config") or hf.get("text_config") or hf
    _check(text, FIXED)
    low, high = (_number(v) for v in text.get("time_step_limit", (0.0, math.inf)))
    if not math.isinf(high):
        raise ValueError(
            f"config.json: time_step_limit with an upper end ({high}) is not supported; supported: infinity"
        )
    embed = by_name.get("backbone.embeddings.weight", (text["vocab_size"],))
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
        "pattern": _pattern(text),
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
    return ModelConfig(
        mamba_heads=text["mamba_num_heads"],
        mamba_head_dim=text["mamba_head_dim"],
        ssm_state=text["ssm_state_size"],
        attention_heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        mlp_width=text["intermediate_size"],
        attention_bias=text.get("attention_bias", False),
        vision=vision_from_hf(hf, by_name) if "vision_config" in hf else None,
        **common,
    )


def vision_from_hf(hf: Mapping[str, Any], by_name: Mapping[str, tuple[int, ...]] | None = None) -> VisionConfig:
    """VisionConfig of a RADIO `config.json`, or of the `vision_config` and the projector's fields of a VLM's.

    by_name: tensor shapes under the names of `names.canonical`; they are needed for what published configs leave out.
    """
    shapes = by_name or {}
    vision = hf.get("vision_config", hf)
    _check(vision, FIXED_VISION)
    width, patch = vision["hidden_size"], vision["patch_size"]
    prefix = shapes.get(
        "patch_generator.cls_token.token", (vision.get("num_cls_tokens", 3) + vision.get("num_registers", 7),)
    )
    table = shapes.get("patch_generator.pos_embed", (1, (vision.get("max_img_size", 2048) // patch) ** 2))
    fc1 = shapes.get("blocks.0.mlp.fc1.weight", (int(width * vision.get("mlp_ratio", 4.0)),))
    side = hf.get("force_image_size") or vision.get("image_size") or 512
    mean = vision.get("norm_mean", hf.get("norm_mean", VisionConfig.pixel_mean))
    std = vision.get("norm_std", hf.get("norm_std", VisionConfig.pixel_std))
    if hf.get("ps_version", "v2") != "v2":
        raise ValueError(f"config.json: ps_version {hf['ps_version']!r} is not supported; supported: 'v2'")
    return VisionConfig(
        kind="radio",
        image_size=(side, side),
        patch_size=patch,
        width=width,
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        mlp_width=fc1[0],
        position_rows=math.isqrt(table[1]),
        prefix_tokens=prefix[0],
        temporal_patch=vision.get("video_temporal_patch_size") or 1,
        norm_eps=vision.get("layer_norm_eps", 1e-6),
        downsample=round(1 / hf.get("downsample_ratio", 0.5)),
        projector_width=hf.get("projector_hidden_size", VisionConfig.projector_width),
        pixel_mean=tuple(mean),
        pixel_std=tuple(std),
    )
