"""Tiny random checkpoints in the published layout of every family: config.json, shards and their index, tokenizer, chat template.

For tests and for the parity harness: what they say is noise, how they are laid out is not.
"""

from __future__ import annotations

import copy
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybridvlm.checkpoints.hf import save_published
from hybridvlm.models.family import family_of
from hybridvlm.models.weights import WeightMap, unflatten

SPECIAL = {
    "nemotron": ("<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<think>", "</think>", "<image>", "<img>", "</img>"),
    "qwen": (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
        *("<|image_pad|>", "<|video_pad|>"),
    ),
}
BYTES = 256  # a token for every byte, and the special ones after them
VOCABULARY = 288


def _id(kind: str, token: str) -> int:
    return BYTES + SPECIAL[kind].index(token)


_NEMOTRON_H = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "conv_kernel": 4,
    "chunk_size": 8,
    "layer_norm_epsilon": 1e-5,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "use_conv_bias": True,
    "use_bias": False,
    "mlp_bias": False,
    "attention_bias": False,
    "time_step_limit": [0.0, math.inf],
    "time_step_min": 0.0,  # transformers floors dt with it in prefill, and nothing else reads it
    "tie_word_embeddings": False,
    "eos_token_id": _id("nemotron", "<SPECIAL_12>"),
    "num_nextn_predict_layers": 0,
}
_DENSE = _NEMOTRON_H | {
    "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp", "linear_attention"]
}
_EXPERTS = _NEMOTRON_H | {
    "layers_block_type": ["linear_attention", "moe", "linear_attention", "full_attention", "moe"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "n_shared_experts": 1,
    "moe_latent_size": None,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_RADIO = {
    "model_type": "radio",
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2.0,
    "layer_norm_eps": 1e-6,
    "max_img_size": 64,
    "num_cls_tokens": 3,
    "num_registers": 5,
    "norm_mean": [0.48145466, 0.4578275, 0.40821073],
    "norm_std": [0.26862954, 0.26130258, 0.27577711],
    "image_size": 32,
}
_OMNI = {
    "model_type": "nemotron_h_omni",
    "architectures": ["NemotronH_Omni_Reasoning_V3"],
    "text_config": _EXPERTS,
    "vision_config": _RADIO | {"video_temporal_patch_size": 2},
    "video_temporal_patch_size": 2,
    "audio_config": None,
    "force_image_size": 32,
    "downsample_ratio": 0.5,
    "vision_hidden_size": 32,
    "projector_hidden_size": 48,
    "image_token_id": _id("nemotron", "<image>"),
    "video_token_id": _id("nemotron", "<image>"),
    "min_num_patches": 16,
    "max_num_patches": 64,
    "video_target_num_patches": 64,
    "video_pruning_rate": 0.0,
}
_QWEN_IDS = {
    "image_token_id": _id("qwen", "<|image_pad|>"),
    "video_token_id": _id("qwen", "<|video_pad|>"),
    "vision_start_token_id": _id("qwen", "<|vision_start|>"),
    "vision_end_token_id": _id("qwen", "<|vision_end|>"),
}
_QWEN_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": _id("qwen", "<|endoftext|>"),
    "eos_token_id": _id("qwen", "<|im_end|>"),
    "tie_word_embeddings": False,
}
_QWEN2_VISION = {
    "model_type": "qwen2_vl_vision",
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "hidden_act": "quick_gelu",
    "in_channels": 3,
    "mlp_ratio": 2,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN2 = {
    "model_type": "qwen2_vl",
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "text_config": _QWEN_TEXT
    | {"model_type": "qwen2_vl_text", "rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "vision_config": _QWEN2_VISION,
    "tie_word_embeddings": False,
    **_QWEN_IDS,
}

# name -> the published config.json of a tiny model
RAW: dict[str, dict[str, Any]] = {
    "nemotron_h": _DENSE,
    "nemotron_h_moe": _EXPERTS,
    "nemotron_nano_vl": {
        "model_type": "NemotronH_Nano_VL_V2",
        "architectures": ["NemotronH_Nano_VL_V2"],
        "llm_config": {k: v for k, v in _DENSE.items() if k != "layers_block_type"}
        | {"hybrid_override_pattern": "M-M*-M"},
        "vision_config": _RADIO,
        "patch_size": 4,
        "force_image_size": 32,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "vit_hidden_size": 32,
        "projector_hidden_size": 48,
        "max_num_tiles": 6,
        "use_thumbnail": True,
        "img_context_token_id": _id("nemotron", "<image>"),
        "video_pruning_rate": 0.0,
    },
    "nemotron_omni": _OMNI,
    "qwen2_vl": _QWEN2,
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": _QWEN_TEXT
        | {
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "attention_bias": False,
            "rope_parameters": _ROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        "vision_config": {
            "model_type": "qwen3_vl_vision",
            "depth": 2,
            "hidden_size": 32,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "intermediate_size": 48,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": 32,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "deepstack_visual_indexes": [0, 1],
        },
        "tie_word_embeddings": False,
        **_QWEN_IDS,
    },
    "vamba": {
        **{k: v for k, v in _QWEN2.items() if k != "text_config"},
        **_QWEN_TEXT,
        "num_hidden_layers": 6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
        "vision_mamba_mixer_config": {
            "enable": True,
            "hidden_dim": 32,
            "d_state": 16,
            "d_conv": 4,
            "expand": 2,
            "headdim": 8,
            "ngroups": 1,
        },
        "use_alpha_balancing": True,
    },
}


def raw_config(name: str) -> dict[str, Any]:
    """The config.json of one of `RAW`, to change at will; ValueError names those there are."""
    if name not in RAW:
        raise ValueError(f"no sample {name!r}; there are {', '.join(RAW)}")
    return copy.deepcopy(RAW[name])


def random_params(table: WeightMap, seed: int = 0) -> dict[str, Any]:
    """Parameters of a table's arrays, float32 NumPy, such that every one of them shows in the outputs.

    What reference classes start at 1 or 0 is moved off it, and decays and steps lie where trained models have them.
    """
    rng = np.random.default_rng(seed)
    flat = {}
    for job in table.jobs:
        target, shape = job[1].target, table.target_shape(job)
        leaf, noise = target.rsplit("/", 1)[-1], rng.standard_normal(shape)
        if leaf == "A_log":
            value = np.log(rng.uniform(1, 16, shape))
        elif leaf == "dt_bias":
            value = rng.uniform(-4, -1, shape)
        elif leaf == "alpha":
            value = rng.uniform(0.3, 0.7, shape)
        elif leaf == "D" or ("norm" in leaf and "bias" not in leaf):
            value = 1 + 0.1 * noise
        elif "bias" in leaf:
            value = 0.1 * noise
        elif leaf in ("embed", "position", "prefix"):
            value = 0.5 * noise
        else:
            value = noise / math.sqrt(shape[-2])
        flat[target] = value.astype(np.float32)
    return unflatten(flat)


def byte_tokenizer(kind: str) -> Any:
    """A `tokenizers` object with a token for every byte and the special tokens of "nemotron" or "qwen"."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[kind]])
    return tokenizer


def write_text_files(name: str, folder: pathlib.Path) -> None:
    """The tokenizer, the chat template and the preprocessor's limits of a sample."""
    kind = "nemotron" if name.startswith("nemotron") else "qwen"
    byte_tokenizer(kind).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}) + "\n")
    if kind == "qwen":
        (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 64, "max_pixels": 2048}) + "\n")
    (folder / "chat_template.jinja").write_text(family_of(RAW[name]).CHAT)


def write_sample(
    name: str,
    path: str | pathlib.Path,
    *,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    raw: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Write a sample in two shards. params: instead of random ones; raw: another config.json around the same weights."""
    own = raw_config(name)
    kind = family_of(own)
    table = kind.weight_map(kind.config_from_hf(own))
    params = random_params(table, seed) if params is None else params
    half = sum(math.prod(shape) for shape in table.shapes().values()) * 4 // 2 + 1
    return save_published(
        path,
        params,
        table,
        own if raw is None else raw,
        shard_bytes=half,
        extra=lambda folder: write_text_files(name, folder),
    )
