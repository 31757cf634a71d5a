"""What a training run is told: frozen dataclasses, checked on construction, read from JSON, YAML or Python.

A config in Python is a program: reading it runs it, with all rights of whoever starts the training. JSON and YAML are data.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Sequence
from typing import Any

from hybridvlm.config import Reduction
from hybridvlm.video import VideoInfo, sample_indices

QUARTER = Reduction("str", 0.25)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
# Fields that change no number of a run: a run folder may be gone on with under other values of these.
FREE = ("output", "mesh", "checkpoints", "logging", "export")


def _check(config: Any, **least: float) -> None:
    """Types of the fields as annotated, finite numbers, and the least value of the named ones."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, name, kind = getattr(config, field.name), f"{type(config).__name__}.{field.name}", hints[field.name]
        if kind is float and (type(value) is int or (isinstance(value, str) and _NUMBER.fullmatch(value))):
            value = float(value)  # YAML 1.1 takes 1e-4, which has no point, for a text
            object.__setattr__(config, field.name, value)
        if kind in (int, float, bool, str) and type(value) is not kind:
            raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        if typing.get_origin(kind) is tuple:
            each = typing.get_args(kind)[0]
            taken = (int, float) if each is float else (each,)
            if not isinstance(value, tuple) or any(type(v) not in taken for v in value):
                raise ValueError(f"{name} must be a list of {each.__name__}, got {value!r}")
        elif kind not in (int, float, bool, str) and not isinstance(value, kind):
            raise ValueError(f"{name} must be given by its fields, such as {field.name}.NAME=VALUE, got {value!r}")
        if field.name in least and not value >= least[field.name]:
            raise ValueError(f"{name} must be at least {least[field.name]:g}, got {value!r}")


def _one_of(config: Any, name: str, choices: Sequence[Any]) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(
            f"{type(config).__name__}.{name} must be one of {list(choices)}, got {getattr(config, name)!r}"
        )


def _patterns(config: Any, name: str) -> None:
    for pattern in getattr(config, name):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{type(config).__name__}.{name}: {pattern!r} is no regular expression: {error}") from None


