"""Configuration: frozen dataclasses, validated on construction, unknown keys refused.

Axis letters used in shapes everywhere: B batch, L tokens, M visual tokens, T text tokens, D model width,
H heads, K kv heads, P head width, G SSM groups, N SSM state, C chunk, F frames, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import pathlib
from typing import Any, TypeVar

MAMBA, ATTENTION, MLP = "M", "*", "-"
KINDS = {MAMBA: "mamba", ATTENTION: "attention", MLP: "mlp"}
MIXERS = (MAMBA, ATTENTION)

ConfigT = TypeVar("ConfigT")


def from_dict(cls: type[ConfigT], data: dict[str, Any]) -> ConfigT:
    """Build the dataclass `cls` from a plain dict (as read from JSON); nested dataclasses are built too.

    Raises ValueError for a key that `cls` does not have, with the nearest name it has.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {sorted(fields)}"
            raise ValueError(f"{cls.__name__} has no key {key!r}{hint}")
        nested = _NESTED.get((cls.__name__, key))
        if nested is not None and isinstance(value, dict):
            value = from_dict(nested, value)
        elif isinstance(value, list):
            value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
        values[key] = value
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dict of a config dataclass, ready for JSON (infinities become the strings that float() reads)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return repr(value) if isinstance(value, float) and math.isinf(value) else value

    return plain(dataclasses.asdict(config))


def _positive(owner: str, **values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}.{name} must be a whole number of at least 1, got {value!r}")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision tower and its connector: frames [F,height,width,3] -> visual tokens [F,m,D].

    kind "radio": ViT with a resizable position table (C-RADIO). kind "stem": a convolutional stem over separate patches,
    for the tiny embedded model; its tokens get learned cell and frame-time embeddings, as it has no text between frames.
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
    norm_eps: float = 1e-6
    downsample: int = 2  # pixel shuffle: side of the neighbourhood merged into one token
    projector_width: int = 20480
    projector_norm_eps: float = 1e-5
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    max_frames: int = 0  # kind "stem": rows of the frame-time embedding
    stem_channels: tuple[int, ...] = ()  # kind "stem": channels of its stride-2 convolutions

    def __post_init__(self) -> None:
        if self.kind not in ("radio", "stem"):
            raise ValueError(f"VisionConfig.kind must be 'radio' or 'stem', got {self.kind!r}")
        _positive("VisionConfig", patch_size=self.patch_size, width=self.width, downsample=self.downsample)
        step = self.patch_size * self.downsample
        if any(side % step for side in self.image_size):
            raise ValueError(
                f"VisionConfig.image_size must be multiples of patch_size * downsample = {step}, got {self.image_size}"
            )
        if self.kind == "radio" and self.width % self.heads:
            raise ValueError(f"VisionConfig.width {self.width} is not divisible by heads {self.heads}")
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
    """A hybrid decoder given by a pattern string (M Mamba-2, * attention, - MLP), and its vision side.

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
    attention_bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    vision: VisionConfig | None = None
    name: str = ""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(KINDS))
        if unknown or not self.pattern:
            raise ValueError(f"ModelConfig.pattern may hold only {sorted(KINDS)}, got {unknown or 'an empty pattern'}")
        _positive(
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
        if self.mamba_heads % self.ssm_groups:
            raise ValueError(f"mamba_heads {self.mamba_heads} is not divisible by ssm_groups {self.ssm_groups}")
        if self.attention_heads % self.kv_heads:
            raise ValueError(f"attention_heads {self.attention_heads} is not divisible by kv_heads {self.kv_heads}")

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
        """How many layers of the pattern are of `kind` (M, * or -)."""
        return self.pattern.count(kind)

    def kind_index(self, layer: int) -> tuple[str, int]:
        """(kind name, index among the layers of that kind): where a layer's parameters lie in the stacked arrays."""
        kind = self.pattern[layer]
        return KINDS[kind], self.pattern[:layer].count(kind)


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
        _positive("Buckets", max_new=self.max_new)

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

    shape: constant | step | linear | cosine | sigmoid | list. `steepness` is the sigmoid's k; `floor` the least share;
    `values` the shares of shape "list", one per layer: taken as written where the budget is 1, else raised to the power
    that meets the budget. `start`: no drop before the layer with this index has run. `never`: layers after which
    nothing is dropped. `stages` > 0 merges neighbouring drops into that many lengths.
    """

    shape: str = "sigmoid"
    steepness: float = 12.0
    floor: float = 0.05
    start: int = 0
    never: tuple[int, ...] = ()
    stages: int = 0
    values: tuple[float, ...] = ()

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


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """How a layer's scores are made (arXiv 2603.00198 leaves these open; see hybridvlm/reduction/scores.py).

    decay, dt: keep the cumulative decay / the dt factor of the Mamba score. sign: raw | relu | abs. norm: none | l1 |
    softmax | zscore (over the visual tokens of one query row and group). groups: mean | max. heads: mean | max, of
    attention heads, and of the dt and decay factors inside a Mamba group. queries: mean | max | last.
    """

    decay: bool = False
    dt: bool = False
    sign: str = "raw"
    norm: str = "none"
    groups: str = "mean"
    heads: str = "mean"
    queries: str = "mean"

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


BUDGET_KINDS = ("mean", "final", "flops")


@dataclasses.dataclass(frozen=True)
class Reduction:
    """What to drop: a method of the registry, its budget and how the budget is counted, schedule, score options, seed."""

    method: str = "none"
    budget: float = 1.0
    kind: str = "mean"
    schedule: Schedule = Schedule()
    score: ScoreOptions = ScoreOptions()
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.budget, (int, float)) or not 0.0 < self.budget <= 1.0:
            raise ValueError(f"Reduction.budget must lie in (0, 1], got {self.budget!r}")
        if self.kind not in BUDGET_KINDS:
            raise ValueError(f"Reduction.kind must be one of {BUDGET_KINDS}, got {self.kind!r}")


_NESTED: dict[tuple[str, str], type] = {
    ("ModelConfig", "vision"): VisionConfig,
    ("Reduction", "schedule"): Schedule,
    ("Reduction", "score"): ScoreOptions,
}


def config_names() -> list[str]:
    """Names of the configurations that come with the library."""
    return sorted(path.stem for path in _config_folder().glob("*.json"))


def _config_folder() -> pathlib.Path:
    here = pathlib.Path(__file__).parent
    installed = here / "_configs"  # an installed wheel carries the repository's configs/ there
    return installed if installed.is_dir() else here.parent / "configs"


def load_model_config(name_or_path: str | pathlib.Path) -> ModelConfig:
    """A ModelConfig by the name of one of the files in `configs/` (such as "tiny"), or from a JSON file of the same form."""
    path = pathlib.Path(name_or_path)
    if path.suffix != ".json":
        path = _config_folder() / f"{name_or_path}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no model config {str(name_or_path)!r}; give a JSON file or one of {', '.join(config_names())}"
        )
    return from_dict(ModelConfig, json.loads(path.read_text()))
