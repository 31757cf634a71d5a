"""The Nemotron VL family: RADIO tower, pixel shuffle, projector, Mamba-2/attention decoder, with experts in Nemotron 3 Omni.

The text models Nemotron-H and Mamba-2 are the same without the tower, and the tiny embedded model is the same with a
convolutional stem for a tower. Below the module stand the functions that `hybridvlm.models.family.Family` lists.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from hybridvlm import reduction as plans
from hybridvlm.config import MIXERS, Buckets, ModelConfig, Reduction
from hybridvlm.models.media import Clip, cut_tiles, image_grid, resize, tile_count, video_grid
from hybridvlm.models.nemotron_vl.passes import AssembleFn, continue_prefix, decoder_output
from hybridvlm.models.nemotron_vl.pixels import encode_kept
from hybridvlm.models.nemotron_vl.rows import assemble
from hybridvlm.models.prompt import Batch, Layout, Pieces, PromptStyle, render, video_pieces
from hybridvlm.models.prompt import make_batch as pad_layouts
from hybridvlm.nn import decoder, incremental
from hybridvlm.nn.caches import Cache
from hybridvlm.nn.decoder import Decoder, DecoderOutput, apply_final_norm, with_specs
from hybridvlm.nn.incremental import decode_layers
from hybridvlm.nn.prefix import Prefix, prefix_specs
from hybridvlm.ops.ssd.api import default_choice
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.frames import frame_numbers, gather_frames
from hybridvlm.parallel.sequence import pick_rows, row_total
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.parallel.vocab import embed_tokens, project_to_vocab
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.reduction.plan_functions import layer_score_fn
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
    config: ModelConfig, reduction: Reduction, frames: int, text: int, itemsize: int = 2, frame_text: int = 0
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
        frame_text=frame_text,
    )


# -- the computation ----------------------------------------------------------------------------------------------------


def encode(
    params: Mapping[str, Any],
    config: ModelConfig,
    pixels: jax.Array,
    attention: bool = False,
    keep: PixelSelection | None = None,
    frame_count: jax.Array | None = None,
) -> jax.Array:
    """Frames, as `pixels` gives them, -> visual tokens [B,F,m,D]; with `attention` also the tower's, see `encode_frames`; with `keep`
    those that it chooses of each row's frame_count [B] frames, see `encode_kept`."""
    if keep is not None:
        assert frame_count is not None  # as `ModelPrograms.encode` has it
        return encode_kept(params, config, pixels, keep, frame_count)
    b, f = pixels.shape[:2]
    scaled = pixels.reshape(b * f, *pixels.shape[2:]).astype(jnp.float32) / 255
    frame = jnp.tile(frame_numbers(config, f), b)
    visual = encode_frames(params, config.tower, scaled, frame, dtype=params["embed"].dtype, attention=attention)
    return gather_frames(config, visual.reshape(b, f, *visual.shape[1:]))


def embed_prompt(params: Mapping[str, Any], config: ModelConfig, batch: Batch, visual: jax.Array | None) -> Tokens:
    """Prompts as layer 0 of a dense pass sees them; visual [B,F,m,D], or None for text alone."""
    return assemble(config, params["embed"], batch, visual)


def prefill(
    params: Mapping[str, Any],
    config: ModelConfig,
    batch: Batch,
    visual: jax.Array | Prefix | None,
    plan: ReductionPlan | None,
    decode_capacity: int,
    assemble_fn: AssembleFn = assemble,
    *,
    scores: bool = False,
    hidden_states: bool = False,
) -> PrefillOutput[DecoderOutput[tuple[Cache, ...]]]:
    """Embeddings to last-token logits under a plan (None: dense), of one prompt a row; arguments as of `decoder_output`.

    scores: those of every mixer layer come out in `decoder.scores`. hidden_states: the residual stream after every layer comes out
    in `decoder.hidden_states`, and after the final norm in `decoder.tokens.x`, which is [B,0,D] otherwise. With a Prefix for `visual`,
    of `build_video_memory`, the batch is the rest of the prompts alone.
    """
    options: dict[str, Any] = {"decode_capacity": decode_capacity, "final_norm": hidden_states}
    if scores:
        options["collect"] = tuple(layer for layer, kind in enumerate(config.pattern) if kind in MIXERS)
        if plan is None:
            options["score_fn"] = layer_score_fn()
    if hidden_states:
        options["hidden_states"] = tuple(range(len(config.pattern)))
    if isinstance(visual, Prefix):
        out, given = continue_prefix(params, config, batch, visual, plan, **options)
    else:
        options |= {"assemble_fn": assemble_fn, "one_segment": True}
        out, given = decoder_output(params, config, batch, visual, plan, **options)
    last = jnp.maximum(row_total(config, jnp.sum(out.tokens.segment > 0, axis=1)) - 1, 0)[:, None]
    x = pick_rows(config, out.tokens.x, last, jnp.ones(last.shape, bool))[:, 0]
    if not hidden_states:
        x = apply_final_norm(params["decoder"], config, x)
        # a program's results stay in memory, and nothing reads the row of the last layer
        out = dataclasses.replace(out, tokens=out.tokens.replace(x=out.tokens.x[:, :0]))
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
        x, caches = incremental.step(layers(), params["decoder"]["norm_f"], config, x, caches)
        return head(params, config, x[:, 0]), caches

    return one


def extend(
    params: Mapping[str, Any], config: ModelConfig, ids: jax.Array, segment: jax.Array, caches: tuple[Cache, ...]
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Text after what the caches hold: ids and segment [B,T] (0 = padding, at the end) -> logits [B,V] after the last, caches."""
    x = jnp.where(segment[..., None] > 0, embed_tokens(config, params["embed"], ids), 0)
    x, caches = incremental.extend(params["decoder"], config, x, segment, caches)
    last = jnp.maximum(jnp.sum(segment > 0, axis=1) - 1, 0)
    return head(params, config, jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]), caches


def output_specs(config: LocalConfig, plan: ReductionPlan | None = None) -> PrefillOutput[DecoderOutput[Any]]:
    """How what `prefill` returns of a device's part lies on the mesh, as PartitionSpecs."""
    logits = P(config.batch_axes, config.axis if config.vocab_devices > 1 else None)
    return with_specs(PrefillOutput, logits, decoder.output_specs(config), P(config.batch_axes))


def memory_specs(config: LocalConfig, plan: ReductionPlan | None) -> Prefix:
    """How what `build_video_memory` returns of a device's part lies on the mesh."""
    assert plan is not None  # `memory_serves` no other
    return prefix_specs(config, decoder.output_specs(config).caches[: plan.drops[0] + 1])
