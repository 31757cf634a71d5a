"""What a benchmark is made of: its questions, its protocols, and what a benchmark has to say of itself."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hybridvlm.eval.benchmarks.layout import Found, Marker

GroupValue = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question as a benchmark's files have it.

    Attributes:
        id: unique in the benchmark.
        video: the video's name, the cluster of the statistics.
        file: the video's file or folder of frames; None where it is not there.
        question: text without options.
        options: texts without letters.
        answer: letter of the right option; None where it is not published, or is no option.
        groups: field -> value, or several values for a question that counts in each.
        row: number of the question in its file, from 0.
        start: second at which the part asked about begins.
        end: second at which it ends; with no start, nothing from there on is shown.
        stop: number of the first frame that is not shown.
        folder_fps: frames a second where `file` is a folder of frames.
        subtitle: file of subtitles.
        subtitle_start: what to take off the subtitles' times.
        published: the question's text with the options in it, where the file has it so.
        duration: seconds, as the annotations say.
        scored: False where the question is asked for a submission file but left out of every score.
        remark: what is wrong with the question, such as an answer that is no option: it then counts as wrong.
        extra: fields that a submission file needs.
    """

    id: str
    video: str
    file: pathlib.Path | None
    question: str
    options: tuple[str, ...]
    answer: str | None = None
    groups: Mapping[str, GroupValue] = dataclasses.field(default_factory=dict)
    row: int = 0
    start: float | None = None
    end: float | None = None
    stop: int | None = None
    folder_fps: float | None = None
    subtitle: pathlib.Path | None = None
    subtitle_start: float = 0.0
    published: str = ""
    duration: float | None = None
    scored: bool = True
    remark: str = ""
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# (question, subtitle lines or "") -> text of the user's turn
PromptFn = Callable[[Question, str], str]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked and scored under one name.

    Attributes:
        name: such as "official" or "lmms-eval".
        version: of the code or paper that it was read from.
        prompt: makes the text of the user's turn.
        system: text of the system turn.
        prefix: text that the assistant's turn begins with.
        rule: which frames are taken, a name of `frames.RULES` or of `hybridvlm.video.RULES`.
        frames: usual number of frames.
        subtitles: rule of `subtitles.RULES`, "" for none.
        parser: of `parity.PARSERS`, reported beside `letter`.
        interleaved: whether subtitle lines stand between the frames.
        note: what of the protocol this library does otherwise.
    """

    name: str
    version: str
    prompt: PromptFn
    system: str = ""
    prefix: str = ""
    rule: str = "uniform"
    frames: int = 32
    subtitles: str = ""
    parser: str = "letter"
    interleaved: bool = False
    note: str = ""


# (questions, id -> letter or None, id -> reply) -> file name -> JSON value
SubmissionFn = Callable[[Sequence[Question], Mapping[str, str | None], Mapping[str, str]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A published benchmark, or one split of it.

    Attributes:
        name: of the task.
        title: as people call it, with its split.
        markers: files that a folder of it is known by, the preferred one first.
        load: reads what was found.
        protocols: the first one is the default.
        questions: how many the whole has.
        videos: how many the whole has; None where that is not known.
        groups: fields that are reported, the main one first.
        macro: field over whose values the benchmark's own metric averages; "" for the share of all questions.
        metric: what the benchmark calls its number.
        order: values of fields in the benchmark's order.
        submission: files for the benchmark's server.
        lmms: (task name, metric name, scale) of lmms-eval's result files.
        lmms_interleaved: its task's name there where subtitles stand between the frames, "" for the same.
        folders: below the benchmark's own, in which its videos are looked for, the usual one first.
    """

    name: str
    title: str
    markers: Sequence[Marker]
    load: Callable[[Found], list[Question]]
    protocols: Sequence[Protocol]
    questions: int
    videos: int | None
    groups: Sequence[str] = ()
    macro: str = ""
    metric: str = "accuracy"
    order: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    submission: SubmissionFn | None = None
    lmms: tuple[str, str, float] | None = None
    lmms_interleaved: str = ""
    folders: Sequence[str] = ("videos", "")

    def protocol(self, name: str | None) -> Protocol:
        """The protocol of a name, the default one for None; ValueError with the names there are."""
        if name is None:
            return self.protocols[0]
        for protocol in self.protocols:
            if protocol.name == name:
                return protocol
        known = ", ".join(protocol.name for protocol in self.protocols)
        raise ValueError(f"{self.name} has no protocol {name!r}; it has {known}")
