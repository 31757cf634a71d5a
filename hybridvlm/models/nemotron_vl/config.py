"""ModelConfig and VisionConfig from the config.json of a published Nemotron-H, Mamba-2, C-RADIO or Nemotron VL checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hybridvlm.config import MLP, MOE, ModelConfig, VisionConfig
from hybridvlm.models import config_defaults as defaults
from hybridvlm.models.config_fields import MOST_LAYERS, MOST_ROWS, Fields, section, shown, split_nested, tied
from hybridvlm.models.nemotron_vl.weights import FUSED, RENAMES
from hybridvlm.models.weights import WeightMap

LAYER_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "mlp": "-",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
}
# width, layers, heads and MLP width after the names by which published vision_configs call their tower
TOWERS = {
    "vit_base": (768, 12, 12, 3072),
    "vit_large": (1024, 24, 16, 4096),
    "vit_huge": (1280, 32, 16, 5120),
}
# names that speak of one thing
_ONE: list[tuple[str, ...]] = [
    (name, *names) for name, names in defaults.NEMOTRON_H_ALIASES.items() if name != "layers_block_type"
]
_ONE.append(("layers_block_type", "layer_types", "hybrid_override_pattern"))
OMNI = ("nemotron_h_omni", "NemotronH_Omni_Reasoning_V3")  # image and video keep their aspect, frames go in pairs

Shapes = Mapping[str, tuple[int, ...]]


def _pattern(text: Fields) -> str:
    """One letter per layer; a list of kinds counts before a pattern, as in transformers."""
    label, kinds = text.get("layers_block_type")
    if kinds is None:
        if found := text.find("hybrid_override_pattern"):
            pattern = text.word("hybrid_override_pattern")
            if not 0 < len(pattern) <= MOST_LAYERS or set(pattern) - set(LAYER_TYPES.values()):
                letters = sorted(set(LAYER_TYPES.values()))
                raise ValueError(
                    f"config.json: {found[0]} must hold 1 to {MOST_LAYERS} of {letters}, got {shown(pattern)}"
                )
            return pattern
        kinds = list(defaults.LAYERS)
    if not isinstance(kinds, list) or not 0 < len(kinds) <= MOST_LAYERS or not all(isinstance(k, str) for k in kinds):
        raise ValueError(f"config.json: {label} must be a list of 1 to {MOST_LAYERS} words, got {shown(kinds)}")
    unknown = sorted(set(kinds) - set(LAYER_TYPES))
    if unknown:
        raise ValueError(f"config.json: {label} holds {shown(unknown)}; supported: {sorted(LAYER_TYPES)}")
    return "".join(LAYER_TYPES[kind] for kind in kinds)


def _by_name(shapes: Shapes | None) -> Shapes | None:
    """Shapes under the names that the table uses."""
    names = WeightMap((), RENAMES, fused=FUSED)
    return None if shapes is None else {name: s for stored, s in shapes.items() for name in names.canonical(stored)}


def _axis(by_name: Shapes | None, name: str, axis: int, otherwise: int) -> int:
    """The length of a tensor's axis, or what stands for it where there is no such tensor."""
    shape = (by_name or {}).get(name, ())
    return shape[axis] if len(shape) > axis and shape[axis] > 0 else otherwise


def _biased(text: Fields, flag: str, by_name: Shapes | None, names: str) -> bool:
    """Whether a part has biases: if the config says so, and the checkpoint holds one (a class starts them at zero)."""
    return text.flag(flag) and (by_name is None or any(re.search(names, name) for name in by_name))


