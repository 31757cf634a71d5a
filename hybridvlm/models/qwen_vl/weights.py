"""The published tensor names of Qwen2-VL and Qwen3-VL, and their positions in our parameters.

Both spellings are known: `visual.*`, `model.layers.*` (Qwen2-VL as published) and `model.visual.*`, `model.language_model.*`
(Qwen3-VL, and what newer releases of transformers save).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybridvlm.config import ModelConfig, QwenConfig, VisionConfig
from hybridvlm.models.weights import LINEAR, Fused, Shape, StackedSpec, Transform, WeightMap, WeightSpec, stacked_specs

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


def _heads(name: str, count: str) -> tuple[WeightSpec, ...]:
    """Projection, bias and norm of q, k or v; `count` names the config's number of heads."""
    source = f"{_L}self_attn.{name}"

    def out(c: ModelConfig) -> int:
        return getattr(c, count) * c.head_dim

    rows = (
        WeightSpec(f"{_A}{name}_proj", f"{source}_proj.weight", lambda c: (out(c), c.width), LINEAR),
        WeightSpec(f"{_A}{name}_bias", f"{source}_proj.bias", lambda c: (out(c),), when=lambda c: c.attention_bias),
    )
    if name == "v":
        return rows
    return (
        *rows,
        WeightSpec(f"{_A}{name}_norm", f"{source}_norm.weight", lambda c: (c.head_dim,), when=lambda c: c.qk_norm),
    )


LAYER: tuple[WeightSpec, ...] = (
    WeightSpec(f"{_A}norm", f"{_L}input_layernorm.weight", _width),
    *_heads("q", "attention_heads"),
    *_heads("k", "kv_heads"),
    *_heads("v", "kv_heads"),
    WeightSpec(
        f"{_A}o_proj", f"{_L}self_attn.o_proj.weight", lambda c: (c.width, c.attention_heads * c.head_dim), LINEAR
    ),
    WeightSpec(f"{_A}o_bias", f"{_L}self_attn.o_proj.bias", _width, when=lambda c: c.output_bias),
    WeightSpec(f"{_F}norm", f"{_L}post_attention_layernorm.weight", _width),
    WeightSpec(f"{_F}gate_proj", f"{_L}mlp.gate_proj.weight", lambda c: (c.mlp_width, c.width), LINEAR),
    WeightSpec(f"{_F}up_proj", f"{_L}mlp.up_proj.weight", lambda c: (c.mlp_width, c.width), LINEAR),
    WeightSpec(f"{_F}down_proj", f"{_L}mlp.down_proj.weight", lambda c: (c.width, c.mlp_width), LINEAR),
)

TOP: tuple[WeightSpec, ...] = (
    WeightSpec("embed", "embed_tokens.weight", lambda c: (c.vocab_size, c.width)),
    WeightSpec("decoder/norm_f", "norm.weight", _width),
    WeightSpec(
        "lm_head", "lm_head.weight", lambda c: (c.vocab_size, c.width), LINEAR, when=lambda c: not c.tie_embeddings
    ),
)

_PATCH = Transform(
    lambda x, c: x.reshape(x.shape[0], -1).T,
    lambda x, c: x.T.reshape(-1, 3, c.temporal_patch, c.patch_size, c.patch_size),
    1,
)
_SQUARE = Transform(
    lambda x, c: x.reshape(c.position_rows, c.position_rows, c.width), lambda x, c: x.reshape(-1, c.width), None
)
TOWER: tuple[WeightSpec, ...] = (
    WeightSpec(
        "vision/patch_embed",
        "visual.patch_embed.proj.weight",
        lambda c: (c.width, 3, c.temporal_patch, c.patch_size, c.patch_size),
        _PATCH,
    ),
    WeightSpec("vision/patch_bias", "visual.patch_embed.proj.bias", _width, when=lambda c: c.patch_bias),
    WeightSpec(
        "vision/position",
        "visual.pos_embed.weight",
        lambda c: (c.position_rows**2, c.width),
        _SQUARE,
        when=lambda c: c.position_rows > 0,
    ),
)


def _block(spelling: Mapping[str, str]) -> tuple[WeightSpec, ...]:
    """The rows of one block of the tower."""
    rows: list[WeightSpec] = []
    for name in ("norm1", "norm2"):
        for leaf, ours in (("weight", name), ("bias", f"{name}_bias")):
            rows.append(WeightSpec(f"vision/blocks/{ours}", f"visual.blocks.{{i}}.{name}.{leaf}", _width))
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

        rows.append(WeightSpec(f"vision/blocks/{ours}", f"visual.blocks.{{i}}.{source}.weight", weight, LINEAR))
        rows.append(WeightSpec(f"vision/blocks/{name}_bias", f"visual.blocks.{{i}}.{source}.bias", bias))
    return tuple(rows)


def _merger(source: str, target: str, spelling: Mapping[str, str], merged: bool) -> tuple[WeightSpec, ...]:
    """The rows of one merger; `merged`: its norm comes after the neighbours are joined."""

    def inner(c: ModelConfig) -> int:
        return c.tower.width * c.tower.downsample**2

    def norm(c: ModelConfig) -> Shape:
        return (inner(c) if merged else c.tower.width,)

    first, second = f"{source}.{spelling['merge1']}", f"{source}.{spelling['merge2']}"
    return (
        WeightSpec(f"projector/{target}norm", f"{source}.{spelling['norm']}.weight", norm),
        WeightSpec(f"projector/{target}norm_bias", f"{source}.{spelling['norm']}.bias", norm),
        WeightSpec(f"projector/{target}fc1", f"{first}.weight", lambda c: (c.vision.projector_width, inner(c)), LINEAR),
        WeightSpec(f"projector/{target}fc1_bias", f"{first}.bias", lambda c: (c.vision.projector_width,)),
        WeightSpec(f"projector/{target}fc2", f"{second}.weight", lambda c: (c.width, c.vision.projector_width), LINEAR),
        WeightSpec(f"projector/{target}fc2_bias", f"{second}.bias", _width),
    )


def text_jobs(c: ModelConfig, layers: int) -> list[StackedSpec]:
    """Embeddings, decoder and head; `layers` published layers, each one attention and one MLP layer of ours."""
    return [*stacked_specs(c, TOP), *stacked_specs(c, LAYER, range(layers))]


def vision_jobs(c: ModelConfig, generation: int) -> list[StackedSpec]:
    """Tower and mergers, none for a config without vision."""
    v = c.vision
    if v is None:
        return []
    spelling = SPELLING[generation]
    jobs = [*stacked_specs(v, TOWER), *stacked_specs(v, _block(spelling), range(v.layers))]
    jobs += stacked_specs(c, _merger("visual.merger", "", spelling, merged=False))
    stacked = _merger("visual.deepstack_merger_list.{i}", "deepstack_", spelling, merged=True)
    return jobs + stacked_specs(c, stacked, range(len(v.deepstack)))


def weight_map(config: QwenConfig) -> WeightMap:
    """Published names and our arrays."""
    return WeightMap(
        jobs=(*text_jobs(config, config.count("*")), *vision_jobs(config, config.generation)),
        renames=RENAMES,
        publish=PUBLISH[config.generation],
        fused=FUSED,
        tied=("embed_tokens.weight", "lm_head.weight") if config.tie_embeddings else (),
        who=f"the config {config.name}" if config.name else "the config",
    )
