"""VAMBA (arXiv 2503.11579): video tokens through Mamba-2, text reading them by cross-attention.

The package is the family that `hybridvlm.models.family.Family` describes.
"""

from hybridvlm.models.qwen_vl import encode
from hybridvlm.models.vamba.batch import make_batch, split_rows
from hybridvlm.models.vamba.model import (
    BOUNDS,
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
from hybridvlm.models.vamba.streams import decoder_output
from hybridvlm.models.vamba.weights import config_from_hf, weight_map

# Two streams: there is no row of both that enters layer 0.
embed_prompt = None

__all__ = [
    "BOUNDS",
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
    "split_rows",
]
