"""The tensors of Nemotron-H, Mamba-2, C-RADIO and the Nemotron VL checkpoints, by name, and their positions in our parameters."""

from __future__ import annotations

import re
from collections.abc import Callable

from hybridvlm.config import ModelConfig, VisionConfig
from hybridvlm.models.weights import (
    CONV,
    LINEAR,
    SAME,
    Fused,
    Shape,
    StackedSpec,
    Transform,
    WeightMap,
    WeightSpec,
    stacked_specs,
)

RENAMES: tuple[tuple[str, str], ...] = (
    # the language model: text-only (`model.`, `backbone.`) or inside a VLM (`language_model.` before it)
    (r"^language_model\.", ""),
    (r"^model\.(?=layers\.|embeddings?\.|norm_f\.)", "backbone."),
    (r"^backbone\.embedding\.", "backbone.embeddings."),
    # the tower: in-memory names of transformers -> published names without `vision_model.radio_model.model.`
    (r"^vision_model\.", ""),
    (r"^radio_model\.(?:model\.)?", ""),
    (r"^embeddings\.patch_projection\.", "patch_generator.embedder."),
    (r"^embeddings\.video_patch_projection\.", "patch_generator.video_embedder."),
    (r"^embeddings\.position_embedding$", "patch_generator.pos_embed"),
    (r"^embeddings\.cls_register_token$", "patch_generator.cls_token.token"),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+)\.attention\.o_proj\.", r"\1.attn.proj."),
    (r"^(blocks\.\d+)\.attention\.", r"\1.attn."),
    (r"^(blocks\.\d+)\.(?:ls|layer_scale)([12])(?:\.gamma|\.lambda1)?$", r"\1.ls\2"),
    # the projector
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
)

PUBLISH: tuple[tuple[str, str], ...] = (
    (r"^(?=backbone\.|lm_head\.)", "language_model."),
    (r"^(?=patch_generator\.|blocks\.)", "vision_model.radio_model.model."),
)

FUSED = tuple(
    Fused(f"blocks.{{i}}.attn.qkv.{leaf}", tuple(f"blocks.{{i}}.attn.{part}_proj.{leaf}" for part in "qkv"))
    for leaf in ("weight", "bias")
)

_SQUARE = Transform(
    lambda x, c: x.reshape(c.position_rows, c.position_rows, c.width), lambda x, c: x.reshape(1, -1, c.width), None
)


def _width(c: ModelConfig) -> Shape:
    return (c.width,)


_M, _A, _F, _E = "decoder/mamba/", "decoder/attention/", "decoder/mlp/", "decoder/moe/"
_L = "backbone.layers.{i}."


def _attention_rows(name: str, heads: str) -> tuple[WeightSpec, ...]:
    """Projection, bias and norm of q, k or v; `heads` names the config's count of heads."""
    source = f"{_L}mixer.{name}"
    return (
        WeightSpec(
            f"{_A}{name}_proj", f"{source}_proj.weight", lambda c: (getattr(c, heads) * c.head_dim, c.width), LINEAR
        ),
        WeightSpec(
            f"{_A}{name}_bias",
            f"{source}_proj.bias",
            lambda c: (getattr(c, heads) * c.head_dim,),
            when=lambda c: c.attention_bias,
        ),
        WeightSpec(
            f"{_A}{name}_norm",
            f"{source}_norm.weight",
            lambda c: (c.head_dim,),
            when=lambda c: c.qk_norm and name != "v",
        ),
    )


def _expert_bias(
    name: str, source: str, shape: Callable[[ModelConfig], Shape], latent: bool = False
) -> tuple[WeightSpec]:
    """The bias of a projection next to the experts; `latent`: one that only a config with expert_latent has."""

    def when(c: ModelConfig) -> bool:
        return c.mlp_bias and (not latent or c.expert_latent > 0)

    return (WeightSpec(_E + name, f"{_L}mixer.{source}.bias", shape, when=when),)


def _inside(c: ModelConfig) -> int:
    return c.expert_latent or c.width


