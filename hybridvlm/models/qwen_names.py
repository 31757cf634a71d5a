"""The published config.json and tensor names of Qwen2-VL and Qwen3-VL, and their places in our config and parameters.

Both spellings are known: `visual.*`, `model.layers.*` (Qwen2-VL as published) and `model.visual.*`, `model.language_model.*`
(Qwen3-VL, and what newer releases of transformers save).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hybridvlm.config import ModelConfig, QwenConfig, VisionConfig
from hybridvlm.models.names import LINEAR, Fused, Job, Row, Shape, Table, Turn, jobs_of

RENAMES: tuple[tuple[str, str], ...] = (
    (r"^model\.(?:language_model\.|(?=visual\.))?", ""),
    (r"^language_model\.(?:model\.)?", ""),
)
PUBLISH: dict[int, tuple[tuple[str, str], ...]] = {
    2: ((r"^(?=layers\.|embed_tokens\.|norm\.)", "model."),),
    3: (
        (r"^(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
        (r"^(?=visual\.)", "model."),
    ),
}
FUSED = tuple(
    Fused(f"visual.blocks.{{i}}.attn.qkv.{leaf}", tuple(f"visual.blocks.{{i}}.attn.{part}.{leaf}" for part in "qkv"))
    for leaf in ("weight", "bias")
)
# published names of the parts that the two generations call differently
SPELLING: dict[int, dict[str, str]] = {
    2: {"fc1": "mlp.fc1", "fc2": "mlp.fc2", "norm": "ln_q", "merge1": "mlp.0", "merge2": "mlp.2"},
    3: {
        "fc1": "mlp.linear_fc1",
        "fc2": "mlp.linear_fc2",
        "norm": "norm",
        "merge1": "linear_fc1",
        "merge2": "linear_fc2",
    },
}


def _width(c: Any) -> Shape:
    return (c.width,)


_A, _F, _L = "decoder/attention/", "decoder/mlp/", "layers.{i}."


def _heads(name: str, count: str) -> tuple[Row, ...]:
    """Projection, bias and norm of q, k or v; `count` names the config's number of heads."""
    source = f"{_L}self_attn.{name}"

    def out(c: ModelConfig) -> int:
        return getattr(c, count) * c.head_dim

    rows = (
        Row(f"{_A}{name}_proj", f"{source}_proj.weight", lambda c: (out(c), c.width), LINEAR),
        Row(f"{_A}{name}_bias", f"{source}_proj.bias", lambda c: (out(c),), when=lambda c: c.attention_bias),
    )
    if name == "v":
        return rows
    return (*rows, Row(f"{_A}{name}_norm", f"{source}_norm.weight", lambda c: (c.head_dim,), when=lambda c: c.qk_norm))


LAYER: tuple[Row, ...] = (
    Row(f"{_A}norm", f"{_L}input_layernorm.weight", _width),
    *_heads("q", "attention_heads"),
    *_heads("k", "kv_heads"),
    *_heads("v", "kv_heads"),
    Row(f"{_A}o_proj", f"{_L}self_attn.o_proj.weight", lambda c: (c.width, c.attention_heads * c.head_dim), LINEAR),
    Row(f"{_F}norm", f"{_L}post_attention_layernorm.weight", _width),
    Row(f"{_F}gate_proj", f"{_L}mlp.gate_proj.weight", lambda c: (c.mlp_width, c.width), LINEAR),
    Row(f"{_F}up_proj", f"{_L}mlp.up_proj.weight", lambda c: (c.mlp_width, c.width), LINEAR),
    Row(f"{_F}down_proj", f"{_L}mlp.down_proj.weight", lambda c: (c.width, c.mlp_width), LINEAR),
)

TOP: tuple[Row, ...] = (
    Row("embed", "embed_tokens.weight", lambda c: (c.vocab_size, c.width)),
    Row("decoder/norm_f", "norm.weight", _width),
    Row("lm_head", "lm_head.weight", lambda c: (c.vocab_size, c.width), LINEAR, when=lambda c: not c.tie_embeddings),
)

