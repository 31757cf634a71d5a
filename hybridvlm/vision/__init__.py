"""Vision towers and connectors: frames [F,h,w,3] -> visual tokens [F,m,D].

The parameters are listed at the top of radio.py, stem.py, qwen_vit.py and connector.py.
"""

from hybridvlm.ops.pack import CHUNK
from hybridvlm.vision.connector import Connector, connect, pixel_shuffle
from hybridvlm.vision.model import VisionModel, encode_frames
from hybridvlm.vision.packed import encode_chosen, packed_sizes, token_values
from hybridvlm.vision.qwen_vit import QwenMerger, QwenTower, qwen_merge, qwen_tokens, qwen_tower
from hybridvlm.vision.radio import RadioTower, radio_tower
from hybridvlm.vision.stem import StemTower, stem_tower

__all__ = [
    "CHUNK",
    "Connector",
    "QwenMerger",
    "QwenTower",
    "RadioTower",
    "StemTower",
    "VisionModel",
    "connect",
    "encode_chosen",
    "encode_frames",
    "packed_sizes",
    "pixel_shuffle",
    "qwen_merge",
    "qwen_tokens",
    "qwen_tower",
    "radio_tower",
    "stem_tower",
    "token_values",
]