DECODER: dict[str, tuple[WeightSpec, ...]] = {
    "M": (
        WeightSpec(_M + "norm", _L + "norm.weight", _width),
        WeightSpec(_M + "in_proj", _L + "mixer.in_proj.weight", lambda c: (c.in_proj_width, c.width), LINEAR),
        WeightSpec(
            _M + "in_bias", _L + "mixer.in_proj.bias", lambda c: (c.in_proj_width,), when=lambda c: c.mamba_bias
        ),
        WeightSpec(_M + "out_bias", _L + "mixer.out_proj.bias", _width, when=lambda c: c.mamba_bias),
        WeightSpec(_M + "conv_weight", _L + "mixer.conv1d.weight", lambda c: (c.conv_width, 1, c.conv_kernel), CONV),
        WeightSpec(_M + "conv_bias", _L + "mixer.conv1d.bias", lambda c: (c.conv_width,), when=lambda c: c.conv_bias),
        WeightSpec(_M + "A_log", _L + "mixer.A_log", lambda c: (c.mamba_heads,)),
        WeightSpec(_M + "D", _L + "mixer.D", lambda c: (c.mamba_heads,)),
        WeightSpec(_M + "dt_bias", _L + "mixer.dt_bias", lambda c: (c.mamba_heads,)),
        WeightSpec(_M + "gate_norm", _L + "mixer.norm.weight", lambda c: (c.mamba_width,)),
        WeightSpec(_M + "out_proj", _L + "mixer.out_proj.weight", lambda c: (c.width, c.mamba_width), LINEAR),
    ),
    "*": (
        WeightSpec(_A + "norm", _L + "norm.weight", _width),
        *_attention_rows("q", "attention_heads"),
        *_attention_rows("k", "kv_heads"),
        *_attention_rows("v", "kv_heads"),
        WeightSpec(
            _A + "o_proj", _L + "mixer.o_proj.weight", lambda c: (c.width, c.attention_heads * c.head_dim), LINEAR
        ),
    ),
    "-": (
        WeightSpec(_F + "norm", _L + "norm.weight", _width),
        WeightSpec(_F + "up_proj", _L + "mixer.up_proj.weight", lambda c: (c.mlp_width, c.width), LINEAR),
        WeightSpec(_F + "down_proj", _L + "mixer.down_proj.weight", lambda c: (c.width, c.mlp_width), LINEAR),
        WeightSpec(_F + "up_bias", _L + "mixer.up_proj.bias", lambda c: (c.mlp_width,), when=lambda c: c.mlp_bias),
        WeightSpec(_F + "down_bias", _L + "mixer.down_proj.bias", _width, when=lambda c: c.mlp_bias),
    ),
    "E": (
        WeightSpec(_E + "norm", _L + "norm.weight", _width),
        WeightSpec(_E + "router", _L + "mixer.gate.weight", lambda c: (c.experts, c.width), LINEAR),
        WeightSpec(_E + "router_bias", _L + "mixer.gate.e_score_correction_bias", lambda c: (c.experts,)),
        WeightSpec(
            _E + "up",
            _L + "mixer.experts.{j}.up_proj.weight",
            lambda c: (c.expert_width, _inside(c)),
            LINEAR,
            experts=lambda c: c.experts,
            stacked=_L + "mixer.experts.up_proj",
        ),
        WeightSpec(
            _E + "down",
            _L + "mixer.experts.{j}.down_proj.weight",
            lambda c: (_inside(c), c.expert_width),
            LINEAR,
            experts=lambda c: c.experts,
            stacked=_L + "mixer.experts.down_proj",
        ),
        WeightSpec(
            _E + "shared_up_proj",
            _L + "mixer.shared_experts.up_proj.weight",
            lambda c: (c.shared_width, c.width),
            LINEAR,
        ),
        WeightSpec(
            _E + "shared_down_proj",
            _L + "mixer.shared_experts.down_proj.weight",
            lambda c: (c.width, c.shared_width),
            LINEAR,
        ),
        WeightSpec(
            _E + "latent_in_proj",
            _L + "mixer.fc1_latent_proj.weight",
            lambda c: (c.expert_latent, c.width),
            LINEAR,
            when=lambda c: c.expert_latent > 0,
        ),
        WeightSpec(
            _E + "latent_out_proj",
            _L + "mixer.fc2_latent_proj.weight",
            lambda c: (c.width, c.expert_latent),
            LINEAR,
            when=lambda c: c.expert_latent > 0,
        ),
        *_expert_bias("shared_up_bias", "shared_experts.up_proj", lambda c: (c.shared_width,)),
        *_expert_bias("shared_down_bias", "shared_experts.down_proj", _width),
        *_expert_bias("latent_in_bias", "fc1_latent_proj", lambda c: (c.expert_latent,), latent=True),
        *_expert_bias("latent_out_bias", "fc2_latent_proj", _width, latent=True),
    ),
}

TOP: tuple[WeightSpec, ...] = (
    WeightSpec("embed", "backbone.embeddings.weight", lambda c: (c.vocab_size, c.width)),
    WeightSpec("decoder/norm_f", "backbone.norm_f.weight", _width),
    WeightSpec(
        "lm_head", "lm_head.weight", lambda c: (c.vocab_size, c.width), LINEAR, when=lambda c: not c.tie_embeddings
    ),
)


