"""Nemotron Nano VL and Nemotron 3 Nano Omni: hybrid Mamba-2 decoders with a RADIO tower.

The package is the family that `hybridvlm.models.family.Family` describes.
"""

from hybridvlm.models.nemotron_vl.config import config_from_hf
from hybridvlm.models.nemotron_vl.model import (
    CHAT,
    MESH_AXES,
    METHODS,
    MODEL_TYPES,
    NAME,
    Config,
    embed_prompt,
    encode,
    extend,
    frame_size,
    init,
    make_batch,
    make_decode_step,
    make_plan,
    memory_specs,
    module,
    output_specs,
    pixels,
    prefill,
    prompt,
    style_for,
)
from hybridvlm.models.nemotron_vl.passes import build_video_memory, decoder_output, memory_serves
from hybridvlm.models.nemotron_vl.weights import weight_map

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
