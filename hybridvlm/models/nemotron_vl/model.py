"""The Nemotron VL family: RADIO tower, pixel shuffle, projector, Mamba-2/attention decoder, with experts in Nemotron 3 Omni.

The text models Nemotron-H and Mamba-2 are the same without the tower, and the tiny embedded model is the same with a
convolutional stem for a tower. Below the module stand the functions that `hybridvlm.models.family.Family` lists.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from hybridvlm import sharding
from hybridvlm.config import MIXERS, Buckets, ModelConfig, Reduction, ScoreOptions
from hybridvlm.models.media import Clip, cut_tiles, image_grid, resize, tile_count, video_grid
from hybridvlm.models.nemotron_vl.rows import assemble, merged, split_attention, visual_positions
from hybridvlm.models.prompt import Batch, Layout, Pieces, PromptStyle, render, video_pieces
from hybridvlm.models.prompt import make_batch as pad_layouts
from hybridvlm.nn import decoder
from hybridvlm.nn.caches import Cache
from hybridvlm.nn.decoder import Decoder, DecoderOutput, decode_layers, visual_counts, with_specs
from hybridvlm.ops.ssd.api import default_choice
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.frames import frame_numbers, gather_frames
from hybridvlm.parallel.scores import reduce_scores
from hybridvlm.parallel.sequence import (
    compact_row,
    gather_sequence,
    own_stretch,
    pick_rows,
    row_total,
    sequence_shards,
)
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.parallel.vocab import embed_tokens, project_to_vocab
from hybridvlm.reduction import methods
from hybridvlm.reduction import plan as plans
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.tokenizers.messages import Message
from hybridvlm.vision import Connector, RadioTower, StemTower, encode_frames

NAME = "nemotron_vl"
MODEL_TYPES = (
    "NemotronH_Nano_VL_V2",
    "NemotronH_Omni_Reasoning_V3",
    "nemotron_h_omni",
    "NemotronHForCausalLM",
    "nemotron_h",
    "Mamba2ForCausalLM",
    "mamba2",
)
Config = ModelConfig
# every method: its text is a part of the row that every layer sees
METHODS = None
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

_IMAGE = {"image": "<img>", "after_image": "</img>"}
_STAMP = "Frame {number} sampled at {seconds:.2f} seconds"
# The engines disagree about the text around frames: "training" is what the model was trained on
STYLES = {
    "training": PromptStyle("This is a video:\n", _STAMP, "</img>\n", opening=": <img>", **_IMAGE),
    "tensorrt": PromptStyle("This is a video:\n", _STAMP, "</img>", opening=": <img>", **_IMAGE),
    "vllm": PromptStyle("", _STAMP, "</img>", opening=": <img>", between="\n", **_IMAGE),
    "omni": PromptStyle(
        "",
        _STAMP,
        "</img>",
        also=" and frame {number} sampled at {seconds:.2f} seconds",
        opening=": <img>",
        between="\n",
        **_IMAGE,
    ),
}

# As published with the 12B model: "/think" and "/no_think" switch reasoning and are taken out of the text
CHAT = """{%- set say = namespace(think=true, system='') -%}
{%- for message in messages if message.role != 'assistant' -%}
{%- if '/no_think' in message.content -%}{%- set say.think = false -%}
{%- elif '/think' in message.content -%}{%- set say.think = true -%}{%- endif -%}
{%- if message.role == 'system' -%}
{%- set say.system = message.content.replace('/no_think', '').replace('/think', '').strip() -%}
{%- endif -%}
{%- endfor -%}
{{- '<SPECIAL_10>System\n' + say.system + '\n' -}}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<SPECIAL_11>User\n' + message.content.replace('/no_think', '').replace('/think', '').strip() + '\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<SPECIAL_11>Assistant\n' + message.content.split('</think>')[-1].strip() + '\n<SPECIAL_12>\n' -}}
{%- endif -%}
{%- endfor -%}
{{- '<SPECIAL_11>Assistant\n' + ('<think>\n' if say.think else '<think></think>') -}}"""


def style_for(config: ModelConfig) -> PromptStyle:
    """The text around the frames that models of this config were trained on."""
    if config.vision is None:
        return PromptStyle()
    return STYLES["omni" if config.vision.temporal_patch > 1 else "training"]


def module(config: ModelConfig) -> HybridVLM:
    """The Flax module of a config."""
    return HybridVLM(config)


def init(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Random parameters, as the module declares them."""
    row = jnp.zeros((1, 1 if config.vision is None else config.vision.tokens_per_frame), jnp.int32)
    batch = Batch(input_ids=row, segment=row, frame=row, frame_count=row[0, :1])
    pixels = None if config.vision is None else jnp.zeros((1, 1, *config.vision.image_size, 3), jnp.uint8)
    return HybridVLM(config).init(key, batch, pixels)["params"]


