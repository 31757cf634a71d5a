"""Tasks: samples with a right answer, the clips of their videos, and a parser that never guesses.

A task is the embedded benchmark (`needle`), a JSONL file of questions on videos and images, or a published benchmark
(`hybridvlm.eval.benchmarks`). Adding one is adding a class with `samples`, `clip` and `identity`, and its builder to TASKS; from
outside the package by `register`, an entry point of the group `hybridvlm.tasks`, or `--task-module`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybridvlm.config import Buckets, ModelConfig
from hybridvlm.eval.benchmarks import MODULES, published
from hybridvlm.inference.thinking import split_reply
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import PromptStyle, user_message
from hybridvlm.tokenizers.messages import Message
from hybridvlm.video.frame_cache import FrameCache


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        id: unique in its task.
        video: what is shown, as `Task.clip` knows it.
        question: text.
        answer: the right one; "" where it is not published, so that the question is asked and not scored.
        options: none for an open answer.
        type: for the accuracy by type.
        two_hop: whether the answer needs a second look-up.
        groups: field -> value or values, for a benchmark's own breakdown.
        cluster: the video, for the statistics, where several samples see different parts of it ("": `video`).
    """

    id: str
    video: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    type: str = ""
    two_hop: bool = False
    groups: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    cluster: str = ""

    @property
    def whole(self) -> str:
        """The video that answers are clustered by."""
        return self.cluster or self.video


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How video files are read.

    Attributes:
        seconds: that one video may take, None for as long as it takes.
        cache: of decoded clips.
    """

    seconds: float | None = None
    cache: FrameCache | None = None


@dataclasses.dataclass(frozen=True)
class Published:
    """Options of published benchmarks.

    Attributes:
        data: folder that holds them.
        protocol: name of one; None for each benchmark's default.
        missing: what a video that cannot be read means: "fail", "wrong" or "skip" its questions.
        incomplete: whether an annotation file may hold fewer questions than the benchmark.
        limit_videos: most videos, 0 for all.
        verify: "quick" or "full", how much of a video file its identity is taken from.
        sanity: "" or "no-video" or "shuffle-frames".
    """

    data: pathlib.Path | None = None
    protocol: str | None = None
    missing: str = "fail"
    incomplete: bool = False
    limit_videos: int = 0
    verify: str = "quick"
    sanity: str = ""


class Asked(NamedTuple):
    """How a sample is put to a model: messages, the clips in them in order, and how the reply has to begin."""

    messages: list[Message]
    clips: list[Clip]
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """What a task is built for.

    Attributes:
        config: of the model.
        frames: of a video; None for the task's own choice.
        buckets: of the model.
        split: of `needle` and `needle-scenes`.
        limit: most samples, 0 for all.
        prompt: template of JSONL questions; another one than the default replaces a protocol's prompt.
        sampling: rule that picks frames of video files (`video.sampling`), "" for the task's own.
        published: what published benchmarks are built with.
        decoding: how video files are read.
    """

    config: ModelConfig
    frames: int | None = None
    buckets: Buckets = Buckets()
    split: str = "test"
    limit: int = 0
    prompt: str = "{question}"
    sampling: str = ""
    published: Published = Published()
    decoding: Decoding = Decoding()


class Task(abc.ABC):
    """Samples grouped by video, and what the model is shown of them."""

    name: str
    samples: tuple[Sample, ...]
    blind: bool = False  # whether questions are asked without any video
    dense_only: bool = False  # whether methods have no part in it

    def prompt(self, sample: Sample) -> str:
        """The text that the model is asked."""
        return sample.question

    def asked(self, sample: Sample, clip: Clip | None, style: PromptStyle) -> Asked:
        """How a sample is put to a model, without the messages that the command itself adds.

        Args:
            sample: the question.
            clip: what is shown, without its frames; None where the task is blind.
            style: of the model.
        """
        clips = [] if clip is None else [clip]
        return Asked([user_message(self.prompt(sample), style, [c.kind for c in clips])], clips)

    @property
    def unavailable(self) -> Mapping[str, str]:
        """Samples that cannot be asked, by id, with the reason; known before any work starts."""
        return {}

    @property
    def counts_unavailable(self) -> bool:
        """Whether such samples count as wrong, rather than being left out of the score."""
        return False

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

    def score(self, text: str | None, sample: Sample) -> dict[str, Any]:
        """What a record holds of a reply; None for one that never came to an answer.

        At least `parsed`, `how` (the step that gave it, or why there is none) and `correct`.
        """
        parsed = None if text is None else self.parse(text, sample)
        return {"parsed": parsed, "how": _how(text, sample, parsed), "correct": self.correct(parsed, sample)}

    def details(self, sample: Sample) -> dict[str, Any]:
        """What a record holds of the question itself, answered or not, beside what it holds for every task."""
        return {}

    def judged(self, record: Mapping[str, Any], sample: Sample) -> dict[str, Any]:
        """A stored record, scored as this task scores now: how it was scored when it was written does not count.

        A question that could not be asked is wrong or left out (`correct` is None), as `counts_unavailable` says.
        """
        if "failure" in record:
            return {**record, "parsed": None, "correct": False if self.counts_unavailable else None}
        return {**record, **self.score(None if "no_answer" in record else record["prediction"], sample)}

    def about(self) -> dict[str, Any]:
        """What results.json holds of the task itself."""
        return {}

    def summary(self, answers: Sequence[tuple[Sample, Mapping[str, Any]]]) -> dict[str, Any]:
        """Further numbers of a row, from its samples and their records; `correct` is None where the answer is not published."""
        return {}

    def files(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """Files to write of a row, name -> content, from its records by sample id: submissions for a server."""
        return {}

    @property
    def videos(self) -> list[str]:
        """The videos, each once, in the order of the samples."""
        return list(dict.fromkeys(sample.video for sample in self.samples))


def plain(text: str) -> str:
    """A text for comparison: case, outer spaces, quotes and a full stop at the end do not matter."""
    return " ".join(text.strip().strip("\"'`").rstrip(".").split()).casefold()


_LETTER = re.compile(r"^\(?([A-Za-z])(?:\)|\.|:|\)\.|\):)?(?:\s+(.*))?$", re.DOTALL)


class Choice(NamedTuple):
    """The option that a reply names, or None, and the step that gave it, or the reason that there is none."""

    option: str | None
    how: str


def choice(text: str, options: Sequence[str]) -> Choice:
    """The option that a reply names, and how.

    What stands before a closing tag of reasoning does not count, and reasoning that never ends holds no answer. No part of a
    longer reply is searched and nothing is guessed.

    Args:
        text: what the model said.
        options: texts of the options.

    Returns:
        The option with "text" (the reply is exactly its text) or "first" (its letter, A is the first: `B`, `(B)`, `B.`, `B) its
        text`), as of `letters.letter`; None with one of the reasons "empty", "no such letter", "thinking not closed", "letter and
        text disagree", "none".
    """
    parts = split_reply(text)
    if parts.unfinished:
        return Choice(None, "thinking not closed")
    reply = plain(parts.text)
    for option in options:
        if reply == plain(option):
            return Choice(option, "text")
    match = _LETTER.match(parts.text.strip())
    if match is None:
        return Choice(None, "none" if reply else "empty")
    number = ord(match.group(1).upper()) - ord("A")
    rest = match.group(2)
    if number >= len(options):
        # a bare letter before words is a word: "A man"
        return Choice(None, "no such letter" if rest is None else "none")
    if rest is None or plain(rest) == plain(options[number]):
        return Choice(options[number], "first")
    return Choice(None, "letter and text disagree" if any(plain(rest) == plain(o) for o in options) else "none")


def parse_choice(text: str, options: Sequence[str]) -> str | None:
    """The option that a reply names, None where it names none: as `choice` has it."""
    return choice(text, options).option


def _how(text: str | None, sample: Sample, parsed: str | None) -> str:
    """The step that parsed a reply. A task with a parser of its own is taken at its word."""
    if text is None:
        return "thinking not closed"
    if not sample.options:
        return "text" if parsed is not None else "thinking not closed" if split_reply(text).unfinished else "empty"
    found = choice(text, sample.options)
    return found.how if found.option == parsed else "own" if parsed is not None else "none"


def parse_open(text: str) -> str | None:
    """An open answer as it stands after any reasoning; None if there is nothing but spaces."""
    return split_reply(text).text.strip() or None


def letters(options: Sequence[str]) -> str:
    """Options one per line with their letters, for prompts."""
    return "\n".join(f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options))


def _needle(name: str, options: TaskOptions) -> Task:
    from hybridvlm.eval.tasks.needle import Needle, NeedleScenes

    return {kind.name: kind for kind in (Needle, NeedleScenes)}[name](options)


def _jsonl(name: str, options: TaskOptions) -> Task:
    from hybridvlm.eval.tasks.jsonl import JsonlTask

    return JsonlTask(pathlib.Path(name), options)


TASKS: dict[str, tuple[Callable[[str, TaskOptions], Task], str]] = {
    "needle": (
        _needle,
        "the embedded benchmark: 7 types of questions on 64-frame videos of real items, one and two look-ups",
    ),
    "needle-scenes": (
        _needle,
        "the same questions on scenes that last: four fifths of the tokens repeat the frame before",
    ),
}
FILE_TASK = "any JSONL file of questions on videos and images (fields: see --help)"


ENTRY_POINTS = "hybridvlm.tasks"


def register(name: str, build: Callable[[str, TaskOptions], Task], what: str) -> None:
    """Add a task of one's own.

    Args:
        name: as `--tasks` takes it.
        build: (name, options) -> the task.
        what: one line for `--list`.

    Raises:
        ValueError: for a name that is taken.
    """
    if name in TASKS or name in MODULES:
        raise ValueError(f"task {name!r} is there already; give yours another name")
    TASKS[name] = (build, what)


def load_tasks(modules: Sequence[str] = ()) -> None:
    """Import what registers tasks: entry points of the group hybridvlm.tasks, and modules by name or path of a .py file.

    ValueError names a module that cannot be imported, with the line that failed.
    """
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name not in TASKS:
            with _told(f"entry point {point.name} of {ENTRY_POINTS}, {point.value}"):
                register(point.name, point.load(), f"from {point.value}")
    for module in modules:
        with _told(f"--task-module {module}"):
            if module.endswith(".py"):
                _execute(pathlib.Path(module).resolve())
            else:
                importlib.import_module(module)


def _execute(path: pathlib.Path) -> None:
    """Import a file as a module of its own, once."""
    spec = importlib.util.spec_from_file_location(f"hybridvlm_task_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no file {path}")
    if spec.name in sys.modules:
        return
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    try:
        spec.loader.exec_module(found)
    except BaseException:
        del sys.modules[spec.name]
        raise


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """ValueError that names `what` for whatever goes wrong: other people's code may raise anything."""
    try:
        yield
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<frozen")]
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
        raise ValueError(f"{what}: {type(error).__name__}: {error}{where}") from None


def build_task(name: str, options: TaskOptions) -> Task:
    """The task called `name`, or the one of a .jsonl file; ValueError with near names for anything else."""
    if name in TASKS:
        return TASKS[name][0](name, options)
    if name in MODULES:
        from hybridvlm.eval.tasks.benchmark import BenchmarkTask

        return BenchmarkTask(published(name), options)
    if name.endswith((".jsonl", ".json")) or pathlib.Path(name).is_file():
        return _jsonl(name, options)
    known = (*TASKS, *MODULES)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown task {name!r}; {hint}the tasks are {', '.join(known)}, or the path of a .jsonl file")
