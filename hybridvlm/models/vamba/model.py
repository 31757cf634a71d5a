"""VAMBA (arXiv 2503.11579): Qwen2-VL's tower and text layers, the video in a Mamba-2 stream of its own.

The video never reads the text, so `build_video_memory` makes everything that a question needs of it once, and `prefill` takes the
memory instead of the visual tokens. This holds for dense videos and for plans that do not look at the question; a plan that does
is refused there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from hybridvlm.config import Buckets, Reduction, VambaConfig
from hybridvlm.models.media import Clip
from hybridvlm.models.nemotron_vl.model import PrefillOutput
from hybridvlm.models.nemotron_vl.rows import merged, split_attention
from hybridvlm.models.prompt import ArrayT, PromptStyle
from hybridvlm.models.qwen_vl import geometry
from hybridvlm.models.qwen_vl import model as qwen_vl
from hybridvlm.models.qwen_vl.model import QwenLayout
from hybridvlm.nn import vamba
from hybridvlm.nn.caches import AttentionCache, MambaCache
from hybridvlm.nn.decoder import with_specs
from hybridvlm.nn.vamba import VambaDecoder, VideoMemory
from hybridvlm.nn.vamba_layers import CrossMemory
from hybridvlm.ops.compact import compact
from hybridvlm.ops.ssd.api import default_choice
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.scores import reduce_scores
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.parallel.vocab import embed_tokens, project_to_vocab
from hybridvlm.reduction import methods
from hybridvlm.reduction import plan as plans
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.reduction.vamba import VambaReading
from hybridvlm.tokenizers.messages import Message
from hybridvlm.vision.model import CONNECTORS, TOWERS

NAME = "vamba"
# It has the names of Qwen2-VL; hybridvlm.models.family.family_of knows it by its vision_mamba_mixer_config.
MODEL_TYPES: tuple[str, ...] = ()
Config = VambaConfig
# Its text enters no Mamba block.
METHODS = methods.AttentionMethods()
MESH_AXES = ("data", "tensor")
CHAT = qwen_vl.CHAT


# -- parameters ---------------------------------------------------------------------------------------------------------


class Vamba(nn.Module):
    """Parameters: embed [V,D] · vision · projector (Qwen2-VL's merger) · decoder (see nn/vamba.py) · lm_head [D,V]."""

    config: VambaConfig

    @nn.compact
    def __call__(self) -> None:
        c = self.config
        self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        VambaDecoder(c, name="decoder").stacks()
        if c.vision is not None:
            TOWERS[c.vision.kind](c.vision, name="vision").parameters()
            CONNECTORS[c.vision.kind](c.vision, c.width, name="projector").parameters()
        if not c.tie_embeddings:
            dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            self.param("lm_head", dense, (c.width, c.vocab_size))


def init(config: VambaConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters; the gated shares start at a half, everything else random."""
    return Vamba(config).init(key)["params"]


def module(config: VambaConfig) -> Vamba:
    """The Flax module of a config: what declares its parameters."""
    return Vamba(config)


# -- from frames and words to the arrays of a bucket --------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[ArrayT]):
    """Prompts as arrays of one bucket, text and video apart.

    input_ids, segment [B,T] int32 (0 = padding, at the end); query [B,T] bool, the text after the last visual token.
    video_segment [B,M] int32, frame [B,M] int32 (-1 = padding) and index [B,M] int32, the position in the prompt as it is laid out.
    frame_count [B] int32: real frames of each example (of the tower: pairs of the video's).
    """

    input_ids: ArrayT
    segment: ArrayT
    query: ArrayT
    video_segment: ArrayT
    frame: ArrayT
    index: ArrayT
    frame_count: ArrayT


def style_for(config: VambaConfig) -> PromptStyle:
    """There is no text around frames: the chat template is all."""
    return PromptStyle()


def frame_size(config: VambaConfig, height: int, width: int, frames: int, kind: str = "video") -> tuple[int, int]:
    """What the frames of a clip are brought to: within config's edges, then to whole cells of the tower.

    The reference resizes twice, to the edges and then to the cells; this is the size after both, reached at once.
    """
    v = config.tower
    if kind == "video":
        scale = min(1.0, config.longest_edge / max(height, width))
        height, width = (max(config.shortest_edge, int(side * scale)) for side in (height, width))
    return geometry.smart_resize(height, width, v.patch_size * v.downsample, *config.image_pixels)


def trim_frames(config: VambaConfig, clip: Clip) -> Clip:
    """A video without the frames at its end that fill no tubelet, as the reference has it; one shorter than that stays."""
    patch = config.tower.temporal_patch
    whole = len(clip.seconds) // patch * patch
    if clip.kind == "image" or not whole or whole == len(clip.seconds):
        return clip
    return dataclasses.replace(
        clip,
        seconds=clip.seconds[:whole],
        numbers=clip.numbers[:whole],
        frames=None if clip.frames is None else clip.frames[:whole],
    )


def prompt(
    config: VambaConfig,
    tokenizer: Any,
    messages: Sequence[Message],
    clips: Sequence[Clip],
    *,
    style: PromptStyle | None = None,
    factors: tuple[int, int, int] = (1, 1, 1),
    template_options: Mapping[str, Any] | None = None,
) -> QwenLayout:
    """Lay one conversation out as Qwen2-VL's, with at most one clip; `make_batch` takes the video out of the row."""
    clips = [trim_frames(config, clip) for clip in clips]
    return qwen_vl.prompt(
        config, tokenizer, messages, clips, style=style, factors=factors, template_options=template_options
    )


def make_batch(
    config: VambaConfig,
    layouts: Sequence[QwenLayout],
    buckets: Buckets,
    factors: tuple[int, int, int] = (1, 1, 1),
) -> tuple[Batch[np.ndarray], int, int]:
    """Pad prompts to the smallest bucket that holds them all: (batch, frame bucket, text bucket)."""
    row, frames, text = qwen_vl.make_batch(config, layouts, buckets, factors)
    visual, real = row.frame >= 0, row.segment > 0
    words = np.zeros((3, len(layouts), text), np.int32)  # ids, segment, query
    slots = visual.shape[1] - text
    video = np.zeros((3, len(layouts), slots), np.int32)  # segment, frame, position in the row
    video[1:] = -1
    for i in range(len(layouts)):
        at, seen = np.flatnonzero(real[i] & ~visual[i]), np.flatnonzero(visual[i])
        last = seen[-1] if len(seen) else -1
        words[:, i, : len(at)] = row.input_ids[i, at], row.segment[i, at], at > last
        video[:, i, : len(seen)] = row.segment[i, seen], row.frame[i, seen], seen
    segment, frame, index = video
    return Batch(words[0], words[1], words[2] > 0, segment, frame, index, row.frame_count), frames, text


def pixels(config: VambaConfig, clips: Sequence[Clip], frames: int) -> np.ndarray:
    """Clips, one per example, all of one size -> [B,F,t,h,w,3] uint8 tubelets for `encode`, F = `frames`, the bucket."""
    return qwen_vl.pixels(config, [trim_frames(config, clip) for clip in clips], frames)


def make_plan(
    config: VambaConfig, reduction: Reduction | None, frames: int, text: int, itemsize: int = 2
) -> ReductionPlan | None:
    """The static plan for a bucket of `frames` tubelets, of the size in config.vision; one layer of the plan is one of VAMBA's."""
    if reduction is None or reduction.method == "none" or not frames:
        return None
    return plans.make_plan(
        reduction,
        VambaReading(config, text),
        visual_tokens=frames * config.tower.tokens_per_frame,
        text_tokens=text,
        frames=frames,
        chunk_size=config.chunk_size or default_choice().chunk_size,
        itemsize=itemsize,
    )


# -- the computation ----------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Caches:
    """What decoding needs: the text's own keys and values, and the memory that it reads and never writes."""

    own: tuple[AttentionCache, ...]
    memory: VideoMemory


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SurvivingTokens:
    """The visual tokens that the last layer reads: index [B,M], positions in the prompt, where visual [B,M]."""

    index: jax.Array
    visual: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Decoded:
    """The part of a prefill that generation and reports use; fields as in nn.decoder.DecoderOutput."""

    tokens: SurvivingTokens
    caches: Caches
    survivors: tuple[tuple[jax.Array, jax.Array], ...]
    kept: jax.Array


def text_stream(config: VambaConfig, embed: jax.Array, batch: Batch) -> Tokens:
    """The text's Tokens: positions count the text alone, and the video takes none away."""
    real = batch.segment > 0
    x = jnp.where(real[..., None], embed_tokens(config, embed, batch.input_ids), 0)
    index = jnp.broadcast_to(jnp.arange(real.shape[1], dtype=jnp.int32), real.shape)
    no = jnp.zeros(real.shape, bool)
    return Tokens(x, index, batch.segment, no, batch.query & real, index, jnp.full(real.shape, -1, jnp.int32))


def video_stream(batch: Batch, visual: jax.Array) -> Tokens:
    """The video's Tokens, of the visual tokens [B,F,m,D] as the tower gives them, those of padding frames emptied."""
    real = batch.video_segment > 0
    x = jnp.where(real[..., None], visual.reshape(*real.shape, visual.shape[-1]), 0)
    index = jnp.broadcast_to(jnp.arange(real.shape[1], dtype=jnp.int32), real.shape)
    return Tokens(x, index, batch.video_segment, real, jnp.zeros(real.shape, bool), batch.index, batch.frame)


def _prepare(
    config: VambaConfig, batch: Batch, visual: jax.Array, plan: ReductionPlan | None
) -> tuple[Tokens, jax.Array]:
    """The video as it enters layer 0, and the count of visual tokens [B,1] that it was handed."""
    frame_count = batch.frame_count
    if plan is not None and plan.pool_factors != (1, 1, 1):
        visual, frame_count = methods.merge_fn(plan)(visual, frame_count)
    visual, attention = split_attention(config, visual)
    if plan is not None and plan.drops_input:
        chosen = methods.input_selection(plan)(visual, frame_count, attention)
        visual = merged(visual, chosen)
    video = video_stream(batch, visual)
    given = jnp.sum(video.visual, axis=1, dtype=jnp.int32)[:, None]
    if plan is not None and plan.drops_input:
        score = jnp.where(video.visual, chosen.score, 0)
        video = compact(video, score, plan.keep(0, given), plan.capacities[0])
    return video, given


class _VideoRows:
    """A plan for the video's rows alone: no text stands in them."""

    def __init__(self, plan: ReductionPlan) -> None:
        self.drops, self.keep, self.row_length = plan.drops, plan.keep, lambda layer: plan.capacities[layer]


def _walk(params: dict, config: VambaConfig, batch: Batch, visual, text: Tokens | None, plan, decode_capacity: int):
    video, given = _prepare(config, batch, visual, plan)
    options: dict[str, Any] = {}
    if plan is not None:
        score_fn: Callable[..., Any] = methods.score_fn(plan)
        if isinstance(config, LocalConfig):
            score_fn = reduce_scores(score_fn, config, plan.score, getattr(score_fn, "method", None))
        options = {"plan": _VideoRows(plan), "score_fn": score_fn, "counts": given}
    return *vamba.prefill(params["decoder"], config, video, text, decode_capacity=decode_capacity, **options), given


def memory_serves(plan: ReductionPlan | None) -> bool:
    """Whether `build_video_memory` is for a plan: one that does not look at the question."""
    return plan is None or not plan.depends_on_query


def build_video_memory(
    params: dict, config: VambaConfig, batch: Batch, visual: jax.Array, plan: ReductionPlan | None = None
) -> VideoMemory:
    """All that any question needs of these videos: per layer keys and values [B,M,K*P], made once. visual [B,F,m,D].

    ValueError for a plan that keeps what the question asks for: its memory would serve that question alone.
    """
    if plan is not None and not memory_serves(plan):
        others = ", ".join(name for name in METHODS if not methods.get_method(name).depends_on_query)
        raise ValueError(
            f"build_video_memory: {plan.method!r} keeps what one question asks for, and another question needs other tokens; "
            f"prefill each question by itself, or take a plan that does not look at it ({others})"
        )
    return _walk(params, config, batch, visual, None, plan, 0)[0]


def prefill(
    params: dict,
    config: VambaConfig,
    batch: Batch,
    visual: jax.Array | VideoMemory | None,
    plan: ReductionPlan | None,
    decode_capacity: int,
    *,
    scores: bool = False,
    hidden_states: bool = False,
) -> PrefillOutput[Decoded]:
    """Prompts to last-token logits, with `decode_capacity` cache slots for new tokens.

    visual: tokens [B,F,m,D] from `encode`; or the VideoMemory that `build_video_memory` made under this plan (a batch may
    then hold several questions on each video, those on one video next to each other); or None for text alone.
    """
    if scores or hidden_states:
        raise ValueError("prefill: VAMBA's two streams return no scores and no hidden states of one row")
    text = text_stream(config, params["embed"], batch)
    b = batch.input_ids.shape[0]
    if visual is None or isinstance(visual, VideoMemory):
        if visual is not None and plan is not None and plan.depends_on_query:
            raise ValueError(f"prefill: {plan.method!r} looks at the question; give it visual tokens, not a memory")
        memory = vamba.no_video(config, b, text.x.dtype) if visual is None else visual
        if isinstance(config, LocalConfig) and memory.index.shape[0] != b:
            raise ValueError(
                f"prefill: on a mesh every prompt needs a memory of its own, got {memory.index.shape[0]} for {b} prompts a device"
            )
        text, own = vamba.prefill_text(params["decoder"], config, text, memory, decode_capacity=decode_capacity)
        given = memory.kept[0] if visual is None else jnp.sum(batch.video_segment > 0, axis=1, dtype=jnp.int32)[:, None]
    else:
        memory, text, own, given = _walk(params, config, batch, visual, text, plan, decode_capacity)
    seen = SurvivingTokens(memory.index, memory.visual)
    decoded = Decoded(seen, Caches(own, memory), memory.survivors, memory.kept)
    return PrefillOutput(_last_logits(params, config, text.x, text.segment), decoded, given)


def logits(params: dict, config: VambaConfig, x: jax.Array) -> jax.Array:
    """Final hidden states [...,D] -> logits [...,V] fp32."""
    return project_to_vocab(config, params, x)


def _last_logits(params: dict, config: VambaConfig, x: jax.Array, segment: jax.Array) -> jax.Array:
    last = jnp.maximum(jnp.sum(segment > 0, axis=1) - 1, 0)
    return logits(params, config, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0])


def make_decode_step(params: dict, config: VambaConfig) -> Callable[[jax.Array, Caches], tuple[jax.Array, Caches]]:
    """A function (token [B] int32, caches) -> (logits [B,V] fp32, caches), for the decode loop."""

    def step(token: jax.Array, caches: Caches) -> tuple[jax.Array, Caches]:
        return extend(params, config, token[:, None], jnp.ones((token.shape[0], 1), jnp.int32), caches)

    return step


def extend(
    params: dict, config: VambaConfig, ids: jax.Array, segment: jax.Array, caches: Caches
) -> tuple[jax.Array, Caches]:
    """More text on what the caches hold: ids, segment [B,T] -> logits [B,V] after the last real id, and the longer caches."""
    x = embed_tokens(config, params["embed"], ids)
    x, own = vamba.extend(params["decoder"], config, x, segment, caches.own, caches.memory)
    return _last_logits(params, config, x, segment), Caches(own, caches.memory)


def output_specs(config: LocalConfig, plan: ReductionPlan | None = None) -> PrefillOutput[Decoded]:
    """How what `prefill` returns of a device's part lies on the mesh, as PartitionSpecs: by rows, behind the stack of layers,
    and by heads, which lie side by side in the video's keys, or by a device's own channels."""
    rows, stacked, tensor = P(config.batch_axes), P(None, config.batch_axes), config.axis
    heads = P(None, config.batch_axes, None, tensor)
    logits = P(config.batch_axes, tensor if config.vocab_devices > 1 else None)
    stages = 1 if plan is None else 1 + len(plan.drops)
    own = with_specs(AttentionCache, heads, heads, stacked, heads, heads, stacked, P())
    stage = with_specs(CrossMemory, heads, heads, rows)
    state = with_specs(MambaCache, heads, P(None, config.batch_axes, tensor), stacked)
    memory = with_specs(VideoMemory, (stage,) * stages, (state,) * stages, rows, stacked, rows, rows)
    return with_specs(
        PrefillOutput,
        logits,
        with_specs(Decoded, rows, with_specs(Caches, (own,) * stages, memory), rows, stacked),
        rows,
    )


def memory_specs(config: LocalConfig, plan: ReductionPlan | None) -> VideoMemory:
    """How what `build_video_memory` returns of a device's part lies on the mesh."""
    return output_specs(config, plan).decoder.caches.memory
