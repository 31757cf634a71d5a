"""The prompt of a sample as a model takes it: messages, the clips in them, and how the reply begins."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hybridvlm.eval.tasks import Sample, Task
from hybridvlm.inference.model import Model
from hybridvlm.inference.thinking import Switch
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
