"""VAMBA as a plan sees it: one position to drop per layer, and what its two streams cost.

The video loses tokens after a layer's cross-attention, so a layer is one "*" of the pattern, whose row is made of the
video's tokens and a fixed number of text tokens. Counting rules as in hybridvlm/reduction/cost.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hybridvlm.config import ATTENTION, ModelConfig, VambaConfig, VisionConfig
from hybridvlm.reduction import cost as flops


@dataclasses.dataclass(frozen=True)
class VambaReading:
    """A VambaConfig and the text tokens of a bucket, in the form that `make_plan` takes for a config."""

    config: VambaConfig
    text_tokens: int

    @property
    def pattern(self) -> str:
        return ATTENTION * self.config.layers

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def vision(self) -> VisionConfig | None:
        return self.config.vision

    @property
    def chunk_size(self) -> int:
        return self.config.chunk_size

    def video_flops(self, layer: int, video: int, chunk_size: int | None = None) -> int:
        """Operations on `video` tokens in one layer: keys and values for the text, and the Mamba block (none in the last layer)."""
        c = self.config
        keys = 4 * video * c.width * c.kv_heads * c.head_dim
        last = layer == c.layers - 1 or not video
        return keys + (0 if last else flops.mamba_flops(c.mixer, video, chunk_size))

    def text_flops(self, video: int) -> int:
        """Operations on the text in one layer that reads `video` tokens: both attentions and the MLP."""
        c, t = self.config, self.text_tokens
        heads = c.attention_heads * c.head_dim
        cross = 4 * t * c.width * heads + 4 * heads * t * video
        return flops.attention_flops(c, t) + cross + flops.mlp_flops(c, t)

    def layer_flops(self, layer: int, length: int, chunk_size: int | None = None) -> int:
        video = length - self.text_tokens
        return self.video_flops(layer, video, chunk_size) + self.text_flops(video)

    def head_flops(self) -> int:
        return flops.head_flops(self.config)

    def scoring_flops(self, layer: int, length: int, queries: int) -> int:
        c = self.config
        return 2 * (length - self.text_tokens) * queries * c.attention_heads * c.head_dim

    def kv_bytes(self, lengths: Sequence[int], itemsize: int = 2) -> int:
        """The text's own keys and values, and those that it reads of the video: both grow by the same bytes a token."""
        return 2 * sum(lengths) * self.config.kv_heads * self.config.head_dim * itemsize

    def state_bytes(self, itemsize: int = 2) -> int:
        """What the next piece of the video starts from, in the layers that run."""
        whole = flops.state_bytes(self.config.mixer, itemsize)
        return whole * (self.config.layers - 1) // self.config.layers


def counted(config: ModelConfig, text_tokens: int) -> flops.Counted:
    """What a plan counts of a config, with rows of `text_tokens` text tokens: itself, but for VAMBA."""
    return VambaReading(config, text_tokens) if isinstance(config, VambaConfig) else config