_PATCH = Turn(
    lambda x, c: x.reshape(x.shape[0], -1).T,
    lambda x, c: x.T.reshape(-1, 3, c.temporal_patch, c.patch_size, c.patch_size),
    1,
)
_SQUARE = Turn(
    lambda x, c: x.reshape(c.position_rows, c.position_rows, c.width), lambda x, c: x.reshape(-1, c.width), None
)
TOWER: tuple[Row, ...] = (
    Row(
        "vision/patch_embed",
        "visual.patch_embed.proj.weight",
        lambda c: (c.width, 3, c.temporal_patch, c.patch_size, c.patch_size),
        _PATCH,
    ),
    Row("vision/patch_bias", "visual.patch_embed.proj.bias", _width, when=lambda c: c.patch_bias),
    Row(
        "vision/position",
        "visual.pos_embed.weight",
        lambda c: (c.position_rows**2, c.width),
        _SQUARE,
        when=lambda c: c.position_rows > 0,
    ),
)


def _block(spelling: Mapping[str, str]) -> tuple[Row, ...]:
    """The rows of one block of the tower."""
    rows: list[Row] = []
    for name in ("norm1", "norm2"):
        for leaf, ours in (("weight", name), ("bias", f"{name}_bias")):
            rows.append(Row(f"vision/blocks/{ours}", f"visual.blocks.{{i}}.{name}.{leaf}", _width))
    for name, source, out, into in (
        *((part, f"attn.{part}", "width", "width") for part in "qkv"),
        ("o", "attn.proj", "width", "width"),
        ("fc1", spelling["fc1"], "mlp_width", "width"),
        ("fc2", spelling["fc2"], "width", "mlp_width"),
    ):
        ours = name if name.startswith("fc") else f"{name}_proj"

        def weight(c: VisionConfig, out: str = out, into: str = into) -> Shape:
            return getattr(c, out), getattr(c, into)

        def bias(c: VisionConfig, out: str = out) -> Shape:
            return (getattr(c, out),)

        rows.append(Row(f"vision/blocks/{ours}", f"visual.blocks.{{i}}.{source}.weight", weight, LINEAR))
        rows.append(Row(f"vision/blocks/{name}_bias", f"visual.blocks.{{i}}.{source}.bias", bias))
    return tuple(rows)


def _merger(source: str, target: str, spelling: Mapping[str, str], merged: bool) -> tuple[Row, ...]:
    """The rows of one merger; `merged`: its norm comes after the neighbours are joined."""

    def inner(c: ModelConfig) -> int:
        return c.vision.width * c.vision.downsample**2

    def norm(c: ModelConfig) -> Shape:
        return (inner(c) if merged else c.vision.width,)

    first, second = f"{source}.{spelling['merge1']}", f"{source}.{spelling['merge2']}"
    return (
        Row(f"projector/{target}norm", f"{source}.{spelling['norm']}.weight", norm),
        Row(f"projector/{target}norm_bias", f"{source}.{spelling['norm']}.bias", norm),
        Row(f"projector/{target}fc1", f"{first}.weight", lambda c: (c.vision.projector_width, inner(c)), LINEAR),
        Row(f"projector/{target}fc1_bias", f"{first}.bias", lambda c: (c.vision.projector_width,)),
        Row(f"projector/{target}fc2", f"{second}.weight", lambda c: (c.width, c.vision.projector_width), LINEAR),
        Row(f"projector/{target}fc2_bias", f"{second}.bias", _width),
    )


def text_jobs(c: ModelConfig, layers: int) -> list[Job]:
    """Embeddings, decoder and head; `layers` published layers, each one attention and one MLP layer of ours."""
    return [*jobs_of(c, TOP), *jobs_of(c, LAYER, range(layers))]


