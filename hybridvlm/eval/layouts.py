"""The prompts of a task's samples as a model takes them: messages, the clips in them, how the reply begins; and their buckets."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridvlm.config import Reduction
from hybridvlm.eval.calls import shared_part
from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.eval.variants import Bucket
from hybridvlm.inference.model import Model
from hybridvlm.inference.thinking import Switch, switch
from hybridvlm.models.prompt import Layout


@dataclasses.dataclass(frozen=True)
class Asking:
    """How questions are put, in addition to their text: a system message, the template's switch for reasoning (None: as it is), and
    the most tokens of reasoning (None: one limit for it and the answer)."""

    system: str = ""
    thinking: bool | None = None
    think_tokens: int | None = None


def lay_out(
    model: Model, task: Task, sample: Sample, factors: tuple[int, int, int], asking: Asking, switch: Switch
) -> Layout:
    """A sample's prompt before padding.

    Args:
        model: whose prompt it is.
        task: of the sample.
        sample: the question.
        factors: frames, rows and columns that an average-pooling plan merges.
        asking: its system message stands in the place of the task's own.
        switch: of reasoning, for the chat template.
    """
    clip, config = (None, model.config) if task.blind else task.clip(sample.video, pixels=False)
    asked = task.asked(sample, clip, model.style)
    messages = asked.messages
    if asking.system:
        messages = [m for m in messages if m["role"] != "system"]
        messages = [{"role": "system", "content": asking.system}, *messages]
    if not hasattr(model.tokenizer, "chat"):  # a model that knows no conversation is asked the user's turn alone
        messages = [m for m in messages if m["role"] == "user"]
    layout = model.family.prompt(
        config,
        model.tokenizer,
        switch.messages(messages),
        asked.clips,
        style=model.style,
        factors=factors,
        template_options=switch.options,
    )
    return continued(layout, model.tokenizer, asked.prefix)


def continued(layout: Layout, tokenizer: Any, prefix: str) -> Layout:
    """A prompt with the text that the reply begins with at its end."""
    if not prefix:
        return layout
    ids = np.asarray(tokenizer.encode(prefix), np.int32)
    changes: dict[str, Any] = {
        "ids": np.concatenate([layout.ids, ids]),
        "frame": np.concatenate([layout.frame, np.full(len(ids), -1, np.int32)]),
    }
    position = getattr(layout, "position", None)
    if position is not None:  # M-RoPE: text counts on from the largest of the three axes
        after = (0 if not len(position) else int(position.max()) + 1) + np.arange(len(ids))
        changes["position"] = np.concatenate([position, np.repeat(after[:, None], 3, axis=1).astype(position.dtype)])
    return dataclasses.replace(layout, **changes)


class Prompts:
    """The prompts of a task's samples for a model, and the bucket of each.

    Args:
        model: that is asked.
        task: whose samples they are.
        base: what all variants share, whose `drop_text` text buckets have to have room for.
        asking: how questions are put.
        held: prompts that are kept for a second look.

    Attributes:
        available: the samples that can be asked.
        buckets: of each of them, by its id.
        shared: of each, what its prompt has in common with others about its video.
        frames: of every video, as prompts have them.
        frame_bytes: of every video's decoded frames.
    """

    def __init__(self, model: Model, task: Task, base: Reduction, asking: Asking, held: int):
        self.model, self.task = model, task
        self._base, self._asking, self._switch, self._held = base, asking, switch(model, asking.thinking), held
        self._layouts: dict[tuple[str, tuple[int, int, int]], Layout] = {}
        self.shared: dict[str, Hashable | None] = {}
        self.frames: dict[str, int] = {}
        self.frame_bytes: dict[str, int] = {}
        self.available = [sample for sample in task.samples if sample.id not in task.unavailable]
        self.buckets = {sample.id: self._bucket(sample) for sample in self.available}

    def layout(self, sample: Sample, factors: tuple[int, int, int] = (1, 1, 1)) -> Layout:
        """A sample's prompt, as `Conversation` lays out the first question on a video."""
        if (sample.id, factors) not in self._layouts:
            if len(self._layouts) > self._held:
                self._layouts.clear()
            laid_out = lay_out(self.model, self.task, sample, factors, self._asking, self._switch)
            self._layouts[sample.id, factors] = laid_out
        return self._layouts[sample.id, factors]

    def _bucket(self, sample: Sample) -> Bucket:
        pick = self.model.buckets.pick
        try:
            layout = self.layout(sample)
            self.shared[sample.id] = shared_part(sample.video, layout)
            if self.task.blind:
                return Bucket(0, pick("text", layout.text), kind="text")
            clip, config = self.task.clip(sample.video, pixels=False)
            size = clip.size if clip.kind == "image" else config.tower.image_size
            self.frames[sample.video] = layout.frames
            self.frame_bytes[sample.video] = 3 * len(clip.seconds) * size[0] * size[1]
            frames = pick("frames", layout.frames)
            text = self.model.text_needed([layout], frames, self._base)
            return Bucket(frames, pick("text", text), config.tower.image_size, clip.kind)
        except ValueError as error:
            raise ValueError(f"{self.task.name}, question {sample.id}: {error}") from error
