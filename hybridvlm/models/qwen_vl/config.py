"""QwenConfig and VisionConfig from the published files of Qwen2-VL and Qwen3-VL, as transformers reads them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from hybridvlm.config import QwenConfig, VisionConfig
from hybridvlm.models import config_defaults as defaults
from hybridvlm.models.config_fields import MOST_LAYERS, MOST_ROWS, OF_ALL, Fields, section, shown, split_nested, tied
from hybridvlm.models.weights import Shape

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
TEXT = {2: defaults.QWEN2_TEXT, 3: defaults.QWEN3_TEXT}
VISION = {2: defaults.QWEN2_VISION, 3: defaults.QWEN3_VISION}
# least and most pixels of an image, of a video frame, and most of a whole video: the published preprocessor files, and
# qwen-vl-utils for videos
PIXELS: dict[int, dict[str, Any]] = {
    2: {
        "image_pixels": QwenConfig.image_pixels,
        "frame_pixels": QwenConfig.frame_pixels,
        "video_pixels": QwenConfig.video_pixels,
    },
    3: {"image_pixels": (65536, 16777216), "frame_pixels": (4096, 768 * 32**2), "video_pixels": 25165824},
}
MOST_PIXELS = 1 << 40
_ROPE = ("rope_scaling", "rope_parameters", "rope_theta")
_IMAGES = "preprocessor_config.json"
_HEAD, _EMBED = "lm_head.weight", "embed_tokens.weight"


def pixel_limits(raw: Mapping[str, Any], generation: int) -> dict[str, Any]:
    """The limits of a checkpoint's own processor files (in `raw` under "preprocessor" and "video_preprocessor"), else the
    published defaults.

    A video's file speaks of one frame in Qwen2-VL and of all frames together in Qwen3-VL. Where there is none, a video's frame
    lies within the image's limits, too. ValueError for a limit that is not a whole number, or limits the wrong way round.
    """
    limits, video_options = dict(PIXELS[generation]), raw.get("video_preprocessor")
    limits["image_pixels"] = _, most = _edges(_IMAGES, raw, "preprocessor", limits["image_pixels"])
    low, high = limits["frame_pixels"]
    if not video_options:
        return limits | {"frame_pixels": (min(low, most), min(high, most))}
    where = "video_preprocessor_config.json", raw, "video_preprocessor"
    if generation == 2:
        return limits | {"frame_pixels": _edges(*where, (low, high))}
    low, together = _edges(*where, (low, limits["video_pixels"]))
    if video_options.get("max_video_tokens") is not None:
        tokens = video_options["max_video_tokens"]
        if type(tokens) is not int or not 1 <= tokens <= MOST_PIXELS:
            raise ValueError(
                f"video_preprocessor_config.json: max_video_tokens must be a whole number of at least 1, got {shown(tokens)}"
            )
        vision = _vision_fields_of(raw, generation)
        high = tokens * (vision.side("patch_size") * vision.count("spatial_merge_size")) ** 2
    return limits | {"frame_pixels": (low, max(low, min(high, together))), "video_pixels": together}


def _edges(file: str, raw: Mapping[str, Any], part: str, default: tuple[int, int]) -> tuple[int, int]:
    """(least, most) pixels that a processor's file allows, under its old names or its new ones."""
    own = raw.get(part) or {}
    size = own.get("size")
    if not isinstance(size, Mapping):
        size = {}
    found = []
    for old, new, usual in (("min_pixels", "shortest_edge", default[0]), ("max_pixels", "longest_edge", default[1])):
        value = next((v for v in (own.get(old), size.get(new)) if v is not None), usual)
        if type(value) is not int or not 1 <= value <= MOST_PIXELS:
            raise ValueError(f"{file}: {old} (or size.{new}) must be a whole number of at least 1, got {shown(value)}")
        found.append(value)
    if found[0] > found[1]:
        raise ValueError(f"{file}: at least {found[0]} pixels and at most {found[1]} cannot both be kept")
    return found[0], found[1]


