"""Tasks: samples with a right answer, the clips of their videos, and a parser that never guesses.

A task is the embedded benchmark (`needle`) or a JSONL file of questions on videos and images. Adding one is adding a class
with `samples`, `clip` and `identity`, and its builder to TASKS.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from hybridvlm.config import Buckets, ModelConfig
from hybridvlm.inference.thinking import split_reply
from hybridvlm.models.media import Clip


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question. `video` names its video, the cluster of the statistics; no `options` means an open answer."""

    id: str
    video: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    type: str = ""
    two_hop: bool = False


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """What a task is built for: the model's config and buckets, frames per video (None: the task's own choice), split of
    `needle`, most samples (0: all), the prompt template of JSONL questions, the rule that picks frames of video files
    (`video.sampling`)."""

    config: ModelConfig
    frames: int | None = None
    buckets: Buckets = Buckets()
    split: str = "test"
    limit: int = 0
    prompt: str = "{question}"
    sampling: str = "uniform"


class Task(abc.ABC):
    """Samples grouped by video, and what the model is shown of them."""

    name: str
    samples: tuple[Sample, ...]

    def prompt(self, sample: Sample) -> str:
        """The text that the model is asked."""
        return sample.question

    @abc.abstractmethod
    def clip(self, video: str, pixels: bool = True) -> tuple[Clip, ModelConfig]:
        """What the model is shown of a video, and its config for clips of that size, as `video.shown_clip` gives them.

        pixels: False leaves the frames out, and decodes nothing.
        """

    @abc.abstractmethod
    def identity(self, video: str) -> str:
        """A text that changes when the video or the choice of its frames does: part of a sample's key. No path and no date."""

    def seconds(self, video: str) -> list[float]:
        """Time stamps, in seconds, of the frames that are shown."""
        return list(self.clip(video, pixels=False)[0].seconds)

    def frames(self, video: str) -> tuple[np.ndarray, list[float]]:
        """(the frames that are shown, uint8 [F,h,w,3], and their time stamps in seconds)."""
        clip, _ = self.clip(video)
        assert clip.frames is not None  # asked for with its pixels
        return clip.frames, list(clip.seconds)

    def remarks(self, video: str) -> list[str]:
        """What the decoder complained of in a video so far."""
        return []

    def gone(self, video: str) -> bool:
        """Whether a video that cannot be read is not there any more, rather than damaged."""
        return False

    def check(self) -> list[str]:
        """One line for every video that cannot be used; asked before any work starts."""
        return []

    def parse(self, text: str, sample: Sample) -> str | None:
        """The answer that a reply stands for, None where it stands for none."""
        return parse_choice(text, sample.options) if sample.options else parse_open(text)

    def correct(self, parsed: str | None, sample: Sample) -> bool:
        """Whether a parsed answer is the right one; no answer is wrong."""
        return parsed is not None and plain(parsed) == plain(sample.answer)

    @property
    def videos(self) -> list[str]:
        """The videos, each once, in the order of the samples."""
        return list(dict.fromkeys(sample.video for sample in self.samples))


def plain(text: str) -> str:
    """A text for comparison: case, outer spaces, quotes and a full stop at the end do not matter."""
    return " ".join(text.strip().strip("\"'`").rstrip(".").split()).casefold()


_LETTER = re.compile(r"^\(?([A-Za-z])(?:\)|\.|:|\)\.|\):)?(?:\s+(.*))?$", re.DOTALL)


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """The option that a reply names: exactly its text, or its letter (A is the first; `B`, `(B)`, `B.`, `B) its text`).

    What stands before a closing tag of reasoning does not count, and reasoning that never ends holds no answer. Anything else
    is None: no part of a longer reply is searched and nothing is guessed.
    """
    text = split_reply(text).text
    reply = plain(text)
    for option in options:
        if reply == plain(option):
            return option
    match = _LETTER.match(text.strip())
    if match is None:
        return None
    number = ord(match.group(1).upper()) - ord("A")
    if number >= len(options):
        return None
    rest = match.group(2)
    return options[number] if rest is None or plain(rest) == plain(options[number]) else None


def parse_open(text: str) -> str | None:
    """An open answer as it stands after any reasoning; None if there is nothing but spaces."""
    return split_reply(text).text.strip() or None


def letters(options: Sequence[str]) -> str:
    """Options one per line with their letters, for prompts."""
    return "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))


def _needle(name: str, options: TaskOptions) -> Task:
    from hybridvlm.eval.tasks.needle import Needle

    return Needle(options)


def _jsonl(name: str, options: TaskOptions) -> Task:
    from hybridvlm.eval.tasks.jsonl import JsonlTask

    return JsonlTask(pathlib.Path(name), options)


TASKS: dict[str, tuple[Callable[[str, TaskOptions], Task], str]] = {
    "needle": (
        _needle,
        "the embedded benchmark: 7 types of questions on 64-frame videos of real items, one and two look-ups",
    ),
}
FILE_TASK = "any JSONL file of questions on videos and images (fields: see --help)"


def build_task(name: str, options: TaskOptions) -> Task:
    """The task called `name`, or the one of a .jsonl file; ValueError with near names for anything else."""
    if name in TASKS:
        return TASKS[name][0](name, options)
    if name.endswith((".jsonl", ".json")) or pathlib.Path(name).is_file():
        return _jsonl(name, options)
    near = difflib.get_close_matches(name, TASKS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown task {name!r}; {hint}the tasks are {', '.join(TASKS)}, or the path of a .jsonl file")
