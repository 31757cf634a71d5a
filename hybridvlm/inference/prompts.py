"""What a model makes of prompts before anything runs: their layout, the arrays of a bucket, and the plan for it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from hybridvlm.config import Buckets, Reduction
from hybridvlm.inference import frame_text
from hybridvlm.inference.thinking import opens
from hybridvlm.models import nemotron_vl
from hybridvlm.models.family import Family
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import Batch, Layout, PromptStyle, user_message
from hybridvlm.reduction.methods import named_reduction
from hybridvlm.reduction.plan import ReductionPlan


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ModelPrompts:
    """A config, its parameters and a tokenizer, with what turns questions about videos into arrays and plans.

    Attributes:
        config: of the family.
        params: a nested dict of arrays.
        tokenizer: text to ids and back; None takes and gives ids alone.
        buckets: lengths that programs are compiled for.
        reduction: what the checkpoint was tuned under.
        style: the text around frames and question.
        name: for people (default: the config's).
        family: whose functions do the work.
    """

    config: Any
    params: dict[str, Any]
    tokenizer: Any = None
    _: dataclasses.KW_ONLY
    buckets: Buckets = Buckets()
    reduction: Reduction | None = None
    style: PromptStyle = PromptStyle()
    name: str = ""
    family: Family = nemotron_vl

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.config.name)

    def plan(self, reduction: Reduction | None, frames: int, text: int, *, config: Any = None) -> ReductionPlan | None:
        """The static plan of a reduction for a bucket; None when there is nothing to reduce.

        Args:
            reduction: method and budget.
            frames: frame bucket.
            text: text bucket, in tokens.
            config: where frames have another size than the model's own.
        """
        if reduction is None:
            return None
        config = self.config if config is None else config
        own = self.frame_text(frames, reduction)
        return self.family.make_plan(config, reduction, frames, text, self.params["embed"].dtype.itemsize, own)

    def frame_text(self, frames: int, reduction: Reduction | None) -> int:
        """Most text tokens that one of so many frames of a video has of its own; 0 under a reduction that drops none of it."""
        if reduction is None or reduction.drop_text == "none" or not frames or self.config.vision is None:
            return 0
        if frames not in self._frame_text:
            stamps = frame_text.late_stamps(frames * self.config.vision.temporal_patch)
            self._frame_text[frames] = self.layout("", stamps).frame_text
        return self._frame_text[frames]

    @functools.cached_property
    def _frame_text(self) -> dict[int, int]:
        return {}

    def text_needed(self, layouts: Sequence[Layout], frames: int, reduction: Reduction | None) -> int:
        """Text tokens that a bucket of `frames` has to have room for, for prompts under a reduction."""
        return frame_text.bucket_needed(layouts, frames, self.frame_text(frames, reduction))

    def layout(self, question: str, seconds: Sequence[float], factors: tuple[int, int, int] = (1, 1, 1)) -> Layout:
        """One prompt of this model's style: frames at these time stamps, then the question."""
        clips = [Clip(tuple(seconds))] if len(seconds) else []
        messages = [user_message(question, self.style, [clip.kind for clip in clips])]
        return self.family.prompt(self.config, self.tokenizer, messages, clips, style=self.style, factors=factors)

    def batch(
        self, questions: Sequence[str], seconds: Sequence[Sequence[float]], reduction: Reduction | None
    ) -> tuple[Batch, ReductionPlan | None]:
        """Questions, each with the time stamps of its frames, as the arrays of the smallest bucket; and the plan for it."""
        asked = list(zip(questions, seconds, strict=True))
        return self.batch_of(lambda factors: [self.layout(q, s, factors) for q, s in asked], reduction)

    def batch_of(
        self,
        layouts: Callable[[tuple[int, int, int]], Sequence[Layout]],
        reduction: Reduction | None,
        *,
        config: Any = None,
        buckets: Buckets | None = None,
    ) -> tuple[Batch, ReductionPlan | None]:
        """Prompts as the arrays of the smallest bucket, and the plan for it.

        Args:
            layouts: prompts by the factors (frames, rows, columns) that a plan merges by; called a second time if it merges.
            reduction: method and budget.
            config: where frames have another size than the model's own.
            buckets: instead of the model's own.
        """
        config = self.config if config is None else config
        buckets = self.buckets if buckets is None else buckets
        whole = layouts((1, 1, 1))
        batch, frames, text = self.family.make_batch(config, whole, buckets)
        if (needed := self.text_needed(whole, frames, reduction)) > text:
            buckets = dataclasses.replace(buckets, text=(buckets.pick("text", needed),))
            batch, frames, text = self.family.make_batch(config, whole, buckets)
        plan = self.plan(reduction, frames, text, config=config)
        if plan is not None and plan.pool_factors != (1, 1, 1):
            buckets = dataclasses.replace(buckets, text=(text,))
            batch, _, _ = self.family.make_batch(config, layouts(plan.pool_factors), buckets, plan.pool_factors)
        return batch, plan

    def reduction_for(
        self,
        method: str,
        budget: float | None = None,
        kind: str | None = None,
        first_drop: int | None = None,
        drop_text: str | None = None,
    ) -> Reduction | None:
        """The Reduction of a method's name, under the checkpoint's own schedule, score options and seed; None for "none".

        Args:
            method: a name such as "str", or a composition such as "evs:0.5+str:0.5".
            budget: share of the visual tokens (default: 0.25).
            kind: how it is counted, of `BUDGET_KINDS` (default: the checkpoint's own).
            first_drop: the schedule's `start`: no drop before that layer has run (default: the checkpoint's own).
            drop_text: which text of frames' own goes at a drop, of `DROP_TEXT` (default: the checkpoint's own).

        Raises:
            ValueError: for an unknown method (with near names) or a budget outside (0, 1].
        """
        return named_reduction(self.reduction, method, budget, kind, first_drop, drop_text)

    def opened(self, batch: Batch) -> list[bool]:
        """Of each prompt, whether it ends inside reasoning that the reply has to end."""
        if not hasattr(self.tokenizer, "chat"):
            return [False] * len(batch.input_ids)
        ids, segment = jax.device_get((batch.input_ids, batch.segment))
        return [opens(self.tokenizer, row[real > 0]) for row, real in zip(ids, segment, strict=True)]
