"""The programs of inference as models run them, compiled ahead of time on one device or a mesh: tower, prefill, decoding, and the
two parts of a prefill that questions about one video share the first of ("memory", "further").

Arguments are shapes: parameters laid out for the mesh as `Model.to_mesh` lays them out, prompts that fill their bucket exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hybridvlm import aot, sharding
from hybridvlm.config import ModelConfig, QwenConfig
from hybridvlm.inference import functions, placement
from hybridvlm.inference.sampling import Sampling
from hybridvlm.models.family import family_for
from hybridvlm.models.prompt import Batch
from hybridvlm.models.qwen_vl.model import QwenBatch
from hybridvlm.models.weights import FLOAT32
from hybridvlm.parallel.mesh import tensor_size
from hybridvlm.parallel.tensor import LocalConfig
from hybridvlm.reduction.plan import ReductionPlan


@dataclasses.dataclass(frozen=True)
class InferenceShapes:
    """What is compiled for.

    Attributes:
        config: of the model, of the families nemotron_vl and qwen_vl.
        plan: what is dropped; None for a dense pass.
        frames: as the tower's patches have them.
        text: tokens of the question.
        batch: prompts at once.
        max_new: tokens of an answer.
        stamp: text tokens before every frame.
        question: text tokens of a further question.
    """

    config: ModelConfig
    plan: ReductionPlan | None
    frames: int
    text: int
    batch: int = 1
    max_new: int = 256
    stamp: int = 0
    question: int = 64


def compile_program(program: str, where: aot.Target, mesh: Mesh, shapes: InferenceShapes) -> aot.Compiled:
    """The program "tower", "prefill", "decode", "memory" or "further", weights in bfloat16, for the devices of a mesh of `where`.

    Of decoding, whose loop runs until all answers have ended, costs are those of one token. "memory" and "further" take a plan that
    `Model.build_video_memory` serves (ValueError).
    """
    on_mesh = _OnMesh(mesh, shapes)
    programs = {
        "tower": on_mesh.tower,
        "prefill": on_mesh.prefill,
        "decode": on_mesh.decode,
        "memory": on_mesh.memory,
        "further": on_mesh.further,
    }
    with jax.default_device(where.devices[0]):
        function, args = programs[program]()
    return aot.compile_for(where, function, *args)


class _OnMesh:
    """The programs of a model on a mesh; of a mesh of one device as models without any run them."""

    def __init__(self, mesh: Mesh, shapes: InferenceShapes) -> None:
        self.mesh, self.shapes, self.family = mesh, shapes, family_for(shapes.config)
        config = shapes.config
        whole = jax.eval_shape(
            lambda: sharding.permute_for_tp(self.family.init(config, jax.random.key(0)), config, tensor_size(mesh))
        )
        lies = sharding.INFERENCE_RULES.shardings(mesh, whole)
        self.params = jax.tree_util.tree_map_with_path(_weight, whole, lies)
        self.part = config if mesh.size == 1 else placement.part_of(config, self.params, mesh)
        self.rows = placement.filled(shapes.batch, placement.row_parts(mesh))

    def struct(self, shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        """An array that is cut over mesh axes as `PartitionSpec(*axes)`."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, P(*axes)))

    def over_rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return self.struct((self.rows, *shape), dtype, sharding.INFERENCE_RULES.batch)

    def program(self, phase: Callable[..., Any], args: tuple[Any, ...], config: Any, **static: Any) -> Any:
        """A function of args alone: `phase` as `ModelPrograms` compiles it."""
        if self.mesh.size == 1:
            return lambda *given: phase(*given, family=self.family, config=config, **static)
        fixed = {"mesh": self.mesh, "specs": placement.arguments_specs(args), "family": self.family, "config": config}
        results = functions.RESULTS[phase]
        return lambda *given: placement.over_mesh(*given, phase=phase, results=results, **fixed, **static)

    def tower(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        v, shapes = self.shapes.config.tower, self.shapes
        multiple, axes, spec = placement.frame_dealing(shapes.batch, self.mesh)
        rows = placement.filled(shapes.batch, multiple)
        frames = placement.filled(shapes.frames, math.prod(self.mesh.shape[axis] for axis in axes))
        patch = (v.temporal_patch,) if v.temporal_patch > 1 else ()
        pixels = self.struct((rows, frames, *patch, *v.image_size, 3), jnp.uint8, *spec)
        part = dataclasses.replace(self.part, frame_axes=axes) if isinstance(self.part, LocalConfig) else self.part
        args: tuple[Any, ...] = (self.params, pixels)
        keep = None if shapes.plan is None else shapes.plan.pixel_selection
        if keep is not None:
            args = (*args, self.struct((rows,), jnp.int32, spec[0]))
        return self.program(functions.encode, args, part, frames=shapes.frames, keep=keep), args

    def prompt(self) -> tuple[Any, jax.ShapeDtypeStruct]:
        """A full bucket of prompts, and their visual tokens."""
        config, plan, shapes = self.shapes.config, self.shapes.plan, self.shapes
        per_frame = config.tower.tokens_per_frame
        frames, each = shapes.frames, per_frame
        if plan is not None:  # average pooling makes fewer and smaller frames of them
            frames, each = plan.decoder_frames, plan.decoder_tokens // plan.decoder_frames
        length = frames * (each + shapes.stamp) + shapes.text
        row = self.over_rows(length)
        batch = Batch(row, row, row, self.over_rows())
        if isinstance(config, QwenConfig):
            batch = QwenBatch(row, row, row, self.over_rows(), position=self.over_rows(length, 3))
        frames_given = placement.filled(shapes.frames, self.mesh.shape["sequence"])
        width = config.width * (1 + len(config.tower.deepstack))
        if plan is not None and plan.pixel_selection is not None:
            width += 1  # which tokens were encoded
        lies = (sharding.INFERENCE_RULES.batch, sharding.INFERENCE_RULES.row)
        return batch, self.struct((self.rows, frames_given, per_frame, width), jnp.bfloat16, *lies)

    def prefill(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        args = (self.params, *self.prompt())
        static = {"plan": self.shapes.plan, "decode_capacity": self.shapes.max_new}
        return _of_prefill(self.program(functions.prefill, args, self.part, **static)), args

    def decode(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        prefill, given = self.prefill()
        logits, caches, *_ = jax.eval_shape(prefill, *given)
        if self.mesh.size > 1:
            specs = functions.RESULTS[functions.prefill](self.family, self.part, (), {"plan": self.shapes.plan})
            logits, caches = (
                self.laid_out(array, spec) for array, spec in ((logits, specs.logits), (caches, specs.decoder.caches))
            )
        real = () if self.mesh.size == 1 else (self.over_rows(dtype=jnp.bool_),)
        args = (self.params, logits, caches, self.over_rows(), self.struct((), jnp.int32), None, *real)
        static = {"max_new": self.shapes.max_new, "sampling": Sampling(), "budget": None}
        return self.program(functions.decode_tokens, args, self.part, **static), args

    def memory(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What all questions about the videos share, of rows with room for the prompt's whole text."""
        args = (self.params, *self.prompt())
        return self.program(functions.build_video_memory, args, self.part, plan=self.shapes.plan), args

    def further(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The prefill of one more question on each video, from that on."""
        plan, length = self.shapes.plan, self.shapes.question
        build, given = self.memory()
        shared = jax.eval_shape(build, *given)
        if isinstance(self.part, LocalConfig):
            shared = self.laid_out(shared, self.family.memory_specs(self.part, plan))
        row = self.over_rows(length)
        batch = Batch(row, row, row, self.over_rows())
        if isinstance(self.shapes.config, QwenConfig):
            batch = QwenBatch(row, row, row, self.over_rows(), position=self.over_rows(length, 3))
        args = (self.params, batch, shared)
        run = self.program(functions.prefill, args, self.part, plan=plan, decode_capacity=self.shapes.max_new)
        return _of_prefill(run), args

    def laid_out(self, arrays: Any, specs: Any) -> Any:
        """Arrays with what `specs`, a tree like them or a prefix of one, says of where they lie."""
        under = lambda spec, part: jax.tree.map(lambda a: self.struct(a.shape, a.dtype, *spec), part)  # noqa: E731
        return jax.tree.map(under, specs, arrays, is_leaf=lambda leaf: isinstance(leaf, P))


def _of_prefill(run: Callable[..., Any]) -> Callable[..., Any]:
    """What answers are decoded from, of all that a prefill returns."""

    def needed(*given: Any) -> Any:
        out = run(*given)
        return out.logits, out.decoder.caches, out.decoder.survivors, out.decoder.kept

    return needed


def _weight(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, lies: NamedSharding) -> jax.ShapeDtypeStruct:
    dtype = jnp.float32 if path[-1].key in FLOAT32 else jnp.bfloat16
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding.row_major_format(lies, leaf.ndim))
