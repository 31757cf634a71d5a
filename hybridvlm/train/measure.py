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
from hybridvlm.models import nemotron_vl
from hybridvlm.models.prompt import Batch
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.train.config import Data, Distill, Optimizer, ReductionMode, TrainConfig
from hybridvlm.train.rows import TrainBatch
from hybridvlm.train.step import Trainer


@dataclasses.dataclass(frozen=True)
class StepCall:
    """A compiled training step as a call without arguments, its plan (None: dense), and the seconds that it took to compile."""

    call: Callable[[], Any]
    plan: ReductionPlan | None
    compile_seconds: float


def random_row(
    config: ModelConfig, frames: int, text: int, rows: int, answer: int, seed: int = 0
) -> TrainBatch[np.ndarray]:
    """Rows of `frames` frames and `text` text tokens after them, of which the last `answer` are to be said; random features."""
    rng, m = np.random.default_rng(seed), config.tower.tokens_per_frame
    frame = np.concatenate([np.repeat(np.arange(frames), m), np.full(text, -1)]).astype(np.int32)
    length = len(frame)
    ids = rng.integers(0, config.vocab_size, (rows, length), np.int32)
    label = np.zeros((rows, length), np.int32)
    label[:, -answer - 1 : -1] = ids[:, -answer:] + 1
    question = (frame < 0) & (np.arange(length) < length - answer)
    batch = Batch(ids, np.ones_like(ids), np.tile(frame, (rows, 1)), np.full(rows, frames, np.int32))
    features = rng.normal(size=(rows, frames, m, config.width)).astype(np.float32)
    return TrainBatch(batch, label, np.tile(question, (rows, 1)), {"features": features})


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
    settings = TrainConfig(
        steps=1000,
        dtype=dtype,
        remat=remat,
        data=Data(batch=rows, frames=frames, text=text, answer=answer),
        reduction=ReductionMode("none"),
        distill=Distill(),
        optimizer=Optimizer(warmup=0),
    )
    params = nemotron_vl.init(config, jax.random.key(0))
    trainer = Trainer(settings, Model(config, params))
    state, fixed = trainer.start(params)
    del params
    batch, held, calls = jax.device_put(random_row(config, frames, text, rows, answer)), {"state": state}, []
    del state
    for reduction in reductions:
        plan = None if reduction is None else nemotron_vl.make_plan(config, reduction, frames, text, 4)
        begin = time.perf_counter()
        program = trainer.program(plan).lower(held["state"], fixed, batch).compile()  # type: ignore[attr-defined]
        seconds = time.perf_counter() - begin

        def call(program: Any = program) -> Any:
            held["state"], metrics = program(held["state"], fixed, batch)
            return metrics

        calls.append(StepCall(call, plan, seconds))
    return calls