class HybridVLM(nn.Module):
    """Parameters: embed [V,D] · vision · projector · decoder · lm_head [D,V] (absent with tied embeddings)."""

    config: ModelConfig

    def setup(self):
        c = self.config
        self.embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.width))
        self.decoder = Decoder(c)
        if c.vision is not None:
            self.vision = (RadioTower if c.vision.kind == "radio" else StemTower)(c.vision)
            self.projector = Connector(c.vision, c.width)
        if not c.tie_embeddings:
            dense = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
            self.lm_head = self.param("lm_head", dense, (c.width, c.vocab_size))

    def __call__(self, batch: Batch, pixels: jax.Array | None = None) -> jax.Array:
        """Logits [B,L,V] fp32 of whole prompts, nothing dropped; pixels [B,F,h,w,3] uint8, or None for plain text."""
        visual = None if pixels is None else self.encode(pixels)
        return self.logits(self.decoder(assemble(self.config, self.embed, batch, visual)).tokens.x)

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Frames [B,F,h,w,3] uint8, or groups of frames that make one patch [B,F,t,h,w,3] -> visual tokens [B,F,m,D]."""
        params = {"vision": self.vision.parameters(), "projector": self.projector.parameters(), "embed": self.embed}
        return encode(params, self.config, pixels)

    def logits(self, x: jax.Array) -> jax.Array:
        """Final hidden states [...,D] -> logits [...,V] fp32."""
        return head({"embed": self.embed} if self.config.tie_embeddings else {"lm_head": self.lm_head}, self.config, x)


AssembleFn = Callable[[ModelConfig, jax.Array, Any, jax.Array | None], Tokens]
DecodedT = TypeVar("DecodedT")  # a DecoderOutput, or a family's own with the same fields as far as they are used


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillOutput(Generic[DecodedT]):
    """logits [B,V] fp32 after each example's last token; decoder: caches, survivors, kept; counts [B,1] visual tokens given."""

    logits: jax.Array
    decoder: DecodedT
    counts: jax.Array


# -- from frames and words to the arrays of a bucket --------------------------------------------------------------------


def frame_size(config: ModelConfig, height: int, width: int, frames: int, kind: str) -> tuple[int, int]:
    """(height, width) of the frames that the tower sees of a source of this size (of each tile, for an image in tiles)."""
    v = config.tower
    if kind == "video" and v.video_patches:
        grid = video_grid(height, width, v.downsample, v.video_patches)
    elif kind == "image" and v.image_patches[1]:
        grid = image_grid(height, width, v.patch_size, v.downsample, *v.image_patches)
    else:
        return v.image_size
    return grid[0] * v.patch_size, grid[1] * v.patch_size


