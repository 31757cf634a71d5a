"""Configuration: frozen dataclasses, validated on construction, unknown keys refused.

Axis letters used in shapes everywhere: B batch, L tokens, M visual tokens, T text tokens, D model width,
H heads, K kv heads, P head width, G SSM groups, N SSM state, C chunk, F frames, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from hybridvlm.plain import from_dict as from_dict
from hybridvlm.plain import shown
from hybridvlm.plain import to_dict as to_dict

MAMBA, ATTENTION, MLP, MOE = "M", "*", "-", "E"
MOST_LAYERS = 1 << 14  # two for each layer of a Transformer; no model comes near it
MOST_ROWS = 1 << 24  # of anything that is counted; products of two still fit every integer
KINDS = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp", MOE: "moe"}
MIXERS = (MAMBA, ATTENTION)


def _counted(owner: str, least: int = 1, most: int = MOST_ROWS, **values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"{owner}.{name} must be a whole number of at least {least}, at most {most}, got {shown(value)}"
            )


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision tower and its connector: frames [F,height,width,3] -> visual tokens [F,m,D].

    kind "radio": ViT with a resizable position table (C-RADIO). kind "stem": a convolutional stem over separate patches,
    for the tiny embedded model; its tokens get learned cell and frame-time embeddings, as it has no text between frames.
    kind "qwen": the ViT of Qwen2-VL and Qwen3-VL, with rotary embeddings of row and column and full attention inside each
    frame; a frame here is `temporal_patch` frames of the video, and image_size the size that a video is brought to.
    """

    kind: str = "radio"
    image_size: tuple[int, int] = (512, 512)  # height, width that every frame is resized to
    patch_size: int = 16
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    position_rows: int = 128  # side of the square position table
    prefix_tokens: int = 10  # cls + register tokens, dropped after the tower
    temporal_patch: int = 1  # frames per video patch (2 in Nemotron-3-Omni)
    max_tiles: int = 0  # an image is cut into up to this many tiles of image_size and a thumbnail; 0: it is one frame
    image_patches: tuple[int, int] = (0, 0)  # least and most of an image that keeps its aspect; 0: image_size instead
    video_patches: int = 0  # patches of a video frame that keeps its aspect; 0: image_size instead
    norm_eps: float = 1e-6
    downsample: int = 2  # pixel shuffle: side of the neighbourhood merged into one token
    projector_width: int = 20480
    projector_norm_eps: float = 1e-5
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_frames: int = 0  # kind "stem": rows of the frame-time embedding
    stem_channels: tuple[int, ...] = ()  # kind "stem": channels of its stride-2 convolutions
    activation: str = "gelu"  # of the blocks: gelu | gelu_tanh | quick_gelu
    patch_bias: bool = False  # kind "qwen": whether the patch embedding has a bias
    deepstack: tuple[int, ...] = ()  # kind "qwen": blocks whose output, merged, is added after the first decoder layers

    def __post_init__(self) -> None:
        if self.kind not in ("radio", "stem", "qwen"):
            raise ValueError(f"VisionConfig.kind must be 'radio', 'stem' or 'qwen', got {self.kind!r}")
        if self.activation not in ("gelu", "gelu_tanh", "quick_gelu"):
            raise ValueError(
                f"VisionConfig.activation must be 'gelu', 'gelu_tanh' or 'quick_gelu', got {self.activation!r}"
            )
        sizes = ("patch_size", "width", "heads", "temporal_patch", "downsample", "projector_width", "mlp_width")
        _counted("VisionConfig", **{name: getattr(self, name) for name in sizes})
        _counted("VisionConfig", most=MOST_LAYERS, layers=self.layers)
        for name in ("position_rows", "prefix_tokens", "max_tiles", "video_patches", "max_frames"):
            _counted("VisionConfig", least=0, **{name: getattr(self, name)})
        _counted("VisionConfig", **{f"stem_channels[{i}]": n for i, n in enumerate(self.stem_channels)})
        if len(self.image_size) != 2 or not 1 <= min(self.image_size) <= max(self.image_size) <= MOST_ROWS:
            raise ValueError(f"VisionConfig.image_size must be (height, width) above 0, got {shown(self.image_size)}")
        step = self.patch_size * self.downsample
        if any(side % step for side in self.image_size):
            raise ValueError(
                f"VisionConfig.image_size must be multiples of patch_size * downsample = {step}, got {self.image_size}"
            )
        if self.kind != "stem" and self.width % self.heads:
            raise ValueError(f"VisionConfig.width {self.width} is not divisible by heads {self.heads}")
        if self.kind == "qwen" and self.width // self.heads % 4:
            raise ValueError(f"VisionConfig.width / heads must be divisible by 4, got {self.width} / {self.heads}")
        if any(b <= a for a, b in zip(self.deepstack, self.deepstack[1:], strict=False)) or not all(
            0 <= layer < self.layers for layer in self.deepstack
        ):
            raise ValueError(f"VisionConfig.deepstack must be rising blocks below {self.layers}, got {self.deepstack}")
        if self.kind == "stem" and self.max_frames < 1:
            raise ValueError("VisionConfig.max_frames must be at least 1 for kind 'stem'")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens in one frame (after pixel shuffle)."""
        step = self.patch_size * self.downsample
        return self.image_size[0] // step, self.image_size[1] // step

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A hybrid decoder given by a pattern string (M Mamba-2, * attention, - MLP, E experts), and its vision side.

    Every character is one pre-norm residual layer. Defaults follow Nemotron-H: no RoPE, relu^2 MLP without gate.
    """

    pattern: str
    width: int
    vocab_size: int
    mamba_heads: int
    mamba_head_dim: int
    ssm_groups: int
    ssm_state: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    conv_kernel: int = 4
    conv_bias: bool = True
    chunk_size: int = 0  # SSD chunk; 0 takes the platform's measured choice (results do not depend on it)
    dt_floor: float = 0.0  # only for parity with transformers' NemotronH prefill, which floors dt at 1e-3
    qk_norm: bool = False  # RMSNorm on q and k per head
    dt_ceiling: float = 0.0  # most that dt may be; 0: no limit
    mamba_bias: bool = False  # on in_proj and out_proj
    attention_bias: bool = False  # on q, k and v
    output_bias: bool = False  # on o_proj
    mlp_bias: bool = False  # on every projection of an MLP without gate, shared experts and latent projections included
    rope_theta: float = 0.0  # base of the rotary embedding; 0 means none, as in Nemotron-H
    rope_sections: tuple[int, ...] = ()  # M-RoPE: pairs of channels that follow time, row and column; () means one axis
    rope_interleaved: bool = False  # M-RoPE: the axes take turns (Qwen3-VL) instead of standing one after the other
    mlp_gated: bool = False  # SwiGLU instead of relu^2 without gate
    experts: int = 0  # of an E layer; each is a relu^2 MLP of expert_width, and one of shared_width sees every token
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    expert_latent: int = 0  # width that tokens are projected to before the experts and back after them; 0: as they are
    router_groups: int = 1  # experts compete in groups, of which the router_top_groups best are kept
    router_top_groups: int = 1
    router_norm: bool = True  # the chosen experts' weights add up to router_scale
    router_scale: float = 1.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    vision: VisionConfig | None = None
    name: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(KINDS))
        if unknown or not self.pattern or len(self.pattern) > MOST_LAYERS:
            got = unknown or (f"{len(self.pattern)} layers" if self.pattern else "an empty pattern")
            raise ValueError(f"ModelConfig.pattern may hold only {sorted(KINDS)}, got {got}")
        _counted(
            "ModelConfig",
            width=self.width,
            vocab_size=self.vocab_size,
            mamba_heads=self.mamba_heads,
            mamba_head_dim=self.mamba_head_dim,
            ssm_groups=self.ssm_groups,
            ssm_state=self.ssm_state,
            attention_heads=self.attention_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            conv_kernel=self.conv_kernel,
        )
        _counted("ModelConfig", least=0, most=self.vocab_size - 1, pad_id=self.pad_id)
        if any(type(id) is not int or id < 0 for id in self.eos_ids):
            raise ValueError(f"ModelConfig.eos_ids must be ids of tokens, from 0, got {shown(self.eos_ids)}")
        if self.mamba_heads % self.ssm_groups:
            raise ValueError(f"mamba_heads {self.mamba_heads} is not divisible by ssm_groups {self.ssm_groups}")
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"attention_heads {self.attention_heads} is not divisible by kv_heads {self.kv_heads}")
        if self.count(MOE):
            _counted(
                "ModelConfig",
                experts=self.experts,
                experts_per_token=self.experts_per_token,
                expert_width=self.expert_width,
                shared_width=self.shared_width,
            )
            if self.experts % self.router_groups or self.router_top_groups > self.router_groups:
                raise ValueError(
                    f"ModelConfig: {self.experts} experts in router_groups {self.router_groups}, of which "
                    f"router_top_groups {self.router_top_groups} are kept, cannot be cut evenly"
                )
            if self.experts_per_token > self.experts // self.router_groups * self.router_top_groups:
                raise ValueError(f"ModelConfig.experts_per_token {self.experts_per_token} is more than can be chosen")
        if self.rope_sections and (len(self.rope_sections) != 3 or 2 * sum(self.rope_sections) != self.head_dim):
            raise ValueError(
                f"ModelConfig.rope_sections must be three counts (time, row, column) that add up to head_dim / 2 = "
                f"{self.head_dim // 2}, got {self.rope_sections}"
            )

    @property
    def tower(self) -> VisionConfig:
        """The vision tower's config. ValueError for a model that has none."""
        if self.vision is None:
            raise ValueError(f"the model {self.name!r} has no vision tower: ModelConfig.vision is None")
        return self.vision

    @property
    def mamba_width(self) -> int:
        """Inner width of a Mamba layer, H * P."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        """Channels that the causal convolution sees: x, B and C."""
        return self.mamba_width + 2 * self.ssm_groups * self.ssm_state

    @property
    def in_proj_width(self) -> int:
        """Outputs of in_proj: z, x, B, C, dt."""
        return self.mamba_width + self.conv_width + self.mamba_heads

    def count(self, kind: str) -> int:
        """How many layers of the pattern are of `kind` (M, *, - or E)."""
        return self.pattern.count(kind)

    def kind_index(self, layer: int) -> tuple[str, int]:
        """(kind name, index among the layers of that kind): where a layer's parameters lie in the stacked arrays."""
        kind = self.pattern[layer]
        return KINDS[kind], self.pattern[:layer].count(kind)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenConfig(ModelConfig):
    """Qwen2-VL (arXiv 2409.12191) and Qwen3-VL (arXiv 2511.21631): "*-" per layer, M-RoPE, SwiGLU.

    generation: 2 or 3, for tensor names and prompt: 3 writes each frame's time before it. Pixel limits are (least, most): of an
    image; of one video frame; and `video_pixels` the most that all frames of a video have together.
    """

    mamba_heads: int = 1  # the pattern has no Mamba layer: these four say nothing
    mamba_head_dim: int = 1
    ssm_groups: int = 1
    ssm_state: int = 1
    generation: int = 2
    image_pixels: tuple[int, int] = (3136, 12845056)
    frame_pixels: tuple[int, int] = (128 * 28**2, 768 * 28**2)
    video_pixels: int = 2 * 115200 * 28**2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "*-" * (len(self.pattern) // 2):
            raise ValueError(f"QwenConfig.pattern must be '*-' for every layer, got {self.pattern!r}")
        if self.generation not in (2, 3):
            raise ValueError(f"QwenConfig.generation must be 2 or 3, got {self.generation!r}")
        for name in ("image_pixels", "frame_pixels"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"QwenConfig.{name} must be (least, most), got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VambaConfig(QwenConfig):
    """VAMBA (arXiv 2503.11579): a Qwen2 decoder for the text, whose layers each carry a Mamba-2 block for the video as well.

    The pattern is that of the text, "*-" per layer; the mamba_ and ssm_ fields are those of the video's blocks. longest_edge,
    shortest_edge: what a video's sides are brought within before they are rounded to whole patches.
    """

    mamba_heads: int = 112
    mamba_head_dim: int = 64
    ssm_groups: int = 1
    ssm_state: int = 128
    mamba_norm_eps: float = 1e-5  # of the norms before and inside a Mamba block; norm_eps is the text's
    alpha_balancing: bool = True  # a learnt share for self-attention against cross-attention, per layer
    longest_edge: int = 480
    shortest_edge: int = 256
    text_only: str = "balanced"  # rows without a video: self-attention keeps its share ("balanced") or counts "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generation != 2:
            raise ValueError(f"VambaConfig.generation must be 2, VAMBA is made from Qwen2-VL; got {self.generation!r}")
        if not 0 < self.shortest_edge <= self.longest_edge:
            edges = (self.shortest_edge, self.longest_edge)
            raise ValueError(f"VambaConfig.shortest_edge, longest_edge: expected 0 < shortest <= longest, got {edges}")
        if self.text_only not in ("balanced", "whole"):
            raise ValueError(f"VambaConfig.text_only must be 'balanced' or 'whole', got {self.text_only!r}")

    @property
    def layers(self) -> int:
        return self.count(ATTENTION)

    @functools.cached_property
    def mixer(self) -> ModelConfig:
        """The video's Mamba-2 blocks as a decoder of their own, one per layer."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig)}
        fields |= {"pattern": MAMBA * self.layers, "norm_eps": self.mamba_norm_eps, "vision": None}
        return ModelConfig(**fields)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The static sizes that programs are compiled for: frames per video, text tokens per prompt, new tokens."""

    frames: tuple[int, ...] = (8, 16, 32, 64)
    text: tuple[int, ...] = (16, 64, 256)
    max_new: int = 64

    def __post_init__(self) -> None:
        for name in ("frames", "text"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 0:
                raise ValueError(f"Buckets.{name} must be rising whole numbers, got {sizes}")
        _counted("Buckets", max_new=self.max_new)

    def pick(self, axis: str, size: int) -> int:
        """The smallest bucket on `axis` ("frames" or "text") that holds `size`; ValueError names the buckets if none does."""
        for bucket in getattr(self, axis):
            if size <= bucket:
                return bucket
        raise ValueError(
            f"{axis} = {size} is over the largest bucket; the {axis} buckets are {getattr(self, axis)}. "
            f"Pass Buckets({axis}=...) with a larger one, or shorten the input."
        )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the share of visual tokens falls with depth (x = layer / (layers - 1)).

    Attributes:
        shape: constant, step, linear, cosine, sigmoid or list.
        steepness: the sigmoid's k.
        floor: the least share.
        start: no drop before the layer with this index has run.
        never: layers after which nothing is dropped.
        stages: lengths that rows may have, 0 for any number: each is compiled anew. Of a list, all that it has.
        values: shares of shape "list", one per layer: taken as written where the budget is 1, else raised to the power that
            meets the budget.
        layer_weights: for str-calibrated, how far each layer's score follows the question, one number per layer, 0 for not at all.
    """

    shape: str = "sigmoid"
    steepness: float = 12.0
    floor: float = 0.05
    start: int = 0
    never: tuple[int, ...] = ()
    stages: int = 4
    values: tuple[float, ...] = ()
    layer_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        shapes = ("constant", "step", "linear", "cosine", "sigmoid", "list")
        if self.shape not in shapes:
            raise ValueError(f"Schedule.shape must be one of {shapes}, got {self.shape!r}")
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(f"Schedule.floor must lie in [0, 1), got {self.floor}")
        if not 0.0 < self.steepness < math.inf:
            raise ValueError(f"Schedule.steepness must be a positive number, got {self.steepness}")
        for name in ("start", "stages"):
            if getattr(self, name) < 0:
                raise ValueError(f"Schedule.{name} must be at least 0, got {getattr(self, name)}")
        if (self.shape == "list") != bool(self.values):
            raise ValueError("Schedule.values goes with shape 'list', and only with it")
        if any(not 0.0 <= w < math.inf for w in self.layer_weights) or (
            self.layer_weights and not any(self.layer_weights)
        ):
            raise ValueError(
                f"Schedule.layer_weights must be finite numbers of at least 0, not all of them 0, got {self.layer_weights}"
            )


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How a layer's scores are made (arXiv 2603.00198 leaves these open; see hybridvlm/reduction/scores.py).

    Attributes:
        decay: keep the cumulative decay of the Mamba score.
        dt: keep the dt factor of the Mamba score.
        sign: raw, relu or abs.
        norm: none, l1, softmax or zscore, over the visual tokens of one query row and group.
        groups: mean or max over groups.
        heads: mean or max over attention heads, and over the dt and decay factors inside a Mamba group.
        queries: mean, max or last of the query rows.
        ahead: how many of the next attention layers str-lookahead looks through; 0: all that come.
    """

    decay: bool = False
    dt: bool = False
    sign: str = "raw"
    norm: str = "none"
    groups: str = "mean"
    heads: str = "mean"
    queries: str = "mean"
    ahead: int = 1

    def __post_init__(self) -> None:
        choices = {
            "sign": ("raw", "relu", "abs"),
            "norm": ("none", "l1", "softmax", "zscore"),
            "groups": ("mean", "max"),
            "heads": ("mean", "max"),
            "queries": ("mean", "max", "last"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"ScoreOptions.{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.ahead < 0:
            raise ValueError(
                f"ScoreOptions.ahead must be at least 0 (0: all attention layers to come), got {self.ahead}"
            )


BUDGET_KINDS = ("mean", "final", "flops", "total-flops")
DROP_TEXT = ("none", "empty-frames", "best-frames")


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What to drop.

    Attributes:
        method: a name of the registry, or a composition such as "evs:0.5+str:0.5".
        budget: share of visual tokens to keep, in (0, 1].
        kind: what the budget counts: mean over layers, final (the last layer), flops of the decoder, or total-flops, with
            scoring and vision tower.
        schedule: how the share falls with depth.
        score: how a layer's scores are made.
        seed: of the random methods.
        drop_text: which text of frames' own (time stamps) goes at a drop, a value of DROP_TEXT: see reduction/frame_text.py.
    """

    method: str = "none"
    budget: float = 1.0
    kind: str = "mean"
    schedule: Schedule = Schedule()
    score: ScoreOptions = ScoreOptions()
    seed: int = 0
    drop_text: str = DROP_TEXT[0]

    def __post_init__(self) -> None:
        if not isinstance(self.budget, (int, float)) or not 0.0 < self.budget <= 1.0:
            raise ValueError(f"Reduction.budget must lie in (0, 1], got {self.budget!r}")
        for name, allowed in (("kind", BUDGET_KINDS), ("drop_text", DROP_TEXT)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Reduction.{name} must be one of {allowed}, got {getattr(self, name)!r}")
