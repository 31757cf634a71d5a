"""Training steps on random rows, for measuring: what a step costs depends on shapes alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hybridvlm.config import ModelConfig, Reduction
from hybridvlm.inference.model import Model
from hybridvlm.inference.program_cache import peak_bytes
from hybridvlm.models.family import family_for
from hybridvlm.models.qwen_vl.geometry import rope_positions
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.train.config import Data, Distill, Optimizer, ReductionMode, TrainConfig
from hybridvlm.train.rows import Shape, TrainBatch, train_batch
from hybridvlm.train.step import Trainer


@dataclasses.dataclass(frozen=True)
class StepCall:
    """A compiled training step as a call without arguments.

    Attributes:
        call: runs it.
        plan: what it drops, None for dense.
        compile_seconds: that it took to compile.
        peak_bytes: what it needs, by its compiler.
        parameters: of the model that is trained.
    """

    call: Callable[[], Any]
    plan: ReductionPlan | None
    compile_seconds: float
    peak_bytes: int
    parameters: int


def random_row(
    config: ModelConfig, frames: int, text: int, rows: int, answer: int, seed: int = 0, *, features: bool = True
) -> TrainBatch[np.ndarray]:
    """Rows of `frames` frames and `text` text tokens after them, of which the last `answer` are to be said.

    features: whether random visual tokens come with them; else `visual` is empty.
    """
    rng, m, family = np.random.default_rng(seed), config.tower.tokens_per_frame, family_for(config)
    frame = np.concatenate([np.repeat(np.arange(frames), m), np.full(text, -1)]).astype(np.int32)
    length = len(frame)
    ids = rng.integers(0, config.vocab_size, (rows, length), np.int32)
    label = np.zeros((rows, length), np.int32)
    label[:, -answer - 1 : -1] = ids[:, -answer:] + 1
    question = (frame < 0) & (np.arange(length) < length - answer)
    made = {
        "ids": ids,
        "segment": np.ones_like(ids),
        "frame": np.tile(frame, (rows, 1)),
        "frame_count": np.full(rows, frames, np.int32),
        "label": label,
        "question": np.tile(question, (rows, 1)),
        "position": np.tile(rope_positions(frame, config.tower.grid), (rows, 1, 1)),
    }
    if features:
        made["visual_features"] = rng.normal(size=(rows, frames, m, config.width)).astype(np.float32)
    return train_batch(made, family, Shape(frames, text, 1, m))


def step_calls(
    config: ModelConfig,
    reductions: Sequence[Reduction | None],
    *,
    frames: int,
    text: int,
    rows: int = 1,
    answer: int = 8,
    remat: str = "layer",
    dtype: str = "float32",
) -> list[StepCall]:
    """A whole AdamW step of the decoder (frozen tower, features given) under each reduction, None being dense.

    All of them go on from one state, so that memory holds the weights and moments once.
    """
    family = family_for(config)
    params = family.init(config, jax.random.key(0))
    count = sum(a.size for a in jax.tree.leaves(params))
    settings = step_settings(frames=frames, text=text, rows=rows, answer=answer, remat=remat, dtype=dtype)
    trainer = Trainer(settings, Model(config, params, family=family))
    state, fixed = trainer.start(params)
    del params
    batch, held, calls = jax.device_put(random_row(config, frames, text, rows, answer)), {"state": state}, []
    del state
    for reduction in reductions:
        plan = None if reduction is None else family.make_plan(config, reduction, frames, text, 4)
        begin = time.perf_counter()
        program = trainer.program(plan).lower(held["state"], fixed, batch).compile()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - begin

        def call(program: Any = program) -> Any:
            held["state"], metrics = program(held["state"], fixed, batch)
            return metrics

        calls.append(StepCall(call, plan, seconds, peak_bytes(program), count))
    return calls


def step_settings(
    *, frames: int, text: int, rows: int, answer: int, remat: str, dtype: str, frozen: tuple[str, ...] | None = None
) -> TrainConfig:
    """What a measured step is told: dense, features given, AdamW at a rate that stays. frozen: as of `Optimizer` (default: its own)."""
    return TrainConfig(
        steps=1000,
        dtype=dtype,
        remat=remat,
        data=Data(batch=rows, frames=frames, text=text, answer=answer),
        reduction=ReductionMode("none"),
        distill=Distill(),
        optimizer=Optimizer(warmup=0) if frozen is None else Optimizer(warmup=0, frozen=frozen),
    )
