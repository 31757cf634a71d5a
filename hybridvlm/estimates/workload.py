"""What is to be run, on how many devices, as numbers alone: nothing here compiles or touches a device."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from hybridvlm.config import ModelConfig, Reduction
from hybridvlm.models.family import family_for
from hybridvlm.models.weights import FLOAT32, flatten
from hybridvlm.parallel.layout import local_config, permute_for_tp
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.sharding import AXES, INFERENCE_RULES, ShardingRules


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of a mesh: `hybridvlm.sharding.make_mesh` without the devices."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int or size < 1:
                raise ValueError(f"mesh: {axis} must be a whole number of at least 1, got {size!r}")

    @property
    def devices(self) -> int:
        return math.prod(getattr(self, axis) for axis in AXES)

    @property
    def batch(self) -> int:
        """Devices that work on different examples."""
        return self.data * self.fsdp

    def __str__(self) -> str:
        axes = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(axes) or "one device"

    @classmethod
    def of(cls, mesh: Any) -> MeshSizes:
        """The sizes of a mesh, of a mapping of axes to sizes, or of None: one device. ValueError for another axis."""
        shape = {} if mesh is None else dict(mesh if isinstance(mesh, Mapping) else mesh.shape)
        unknown = [axis for axis, size in shape.items() if axis not in AXES and size != 1]
        if unknown:
            raise ValueError(f"mesh: expected axes out of {AXES}, got {', '.join(map(str, shape))}")
        return cls(**{axis: int(size) for axis, size in shape.items() if axis in AXES})


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model's inference on one batch of prompts.

    Attributes:
        config: of the model.
        frames: of the video.
        text: tokens of the prompt around them.
        batch: prompts at once.
        max_new: tokens of an answer.
        dtype: of weights and activations.
        reduction: what is dropped (None: nothing).
        platform: "tpu" or "gpu", where decoding copies the decoder's weights before it starts.
        question: text tokens of a further question on the same video.
        frame_text: of `text`, most tokens that each frame (as patches have them) has of its own, for a reduction that drops those.
    """

    config: Any
    frames: int
    text: int = 512
    batch: int = 1
    max_new: int = 256
    dtype: str = "bfloat16"
    reduction: Reduction | None = None
    platform: str = "tpu"
    question: int = 64
    frame_text: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 0), ("text", 1), ("batch", 1), ("max_new", 1), ("question", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"Workload.{name} must be a whole number of at least {least}, got {value!r}")
        if self.frames and self.config.vision is None:
            raise ValueError(f"the model {self.config.name!r} has no vision tower; use frames=0")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"Workload.dtype must be bfloat16, float16 or float32, got {self.dtype!r}")

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def groups(self) -> int:
        """Frames as the tower's patches have them: of some models, a patch takes several frames."""
        return -(-self.frames // self.config.vision.temporal_patch) if self.frames else 0

    @property
    def visual_tokens(self) -> int:
        return self.groups * self.config.vision.tokens_per_frame if self.frames else 0

    @property
    def planes(self) -> int:
        """How many widths a visual token has when it leaves the tower: itself, and what deeper layers add."""
        return 1 + len(self.config.vision.deepstack) if self.frames else 1

    @functools.cached_property
    def plan(self) -> ReductionPlan:
        """The plan of the reduction; of a dense workload one that keeps everything.

        Raises:
            ValueError: the budget cannot be met; the message says what the method can do.
        """
        from hybridvlm.reduction import make_plan
        from hybridvlm.reduction.vamba import counted

        family, c = family_for(self.config), self.config
        if self.reduction is not None and self.reduction.method != "none" and self.frames:
            plan = family.make_plan(c, self.reduction, self.groups, self.text, self.itemsize, self.frame_text)
            assert plan is not None  # of frames and a method there is one
            return plan
        sizes = {"visual_tokens": self.visual_tokens, "text_tokens": self.text, "frames": self.groups}
        return make_plan(Reduction(), counted(c, self.text), **sizes, itemsize=self.itemsize)

    def dense(self) -> Workload:
        """The same without a reduction."""
        return dataclasses.replace(self, reduction=None)


def local_part(config: ModelConfig, mesh: MeshSizes) -> ModelConfig:
    """The heads, groups and channels that one device of the tensor axis holds. ValueError where they cannot be cut so."""
    return local_config(config, mesh.tensor) if mesh.tensor > 1 else config


def local_batch(work: Workload, mesh: MeshSizes) -> int:
    """Prompts on one device: what the batch axes do not divide is filled up."""
    return -(-work.batch // mesh.batch)


def dealt_frames(work: Workload, mesh: MeshSizes) -> tuple[int, int]:
    """(rows, frames of each of them as patches have them) that one device takes through the tower: `placement.put_frames`."""
    if work.batch >= mesh.batch:
        return local_batch(work, mesh), -(-work.groups // (mesh.sequence * mesh.tensor))
    # fewer rows than there are devices for them: of each row, all devices take frames
    return work.batch, -(-work.groups // mesh.devices)


@functools.lru_cache(maxsize=8)
def _params(config: Any) -> Any:
    """The parameters of a model, as shapes."""
    return jax.eval_shape(lambda: family_for(config).init(config, jax.random.key(0)))


@functools.lru_cache(maxsize=32)
def _shapes(config: Any, tensor: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by path, laid out for a tensor axis."""
    params = _params(config)
    if tensor > 1:
        params = jax.eval_shape(lambda params: permute_for_tp(params, config, tensor), params)
    return {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}


@functools.lru_cache(maxsize=1024)
def weight_bytes(
    config: Any, mesh: MeshSizes, itemsize: int, prefix: str = "", rules: ShardingRules = INFERENCE_RULES
) -> int:
    """Bytes of the parameters whose path begins with `prefix` on one device, by the rules of hybridvlm/sharding.py."""
    sizes = tuple(getattr(mesh, axis) for axis in AXES)
    abstract: Any = AbstractMesh(sizes, AXES)
    total = 0
    for path, shape in _shapes(config, mesh.tensor).items():
        if path.startswith(prefix):
            try:
                spec = rules.spec(path, shape, abstract) if mesh.devices > 1 else PartitionSpec()
            except ValueError:  # what no rule is for is whole on every device
                spec = PartitionSpec()
            held = NamedSharding(abstract, spec).shard_shape(shape)
            total += math.prod(held) * (4 if path.rsplit("/", 1)[-1] in FLOAT32 else itemsize)
    return total