def _rope(text: Fields, generation: int, pairs: int) -> dict[str, Any]:
    """The rotary embedding of a decoder whose heads have so many pairs of channels."""
    usual = defaults.ROPE[generation]
    given = [
        found
        for where, fields in text.tables.items()
        for name in _ROPE[:2]
        if (found := Fields({where: fields}, {}).find(name)) is not None
    ]
    for label, table in given:
        if not isinstance(table, Mapping):
            raise ValueError(f"config.json: {label} must be a table, got {shown(table)}")
    for name in _ROPE[:2]:
        if not given:
            text.find(name)  # warns of one that is not read
    label, table = next((found for found in given if found[1]), ("rope_parameters", {}))
    theta = text.number("rope_theta", 1.0, above=True) if text.find("rope_theta") else usual["rope_theta"]
    rope = Fields({f"{label}.": table}, {**usual, "rope_theta": theta, "type": "default"}, {"type": ("rope_type",)})
    rope.only("type", "default", "mrope")
    sections = rope.counts("mrope_section", 0, length=3)
    if usual["mrope_interleaved"]:
        # every third pair follows the row, every third the column, as far as their sections reach: never past the head
        row, column = (min(sections[axis], len(range(axis, pairs, 3))) for axis in (1, 2))
        sections = (pairs - row - column, row, column)
    elif sum(sections) != pairs:
        raise ValueError(
            f"config.json: {label}.mrope_section must add up to half a head's {2 * pairs} channels, got {list(sections)}"
        )
    return {
        "rope_theta": rope.number("rope_theta", 1.0, above=True),
        "rope_sections": sections,
        "rope_interleaved": usual["mrope_interleaved"],
    }


def _text(raw: Mapping[str, Any], generation: int) -> Fields:
    """The fields of a decoder: nested, or in Qwen2-VL's files flat. ValueError for a flat Qwen3-VL, which means nothing."""
    inner = section(raw, "text_config")
    if inner is None and generation == 2:
        return Fields({"": raw}, TEXT[2])
    seen, unread = split_nested(inner or {}, raw, [_ROPE])
    if inner is None and (lost := [name for name in TEXT[3] if unread.get(name) is not None and name not in OF_ALL]):
        raise ValueError(
            f"config.json: {lost[0]} stands outside text_config, which is not there and which is where transformers looks for "
            "a qwen3_vl's decoder; put its fields into text_config"
        )
    return Fields({"text_config.": inner or {}, "": seen}, TEXT[generation], unread=unread)


