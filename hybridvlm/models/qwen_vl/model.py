"""Qwen2-VL (arXiv 2409.12191) and Qwen3-VL (arXiv 2511.21631): a rotary ViT, a merger, and a Transformer with M-RoPE.

They are the Transformers that the hybrids are measured against: the same decoder walk, plans, scores and caches, with a pattern of
"*-" per layer. A visual token's position is (time, row, column), made with the prompt and carried through every reduction in
Tokens.position; Qwen3-VL's DeepStack planes travel after the visual tokens and then in Tokens.extra.

A frame of the decoder is a tubelet, two frames of the video.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from hybridvlm import reduction as plans
from hybridvlm.config import Buckets, ModelConfig, QwenConfig, Reduction
from hybridvlm.models import prompt as prompts
from hybridvlm.models.media import Clip, resize
from hybridvlm.models.nemotron_vl import model as nemotron_vl
from hybridvlm.models.nemotron_vl import passes
from hybridvlm.models.nemotron_vl.model import PrefillOutput
from hybridvlm.models.nemotron_vl.rows import token_rows, visual_rows
from hybridvlm.models.prompt import ArrayT, Batch, Layout, Pieces
from hybridvlm.models.qwen_vl.geometry import _grid, frame_size, rope_positions
from hybridvlm.nn import incremental
from hybridvlm.nn.caches import Cache
from hybridvlm.nn.decoder import Decoder, DecoderOutput, deepstack_key, with_specs
from hybridvlm.nn.incremental import decode_layers
from hybridvlm.nn.prefix import Prefix
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.sequence import own_shard
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.parallel.vocab import embed_tokens
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.tokenizers.messages import Message
from hybridvlm.tokenizers.text import trusted
from hybridvlm.vision.model import CONNECTORS, TOWERS

NAME = "qwen_vl"
MODEL_TYPES = ("qwen2_vl", "qwen3_vl", "Qwen2VLForConditionalGeneration", "Qwen3VLForConditionalGeneration")
Config = QwenConfig
METHODS = None
MESH_AXES = ("data", "fsdp", "sequence", "tensor")
CHAT = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_3 = (  # without the system message that Qwen2-VL puts where there is none
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"


# -- parameters ---------------------------------------------------------------------------------------------------------


class QwenVL(nn.Module):
    """Parameters: embed [V,D] · vision · projector (both in vision/qwen_vit.py) · decoder · lm_head [D,V] (absent if tied)."""

    config: QwenConfig
    # what declares the decoder's parameters
    DECODER: ClassVar[type[Any]] = Decoder

    @nn.compact
    def __call__(self) -> None:
        c = self.config
        self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        self.DECODER(c, name="decoder").stacks()
        if c.vision is not None:
            TOWERS[c.vision.kind](c.vision, name="vision").parameters()
            CONNECTORS[c.vision.kind](c.vision, c.width, name="projector").parameters()
        if not c.tie_embeddings:
            dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            self.param("lm_head", dense, (c.width, c.vocab_size))


def style_for(config: QwenConfig) -> prompts.PromptStyle:
    """There is no style to choose: the chat template, and Qwen3-VL's times, are all the text there is."""
    return prompts.PromptStyle()


def module(config: QwenConfig) -> QwenVL:
    """The Flax module of a config."""
    return QwenVL(config)