def prompt(
    config: ModelConfig,
    tokenizer: Any,
    messages: Sequence[Message],
    clips: Sequence[Clip],
    *,
    style: PromptStyle | None = None,
    factors: tuple[int, int, int] = (1, 1, 1),
    template_options: Mapping[str, Any] | None = None,
) -> Layout:
    """Messages and their clips, in order, as one prompt. factors: (frames, rows, columns) that an avgpool plan merges into one.

    template_options: further variables of the chat template.
    """
    pieces = Pieces(tokenizer)
    style = style_for(config) if style is None else style
    for part in render(tokenizer, messages, CHAT, template_options=template_options):
        if isinstance(part, str):
            pieces.text(part)
            continue
        clip, v = clips[part], config.tower
        tokens = v.tokens_per_frame // (factors[1] * factors[2])
        if clip.kind == "video":
            video_pieces(pieces, clip.seconds, tokens, style, patch=v.temporal_patch, group=factors[0])
            continue
        tiles = tile_count(*clip.size, v.image_size, v.max_tiles) if v.max_tiles else 1
        pieces.text(style.image)
        for start in range(0, tiles, factors[0]):
            pieces.visual(tokens, min(factors[0], tiles - start))
        pieces.text(style.after_image)
    return pieces.layout()


def make_batch(
    config: ModelConfig, layouts: Sequence[Layout], buckets: Buckets, factors: tuple[int, int, int] = (1, 1, 1)
) -> tuple[Batch, int, int]:
    """Prompts as the arrays of the smallest bucket: (batch, frame bucket, text bucket)."""
    tokens = 0 if config.vision is None else config.vision.tokens_per_frame // (factors[1] * factors[2])
    return pad_layouts(layouts, buckets, tokens, factors[0])


def pixels(config: ModelConfig, clips: Sequence[Clip], frames: int) -> np.ndarray:
    """What `encode` takes of one clip per example: uint8 [B,frames,h,w,3], or [B,frames,t,h,w,3] where t frames make a patch."""
    v = config.tower
    rows = []
    for clip in clips:
        shown = clip.frames
        if shown is None:
            raise ValueError("pixels: a clip has no frames; a layout can be made without them, its pixels cannot")
        if clip.kind == "image":
            shown = cut_tiles(shown[0], v.image_size, v.max_tiles) if v.max_tiles else resize(shown, v.image_size)
        elif v.temporal_patch > 1:
            missing = -len(shown) % v.temporal_patch
            shown = np.concatenate([shown, np.repeat(shown[-1:], missing, axis=0)])
            shown = shown.reshape(-1, v.temporal_patch, *shown.shape[1:])
        if len(shown) > frames:
            raise ValueError(
                f"{len(shown)} {'tiles of an image' if clip.kind == 'image' else 'frames of a clip'} do not fit the bucket of {frames}"
            )
        rows.append(np.concatenate([shown, np.zeros((frames - len(shown), *shown.shape[1:]), np.uint8)]))
    return np.stack(rows)


def make_plan(
    config: ModelConfig, reduction: Reduction, frames: int, text: int, itemsize: int = 2
) -> ReductionPlan | None:
    """The static plan of a reduction for a bucket; None when there is nothing to reduce."""
    if reduction.method == "none" or not frames:
        return None
    return plans.make_plan(
        reduction,
        config,
        visual_tokens=frames * config.tower.tokens_per_frame,
        text_tokens=text,
        frames=frames,
        chunk_size=config.chunk_size or default_choice().chunk_size,
        itemsize=itemsize,
    )


# -- the computation ----------------------------------------------------------------------------------------------------


def encode(params: Mapping[str, Any], config: ModelConfig, pixels: jax.Array, attention: bool = False) -> jax.Array:
    """Frames, as `pixels` gives them, -> visual tokens [B,F,m,D]; with `attention` also the tower's, see `encode_frames`."""
    b, f = pixels.shape[:2]
    scaled = pixels.reshape(b * f, *pixels.shape[2:]).astype(jnp.float32) / 255
    frame = jnp.tile(frame_numbers(config, f), b)
    visual = encode_frames(params, config.tower, scaled, frame, dtype=params["embed"].dtype, attention=attention)
    return gather_frames(config, visual.reshape(b, f, *visual.shape[1:]))


def embed_prompt(params: Mapping[str, Any], config: ModelConfig, batch: Batch, visual: jax.Array | None) -> Tokens:
    """Prompts as layer 0 of a dense pass sees them; visual [B,F,m,D], or None for text alone."""
    return assemble(config, params["embed"], batch, visual)


