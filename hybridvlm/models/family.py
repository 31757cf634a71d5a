"""Model families: what each has to offer (`Family`), and which one a checkpoint belongs to.

A family is a package of hybridvlm.models: `config.py` reads a published config.json, `weights.py` names its tensors, `model.py`
is the computation. models/nemotron_vl/ is the one to read first. A new family is one more package and one more name here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import jax
import numpy as np

from hybridvlm.config import Buckets, Reduction
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import Layout, PromptStyle
from hybridvlm.models.weights import WeightMap
from hybridvlm.ops.tokens import Tokens
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.plain import shown
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.tokenizers.messages import Message

FAMILIES = ("nemotron_vl", "vamba", "qwen_vl")
Params = dict[str, Any]


@runtime_checkable
class Family(Protocol):
    """The functions and constants of a family package.

    Attributes:
        NAME: as checkpoints of this library have it under "family".
        MODEL_TYPES: what config.json says under `model_type` or `architectures`.
        Config: frozen dataclass of a model's sizes.
        METHODS: reduction methods that it takes, None for all.
        CHAT: chat template where a checkpoint has none.
        trim_frames: (config, clip) -> the clip without the frames that the model leaves out; None where it looks at all.
        embed_prompt: (params, config, batch, visual) -> the Tokens that enter layer 0 of a dense pass; None for a family
            without a row of video and text.
        MESH_AXES: axes of a mesh that may have more than one device.
        decoder_output: rows of training and analyses through the decoder.
        split_rows: (rows, text) -> (batch, label, question) of training rows, for a family whose video and text are two streams;
            None where a row is both.
        BOUNDS: parameter path -> (least, most): an interval that every step of training holds it in.
    """

    # as properties, which say that they are only read: a module's own value may then be of a narrower type
    @property
    def NAME(self) -> str: ...
    @property
    def MODEL_TYPES(self) -> tuple[str, ...]: ...
    @property
    def Config(self) -> type[Any]: ...
    @property
    def METHODS(self) -> tuple[str, ...] | None: ...
    @property
    def CHAT(self) -> str: ...
    @property
    def MESH_AXES(self) -> tuple[str, ...]: ...
    @property
    def trim_frames(self) -> Callable[[Any, Clip], Clip] | None: ...
    @property
    def embed_prompt(self) -> Callable[..., Tokens] | None: ...
    @property
    def decoder_output(self) -> Callable[..., Any]: ...
    @property
    def split_rows(self) -> Callable[..., tuple[Any, Any, Any]] | None: ...
    @property
    def BOUNDS(self) -> Mapping[str, tuple[float, float]]: ...

    # -- its form on disk

    def config_from_hf(self, raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
        """The Config of a published config.json. ValueError names an option that is not supported."""
        ...

    def weight_map(self, config: Any) -> WeightMap:
        """Which published tensor becomes which array of ours."""
        ...

    def init(self, config: Any, key: jax.Array) -> Params:
        """Random parameters."""
        ...

    def module(self, config: Any) -> Any:
        """The Flax module that declares them."""
        ...

    # -- from frames and words to the arrays of a bucket (host side)

    def style_for(self, config: Any) -> PromptStyle:
        """The text around frames and question that checkpoints of this config were trained with."""
        ...

    def frame_size(self, config: Any, height: int, width: int, frames: int, kind: str) -> tuple[int, int]:
        """(height, width) that the frames of a source are brought to."""
        ...

    def prompt(
        self,
        config: Any,
        tokenizer: Any,
        messages: Sequence[Message],
        clips: Sequence[Clip],
        *,
        style: PromptStyle | None = None,
        factors: tuple[int, int, int] = (1, 1, 1),
        template_options: Mapping[str, Any] | None = None,
    ) -> Layout:
        """A conversation and its clips as one prompt before padding."""
        ...

    def make_batch(
        self, config: Any, layouts: Sequence[Layout], buckets: Buckets, factors: tuple[int, int, int] = (1, 1, 1)
    ) -> tuple[Any, int, int]:
        """(batch, frame bucket, text bucket) of prompts."""
        ...

    def pixels(self, config: Any, clips: Sequence[Clip], frames: int) -> np.ndarray:
        """What `encode` takes of clips, uint8, filled up to `frames`."""
        ...

    def make_plan(
        self, config: Any, reduction: Reduction, frames: int, text: int, itemsize: int = 2, frame_text: int = 0
    ) -> ReductionPlan | None:
        """The plan of a reduction for a bucket; None where there is nothing to reduce. frame_text: most text tokens that a frame has
        of its own, for a reduction that drops those."""
        ...

    # -- the computation (traced)

    def encode(
        self,
        params: Params,
        config: Any,
        pixels: jax.Array,
        attention: bool = False,
        keep: PixelSelection | None = None,
        frame_count: jax.Array | None = None,
    ) -> jax.Array:
        """Pixels -> visual tokens [B,F,m,D]; with `attention` also how much the tower attends to each, see `encode_frames`.

        keep: choose tokens of the frame_count [B] real frames by their pixels, and encode these alone: [B,F,m,D + 1], see
        `encode_kept`.
        """
        ...

    def prefill(
        self,
        params: Params,
        config: Any,
        batch: Any,
        visual: Any,
        plan: ReductionPlan | None,
        decode_capacity: int,
        *,
        scores: bool = False,
        hidden_states: bool = False,
    ) -> Any:
        """Prompts -> logits of the last token and caches with `decode_capacity` empty slots.

        With `scores` also those of every mixer layer, with `hidden_states` the residual stream after every layer; a
        ValueError where the family has none.
        """
        ...

    def memory_serves(self, plan: ReductionPlan | None) -> bool:
        """Whether questions under this plan share a memory of their video, of `build_video_memory`."""
        ...

    def build_video_memory(
        self, params: Params, config: Any, batch: Any, visual: Any, plan: ReductionPlan | None
    ) -> Any:
        """What all questions about videos share under a plan, for `prefill` in the place of visual tokens.

        Of a hybrid a `Prefix`, which holds the prompts up to their last visual token: `prefill` then takes the rest of a batch
        alone (`models.prompt.rest_of`). Of VAMBA the video's keys and values. A batch may hold several questions on each video,
        those on one video next to each other. It is a dataclass with `rows`, and `videos` for how many of them are of videos.
        """
        ...

    def make_decode_step(self, params: Params, config: Any) -> Callable[[jax.Array, Any], tuple[jax.Array, Any]]:
        """(token [B], caches) -> (logits [B,V] fp32, caches), for the decode loop."""
        ...

    def extend(
        self, params: Params, config: Any, ids: jax.Array, segment: jax.Array, caches: Any
    ) -> tuple[jax.Array, Any]:
        """Text after what the caches hold: ids and segment [B,T] -> logits [B,V] after it, and the longer caches."""
        ...

    # -- the same on a mesh: every function above then runs on each device, with a LocalConfig for its config

    def output_specs(self, config: LocalConfig, plan: ReductionPlan | None) -> Any:
        """How what `prefill` returns under a plan lies on the mesh: a tree like it, or the beginning of one, of PartitionSpecs."""
        ...

    def memory_specs(self, config: LocalConfig, plan: ReductionPlan | None) -> Any:
        """The same of what `build_video_memory` returns."""
        ...


def get_family(name: str) -> Family:
    """The family of a name; ValueError names those there are."""
    if name not in FAMILIES:
        raise ValueError(f"no model family {name!r}; there are {', '.join(FAMILIES)}")
    return cast(Family, importlib.import_module(f"hybridvlm.models.{name}"))


def family_for(config: Any) -> Family:
    """The family whose configs are of this one's class."""
    for name in FAMILIES:
        if type(config) is get_family(name).Config:
            return get_family(name)
    raise ValueError(f"{type(config).__name__} is the config of no model family")


def family_of(raw: Mapping[str, Any]) -> Family:
    """The family of a published config.json (parsed), by its `architectures` and `model_type`."""
    # VAMBA has the names of Qwen2-VL, which it was made from, and this.
    if "vision_mamba_mixer_config" in raw:
        return get_family("vamba")
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"config.json: architectures must be a list of words, got {shown(names)}")
    for kind in [*names, raw.get("model_type")]:
        for name in FAMILIES:
            if kind in get_family(name).MODEL_TYPES:
                return get_family(name)
    known = sorted(kind for name in FAMILIES for kind in get_family(name).MODEL_TYPES)
    raise ValueError(
        f"config.json: architectures {shown(names)} and model_type {shown(raw.get('model_type'))} belong to no family; "
        f"supported: {', '.join(known)}"
    )