def init(config: QwenConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh random parameters."""
    return QwenVL(config).init(key)["params"]


# -- prompts (host) -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QwenLayout(Layout):
    """A Layout with every token's position [L,3] int32 (time, row, column; three equal ones for text) and the grid, in
    visual tokens, of its frames ((0, 0) without any)."""

    position: np.ndarray
    grid: tuple[int, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QwenBatch(Batch[ArrayT]):
    """A Batch with position [B,L,3] int32."""

    position: ArrayT


def prompt(
    config: QwenConfig,
    tokenizer: Any,
    messages: Sequence[Message],
    clips: Sequence[Clip],
    *,
    style: Any = None,
    factors: tuple[int, int, int] = (1, 1, 1),
    template_options: Mapping[str, Any] | None = None,
) -> QwenLayout:
    """Lay one conversation out, with at most one clip in it, or the pieces of one video with text between them.

    factors: (frames, rows, columns) that an average-pooling plan makes one. `style` has no part here: the chat template and, for
    Qwen3-VL, the frames' times are all the text there is around a question. template_options: further variables of that template.
    """
    if len(clips) > 1 and not all(_continues(*pair) for pair in itertools.pairwise(clips)):
        raise ValueError(
            f"a prompt of this family takes one video or image, got {len(clips)}; ask about them one by one"
        )
    pieces, pending, grid = Pieces(tokenizer), trusted(""), (0, 0)
    times = config.generation == 3
    # a closed vocabulary, of a model that knows no conversation, has no such tokens
    opening, closing = (trusted(mark if hasattr(tokenizer, "chat") else "") for mark in (VISION_START, VISION_END))

    def frames(clip: Clip) -> None:
        """Text runs are tokenised whole, from one run of visual tokens to the next, as the published processors do."""
        nonlocal pending, grid
        rows, cols = _grid(config, clip)
        if rows % factors[1] or cols % factors[2]:
            raise ValueError(f"a grid of {rows}x{cols} tokens cannot be pooled by {factors[1]}x{factors[2]}")
        grid = rows // factors[1], cols // factors[2]
        patch = config.tower.temporal_patch
        starts = range(0, len(clip.seconds), patch)
        if not times or clip.kind == "image":
            pieces.text(pending + opening)
        for number in range(0, len(starts), factors[0]):
            if times and clip.kind == "video":
                first, last = starts[number], min(starts[number] + patch, len(clip.seconds)) - 1
                mean = (clip.seconds[first] + clip.seconds[last]) / 2
                # of the first frame it is one text with what stands before the video
                own = pieces.frames if number else None
                pieces.text(pending + trusted(f"<{mean:.1f} seconds>") + opening, own)
                pending = closing
            pieces.visual(grid[0] * grid[1], min(factors[0], len(starts) - number))
        pending = closing

    for part in prompts.render(tokenizer, messages, CHAT_3 if times else CHAT, template_options=template_options):
        if isinstance(part, int):
            if part >= len(clips):
                raise ValueError(f"the messages name {part + 1} videos or images, but {len(clips)} clips were given")
            frames(clips[part])
        else:
            pending += part
    pieces.text(pending)
    layout = pieces.layout()
    position = rope_positions(layout.frame, grid, factors, apart=times)
    return QwenLayout(layout.ids, layout.frame, layout.frames, position, grid)


def _continues(clip: Clip, following: Clip) -> bool:
    """Whether one clip is the next piece of the video that another one is a piece of."""
    alike = clip.kind == following.kind == "video" and clip.size == following.size
    return alike and following.seconds[0] > clip.seconds[-1]


def make_batch(
    config: QwenConfig,
    layouts: Sequence[QwenLayout],
    buckets: Buckets,
    factors: tuple[int, int, int] = (1, 1, 1),
) -> tuple[QwenBatch[np.ndarray], int, int]:
    """Pad prompts to the smallest bucket that holds them all: (batch, frame bucket, text bucket).

    factors: as the prompts were laid out with. ValueError if frames are not of one size in all of them, or a prompt is over the
    largest bucket.
    """
    if not layouts:
        raise ValueError("make_batch needs at least one prompt, got none")
    grids = sorted({item.grid for item in layouts if item.frames})
    if len(grids) > 1:
        sizes = ", ".join(f"{rows}x{cols}" for rows, cols in grids)
        raise ValueError(
            f"clips of one batch must have one grid of visual tokens, got {sizes}; ask in separate batches"
        )
    m = grids[0][0] * grids[0][1] if grids else 0
    batch, frames, text = prompts.make_batch(layouts, buckets, m, factors[0])
    position = np.zeros((*batch.segment.shape, 3), np.int32)
    for row, item in enumerate(layouts):
        position[row, : len(item.ids)] = item.position
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return QwenBatch(**fields, position=position), frames, text


def pixels(config: QwenConfig, clips: Sequence[Clip], frames: int) -> np.ndarray:
    """Clips, one per example, all of one size -> [B,F,t,h,w,3] uint8 tubelets for `encode`, F = `frames`, the bucket.

    The last frame is repeated to fill its tubelet, and tubelets after the last one are black and never read.
    """
    patch = config.tower.temporal_patch
    sized = []
    for clip in clips:
        if clip.frames is None:
            raise ValueError("pixels: a clip has no frames; a layout can be made without them, its pixels cannot")
        if clip.kind == "image":
            height, width = clip.frames.shape[1:3]
            sized.append(resize(clip.frames, frame_size(config, height, width, 1, "image")))
        else:
            sized.append(clip.frames)
    sizes = sorted({array.shape[1:3] for array in sized})
    if len(sizes) > 1:
        raise ValueError(f"clips of one batch must be of one size, got {sizes}; resize them alike or ask separately")
    out = np.zeros((len(sized), frames * patch, *sizes[0], 3), np.uint8)
    for row, array in enumerate(sized):
        whole = -(-len(array) // patch) * patch
        if whole > frames * patch:
            raise ValueError(f"a clip of {len(array)} frames is over its bucket of {frames} x {patch} frames")
        out[row, : len(array)] = array
        out[row, len(array) : whole] = array[-1]
    return out.reshape(len(sized), frames, patch, *sizes[0], 3)


def make_plan(
    config: QwenConfig, reduction: Reduction | None, frames: int, text: int, itemsize: int = 2, frame_text: int = 0
) -> ReductionPlan | None:
    """The static plan for a bucket of `frames` tubelets, of the size in config.vision; None when there is nothing to reduce."""
    if reduction is None or reduction.method == "none" or not frames:
        return None
    return plans.make_plan(
        reduction,
        config,
        visual_tokens=frames * config.tower.tokens_per_frame,
        text_tokens=text,
        frames=frames,
        itemsize=itemsize,
        frame_text=frame_text,
    )


# -- computation (traced) -----------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QwenCaches:
    """layers: one cache per decoder layer; position [B] int32: of the next token, on all three axes."""

    layers: tuple[Cache, ...]
    position: jax.Array


def encode(
    params: Mapping[str, Any],
    config: QwenConfig,
    pixels: jax.Array,
    attention: bool = False,
    keep: PixelSelection | None = None,
    frame_count: jax.Array | None = None,
) -> jax.Array:
    """Tubelets [B,F,t,h,w,3] uint8 -> visual tokens [B,F,m,D * (1 + planes)], each token's DeepStack planes after it."""
    return nemotron_vl.encode(params, config, pixels, attention, keep, frame_count)


def assemble(config: ModelConfig, embed: jax.Array, batch: QwenBatch, visual: jax.Array | None) -> Tokens:
    """A batch and its visual tokens as one row: with M-RoPE positions, and the planes in Tokens.extra."""
    rows = None if visual is None else visual_rows(config, batch, visual)
    whole = token_rows(config, embed, batch, None if rows is None else rows[..., : config.width])
    extra = {}
    if rows is not None:
        planes = rows.shape[-1] // config.width - 1
        for k in range(min(planes, config.count("*"))):  # of more planes than layers the last go nowhere
            plane = rows[..., (k + 1) * config.width : (k + 2) * config.width].astype(whole.x.dtype)
            extra[deepstack_key(2 * k + 1)] = plane  # after the MLP of published layer k
    return whole.replace(position=own_shard(config, jnp.asarray(batch.position)), extra=extra)


def embed_prompt(params: Mapping[str, Any], config: QwenConfig, batch: QwenBatch, visual: jax.Array | None) -> Tokens:
    """Prompts as layer 0 of a dense pass sees them, with M-RoPE positions and DeepStack planes."""
    return assemble(config, params["embed"], batch, visual)


def decoder_output(
    params: Mapping[str, Any],
    config: QwenConfig,
    batch: QwenBatch,
    visual: jax.Array | None,
    plan: ReductionPlan | None,
    **options: Any,
) -> tuple[DecoderOutput[tuple[Cache, ...]], jax.Array]:
    """As `nemotron_vl.decoder_output`, with M-RoPE positions and DeepStack planes."""
    return passes.decoder_output(params, config, batch, visual, plan, assemble_fn=assemble, **options)


def build_video_memory(
    params: Mapping[str, Any], config: QwenConfig, batch: QwenBatch, visual: jax.Array, plan: ReductionPlan | None
) -> Prefix:
    """As `nemotron_vl.build_video_memory`, with M-RoPE positions and DeepStack planes: those before the first drop are added."""
    return passes.build_video_memory(params, config, batch, visual, plan, assemble)


def prefill(
    params: Mapping[str, Any],
    config: QwenConfig,
    batch: QwenBatch,
    visual: jax.Array | Prefix | None,
    plan: ReductionPlan | None,
    decode_capacity: int,
    *,
    scores: bool = False,
    hidden_states: bool = False,
) -> PrefillOutput[DecoderOutput[QwenCaches]]:
    """Prompts to last-token logits [B,V] fp32 under a plan (None: dense), and QwenCaches with `decode_capacity` for new tokens.

    With a Prefix for `visual`, of `build_video_memory`, the batch is the rest of the prompts alone.
    """
    done = nemotron_vl.prefill(
        params,
        config,
        batch,
        visual,
        plan,
        decode_capacity,
        assemble,
        scores=scores,
        hidden_states=hidden_states,
    )
    real = (jnp.asarray(batch.segment) > 0)[..., None]
    following = jnp.max(jnp.where(real, batch.position, -1), axis=(1, 2)) + 1
    fields = {field.name: getattr(done.decoder, field.name) for field in dataclasses.fields(done.decoder)}
    caches = QwenCaches(done.decoder.caches, following)
    return PrefillOutput(done.logits, DecoderOutput(**(fields | {"caches": caches})), done.counts)


def make_decode_step(
    params: Mapping[str, Any], config: QwenConfig
) -> Callable[[jax.Array, QwenCaches], tuple[jax.Array, QwenCaches]]:
    """The decode step: (token [B] int32, caches) -> (logits [B,V] fp32, caches one token longer)."""
    layers, norm_f = decode_layers(params["decoder"], config), params["decoder"]["norm_f"]

    def one(token: jax.Array, caches: QwenCaches) -> tuple[jax.Array, QwenCaches]:
        x = embed_tokens(config, params["embed"], token)[:, None]
        x, longer = incremental.step(layers(), norm_f, config, x, caches.layers, caches.position[:, None])
        return nemotron_vl.head(params, config, x[:, 0]), QwenCaches(longer, caches.position + 1)

    return one


def extend(
    params: Mapping[str, Any], config: QwenConfig, ids: jax.Array, segment: jax.Array, caches: QwenCaches
) -> tuple[jax.Array, QwenCaches]:
    """Text after what the caches hold: ids and segment [B,T] (0 = padding at the end) -> logits [B,V] after the last real id."""
    real = segment > 0
    count = jnp.sum(real, axis=1, dtype=jnp.int32)
    position = caches.position[:, None] + jnp.arange(ids.shape[1], dtype=jnp.int32)
    x = jnp.where(real[..., None], embed_tokens(config, params["embed"], ids), 0)
    x, longer = incremental.extend(params["decoder"], config, x, segment, caches.layers, position)
    last = jnp.take_along_axis(x, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
    return nemotron_vl.head(params, config, last), QwenCaches(longer, caches.position + count)


def output_specs(config: LocalConfig, plan: ReductionPlan | None = None) -> PrefillOutput[DecoderOutput[Any]]:
    """How what `prefill` returns of a device's part lies on the mesh, as PartitionSpecs."""
    specs = nemotron_vl.output_specs(config, plan)
    caches = with_specs(QwenCaches, specs.decoder.caches, P(config.batch_axes))
    return dataclasses.replace(specs, decoder=dataclasses.replace(specs.decoder, caches=caches))