def decoder_output(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Batch,
    visual: jax.Array | None,
    plan: ReductionPlan | None,
    *,
    decode_capacity: int = 0,
    assemble_fn: AssembleFn = assemble,
    mesh: Mesh | None = None,
    question: jax.Array | None = None,
    segments: int = 1,
    score_fn: methods.ScoreFn | None = None,
    **options: Any,
) -> tuple[DecoderOutput[tuple[Cache, ...]], jax.Array]:
    """Embeddings through the decoder under a plan (None: dense): its output, and the visual tokens given, counts [B,S].

    Args:
        params: of the model.
        config: of the family.
        batch: laid out for this plan: with average pooling it has the pooled number of visual tokens.
        visual: [B,F,m,D], or None for text alone.
        plan: what is dropped where.
        decode_capacity: cache slots for new tokens.
        assemble_fn: how embeddings, batch and visual tokens become one row; a family whose visual tokens carry more after
            their first D values has its own.
        mesh: for training, the devices that `params` are cut over; inside a program over a mesh `config` is a device's part.
        question: [B,L] bool, the text that says what matters, where that is not simply all after the last visual token, as
            in rows that hold answers or several packed samples.
        segments: S, samples packed in a row.
        score_fn: instead of the plan's own.
        options: as of `nn.decoder.prefill`.
    """
    counts = None
    frame_count = batch.frame_count
    if visual is not None and plan is not None and plan.input_method != "none":
        # what merges or ranks before the decoder looks at the whole video
        visual = gather_sequence(config, visual)
    if segments > 1 and plan is not None and plan.input_method != "none":
        raise ValueError(
            f"{plan.input_method} works on one video a row, and rows pack up to {segments}; use segments=1"
        )
    if plan is not None and plan.pool_factors != (1, 1, 1):
        visual, frame_count = methods.merge_fn(plan)(_needed(plan, visual), frame_count)
    if plan is not None and plan.drops_input:
        visual, attention = split_attention(config, _needed(plan, visual))
        chosen = methods.input_selection(plan)(visual[..., : config.width], frame_count, attention)
        visual = merged(visual, chosen)
    if visual is not None and plan is not None and plan.input_method != "none":
        visual = own_stretch(config, visual.reshape(visual.shape[0], -1, 1, visual.shape[-1]))
    tokens = assemble_fn(config, params["embed"], batch, visual)
    if question is not None:
        tokens = tokens.replace(query=question & (tokens.segment > 0) & ~tokens.visual)
    if plan is not None:
        tokens = _prepared(config, plan, tokens, segments)
    text = tokens.length * sequence_shards(config)
    given = row_total(config, visual_counts(tokens, segments))
    if plan is not None:
        score_fn = methods.score_fn(plan, segments=segments) if score_fn is None else score_fn
        counts, text = given, plan.text_tokens
        if plan.drops_input:
            is_visual, order = visual_positions(batch)
            ranks = jnp.take_along_axis(chosen.score, jnp.minimum(order, chosen.score.shape[1] - 1), axis=1)
            score = own_stretch(config, jnp.where(is_visual, ranks, 0))
            tokens = compact_row(config, tokens, score, plan.keep(0, given), plan.row_length(0))
    if isinstance(config, LocalConfig) and score_fn is not None:
        options_of_score = ScoreOptions() if plan is None else plan.score
        score_fn = reduce_scores(score_fn, config, options_of_score, getattr(score_fn, "method", None))
    run = decoder.prefill if mesh is None else functools.partial(sharding.prefill, mesh=mesh)
    options = {
        "decode_capacity": decode_capacity,
        "query_capacity": text,
        "counts": counts,
        "segments": segments,
    } | options
    return run(params["decoder"], config, tokens, plan=plan, score_fn=score_fn, **options), given