def _merged(c: ModelConfig) -> int:
    return c.tower.width * c.tower.downsample**2


PROJECTOR: tuple[WeightSpec, ...] = (
    WeightSpec("projector/norm", "mlp1.0.weight", lambda c: (_merged(c),)),
    WeightSpec("projector/up_proj", "mlp1.1.weight", lambda c: (c.vision.projector_width, _merged(c)), LINEAR),
    WeightSpec("projector/down_proj", "mlp1.3.weight", lambda c: (c.width, c.vision.projector_width), LINEAR),
)

RADIO_TOP: tuple[WeightSpec, ...] = (
    WeightSpec(
        "vision/patch_embed", "patch_generator.embedder.weight", lambda c: (c.width, 3 * c.patch_size**2), LINEAR
    ),
    WeightSpec(
        "vision/video_patch_embed",
        "patch_generator.video_embedder.weight",
        lambda c: (c.width, c.temporal_patch * 3 * c.patch_size**2),
        LINEAR,
        when=lambda c: c.temporal_patch > 1,
    ),
    WeightSpec("vision/position", "patch_generator.pos_embed", lambda c: (1, c.position_rows**2, c.width), _SQUARE),
    WeightSpec("vision/prefix", "patch_generator.cls_token.token", lambda c: (c.prefix_tokens, c.width)),
)


def _block_rows(name: str, source: str, out: str, into: str = "", scale: str = "") -> tuple[WeightSpec, WeightSpec]:
    """Weight and bias of one part of a transformer block; without `into` a LayerNorm, else a linear map."""
    stem = name.removesuffix("_proj") if into else name
    weight = WeightSpec(
        f"vision/blocks/{name}",
        f"blocks.{{i}}.{source}.weight",
        (lambda c: (getattr(c, out), getattr(c, into))) if into else (lambda c: (getattr(c, out),)),
        LINEAR if into else SAME,
        scale,
    )
    bias = WeightSpec(
        f"vision/blocks/{stem}_bias", f"blocks.{{i}}.{source}.bias", lambda c: (getattr(c, out),), scale=scale
    )
    return weight, bias


RADIO_BLOCK: tuple[WeightSpec, ...] = (
    *_block_rows("norm1", "norm1", "width"),
    *_block_rows("q_proj", "attn.q_proj", "width", "width"),
    *_block_rows("k_proj", "attn.k_proj", "width", "width"),
    *_block_rows("v_proj", "attn.v_proj", "width", "width"),
    *_block_rows("o_proj", "attn.proj", "width", "width", "blocks.{i}.ls1"),
    *_block_rows("norm2", "norm2", "width"),
    *_block_rows("fc1", "mlp.fc1", "mlp_width", "width"),
    *_block_rows("fc2", "mlp.fc2", "width", "mlp_width", "blocks.{i}.ls2"),
)

# Omni checkpoints hold a sound tower; sound is refused at the door, so that nothing of it is read
_SOUND = r"sound_encoder|sound_projection|audio_tower|embed_audio"


def weight_map(config: ModelConfig | VisionConfig) -> WeightMap:
    """Published names <-> our arrays of a config; a VisionConfig has a RADIO tower alone."""
    jobs: list[StackedSpec] = []
    vision = config if isinstance(config, VisionConfig) else config.vision
    if isinstance(config, ModelConfig):
        jobs += stacked_specs(config, TOP)
        for kind, rows in DECODER.items():
            jobs += stacked_specs(config, rows, [i for i, letter in enumerate(config.pattern) if letter == kind])
        if vision is not None:
            jobs += stacked_specs(config, PROJECTOR)
    if vision is not None:
        if vision.kind != "radio":
            raise ValueError(f"only towers of kind 'radio' have published names, got kind {vision.kind!r}")
        jobs += stacked_specs(vision, RADIO_TOP) + stacked_specs(vision, RADIO_BLOCK, range(vision.layers))
    tied = ("backbone.embeddings.weight", "lm_head.weight") if getattr(config, "tie_embeddings", False) else ()

    def ignored(name: str) -> bool:
        """What a checkpoint may hold unused: constants of the config, a video patch embedding, sound."""
        if name == "patch_generator.video_embedder.weight":
            return vision is not None and vision.temporal_patch == 1
        return re.match(rf"^(?:input_conditioner\.\w+$|summary_idxs$|(?:{_SOUND})\.)", name) is not None

    whole = isinstance(config, ModelConfig) and vision is not None
    who = f"the config {getattr(config, 'name', '') or type(config).__name__}"
    return WeightMap(tuple(jobs), RENAMES, PUBLISH if whole else (), FUSED, ignored, who, tied)
