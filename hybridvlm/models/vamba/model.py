"""VAMBA (arXiv 2503.11579): Qwen2-VL's tower and text layers, the video in a Mamba-2 stream of its own.

The video never reads the text, so `build_video_memory` makes everything that a question needs of it once, and `prefill` takes the
memory instead of the visual tokens. This holds for dense videos and for plans that do not look at the question; a plan that does
is refused there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybridvlm import reduction as plans
from hybridvlm.config import Reduction, VambaConfig
from hybridvlm.models.media import Clip
from hybridvlm.models.nemotron_vl.model import PrefillOutput
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.models.qwen_vl import geometry
from hybridvlm.models.qwen_vl import model as qwen_vl
from hybridvlm.models.qwen_vl.model import QwenLayout, QwenVL
from hybridvlm.models.vamba.batch import Batch
from hybridvlm.models.vamba.streams import repeat_rows, text_stream, walk
from hybridvlm.nn import vamba
from hybridvlm.nn.caches import AttentionCache, MambaCache
from hybridvlm.nn.decoder import with_specs
from hybridvlm.nn.vamba import VambaDecoder, VideoMemory
from hybridvlm.nn.vamba_layers import CrossMemory
from hybridvlm.ops.ssd.api import default_choice
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.parallel.vocab import embed_tokens, project_to_vocab
from hybridvlm.reduction import methods
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.reduction.vamba import VambaReading
from hybridvlm.tokenizers.messages import Message

NAME = "vamba"
# It has the names of Qwen2-VL; hybridvlm.models.family.family_of knows it by its vision_mamba_mixer_config.
MODEL_TYPES: tuple[str, ...] = ()
Config = VambaConfig
# Its text enters no Mamba block.
METHODS = methods.AttentionMethods()
MESH_AXES = ("data", "fsdp", "sequence", "tensor")
# Parameters that every step of training holds within an interval: the reference clips the shares before they are used.
BOUNDS = {"decoder/cross/alpha": (0.0, 1.0)}
CHAT = qwen_vl.CHAT


# -- parameters ---------------------------------------------------------------------------------------------------------


class Vamba(QwenVL):
    """Parameters: those of Qwen2-VL (projector: its merger) around a decoder of two streams (nn/vamba.py)."""

    DECODER: ClassVar[type[Any]] = VambaDecoder


def init(config: VambaConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters; the gated shares start at a half, everything else random."""
    return Vamba(config).init(key)["params"]


def module(config: VambaConfig) -> Vamba:
    """The Flax module of a config: what declares its parameters."""
    return Vamba(config)


# -- from frames and words to the arrays of a bucket --------------------------------------------------------------------


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


def pixels(config: VambaConfig, clips: Sequence[Clip], frames: int) -> np.ndarray:
    """Clips, one per example, all of one size -> [B,F,t,h,w,3] uint8 tubelets for `encode`, F = `frames`, the bucket; without t
    for a tower that takes single frames."""
    tubelets = qwen_vl.pixels(config, [trim_frames(config, clip) for clip in clips], frames)
    return tubelets if config.tower.kind == "qwen" else tubelets[:, :, 0]


def make_plan(
    config: VambaConfig, reduction: Reduction | None, frames: int, text: int, itemsize: int = 2, frame_text: int = 0
) -> ReductionPlan | None:
    """The static plan for a bucket of `frames` tubelets, of the size in config.vision; one layer of the plan is one of VAMBA's.

    Raises:
        ValueError: for a reduction that drops text: here it is a stream of its own, which no drop makes shorter.
    """
    if reduction is None or reduction.method == "none" or not frames:
        return None
    if reduction.drop_text != "none":
        raise ValueError(
            f"drop_text={reduction.drop_text!r}: the text of a VAMBA is a stream of its own, beside the video, and no drop makes it "
            "shorter; leave it out"
        )
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
    return walk(params, config, batch, visual, None, plan, 0)[0]


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
        if b % memory.index.shape[0]:
            raise ValueError(
                f"prefill: {b} prompts (of a device) cannot share {memory.index.shape[0]} videos evenly; give as many questions "
                "on each video"
            )
        memory = repeat_rows(memory, b)
        text, own = vamba.prefill_text(params["decoder"], config, text, memory, decode_capacity=decode_capacity)
        given = memory.kept[0] if visual is None else jnp.sum(batch.video_segment > 0, axis=1, dtype=jnp.int32)[:, None]
    else:
        memory, read, own, given = walk(params, config, batch, visual, text, plan, decode_capacity)
        # as text was given
        assert read is not None
        text = read
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
    """How what `prefill` returns of a device's part lies on the mesh, as PartitionSpecs: by examples, after the stack of layers, the
    video by shards of its rows, and by heads, which lie side by side in its keys, or by a device's own channels."""
    batch, row, tensor = config.batch_axes, config.row_axis, config.axis
    rows, stacked, shard = P(batch), P(None, batch), P(batch, row)
    heads, keys = P(None, batch, None, tensor), P(None, batch, row, tensor)
    logits = P(batch, tensor if config.vocab_devices > 1 else None)
    stages = 1 if plan is None else 1 + len(plan.drops)
    own = with_specs(AttentionCache, heads, heads, stacked, heads, heads, stacked, P())
    stage = with_specs(CrossMemory, keys, keys, shard)
    state = with_specs(MambaCache, heads, P(None, batch, tensor), stacked)
    memory = with_specs(VideoMemory, (stage,) * stages, (state,) * stages, shard, stacked, shard, shard)
    return with_specs(
        PrefillOutput,
        logits,
        with_specs(Decoded, shard, with_specs(Caches, (own,) * stages, memory), shard, stacked),
        rows,
    )


def memory_specs(config: LocalConfig, plan: ReductionPlan | None) -> VideoMemory:
    """How what `build_video_memory` returns of a device's part lies on the mesh."""
    return output_specs(config, plan).decoder.caches.memory