def _prepared(config: ModelConfig, plan: ReductionPlan, tokens: Tokens, segments: int) -> Tokens:
    """Tokens with what the plan's method needs to know of layer 0."""
    prepare = methods.get_method(plan.decoder_method).prepare
    if prepare is None:
        return tokens
    row = jax.tree.map(lambda a: gather_sequence(config, a), tokens)
    extra = {name: own_stretch(config, array) for name, array in prepare(row, plan, segments).items()}
    return tokens.replace(extra=tokens.extra | extra)


def _needed(plan: ReductionPlan, visual: jax.Array | None) -> jax.Array:
    if visual is None:
        raise ValueError(
            f"{plan.input_method} reduces visual tokens, and there are none; pass plan=None for text alone"
        )
    return visual


def prefill(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Batch,
    visual: jax.Array | None,
    plan: ReductionPlan | None,
    decode_capacity: int,
    assemble_fn: AssembleFn = assemble,
    *,
    scores: bool = False,
    hidden_states: bool = False,
) -> PrefillOutput[DecoderOutput[tuple[Cache, ...]]]:
    """Embeddings to last-token logits under a plan (None: dense); arguments as of `decoder_output`.

    scores: those of every mixer layer come out in `decoder.scores`. hidden_states: the residual stream after every layer comes out
    in `decoder.hidden_states`.
    """
    options: dict[str, Any] = {"decode_capacity": decode_capacity, "assemble_fn": assemble_fn}
    if scores:
        options["collect"] = tuple(layer for layer, kind in enumerate(config.pattern) if kind in MIXERS)
        if plan is None:
            options["score_fn"] = methods.layer_score
    if hidden_states:
        options["hidden_states"] = tuple(range(len(config.pattern)))
    out, given = decoder_output(params, config, batch, visual, plan, **options)
    last = jnp.maximum(row_total(config, jnp.sum(out.tokens.segment > 0, axis=1)) - 1, 0)[:, None]
    x = pick_rows(config, out.tokens.x, last, jnp.ones(last.shape, bool))[:, 0]
    return PrefillOutput(head(params, config, x), out, given)


def head(params: Mapping[str, Any], config: ModelConfig, x: jax.Array) -> jax.Array:
    """Final hidden states [...,D] -> logits [...,V] fp32; of a device's part those of its own tokens."""
    return project_to_vocab(config, params, x)


def make_decode_step(
    params: Mapping[str, Any], config: ModelConfig
) -> Callable[[jax.Array, tuple[Cache, ...]], tuple[jax.Array, tuple[Cache, ...]]]:
    """A function from the next token [B] and the caches to logits [B,V] and the caches, one token longer."""
    layers = decode_layers(params["decoder"], config)

    def one(token: jax.Array, caches: tuple[Cache, ...]) -> tuple[jax.Array, tuple[Cache, ...]]:
        x = embed_tokens(config, params["embed"], token)[:, None]
        x, caches = decoder.step(layers(), params["decoder"]["norm_f"], config, x, caches)
        return head(params, config, x[:, 0]), caches

    return one


def extend(
    params: Mapping[str, Any], config: ModelConfig, ids: jax.Array, segment: jax.Array, caches: tuple[Cache, ...]
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Text after what the caches hold: ids and segment [B,T] (0 = padding, at the end) -> logits [B,V] after the last, caches."""
    x = jnp.where(segment[..., None] > 0, embed_tokens(config, params["embed"], ids), 0)
    x, caches = decoder.extend(params["decoder"], config, x, segment, caches)
    last = jnp.maximum(jnp.sum(segment > 0, axis=1) - 1, 0)
    return head(params, config, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]), caches


def output_specs(config: LocalConfig, plan: ReductionPlan | None = None) -> PrefillOutput[DecoderOutput[Any]]:
    """How what `prefill` returns of a device's part lies on the mesh, as PartitionSpecs."""
    logits = P(config.batch_axes, config.axis if config.vocab_devices > 1 else None)
    return with_specs(PrefillOutput, logits, decoder.output_specs(config), P(config.batch_axes))