@dataclasses.dataclass(frozen=True)
class Data:
    """Where samples come from, and the one static shape of a row.

    Attributes:
        source: needle (the embedded benchmark's generator), jsonl (a file) or tfds (a tensorflow-datasets source).
        path: the file of jsonl, the name of a tfds source.
        folder: the data_dir of tfds.
        split: of needle and tfds.
        batch: rows of a step, of all processes together.
        segments: most samples packed into a row, each of which keeps the plan's share of its own visual tokens.
        frames: frames that a row holds.
        sample_frames: most frames of a sample (0: frames).
        text: text tokens that a row holds, answers included; with packing `segments` of them stay free.
        answer: most answer tokens of a question (0: text).
        questions: most questions on one video that share it in a row, each with its own text; for models whose video and text are two
            streams. Of jsonl, lines that follow each other and name the same video; of needle, so many are drawn.
        features: pixels (through the vision tower in every step) or cached (made once by the frozen tower).
        cache: folder of cached features of files.
        bank: cached image tiles per border colour of needle.
        types: question types of needle, empty for all.
        scenes: share of needle's samples whose scenes last (`tiny.scenes`); needs features "pixels".
        rule: which frames of a file, see `video.sampling`.
        allow_special_tokens: let control tokens in the samples' texts (`<|im_end|>`, and marks such as `<think>` in answers) be
            control tokens instead of plain text.
        shuffle: read the samples in a new order every epoch.
        threads: that read and decode samples.
        prefetch: batches prepared ahead of the step.
        bad_share: share of corrupt samples among those read above which the run stops.
    """

    source: str = "needle"
    path: str = ""
    folder: str = ""
    split: str = "train"
    batch: int = 16
    segments: int = 1
    frames: int = 64
    sample_frames: int = 0
    text: int = 8
    answer: int = 0
    questions: int = 1
    features: str = "pixels"
    cache: str = ""
    bank: int = 4000
    types: tuple[str, ...] = ()
    scenes: float = 0.0
    rule: str = "uniform"
    allow_special_tokens: bool = False
    shuffle: bool = True
    threads: int = 2
    prefetch: int = 2
    bad_share: float = 0.01

    def __post_init__(self) -> None:
        least = dict.fromkeys(("batch", "segments", "frames", "text", "questions", "bank"), 1)
        _check(self, **least, sample_frames=0, answer=0, threads=0, prefetch=0)
        _one_of(self, "source", ("needle", "jsonl", "tfds"))
        sample_indices(VideoInfo(8, 1.0, 8.0, 1, 1), 4, self.rule)  # refuses one that there is not
        if not 0 <= self.bad_share <= 1:
            raise ValueError(f"Data.bad_share must lie in [0, 1], got {self.bad_share}")
        _one_of(self, "features", ("pixels", "cached"))
        if not 0 <= self.scenes <= 1:
            raise ValueError(f"Data.scenes must lie in [0, 1], got {self.scenes}")
        if self.scenes and (self.source != "needle" or self.features != "pixels"):
            raise ValueError(
                "Data.scenes needs the source 'needle' with features 'pixels', "
                f"got {self.source!r} with {self.features!r}"
            )
        if self.source != "needle" and not self.path:
            raise ValueError(f"Data.path is needed for source {self.source!r}")
        if self.source != "needle" and self.features == "cached" and not self.cache:
            raise ValueError("Data.cache, a folder, is needed for features 'cached' of files")
        if self.sample_frames > self.frames:
            raise ValueError(f"Data.sample_frames {self.sample_frames} is more than a row has, frames = {self.frames}")
        if self.segments >= self.text:
            raise ValueError(f"Data.text {self.text} leaves no room for {self.segments} packed samples")


@dataclasses.dataclass(frozen=True)
class ReductionMode:
    """The reduction in the forward pass: the plan of a step.

    Attributes:
        mode: none (dense), fixed (`reduction`), curriculum (through `budgets` in equal parts of the run) or random (drawn from them).
        reduction: the reduction, with its method, budget and schedule.
        budgets: of curriculum and random; 1.0 among them is the dense model.
        straight_through: 0, or the temperature of the estimator that gives the scores a gradient (train/straight_through.py).
    """

    mode: str = "fixed"
    reduction: Reduction = QUARTER
    budgets: tuple[float, ...] = ()
    straight_through: float = 0.0

    def __post_init__(self) -> None:
        _check(self, straight_through=0)
        _one_of(self, "mode", ("none", "fixed", "curriculum", "random"))
        if (self.mode in ("curriculum", "random")) != bool(self.budgets):
            raise ValueError(
                f"ReductionMode.budgets goes with 'curriculum' and 'random'; mode {self.mode!r} has {self.budgets}"
            )
        if any(not 0 < budget <= 1 for budget in self.budgets):
            raise ValueError(f"ReductionMode.budgets must lie in (0, 1], got {self.budgets}")


