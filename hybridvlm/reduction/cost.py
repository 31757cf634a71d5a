"""What a prefill costs: floating-point operations per layer, and bytes of the caches it leaves.

Counting rules: two operations per multiply-add; causal attention counted half; SSD at the chunk that runs; text
included; the language-model head for the last token only. The vision tower and the scoring are listed apart.
Elementwise work (norms, activations, softmax) is not counted. A decoder that is not a ModelConfig's brings its own counts,
as methods of the same names (hybridvlm/reduction/vamba.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from hybridvlm.config import ATTENTION, MAMBA, MOE, ModelConfig, VisionConfig
from hybridvlm.ops.pack import CHUNK, pack_sizes


class OwnCounts(Protocol):
    """A decoder that is not a ModelConfig's, with its own counts; each method as the function of its name below."""

    @property
    def pattern(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def vision(self) -> VisionConfig | None: ...
    @property
    def chunk_size(self) -> int: ...
    def layer_flops(self, layer: int, length: int, chunk_size: int | None = None) -> int: ...
    def head_flops(self) -> int: ...
    def scoring_flops(self, layer: int, length: int, queries: int) -> int: ...
    def kv_bytes(self, lengths: Sequence[int], itemsize: int = 2) -> int: ...
    def state_bytes(self, itemsize: int = 2) -> int: ...


# What a plan is made for
Counted = ModelConfig | OwnCounts


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted cost of one example's prefill: operations per decoder layer, what is listed apart, then bytes kept."""

    layers: tuple[int, ...]
    head: int
    scoring: int
    vision: int
    kv_bytes: int
    state_bytes: int

    @property
    def decoder(self) -> int:
        """Operations of all decoder layers and the head of the last token; scoring and vision tower not included."""
        return sum(self.layers) + self.head

    @property
    def total(self) -> int:
        """Operations from pixels to the first token: decoder, scoring and vision tower."""
        return self.decoder + self.scoring + self.vision


DEFAULT_CHUNK = 128  # where neither the caller nor the config names the SSD chunk that runs


def mamba_flops(config: ModelConfig, length: int, chunk_size: int | None = None) -> int:
    """Operations of one Mamba-2 layer over `length` tokens: projections, convolution, chunked SSD."""
    c = config
    chunk = max(1, min(chunk_size or c.chunk_size or DEFAULT_CHUNK, length))
    inner, state = c.mamba_width, c.ssm_state
    project = 2 * length * c.width * (c.in_proj_width + inner)
    conv = 2 * length * c.conv_width * c.conv_kernel
    within = 2 * length * chunk * (c.ssm_groups * state + inner)  # C B^T per group, then its product with x per head
    states = 4 * length * inner * state  # build every chunk's state, read the incoming one
    passing = 2 * -(-length // chunk) * inner * state
    return project + conv + within + states + passing


def attention_flops(config: ModelConfig, length: int) -> int:
    """Operations of one causal attention layer over `length` tokens; the two L x L products counted half."""
    c = config
    heads = c.attention_heads * c.head_dim
    project = 2 * length * c.width * (2 * heads + 2 * c.kv_heads * c.head_dim)
    return project + 2 * heads * length * length


def mlp_flops(config: ModelConfig, length: int) -> int:
    """Operations of one MLP layer over `length` tokens."""
    return (6 if config.mlp_gated else 4) * length * config.width * config.mlp_width


def moe_flops(config: ModelConfig, length: int) -> int:
    """Operations of one layer of experts over `length` tokens: router, latent projections, chosen experts, shared one."""
    c = config
    inside = c.expert_latent or c.width
    latent = 4 * c.width * c.expert_latent
    chosen = 4 * c.experts_per_token * inside * c.expert_width
    return length * (2 * c.width * c.experts + latent + chosen + 4 * c.width * c.shared_width)


def layer_flops(config: Counted, layer: int, length: int, chunk_size: int | None = None) -> int:
    """Operations of decoder layer `layer` over `length` tokens."""
    if not isinstance(config, ModelConfig):
        return config.layer_flops(layer, length, chunk_size)
    kind = config.pattern[layer]
    if kind == MAMBA:
        return mamba_flops(config, length, chunk_size)
    if kind == MOE:
        return moe_flops(config, length)
    return attention_flops(config, length) if kind == ATTENTION else mlp_flops(config, length)


def continued_flops(config: ModelConfig, layer: int, past: int, length: int, chunk_size: int | None = None) -> int:
    """Operations of decoder layer `layer` over `length` tokens that come after `past` others, which are in its cache."""
    own = layer_flops(config, layer, length, chunk_size)
    if config.pattern[layer] != ATTENTION:
        return own
    return own + 4 * config.attention_heads * config.head_dim * length * past


def decoder_flops(config: Counted, lengths: Sequence[int], chunk_size: int | None = None) -> int:
    """Operations of the decoder, head included, when layer l sees `lengths[l]` tokens (visual and text)."""
    if len(lengths) != len(config.pattern):
        raise ValueError(f"lengths must have one entry per layer: expected {len(config.pattern)}, got {len(lengths)}")
    return sum(layer_flops(config, i, n, chunk_size) for i, n in enumerate(lengths)) + head_flops(config)


def head_flops(config: Counted) -> int:
    """Operations of the language-model head for one token."""
    if not isinstance(config, ModelConfig):
        return config.head_flops()
    return 2 * config.width * config.vocab_size


def scoring_flops(config: Counted, layer: int, length: int, queries: int) -> int:
    """Operations of one layer's score over `length` tokens by `queries` rows; the linear Mamba score needs no rows."""
    c = config
    if not isinstance(c, ModelConfig):
        return c.scoring_flops(layer, length, queries)
    if c.pattern[layer] == MAMBA:
        return 4 * length * c.ssm_groups * c.ssm_state
    return 2 * length * queries * c.attention_heads * c.head_dim


def lookahead_flops(config: ModelConfig, length: int, queries: int) -> int:
    """Operations of a score by one attention layer to come: its keys of `length` tokens, its queries of `queries` rows, and
    their products twice, for the softmax's sums and for its weights, as the TPU and GPU kernels work them
    out; XLA's implementation needs them once."""
    c = config
    heads = c.attention_heads * c.head_dim
    return 2 * c.width * (length * c.kv_heads * c.head_dim + queries * heads) + 4 * length * queries * heads


def vision_flops(vision: VisionConfig, frames: int, width: int) -> int:
    """Operations of the tower and its connector over `frames` frames, into a decoder of `width`."""
    v = vision
    tokens = (v.image_size[0] // v.patch_size) * (v.image_size[1] // v.patch_size)
    if v.kind == "stem":
        side, inputs, stem = v.patch_size, 3, 0
        for channels in v.stem_channels:
            side = -(-side // 2)
            stem += 2 * tokens * side * side * 9 * inputs * channels
            inputs = channels
        stem += 2 * tokens * v.width * (side * side * inputs + width)
        return frames * stem
    rows = tokens + v.prefix_tokens
    embed = 2 * tokens * 3 * v.temporal_patch * v.patch_size**2 * v.width
    block = 2 * rows * v.width * (4 * v.width + 2 * v.mlp_width) + 4 * rows * rows * v.width
    shuffled = tokens // v.downsample**2
    connect = 2 * shuffled * v.projector_width * (v.width * v.downsample**2 + width) * (1 + len(v.deepstack))
    return frames * (embed + v.layers * block + connect)


def shrunk_vision_flops(vision: VisionConfig, frames: int, share: float, width: int) -> int:
    """Operations of the tower and its connector over frames that are scaled down to a share of their area."""
    side = (vision.image_size[0], round(vision.image_size[1] * share))
    if side[1] % (vision.patch_size * vision.downsample):
        # the same number of patches in any shape of a frame
        step = vision.patch_size * vision.downsample
        side = (step, round(share * vision.tokens_per_frame) * step)
    return vision_flops(dataclasses.replace(vision, image_size=side), frames, width)


def packed_vision_flops(vision: VisionConfig, frames: int, kept: int, width: int) -> int:
    """Operations of the tower and its connector where `kept` of the tokens of `frames` frames enter, chosen by their pixels.

    As they run, packed (hybridvlm/ops/pack.py): rows that fill a chunk up, and slots, are counted.
    """
    v = vision
    cells, patches = v.tokens_per_frame, v.downsample**2
    compared = 2 * frames * 3 * v.temporal_patch * v.image_size[0] * v.image_size[1]
    if v.kind == "stem":
        return compared + vision_flops(v, frames, width) * kept // (frames * cells)
    prefix = v.prefix_tokens if v.kind == "radio" else 0
    sizes = pack_sizes(frames, cells, kept, patches=patches, prefix=prefix, chunk_frames=CHUNK)
    embed = 2 * sizes.tokens * patches * 3 * v.temporal_patch * v.patch_size**2 * v.width
    slots = sum((high - low) * rows * rows for low, high, rows in sizes.slots)
    block = 2 * sizes.rows * v.width * (4 * v.width + 2 * v.mlp_width) + 4 * slots * v.width
    connect = 2 * sizes.tokens * v.projector_width * (v.width * patches + width) * (1 + len(v.deepstack))
    return compared + sizes.chunks * (embed + v.layers * block + connect)


def tower_attention_flops(vision: VisionConfig, frames: int) -> int:
    """Operations of the last block's attention probabilities over `frames` frames, made once more to be summed by column."""
    tokens = (vision.image_size[0] // vision.patch_size) * (vision.image_size[1] // vision.patch_size)
    rows = tokens + (vision.prefix_tokens if vision.kind == "radio" else 0)
    return 2 * frames * rows * rows * vision.width


def kv_bytes(config: Counted, lengths: Sequence[int], itemsize: int = 2) -> int:
    """Bytes of one prompt's keys and values when layer l sees `lengths[l]` tokens, `itemsize` bytes a value."""
    if not isinstance(config, ModelConfig):
        return config.kv_bytes(lengths, itemsize)
    rows = sum(n for n, kind in zip(lengths, config.pattern, strict=True) if kind == ATTENTION)
    return 2 * rows * config.kv_heads * config.head_dim * itemsize


def state_bytes(config: Counted, itemsize: int = 2) -> int:
    """Bytes of one example's SSM states (fp32) and convolution states (`itemsize` bytes a value), of any length."""
    c = config
    if not isinstance(c, ModelConfig):
        return c.state_bytes(itemsize)
    per_layer = 4 * c.mamba_width * c.ssm_state + (c.conv_kernel - 1) * c.conv_width * itemsize
    return c.count(MAMBA) * per_layer