def text_fields(
    raw: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None, generation: int = 2
) -> dict[str, Any]:
    """The fields of a ModelConfig that a Qwen decoder's config.json decides. ValueError names an option that is not supported."""
    text = _text(raw, generation)
    text.only("hidden_act", "silu", "swish")
    layers = text.count("num_hidden_layers", 1, MOST_LAYERS)
    if generation == 2 and text.find("use_sliding_window") and text.flag("use_sliding_window"):
        kinds = text.get("layer_types")[1]
        slides = (
            "sliding_attention" in kinds if isinstance(kinds, list) else text.count("max_window_layers", 0) < layers
        )
        if slides and not text.null("sliding_window"):
            raise ValueError("config.json: use_sliding_window = True is not supported; supported: false")
    width, heads = text.count("hidden_size"), text.count("num_attention_heads")
    if text.find("head_dim") or "head_dim" in text.defaults:
        head_dim = text.count("head_dim")
    elif width % heads:
        raise ValueError(f"config.json: hidden_size {width} is not divisible by num_attention_heads {heads}")
    else:
        head_dim = width // heads
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim {head_dim} must be even, a rotary embedding turns pairs")
    vocab = text.count("vocab_size", 1, MOST_ROWS)
    vocab = next((shape[0] for name, shape in (shapes or {}).items() if name.endswith(_EMBED) and shape), vocab)
    pad = text.id("pad_token_id")
    pad = text.id("bos_token_id") if pad is None else pad  # one and the same token in the published tokenizers
    outer = Fields({"": raw}, {}).any_flag("tie_word_embeddings")
    said = text.any_flag("tie_word_embeddings")
    return {
        "pattern": "*-" * layers,
        "width": width,
        "vocab_size": vocab,
        "attention_heads": heads,
        "kv_heads": heads if text.null("num_key_value_heads") else text.count("num_key_value_heads"),
        "head_dim": head_dim,
        "mlp_width": text.count("intermediate_size"),
        "mlp_gated": True,
        **_rope(text, generation, head_dim // 2),
        "norm_eps": text.number("rms_norm_eps", above=True, most=1.0),
        # Qwen2-VL's class carries the nested word outside, Qwen3-VL's does not
        "tie_embeddings": tied(said if generation == 2 else outer, said, _HEAD, shapes),
        "eos_ids": text.ids("eos_token_id"),
        "pad_id": pad if pad is not None and pad < vocab else 0,
    }


def _vision_fields_of(raw: Mapping[str, Any], generation: int) -> Fields:
    own = section(raw, "vision_config") or {}
    return Fields({"vision_config.": own}, VISION[generation], defaults.QWEN_VISION_ALIASES)


def vision_fields(
    raw: Mapping[str, Any], generation: int, shapes: Mapping[str, Shape] | None = None
) -> VisionConfig | None:
    """The tower of a config.json's `vision_config`, None where neither that nor a tensor speaks of one. ValueError names an
    option that is not supported."""
    silent = section(raw, "vision_config") is None
    if silent and shapes is not None and not any(re.search(r"(?:^|\.)visual\.", name) for name in shapes):
        return None
    v = _vision_fields_of(raw, generation)
    v.only("hidden_act", *ACTIVATIONS)
    v.only("in_channels", 3)
    rope = Fields({"vision_config.rope_parameters.": v.get("rope_parameters")[1] or {}}, {"rope_theta": 10000.0})
    if not isinstance(v.get("rope_parameters")[1] or {}, Mapping) or rope.number("rope_theta") != 10000.0:
        given = shown(v.get("rope_parameters")[1])
        raise ValueError(
            f"config.json: vision_config.rope_parameters {given} is not supported; supported: rope_theta 10000.0"
        )
    width = v.count("embed_dim" if generation == 2 else "hidden_size")
    merge, patch, heads = v.count("spatial_merge_size", 1, 64), v.side("patch_size"), v.count("num_heads")
    side, depth = 0, v.count("depth", 1, MOST_LAYERS)
    planes: tuple[int, ...] = ()
    if generation == 3:
        rows = v.count("num_position_embeddings", 1, MOST_ROWS)
        side = math.isqrt(rows)
        if side**2 != rows:
            raise ValueError(f"config.json: num_position_embeddings {rows} is not a square")
        planes = v.counts("deepstack_visual_indexes", 0, MOST_LAYERS)
        mlp = v.count("intermediate_size")
    else:
        mlp = Fields({}, {"width * mlp_ratio": int(width * v.number("mlp_ratio", above=True, most=1e6))}).count(
            "width * mlp_ratio"
        )
    colours = section(raw, "preprocessor") or {}
    mean, std = (0.5,) * 3, (0.5,) * 3
    if generation == 2:
        mean, std = VisionConfig.pixel_mean, VisionConfig.pixel_std
    shown_as = Fields({"": colours}, {"image_mean": mean, "image_std": std}, file=_IMAGES)
    if min(shown_as.numbers("image_std", 3)) <= 0:
        raise ValueError(f"{_IMAGES}: image_std must be above 0")
    square = max(1, 448 // (merge * patch)) * merge * patch  # stands until a clip brings its own size
    return VisionConfig(
        kind="qwen",
        image_size=(square, square),
        patch_size=patch,
        width=width,
        layers=depth,
        heads=heads,
        mlp_width=mlp,
        position_rows=side,
        prefix_tokens=0,
        temporal_patch=v.side("temporal_patch_size"),
        norm_eps=1e-6,
        downsample=merge,
        projector_width=width * merge**2,
        pixel_mean=shown_as.three("image_mean"),
        pixel_std=shown_as.three("image_std"),
        activation=ACTIVATIONS[v.word("hidden_act")],
        patch_bias=generation == 3,
        deepstack=planes,
    )


def config_from_hf(raw: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> QwenConfig:
    """QwenConfig of a published config.json (parsed), flat or with text_config.

    shapes: the checkpoint's tensor shapes by name; given, the rows of the embedding decide the vocabulary, and what is there of
    head, biases and tower whether the model has them. ValueError names an option that is not supported.
    """
    kind = raw.get("model_type")
    if kind not in ("qwen2_vl", "qwen3_vl"):
        raise ValueError(f"config.json: model_type {shown(kind)} is not supported; supported: qwen2_vl, qwen3_vl")
    generation = 2 if kind == "qwen2_vl" else 3
    fields = text_fields(raw, shapes, generation)
    biased = generation == 2
    if generation == 3:
        biased = _text(raw, 3).flag("attention_bias")
        if shapes is not None:  # a class starts biases at zero: left out of the file, they are none
            biased = biased and any(re.search(r"self_attn\.[qkvo]_proj\.bias$", name) for name in shapes)
    return QwenConfig(
        **fields,
        generation=generation,
        attention_bias=biased,
        output_bias=biased and generation == 3,
        qk_norm=generation == 3,
        vision=vision_fields(raw, generation, shapes),
        **pixel_limits(raw, generation),
    )