@dataclasses.dataclass(frozen=True)
class Distill:
    """What the dense model teaches.

    Attributes:
        teacher: whose dense pass the answers are compared with: start (the frozen start weights), self (the same weights), or what
            `hybridvlm.load` takes: another model of the same tokens and frames, such as the Transformer that a VAMBA starts from.
        kl: weight of KL(teacher || student) on answer tokens.
        temperature: of both distributions in the KL.
        scores: weight, in dense steps, of the loss by which Mamba layers' c.b learn to rank as the next attention layer does
            (train/distill.py).
        teach: number of dense steps at the start.
        every: afterwards, one dense step in so many (0: none).
        videos: of a dense step with `questions` > 1.
        questions: that share one pass over a video in a dense step (needle alone); 1: the rows of an ordinary step.
    """

    teacher: str = "start"
    kl: float = 0.0
    temperature: float = 1.0
    scores: float = 0.0
    teach: int = 0
    every: int = 0
    videos: int = 4
    questions: int = 1

    def __post_init__(self) -> None:
        _check(self, kl=0, scores=0, teach=0, every=0, videos=1, questions=1)
        if not self.teacher:
            raise ValueError("Distill.teacher must be 'start', 'self' or the name of a model, got ''")
        if not self.temperature > 0:
            raise ValueError(f"Distill.temperature must be positive, got {self.temperature}")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with warm-up and a cosine decay of the rate.

    Attributes:
        rate: the highest learning rate.
        warmup: steps of linear warm-up.
        start: rate at the first step, as a part of `rate`.
        end: rate at the last step, as a part of `rate`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        decay: weight decay.
        clip: most norm of all gradients together (0: no limit).
        accumulate: microbatches that a step's batch is cut into.
        frozen: regular expressions of parameter paths that are not trained (re.search).
        decay_free: the same, of parameters without weight decay, in addition to those of train/optimizer.py.
        ema: decay of an average of the trained parameters, which starts at the start weights and is exported (0: none).
    """

    rate: float = 1e-4
    warmup: int = 20
    start: float = 0.1
    end: float = 0.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    decay: float = 0.02
    clip: float = 1.0
    accumulate: int = 1
    frozen: tuple[str, ...] = ("^vision/", "^projector/")
    decay_free: tuple[str, ...] = ()
    ema: float = 0.0

    def __post_init__(self) -> None:
        _check(self, rate=0, warmup=0, start=0, end=0, decay=0, clip=0, accumulate=1, ema=0)
        _patterns(self, "frozen")
        _patterns(self, "decay_free")
        for name in ("b1", "b2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.eps > 0:
            raise ValueError(f"Optimizer.eps must be positive, got {self.eps}")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank updates.

    Attributes:
        rank: of the updates; 0: none, else nothing but them is trained.
        alpha: they are scaled by alpha / rank.
        targets: regular expressions of the paths of the parameters that have one.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"^decoder/.*_proj$",)

    def __post_init__(self) -> None:
        _check(self, rank=0)
        _patterns(self, "targets")
        if self.rank and not (self.targets and self.alpha > 0):
            raise ValueError(f"Lora needs targets and a positive alpha, got {self.targets} and {self.alpha}")


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh; all 1: one device and no mesh. One may be -1: the rest.

    Attributes:
        data: cuts the batch.
        fsdp: cuts the batch, and parameters with their optimizer state.
        tensor: cuts heads and channels.
        sequence: cuts the rows.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        _check(self)
        sizes = dataclasses.astuple(self)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"MeshSizes must be 1 or more, and one of them may be -1 (the rest), got {sizes}")

    @property
    def one(self) -> bool:
        return (self.data, self.fsdp, self.tensor, self.sequence) == (1, 1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Checkpointing:
    """Checkpoints in the run's folder.

    Attributes:
        every: steps from one checkpoint to the next (0: only at the end).
        keep: so many of the latest are kept.
        keep_every: and one in so many steps for good (0: none).
        asynchronous: write while the next steps run.
    """

    every: int = 100
    keep: int = 2
    keep_every: int = 0
    asynchronous: bool = True

    def __post_init__(self) -> None:
        _check(self, every=0, keep=1, keep_every=0)


@dataclasses.dataclass(frozen=True)
class Logging:
    """What a run says of itself.

    Attributes:
        every: steps from one printed line to the next.
        tensorboard: write to TensorBoard, too.
        wandb: project on Weights & Biases to write to, too.
        peak_flops: of one device, for the utilisation; 0: by a table of devices, or measured.
    """

    every: int = 20
    tensorboard: bool = False
    wandb: str = ""
    peak_flops: float = 0.0

    def __post_init__(self) -> None:
        _check(self, every=1, peak_flops=0)


@dataclasses.dataclass(frozen=True)
class Export:
    """The checkpoint folder written at the end.

    Attributes:
        name: in its config (default: the start model's; a folder that is loaded goes by its own name).
        storage: float32 or float16.
        reduction: under which it says it is to be run (default: the one it was trained under).
    """

    name: str = ""
    storage: str = "float32"
    reduction: Reduction | None = None

    def __post_init__(self) -> None:
        _check(self)
        _one_of(self, "storage", ("float32", "float16"))


@dataclasses.dataclass(frozen=True)
class Convert:
    """What the model is made into before it is trained; new parameters are drawn by `seed`.

    Attributes:
        to: vamba: a VAMBA, of a Transformer (`hybridvlm.init_vamba_from`); "": it stays what it is.
        ssm_state: N of the new Mamba-2 blocks.
        mamba_head_dim: width of their heads.
        expand: their inner width, in widths of the model.
    """

    to: str = ""
    ssm_state: int = 128
    mamba_head_dim: int = 64
    expand: int = 2

    def __post_init__(self) -> None:
        _check(self, ssm_state=1, mamba_head_dim=1, expand=1)
        _one_of(self, "to", ("", "vamba"))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        model: what `hybridvlm.load` takes.
        convert: what it is made into first.
        output: the run's folder.
        steps: optimizer steps.
        seed: of the data's order, LoRA's start and random budgets.
        dtype: of the computation, float32 or bfloat16; master weights are float32.
        remat: what the backward pass computes again: none, layer or dots.
        data: samples and rows.
        reduction: the reduction in the forward pass.
        distill: what the dense model teaches.
        optimizer: AdamW.
        lora: low-rank updates.
        mesh: devices.
        checkpoints: of the run.
        logging: of the run.
        export: the result.
    """

    model: str = "tiny"
    convert: Convert = Convert()
    output: str = "runs/train"
    steps: int = 100
    seed: int = 0
    dtype: str = "float32"
    remat: str = "none"
    data: Data = Data()
    reduction: ReductionMode = ReductionMode()
    distill: Distill = Distill()
    optimizer: Optimizer = Optimizer()
    lora: Lora = Lora()
    mesh: MeshSizes = MeshSizes()
    checkpoints: Checkpointing = Checkpointing()
    logging: Logging = Logging()
    export: Export = Export()

    def __post_init__(self) -> None:
        _check(self, steps=1, seed=0)
        _one_of(self, "dtype", ("float32", "bfloat16"))
        _one_of(self, "remat", ("none", "layer", "dots"))
        if not self.output:
            raise ValueError("TrainConfig.output, the run's folder, is empty")
        d, t, r = self.data, self.distill, self.reduction
        if d.batch % self.optimizer.accumulate:
            raise ValueError(
                f"Data.batch {d.batch} is not a multiple of Optimizer.accumulate {self.optimizer.accumulate}"
            )
        if t.questions > 1 and d.source != "needle":
            raise ValueError(
                f"Distill.questions > 1 needs the source 'needle', which asks many of a video; got {d.source!r}"
            )
        if t.questions > 1 and (t.videos % self.optimizer.accumulate):
            raise ValueError(f"Distill.videos {t.videos} is not a multiple of Optimizer.accumulate")
        if t.questions > 1 and not self.mesh.one:
            raise ValueError(
                "Distill.questions > 1 shares a pass over a video on one device; with a mesh use questions = 1"
            )
        if t.scores and not (t.teach or t.every):
            raise ValueError("Distill.scores acts in dense steps; set Distill.teach or Distill.every")
        if d.features == "cached":
            for tower in ("vision/x", "projector/x"):
                if not self.lora.rank and not any(re.search(pattern, tower) for pattern in self.optimizer.frozen):
                    raise ValueError(
                        f"Data.features 'cached' needs a frozen tower; Optimizer.frozen does not cover {tower[:-1]}"
                    )
        if r.straight_through and r.mode == "none":
            raise ValueError("ReductionMode.straight_through needs a reduction")
