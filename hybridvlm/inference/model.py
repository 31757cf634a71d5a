"""The model that people hold: `load` or `init` makes it, `ask` answers a question, `save` writes it."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.checkpoints.folder import Checkpoint, read_checkpoint, save_folder
from hybridvlm.config import Buckets, Reduction
from hybridvlm.estimates.guard import mesh_option
from hybridvlm.inference import placement
from hybridvlm.inference.conversation import Answer, Conversation, check_question
from hybridvlm.inference.programs import ModelPrograms
from hybridvlm.inference.sampling import Sampling
from hybridvlm.models.family import family_for
from hybridvlm.models.media import Clip
from hybridvlm.models.vamba import convert
from hybridvlm.parallel.mesh import full_mesh
from hybridvlm.reduction.methods import needs_attention
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.sharding import sharding_of


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model(ModelPrograms):
    """A model in use. It is frozen: `dataclasses.replace(model, buckets=...)` makes another one with the same weights.

    Its programs compile at their first use, one per bucket, plan and phase. The fields are those of `ModelPrompts` and
    `ModelPrograms`.
    """

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(leaf.size for leaf in leaves)
        size = sum(leaf.nbytes for leaf in leaves)
        return (
            f"Model({self.name or 'unnamed'!r}, family {self.family.NAME}, {len(self.config.pattern)} layers, "
            f"{count:,} parameters, {size / 1e9:.2f} GB, frames up to {self.buckets.frames[-1]}{self._mesh_text()})"
        )

    def _mesh_text(self) -> str:
        if self.mesh is None:
            return ""
        return ", mesh " + (" ".join(f"{axis}={n}" for axis, n in self.mesh.shape.items() if n > 1) or "of one device")

    def to_mesh(self, mesh: jax.sharding.Mesh) -> Model:
        """This model on the devices of a mesh, as `make_mesh` gives it: all of its programs run over them.

        Args:
            mesh: data and fsdp cut batches (fsdp the weights too, gathered layer by layer: slow to decode with), tensor
                heads, channels and the vocabulary, sequence the rows of a prompt. All devices share the frames of a video.

        Raises:
            ValueError: for an axis that the family does not run over, or that does not divide the model's sizes.
        """
        mesh = placement.check_mesh(self.family, self.config, mesh)
        return dataclasses.replace(
            self, params=placement.place_params(self.config, self.whole_params(), mesh), mesh=mesh
        )

    def whole_params(self) -> dict[str, Any]:
        """The parameters in the whole model's order: `params`, or of a mesh NumPy arrays on this host."""
        return self.params if self.mesh is None else placement.whole_params(self.config, self.params, self.mesh)

    def ask(
        self,
        video: Any,
        question: str,
        *,
        frames: int | None = None,
        rule: str = "uniform",
        clock: str = "exact",
        reduction: Reduction | str | None = None,
        budget: float | None = None,
        system: str = "",
        decode_capacity: int = 0,
        thinking: bool | None = None,
        think_tokens: int | None = None,
        max_new: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        show: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question about a video or an image; the Answer's `conversation` takes further questions.

        Args:
            video: a path, frames [F,h,w,3] uint8 (an array, or a list of frames), a Clip, or None for text alone.
            question: one text.
            frames: most frames of a file to look at (default: 32, or what the model was made for).
            rule: which frames of a file, see `hybridvlm.video.sample_indices`.
            clock: time stamps of a file, "exact" or "milliseconds".
            reduction: what to drop: a `Reduction`, or a method's name such as "str" (see `reduction_for`).
            budget: share of the visual tokens, with a method's name (default: 0.25).
            system: a system message, for models that know conversations.
            decode_capacity: cache slots for later turns, in addition to those of the answer.
            thinking: True or False turns reasoning on or off, where the chat template has a switch for it.
            think_tokens: most tokens of reasoning, in addition to the answer's own.
            max_new: most tokens of the answer (default: Buckets.max_new).
            sampling: how tokens are chosen (default: greedy).
            seed: of sampling.
            show: called with each new piece of text as it comes.
        """
        check_question(question)
        conversation = Conversation(
            self,
            video,
            frames=frames,
            rule=rule,
            clock=clock,
            reduction=reduction,
            budget=budget,
            system=system,
            decode_capacity=decode_capacity,
            thinking=thinking,
            think_tokens=think_tokens,
        )
        return conversation.ask(question, max_new=max_new, sampling=sampling, seed=seed, show=show)

    def save(self, path: str | os.PathLike[str], *, storage: str = "float32") -> pathlib.Path:
        """Write the model as a checkpoint folder that `load` reads, whole or not at all.

        Args:
            path: the folder; an older checkpoint there is replaced.
            storage: of the weights, "float32", or "float16" at half the bytes.

        Returns:
            The folder.

        Raises:
            ValueError: for weights that are not finite in `storage`, or a path that holds anything else.
        """
        whole = dataclasses.replace(self, params=self.whole_params(), mesh=None)
        return save_folder(pathlib.Path(path), whole, storage=storage)

    def warm_up(
        self,
        reduction: Reduction | None = None,
        *,
        batch: int = 1,
        frames: Sequence[int] | None = None,
        text: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        think_tokens: int | None = None,
    ) -> float:
        """Compile what answers take, so that questions of those buckets, reduction, batch and sampling compile nothing.

        Black frames are asked an empty question. A text bucket that is too short for the text between so many frames is
        passed over.

        Args:
            reduction: method and budget.
            batch: questions at once.
            frames: frame buckets (default: all).
            text: text buckets (default: all).
            sampling: how tokens are chosen (default: greedy).
            think_tokens: most tokens of reasoning.

        Returns:
            The seconds that compiling took.
        """
        before = self.programs.compile_seconds
        for f in self.buckets.frames if frames is None else frames:
            height, width = self.config.vision.image_size
            height, width = self.family.frame_size(self.config, height, width, f, "video")
            group = self.config.vision.temporal_patch
            stamps = tuple(float(t) for t in range(f * group))
            clips = [Clip(stamps, np.zeros((f * group, height, width, 3), np.uint8))] * batch
            pixels = self.family.pixels(self.config, clips, f)
            encoded: dict[PixelSelection | None, Any] = {}
            for t in self.buckets.text if text is None else text:
                if self.text_needed([self.layout("", stamps)], f, reduction) > t:
                    continue
                own = dataclasses.replace(self.buckets, frames=(f,), text=(t,))
                layouts = lambda factors, stamps=stamps: [self.layout("", stamps, factors)] * batch  # noqa: E731
                rows, plan = self.batch_of(layouts, reduction, buckets=own)
                keep = None if plan is None else plan.pixel_selection
                if keep not in encoded:
                    attention = needs_attention(reduction) and keep is None
                    encoded[keep] = self.encode(pixels, attention=attention, keep=keep)
                self.generate(rows, encoded[keep], plan, sampling=sampling, think_tokens=think_tokens)
        return self.programs.compile_seconds - before


def init(config: Any, seed: int = 0, *, tokenizer: Any = None, buckets: Buckets = Buckets()) -> Model:
    """A model of one's own with random parameters.

    Args:
        config: a family's config, such as a `ModelConfig`, or one of `load_model_config`.
        seed: of the parameters.
        tokenizer: what turns text into ids and back; without one the model takes and gives ids alone.
        buckets: lengths that programs are compiled for.
    """
    family = family_for(config)
    params = family.init(config, jax.random.key(seed))
    return Model(config, params, tokenizer, buckets=buckets, style=family.style_for(config), family=family)


def init_vamba_from(
    model: Model, seed: int = 0, *, ssm_state: int = 128, mamba_head_dim: int = 64, expand: int = 2
) -> Model:
    """A VAMBA (arXiv 2503.11579) out of a Transformer such as Qwen2-VL, to be trained: `hybridvlm/train/README.md`.

    Its cross-attention is a copy of the self-attention, each with half the weight; its Mamba-2 blocks are random.

    Args:
        model: the Transformer; its arrays are shared, not copied.
        seed: of what is random.
        ssm_state: N of the Mamba-2 blocks.
        mamba_head_dim: width of their heads.
        expand: their inner width, in widths of the model.

    Raises:
        ValueError: for a model that is no Transformer, has parts that VAMBA has no place for, or is cut over a mesh.
    """
    if model.mesh is not None:
        raise ValueError("init_vamba_from: the model is cut over a mesh; make the VAMBA first, then `to_mesh`")
    config = convert.vamba_config(model.config, ssm_state=ssm_state, mamba_head_dim=mamba_head_dim, expand=expand)
    held = getattr(model.params["embed"], "sharding", None)
    where = None
    if isinstance(held, jax.sharding.NamedSharding) and isinstance(held.mesh, jax.sharding.Mesh):
        where = functools.partial(sharding_of, held.mesh)
    params = convert.vamba_params(model.params, model.config, config, jax.random.key(seed), where)
    family = family_for(config)
    style = family.style_for(config)
    return Model(config, params, model.tokenizer, buckets=model.buckets, style=style, family=family)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    mesh: jax.sharding.Mesh | str | None = None,
    dtype: Any = None,
    reduction: Reduction | None = None,
    buckets: Buckets | None = None,
    revision: str | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Model:
    """The model of a checkpoint.

    Args:
        name_or_path: a folder (this library's, Orbax's or a published one), a packaged name (`tiny`, `tiny-reduced`,
            `tiny-vamba`), or an id of the Hugging Face hub.
        mesh: the devices that the model runs on, such as `make_mesh(tensor=4, data=-1)`, see `Model.to_mesh`; "auto": the
            smallest tensor x sequence of this process's devices that fits, the rest data (default: one).
        dtype: of the weights and so of the activations, e.g. "bfloat16" (default: float32 for the library's own, else as
            stored).
        reduction: instead of the checkpoint's own.
        buckets: instead of the checkpoint's own.
        revision: a commit, tag or branch on the hub.
        cache: a folder for an Orbax copy of a published checkpoint, which is made at the first time and read, onto any
            mesh, from then on.

    Raises:
        FileNotFoundError: for a missing file.
        CheckpointError: (a ValueError) where one does not fit.
    """
    if isinstance(mesh, str):
        mesh = mesh_option(mesh, name_or_path, dtype=dtype, revision=revision, reduction=reduction, buckets=buckets)
    mesh = None if mesh is None else full_mesh(mesh)
    checkpoint = read_checkpoint(
        name_or_path, mesh=mesh, dtype=dtype, reduction=reduction, buckets=buckets, revision=revision, cache=cache
    )
    model = from_checkpoint(checkpoint)
    if mesh is None:
        return dataclasses.replace(model, params=placement.row_major(model.params, consume=True))
    mesh = placement.check_mesh(model.family, model.config, mesh)
    params = placement.place_params(model.config, model.params, mesh, consume=True)
    return dataclasses.replace(model, params=params, mesh=mesh)


def from_checkpoint(checkpoint: Checkpoint) -> Model:
    """The model of what was read, its parameters where they lie and in the whole model's order."""
    return Model(**{field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)})