def vision_jobs(c: ModelConfig, generation: int) -> list[Job]:
    """Tower and mergers, none for a config without vision."""
    v = c.vision
    if v is None:
        return []
    spelling = SPELLING[generation]
    jobs = [*jobs_of(v, TOWER), *jobs_of(v, _block(spelling), range(v.layers))]
    jobs += jobs_of(c, _merger("visual.merger", "", spelling, merged=False))
    stacked = _merger("visual.deepstack_merger_list.{i}", "deepstack_", spelling, merged=True)
    return jobs + jobs_of(c, stacked, range(len(v.deepstack)))


def table(c: QwenConfig) -> Table:
    """Published names and our arrays."""
    return Table(
        jobs=(*text_jobs(c, c.count("*")), *vision_jobs(c, c.generation)),
        renames=RENAMES,
        publish=PUBLISH[c.generation],
        fused=FUSED,
        idle=lambda name: name == "lm_head.weight" and c.tie_embeddings,
        who=f"the config {c.name}" if c.name else "the config",
    )


# -- config.json --------------------------------------------------------------------------------------------------------

# What is computed and no other way: key -> values that mean it (a missing key means the first).
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False, None),
    "attention_dropout": (0.0, 0),
    "mlp_bias": (False,),
}
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
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


def pixel_limits(raw: Mapping[str, Any], generation: int) -> dict[str, Any]:
    """The limits of a checkpoint's own processor files (in `raw` under "preprocessor" and "video_preprocessor"), else the
    published defaults.

    A video's file speaks of one frame in Qwen2-VL and of all frames together in Qwen3-VL. Where there is none, a video's frame
    lies within the image's limits, too. ValueError for a limit that is not a whole number, or limits the wrong way round.
    """
    limits, film = dict(PIXELS[generation]), raw.get("video_preprocessor")
    limits["image_pixels"] = _, most = _edges("preprocessor_config.json", raw, "preprocessor", limits["image_pixels"])
    low, high = limits["frame_pixels"]
    if not film:
        return limits | {"frame_pixels": (min(low, most), min(high, most))}
    where = "video_preprocessor_config.json", raw, "video_preprocessor"
    if generation == 2:
        return limits | {"frame_pixels": _edges(*where, (low, high))}
    low, together = _edges(*where, (low, limits["video_pixels"]))
    if tokens := film.get("max_video_tokens"):
        vision = raw["vision_config"]
        high = tokens * (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
    return limits | {"frame_pixels": (low, max(low, min(high, together))), "video_pixels": together}


def _edges(file: str, raw: Mapping[str, Any], section: str, default: tuple[int, int]) -> tuple[int, int]:
    """(least, most) pixels that a processor's file allows, under its old names or its new ones."""
    own = raw.get(section) or {}
    size = own.get("size") if isinstance(own.get("size"), Mapping) else {}
    found = []
    for old, new, usual in (("min_pixels", "shortest_edge", default[0]), ("max_pixels", "longest_edge", default[1])):
        value = next((v for v in (own.get(old), size.get(new)) if v is not None), usual)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{file}: {old} (or size.{new}) must be a whole number of at least 1, got {value!r}")
        found.append(value)
    if found[0] > found[1]:
        raise ValueError(f"{file}: at least {found[0]} pixels and at most {found[1]} cannot both be kept")
    return found[0], found[1]


def _number(value: Any) -> float:
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def text_fields(raw: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> dict[str, Any]:
    """The fields of a ModelConfig that a Qwen decoder's config.json decides. ValueError names an option that is not supported."""
    text = {**raw, **(raw.get("text_config") or {})}
    for key, allowed in FIXED.items():
        if text.get(key, allowed[0]) not in allowed:
            raise ValueError(f"config.json: {key} = {text[key]!r} is not supported; supported: {list(allowed)}")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ValueError(f"config.json: rotary embedding of type {kind!r} is not supported; supported: default, mrope")
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // heads
    eos = text.get("eos_token_id")
    vocab = text["vocab_size"]
    for stored, shape in (shapes or {}).items():
        if stored.endswith("embed_tokens.weight"):
            vocab = shape[0]
    pad = text.get("pad_token_id")
    pad = text.get("bos_token_id") if pad is None else pad  # one and the same token in the published tokenizers
    return {
        "pattern": "*-" * text["num_hidden_layers"],
        "width": text["hidden_size"],
        "vocab_size": vocab,
        "attention_heads": heads,
        "kv_heads": text.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "mlp_width": text["intermediate_size"],
        "mlp_gated": True,
        "rope_theta": _number(rope.get("rope_theta", text.get("rope_theta", 1e6))),
        "rope_sections": tuple(rope.get("mrope_section") or (head_dim // 2, 0, 0)),
        "rope_interleaved": bool(rope.get("mrope_interleaved", False)),
        "norm_eps": _number(text.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        "eos_ids": () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        "pad_id": pad if pad is not None and pad < vocab else 0,
    }


def vision_fields(raw: Mapping[str, Any], generation: int) -> VisionConfig:
    """The tower of a config.json's `vision_config`. ValueError names an option that is not supported."""
    v = raw["vision_config"]
    act = v.get("hidden_act", "quick_gelu" if generation == 2 else "gelu_pytorch_tanh")
    if act not in ACTIVATIONS:
        raise ValueError(f"config.json: vision hidden_act {act!r} is not supported; supported: {sorted(ACTIVATIONS)}")
    theta = (v.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    if theta != 10000.0 or v.get("in_channels", v.get("in_chans", 3)) != 3:
        raise ValueError(
            f"config.json: vision rope_theta {theta} with {v.get('in_channels')} channels is not supported; "
            "supported: 10000.0 with 3"
        )
    width = v["embed_dim"] if generation == 2 else v["hidden_size"]
    merge, patch = v["spatial_merge_size"], v["patch_size"]
    side = 0
    if generation == 3:
        side = math.isqrt(v["num_position_embeddings"])
        if side**2 != v["num_position_embeddings"]:
            raise ValueError(f"config.json: num_position_embeddings {v['num_position_embeddings']} is not a square")
    square = max(1, 448 // (merge * patch)) * merge * patch  # stands until a clip brings its own size
    return VisionConfig(
        kind="qwen",
        image_size=(square, square),
        patch_size=patch,
        width=width,
        layers=v["depth"],
        heads=v["num_heads"],
        mlp_width=v["intermediate_size"] if generation == 3 else round(width * v["mlp_ratio"]),
        position_rows=side,
        prefix_tokens=0,
        temporal_patch=v["temporal_patch_size"],
        norm_eps=1e-6,
        downsample=merge,
        projector_width=width * merge**2,
        pixel_mean=(0.5, 0.5, 0.5) if generation == 3 else VisionConfig.pixel_mean,
        pixel_std=(0.5, 0.5, 0.5) if generation == 3 else VisionConfig.pixel_std,
        activation=ACTIVATIONS[act],
        patch_bias=generation == 3,
        deepstack=tuple(v.get("deepstack_visual_indexes") or ()),
    )


def config_from_hf(raw: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> QwenConfig:
    """QwenConfig of a published config.json (parsed), flat or with text_config.

    shapes: the checkpoint's tensor shapes by name; given, the rows of the embedding decide the vocabulary.
    ValueError names an option that is not supported.
    """
    kind = raw.get("model_type")
    if kind not in ("qwen2_vl", "qwen3_vl"):
        raise ValueError(f"config.json: model_type {kind!r} is not supported; supported: qwen2_vl, qwen3_vl")
    generation = 2 if kind == "qwen2_vl" else 3
    fields = text_fields(raw, shapes)
    text = raw.get("text_config") or raw
    if generation == 3 and text.get("attention_bias"):
        raise ValueError("config.json: attention_bias true is not supported for qwen3_vl; supported: false")
    return QwenConfig(
        **fields,
        generation=generation,
        attention_bias=generation == 2,
        qk_norm=generation == 3,
        vision=vision_fields(raw, generation) if raw.get("vision_config") else None,
        **pixel_limits(raw, generation),
    )