def is_vlm(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model that looks."""
    return raw.get("vision_config") is not None or _is_omni(raw)


def _is_omni(raw: Mapping[str, Any]) -> bool:
    kinds = raw.get("architectures")
    return any(kind in OMNI for kind in [raw.get("model_type"), *(kinds if isinstance(kinds, list) else ())])


def config_from_hf(raw: Mapping[str, Any], shapes: Shapes | None = None) -> ModelConfig:
    """ModelConfig of a Nemotron-H, Mamba-2 or Nemotron VL `config.json` (already parsed).

    shapes: the checkpoint's tensor shapes by name. Given, they decide the sizes that published configs leave out or round:
    vocabulary rows, prefix tokens, the position table; and what is there of head and biases. ValueError names an option that
    the decoder lacks.
    """
    by_name = _by_name(shapes)
    inner = section(raw, "text_config", "llm_config")
    label = "" if inner is None else "text_config." if raw.get("text_config") is not None else "llm_config."
    seen, unread = (raw, {}) if inner is None else split_nested(inner, raw, _ONE)
    tables = {"": raw} if inner is None else {label: inner, "": seen}
    alone = (raw if inner is None else inner).get("model_type") == "mamba2"
    text = Fields(
        tables,
        defaults.MAMBA2 if alone else defaults.NEMOTRON_H,
        {} if alone else defaults.NEMOTRON_H_ALIASES,
        unread,
    )
    low, high = text.numbers("time_step_limit", 2)
    if not 0 <= low < math.inf or high < low:
        raise ValueError(f"config.json: time_step_limit must be two numbers from 0 that rise, got {[low, high]}")
    pattern = "M" * text.count("num_hidden_layers", 1, MOST_LAYERS) if alone else _pattern(text)
    width, pad = text.count("hidden_size"), text.id("pad_token_id") or 0
    vocab = _axis(by_name, "backbone.embeddings.weight", 0, text.count("vocab_size", 1, MOST_ROWS))
    said = text.any_flag("tie_word_embeddings")
    common: dict[str, Any] = {
        "width": width,
        "vocab_size": vocab,
        "ssm_groups": text.count("n_groups"),
        "conv_kernel": text.count("conv_kernel", 1, 64),
        "conv_bias": text.flag("use_conv_bias"),
        "chunk_size": text.count("chunk_size", 1, 1 << 16),
        "dt_floor": low,
        "mamba_bias": _biased(text, "use_bias", by_name, r"mixer\.(?:in|out)_proj\.bias$"),
        "norm_eps": text.number("layer_norm_epsilon", above=True, most=1.0),
        # Nemotron-H's class ties nothing, whatever its config says
        "tie_embeddings": tied(said and alone, said, "lm_head.weight", shapes),
        "eos_ids": text.ids("eos_token_id"),
        "pad_id": pad if pad < vocab else 0,
        "pattern": pattern,
    }
    if alone:
        # Mamba-2 alone: no attention or MLP layer, so their sizes say nothing
        text.only("hidden_act", "silu", "swish")
        return ModelConfig(
            mamba_heads=text.count("num_heads"),
            mamba_head_dim=text.count("head_dim"),
            ssm_state=text.count("state_size"),
            attention_heads=1,
            kv_heads=1,
            head_dim=1,
            mlp_width=1,
            dt_ceiling=0.0 if math.isinf(high) else high,
            **common,
        )
    text.only("mlp_hidden_act", "relu2")
    text.only("mamba_hidden_act", "silu", "swish")
    if MOE in pattern:
        common |= _experts(text)
    looks = is_vlm(raw)
    if looks and text.count("num_nextn_predict_layers", 0):
        raise ValueError(
            "config.json: num_nextn_predict_layers with a vision tower is not supported (its features are normed once "
            "more); supported: 0"
        )
    heads = text.count("num_attention_heads")
    return ModelConfig(
        mamba_heads=text.count("mamba_num_heads"),
        mamba_head_dim=text.count("mamba_head_dim"),
        ssm_state=text.count("ssm_state_size"),
        attention_heads=heads,
        kv_heads=heads if text.null("num_key_value_heads") else text.count("num_key_value_heads"),
        head_dim=text.count("head_dim"),
        mlp_width=text.count("intermediate_size") if MLP in pattern else 1,
        mlp_bias=_biased(text, "mlp_bias", by_name, r"mixer\.(?:\w+\.)?(?:up|down|fc[12]_latent)_proj\.bias$"),
        attention_bias=_biased(text, "attention_bias", by_name, r"mixer\.[qkv]_proj\.bias$"),
        vision=vision_from_hf(raw, shapes) if looks else None,
        **common,
    )


def _experts(text: Fields) -> dict[str, Any]:
    """The fields of a ModelConfig that a pattern with experts needs."""
    return {
        "experts": text.count("n_routed_experts", 1, 1 << 14),
        "experts_per_token": text.count("num_experts_per_tok"),
        "expert_width": text.count("moe_intermediate_size"),
        # of all shared experts together: their number is read by nobody
        "shared_width": text.count("moe_shared_expert_intermediate_size"),
        "expert_latent": 0 if text.get("moe_latent_size")[1] is None else text.count("moe_latent_size"),
        "router_groups": text.count("n_group"),
        "router_top_groups": text.count("topk_group"),
        "router_norm": text.flag("norm_topk_prob"),
        "router_scale": text.number("routed_scaling_factor", -1e30),
    }


def vision_from_hf(raw: Mapping[str, Any], shapes: Shapes | None = None) -> VisionConfig:
    """VisionConfig of a RADIO `config.json`, or of the `vision_config` and the projector's fields of a VLM's.

    shapes: the checkpoint's tensor shapes by name; they decide what published configs leave out.
    """
    by_name = _by_name(shapes)
    own = section(raw, "vision_config")
    omni = _is_omni(raw)
    table = {"": raw} if own is None and not omni else {"vision_config.": own or {}}
    vision = Fields(table, defaults.RADIO | _tower(next(iter(table.values()))))
    seen, unread = (
        split_nested(own or {}, raw) if omni else (raw, {})
    )  # the older releases' own code reads these outside
    either = Fields({**table, "": seen}, defaults.RADIO, unread=unread)
    outer = Fields(
        {"": raw},
        {
            **defaults.OMNI,
            **({} if omni else {"projector_hidden_size": VisionConfig.projector_width, "video_temporal_patch_size": 1}),
            **{"ps_version": "v2", "max_num_tiles": 12, "min_num_patches": 1024, "max_num_patches": 13312},
            "video_target_num_patches": 1024,
        },
    )
    vision.only("hidden_act", "gelu")
    vision.only("qkv_bias", True)
    vision.only("use_swiglu_ffn", False)
    vision.only("num_channels", 3)
    outer.only("ps_version", "v2")
    width, patch = vision.count("hidden_size"), either.count("patch_size")
    if vision.number("layerscale_value") != 1.0 and not any(re.search(r"\.ls1$", name) for name in by_name or {}):
        raise ValueError("config.json: layerscale_value without its tensors is not supported; supported: 1.0")
    rows = _axis(by_name, "patch_generator.pos_embed", 1, (vision.count("max_img_size") // patch) ** 2)
    prefix = vision.count("num_cls_tokens", 0) + vision.count("num_registers", 0)
    wide = Fields({}, {"hidden_size * mlp_ratio": int(width * vision.number("mlp_ratio", above=True, most=1e6))})
    size = outer.find("force_image_size") or vision.find("image_size")
    side = 512 if size is None else Fields({size[0]: {"": size[1]}}, {}).count("")
    pair = outer if outer.find("video_temporal_patch_size") or not vision.find("video_temporal_patch_size") else vision
    frames = pair.count("video_temporal_patch_size", 1, 64)
    if omni and vision.find("video_temporal_patch_size"):
        inside = vision.count("video_temporal_patch_size", 1, 64)
        if inside != outer.count("video_temporal_patch_size", 1, 64):
            raise ValueError(
                f"config.json: video_temporal_patch_size {outer.get('video_temporal_patch_size')[1]} and "
                f"vision_config.video_temporal_patch_size {inside} must be equal"
            )
    least, most = outer.count("min_num_patches"), outer.count("max_num_patches")
    return VisionConfig(
        kind="radio",
        image_size=(side, side),
        patch_size=patch,
        width=width,
        layers=vision.count("num_hidden_layers", 1, MOST_LAYERS),
        heads=vision.count("num_attention_heads"),
        mlp_width=_axis(by_name, "blocks.0.mlp.fc1.weight", 0, wide.count("hidden_size * mlp_ratio")),
        position_rows=math.isqrt(rows),
        prefix_tokens=_axis(by_name, "patch_generator.cls_token.token", 0, prefix),
        temporal_patch=frames,
        max_tiles=0 if omni else outer.count("max_num_tiles", 0, 1024),
        image_patches=(least, most) if omni else (0, 0),
        video_patches=outer.count("video_target_num_patches") if omni else 0,
        norm_eps=vision.number("layer_norm_eps", above=True, most=1.0),
        downsample=round(1 / outer.number("downsample_ratio", 1 / 64, 1.0)),
        projector_width=_axis(by_name, "mlp1.1.weight", 0, outer.count("projector_hidden_size")),
        pixel_mean=_colours(either, "norm_mean"),
        pixel_std=_colours(either, "norm_std"),
    )


def _colours(fields: Fields, name: str) -> tuple[float, float, float]:
    found = fields.three(name)
    if any(math.isinf(x) for x in found) or (name == "norm_std" and min(found) <= 0):
        raise ValueError(f"config.json: {fields.get(name)[0]} must be three numbers, got {shown(list(found))}")
    return found


def _tower(vision: Mapping[str, Any]) -> defaults.Defaults:
    """hidden_size, num_hidden_layers and num_attention_heads by the tower's name in `args.model`, where that is all there is."""
    args = vision.get("args")
    if args is None or vision.get("hidden_size") is not None:
        return {}
    name = str(args.get("model", "")) if isinstance(args, Mapping) else ""
    for tower, (width, layers, heads, _) in TOWERS.items():
        if name.startswith(tower):
            return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    raise ValueError(
        f"config.json: vision_config has no hidden_size and its tower {shown(name)} is unknown; known: {sorted(TOWERS)}"
    )
