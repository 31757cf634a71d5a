"""Qwen2-VL and Qwen3-VL: Transformer decoders with M-RoPE and a tower of any resolution.

The package is the family that `hybridvlm.models.family.Family` describes.
"""

from hybridvlm.models.nemotron_vl import memory_serves, memory_specs
from hybridvlm.models.qwen_vl.config import config_from_hf
from hybridvlm.models.qwen_vl.geometry import frame_size
from hybridvlm.models.qwen_vl.model import (
    CHAT,
    MESH_AXES,
    METHODS,
    MODEL_TYPES,
    NAME,
    Config,
    build_video_memory,
    decoder_output,
    embed_prompt,
    encode,
    extend,
    init,
    make_batch,
    make_decode_step,
    make_plan,
    module,
    output_specs,
    pixels,
    prefill,
    prompt,
    style_for,
)
from hybridvlm.models.qwen_vl.weights import weight_map

# It looks at every frame that it is shown.
trim_frames = None

__all__ = [
    "CHAT",
    "MESH_AXES",
    "METHODS",
    "MODEL_TYPES",
    "NAME",
    "Config",
    "config_from_hf",
    "decoder_output",
    "embed_prompt",
    "encode",
    "extend",
    "frame_size",
    "init",
    "make_batch",
    "make_decode_step",
    "make_plan",
    "memory_serves",
    "memory_specs",
    "module",
    "output_specs",
    "pixels",
    "prefill",
    "prompt",
    "style_for",
    "weight_map",
    "build_video_memory",
    "trim_frames",
]
