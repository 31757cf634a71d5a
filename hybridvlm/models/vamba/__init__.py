"""VAMBA (arXiv 2503.11579): video tokens through Mamba-2, text reading them by cross-attention.

The package is the family that `hybridvlm.models.family.Family` describes.
"""

from hybridvlm.models.qwen_vl import encode
from hybridvlm.models.vamba.model import (
    CHAT,
    MESH_AXES,
    METHODS,
    MODEL_TYPES,
    NAME,
    Config,
    build_video_memory,
    extend,
    frame_size,
    init,
    make_batch,
    make_decode_step,
    make_plan,
    memory_serves,
    memory_specs,
    module,
    output_specs,
    pixels,
    prefill,
    prompt,
    style_for,
    trim_frames,
)
from hybridvlm.models.vamba.weights import config_from_hf, weight_map

# Two streams: rows of training and analyses have no field for them.
decoder_output = None
embed_prompt = None

__all__ = [
    "CHAT",
    "MESH_AXES",
    "METHODS",
    "MODEL_TYPES",
    "NAME",
    "Config",
    "build_video_memory",
    "config_from_hf",
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
    "trim_frames",
    "decoder_output",
    "embed_prompt",
]
