"""A published benchmark from its files as a task: what was found, what each question is asked, how replies are scored."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hybridvlm.eval.benchmarks import frames, letters, metrics, parity, prompts, subtitles, tables
from hybridvlm.eval.benchmarks.definition import Benchmark, Protocol, Question
from hybridvlm.eval.benchmarks.layout import find, unpack_commands
from hybridvlm.eval.tasks import Asked, Sample, TaskOptions
from hybridvlm.eval.tasks.files import FileTask
from hybridvlm.eval.tasks.identity import identity
from hybridvlm.eval.tasks.shots import Shot, pieces, shuffled
from hybridvlm.models.family import family_for
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import PromptStyle
from hybridvlm.options import InputError
from hybridvlm.tokenizers.messages import Message
from hybridvlm.video import RULES as VIDEO_RULES
from hybridvlm.video import VideoError, VideoInfo, most_frames, probe
from hybridvlm.video.clip import FrameRule
from hybridvlm.video.errors import heard, time_limit

NAMED = 8  # names that a line lists before it counts
ABSENT = "is missing"  # how the reason ends for a video that is not there
PROBES = 4  # files that are looked at side by side


class BenchmarkTask(FileTask):
    """A benchmark below `options.published.data`, asked by one of its protocols.

    Raises:
        InputError: where nothing of it lies there, or none of its videos is unpacked (the commands that do are named).
    """

    def __init__(self, benchmark: Benchmark, options: TaskOptions):
        own = options.published
        if own.data is None:
            raise InputError(f"task {benchmark.name} needs --data DIR, the folder that holds {benchmark.title}")
        self.benchmark, self.options = benchmark, own
        self.found = find(own.data, benchmark.markers, benchmark.title)
        self.listed = benchmark.load(self.found)
        if not self.listed:
            raise InputError(f"{self.found.marker} holds no question of {benchmark.title}")
        self.protocol, self.changed = self._protocol(options)
        self.name = "-".join(filter(None, (benchmark.name, own.sanity)))
        self.blind, self.dense_only = own.sanity == "no-video", bool(own.sanity)
        most = most_frames(options.config, options.buckets)
        count = min(options.frames or self.protocol.frames, most)
        super().__init__(family_for(options.config), options.config, count, self.protocol.rule, options.decoding)
        if count < self.protocol.frames and options.frames is None:
            self.changed.append(f"{count} frames, the most this model takes, instead of {self.protocol.frames}")
        asked = [q for q in self.listed if q.scored]
        self.questions = {q.id: q for q in _limited(asked, options.limit, own.limit_videos)}
        if len({q.id for q in asked}) < len(asked):
            raise InputError(f"{self.found.marker}: two questions have one id; is a file there twice?")
        self._shots = {self._key(q): Shot.of(q) for q in self.questions.values() if q.file is not None}
        order = {video: i for i, video in enumerate(dict.fromkeys(q.video for q in self.questions.values()))}
        samples = [self._sample(q) for q in self.questions.values()]
        self.samples = tuple(sorted(samples, key=lambda sample: order[sample.cluster]))
        self._lines: dict[str, list[subtitles.Line]] = {}
        self._digests: dict[str, str] = {}
        self._totals: dict[pathlib.Path, int] = {}
        if all(q.file is None for q in self.questions.values()) and (archives := self.found.archives()):
            lines = "\n".join(unpack_commands(archives, self.found.root, benchmark.folders))
            raise InputError(
                f"{benchmark.title}: no video is unpacked below {self.found.root}; unpack them first:\n{lines}"
            )

    def _protocol(self, options: TaskOptions) -> tuple[Protocol, list[str]]:
        """The protocol as it is run, and what is not as it says."""
        protocol = self.benchmark.protocol(options.published.protocol)
        changes: dict[str, Any] = {}
        changed = []
        if options.sampling and options.sampling != protocol.rule:
            if not frames.known(options.sampling):
                raise InputError(
                    f"--sampling {options.sampling!r} is no rule; there are {', '.join(frames.RULES)}, vk.fps:R, "
                    f"{', '.join(VIDEO_RULES)}, where R is a rate above 0"
                )
            changes["rule"] = options.sampling
            changed.append(f"frames by {options.sampling} instead of {protocol.rule}")
        if options.frames not in (None, protocol.frames):
            changed.append(f"{options.frames} frames instead of {protocol.frames}")
        if options.prompt != "{question}":
            template = options.prompt.replace("{question}", "{Q}").replace("{options}", "{O.}")
            changes |= {"prompt": prompts.form(template), "system": "", "prefix": ""}
            changed.append("the prompt of --prompt, without the protocol's system text and prefix")
        return dataclasses.replace(protocol, **changes), changed

    def _key(self, question: Question) -> str:
        if question.file is None:
            return question.video
        return question.video + Shot.of(question).suffix

    def _sample(self, question: Question) -> Sample:
        main = question.groups.get(self.benchmark.groups[0]) if self.benchmark.groups else None
        return Sample(
            question.id,
            self._key(question),
            question.question,
            question.answer or "",
            question.options,
            main if isinstance(main, str) else "",
            groups={name: list(v) if isinstance(v, tuple) else v for name, v in question.groups.items()},
            cluster=question.video,
        )

    # -- videos

    def path(self, video: str) -> pathlib.Path:
        return self._shots[video].path

    def source(self, video: str, pixels: bool) -> pathlib.Path | Clip:
        shot = self._shots[video]
        return shot.folder_clip(self._rule, self._count, pixels) if shot.path.is_dir() else shot.path

    def frame_rule(self, video: str) -> FrameRule:
        def rule(info: VideoInfo, n: int) -> np.ndarray:
            return self._shots[video].numbers(self._rule, info, n)

        return rule

    def clip(self, video: str, pixels: bool = True) -> tuple[Clip, Any]:
        clip, config = super().clip(video, pixels)
        if self.options.sanity == "shuffle-frames" and clip.frames is not None:
            clip = dataclasses.replace(clip, frames=clip.frames[shuffled(video, len(clip.seconds))])
        return clip, config

    def identity(self, video: str) -> str:
        if video not in self._digests:
            self._digests[video] = identity(self.path(video), self.options.verify == "full")
        clip, config = super().clip(video, pixels=False)
        size = config.vision.image_size
        return repr((self._digests[video], clip.kind, clip.numbers, clip.seconds, size, self.options.sanity))

    @functools.cached_property
    def unavailable(self) -> Mapping[str, str]:
        """Questions whose videos are missing, empty or not to be decoded, found before any model work."""
        if self.blind:
            return {}
        by_file: dict[pathlib.Path, dict[str, None]] = {}
        for sample in self.samples:
            if sample.video in self._shots:
                by_file.setdefault(self.path(sample.video), {})[sample.video] = None
        reasons: dict[pathlib.Path, str] = {}
        files = list(by_file)
        with concurrent.futures.ThreadPoolExecutor(PROBES) as pool:
            for start in range(
                0, len(files), PROBES
            ):  # what was looked at is still at hand when its frames are settled
                some = files[start : start + PROBES]
                looked = list(pool.map(functools.partial(_look, seconds=self._decoding.seconds), some))
                for file, (frames_, reason) in zip(some, looked, strict=True):
                    self._totals[file] = frames_
                    reason = reason or self._settle(by_file[file])
                    if reason:
                        reasons[file] = reason
        out = {}
        for q in self.questions.values():
            if q.file is None:
                out[q.id] = f"video {q.video} {ABSENT}"
            elif q.file in reasons:
                out[q.id] = reasons[q.file]
        return out

    def _settle(self, videos: Iterable[str]) -> str:
        """Settle which frames are shown; why that cannot be, "" where it can."""
        try:
            for video in videos:
                super().clip(video, pixels=False)
        except VideoError as error:
            return str(error)
        return ""

    @property
    def counts_unavailable(self) -> bool:
        return self.options.missing == "wrong"

    def check(self) -> list[str]:
        problems = []
        whole = self.benchmark.questions
        if len(self.listed) < whole and not self.options.incomplete:
            problems.append(
                f"{self.name}: {self.found.marker} holds {len(self.listed):,} of {whole:,} questions; complete the download, or "
                "go on with --incomplete ok"
            )
        if self.unavailable and self.options.missing == "fail":
            problems.append(f"{self.name}: {self._missing()}; go on with --missing wrong (they count as wrong) or skip")
        if len(self.unavailable) == len(self.questions):
            reason = next(iter(self.unavailable.values()))
            problems.append(f"{self.name}: no video of it can be read below {self.found.root}: {reason}")
        return problems

    def _missing(self) -> str:
        by_video: dict[str, int] = {}
        for sample in self.samples:
            if sample.id in self.unavailable:
                by_video[sample.cluster] = by_video.get(sample.cluster, 0) + 1
        named = ", ".join(f"{video} ({n})" for video, n in list(by_video.items())[:NAMED])
        more = f" and {len(by_video) - NAMED} more" if len(by_video) > NAMED else ""
        asked = len(self.unavailable)
        # of those that are there; that the others are missing can be seen by their names
        damaged = next((f"; {reason}" for reason in self.unavailable.values() if not reason.endswith(ABSENT)), "")
        return f"{len(by_video)} videos of {asked} questions cannot be read: {named}{more}{damaged}"

    # -- questions

    def prompt(self, sample: Sample) -> str:
        """The text of the user's turn; with subtitles between the frames, they stand before it with <frame> for each frame."""
        question = self.questions[sample.id]
        text = self.protocol.prompt(question, self._subtitles(sample))
        items = self._interleaved(sample)
        if items is None:
            return text
        return "\n".join("<frame>" if isinstance(item, int) else item for item in items) + "\n" + text

    def asked(self, sample: Sample, clip: Clip | None, style: PromptStyle) -> Asked:
        question = self.questions[sample.id]
        text = style.question.format(question=self.protocol.prompt(question, self._subtitles(sample)))
        items = self._interleaved(sample) if clip is not None else None
        if clip is None:
            parts: list[Clip | str] = []
        elif items is None:
            parts = [clip]
        else:
            parts = pieces(clip, items, self._config.vision.temporal_patch)
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": p.kind} for p in parts]
        messages: list[Message] = []
        if self.protocol.system:
            messages.append({"role": "system", "content": self.protocol.system})
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": text}]})
        return Asked(messages, [p for p in parts if not isinstance(p, str)], self.protocol.prefix)

    def _subtitles(self, sample: Sample) -> str:
        """What of a video's subtitles stands in the prompt."""
        question = self.questions[sample.id]
        rule = subtitles.RULES.get(self.protocol.subtitles)
        if rule is None or self.blind or sample.id in self.unavailable:
            return ""
        if question.subtitle is None:
            return rule((), (), 1.0, 1)  # the harness says something in their place, the others nothing
        if question.video not in self._lines:
            self._lines[question.video] = subtitles.read_srt(question.subtitle)
        clip, _ = super().clip(sample.video, pixels=False)
        return rule(self._lines[question.video], clip.numbers, clip.fps, self._totals[self.path(sample.video)])

    def _interleaved(self, sample: Sample) -> list[int | str] | None:
        """Frames and subtitle lines in their order; None where the protocol has none between frames."""
        question = self.questions[sample.id]
        if not self.protocol.interleaved or question.subtitle is None or self.blind or sample.id in self.unavailable:
            return None
        if question.video not in self._lines:
            self._lines[question.video] = subtitles.read_lvb(
                question.subtitle, question.subtitle_start, question.duration
            )
        clip, _ = super().clip(sample.video, pixels=False)
        return subtitles.between_frames(self._lines[question.video], clip.seconds)

    # -- scores

    def parse(self, text: str, sample: Sample) -> str | None:
        """The letter that a reply stands for."""
        return letters.letter(text, sample.options).letter

    def correct(self, parsed: str | None, sample: Sample) -> bool:
        """Whether a letter names the right option; equal options are equally right."""
        return parsed is not None and right(parsed, self.questions[sample.id])

    def score(self, text: str | None, sample: Sample) -> dict[str, Any]:
        return scored(text, self.questions[sample.id], self.protocol.parser)

    def details(self, sample: Sample) -> dict[str, Any]:
        return {"options": list(sample.options), "row": self.questions[sample.id].row}

    def summary(self, answers: Sequence[tuple[Sample, Mapping[str, Any]]]) -> dict[str, Any]:
        def answered(sample: Sample, record: Mapping[str, Any]) -> metrics.Answered:
            own = record.get("parity", {}).get("correct", False)  # a question that counts as wrong unasked has none
            given = (record["parsed"], record["prediction"], own)
            return metrics.Answered(self.questions[sample.id].groups, bool(record["correct"]), *given)

        found = [answered(s, r) for s, r in answers]
        counted = [answered(s, r) for s, r in answers if r["correct"] is not None]
        spread = metrics.replies(found)
        reasons: dict[str, int] = {}
        for _, record in answers:
            if record["parsed"] is None and record["prediction"] is not None:
                reasons[record["how"]] = reasons.get(record["how"], 0) + 1
        guessing = parity.PARSERS[self.protocol.parser].guesses
        return {
            "scores": metrics.scores(self.benchmark, counted)
            | {"parity_parser": self.protocol.parser, "parity_guesses": guessing},
            "replies": spread | {"reasons": reasons},
            "reply_warnings": metrics.warnings(spread),
        }

    def files(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """The benchmark's submission files, an entry for every question, and the ids for which there was no letter."""
        if self.benchmark.submission is None or self.options.sanity:
            return {}
        questions = sorted(self.questions.values(), key=lambda q: q.id)
        given = {i: r["parsed"] for i, r in records.items() if r.get("prediction") is not None}
        replies = {i: r["prediction"] for i, r in records.items() if r.get("prediction") is not None}
        made = self.benchmark.submission(questions, given, replies)
        failed = "".join(f"{q.id}\n" for q in questions if given.get(q.id) is None)
        out = {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in made.items()}
        return out | {f"{next(iter(made))}.failed.txt": failed}

    # -- what a reader must know

    def about(self) -> dict[str, Any]:
        return self._about

    @functools.cached_property
    def _about(self) -> dict[str, Any]:
        videos = {q.video for q in self.listed}
        there = {q.video for q in self.listed if q.file is not None and q.id not in self.unavailable}
        shown = [s for s in self.samples if s.id not in self.unavailable and not self.blind]
        clips = [
            super(BenchmarkTask, self).clip(video, pixels=False) for video in dict.fromkeys(s.video for s in shown)
        ]
        counts = sorted(len(clip.seconds) for clip, _ in clips)
        asked = ((s.id, self.protocol.system, self.prompt(s), self.protocol.prefix) for s in self.samples)
        without = {q.video for q in self.questions.values() if q.subtitle is None} if self.protocol.subtitles else set()
        return {
            "title": self.benchmark.title,
            "protocol": self.protocol.name,
            "version": self.protocol.version,
            "changed": self.changed,
            "prompt_hash": prompts.digest(asked),
            "parser": letters.VERSION,
            "protocol_parser": self.protocol.parser,
            "layout": self.found.kind,
            "annotations": {"file": self.found.marker.name, "sha256": tables.digest(self.found.marker)},
            "questions": {"found": len(self.listed), "whole": self.benchmark.questions, "asked": len(self.samples)},
            "videos": {"found": len(there), "listed": len(videos), "whole": self.benchmark.videos},
            "missing": {"rule": self.options.missing, "questions": len(self.unavailable)},
            "frames": {
                "rule": self._rule, "asked": self._count, "least": counts[0], "median": counts[len(counts) // 2],
                "most": counts[-1],
            } if counts else None,
            "pixels": sorted({tuple(config.vision.image_size) for _, config in clips}),
            "subtitles": {"rule": self.protocol.subtitles or None, "videos_without": len(without)},
            "chance": sum(1 / len(q.options) for q in self.questions.values()) / len(self.questions),
            "notes": self.notes(),
        }  # fmt: skip

    def notes(self) -> list[str]:
        """What was found, in lines."""
        whole, videos = self.benchmark.questions, {q.video for q in self.listed}
        gone = {q.video for q in self.listed if q.file is None or q.id in self.unavailable}
        of = f"{len(videos) - len(gone):,} of {self.benchmark.videos or len(videos):,} videos"
        lines = [f"{len(self.listed):,} of {whole:,} questions, {of}"]
        if self.unavailable:
            lines[0] += f"; missing: {self._missing()}"
        change = f", but {'; '.join(self.changed)}" if self.changed else ""
        lines.append(f"protocol {self.protocol.name} ({self.protocol.version}){change}")
        lines += [self.protocol.note] * bool(self.protocol.note) + self.found.notes
        odd = [f"{q.id}: {q.remark}" for q in self.listed if q.remark]
        lines += odd[:NAMED] + [f"{len(odd) - NAMED} more questions with such remarks"] * (len(odd) > NAMED)
        if self.protocol.subtitles:
            without = {q.video for q in self.questions.values() if q.subtitle is None}
            lines += [f"{len(without)} videos have no subtitles and are asked without"] * bool(without)
        return [f"{self.name}: {line}" for line in lines]


def right(letter: str, question: Question) -> bool:
    """Whether a letter names the right option of a question, or one with the same text."""
    if question.answer is None:
        return False
    mine, gold = (question.options[letters.ALPHABET.index(x)] for x in (letter, question.answer))
    return letters.same_text(mine) == letters.same_text(gold)


def scored(text: str | None, question: Question, parser: str) -> dict[str, Any]:
    """What a record holds of a reply: the letter and how it was found, whether it is right (None where the answer is not
    published), and what the protocol's own parser makes of it."""
    parsed = letters.letter(text, question.options) if text is not None else letters.Parsed(None, "thinking not closed")
    open_ = question.answer is None and not question.remark
    own = parity.PARSERS[parser]
    found = own.rule(text or "", question.options)
    official = question.answer is not None and own.right(text or "", question.options, question.answer)
    return {
        "parsed": parsed.letter,
        "how": parsed.how,
        "correct": None if open_ else parsed.letter is not None and right(parsed.letter, question),
        "parity": {"letter": found, "correct": None if open_ else official},
    }


def _look(file: pathlib.Path, seconds: float | None) -> tuple[int, str]:
    """(frames of a file, why it gives none in so many seconds, "" where it does)."""
    if file.is_dir():
        return sum(1 for _ in file.iterdir()), ""
    try:
        with heard(), time_limit(seconds):  # said once more when the frames are settled, where it is kept
            return probe(file).frames, ""
    except (VideoError, OSError) as error:
        return 0, str(error)


def _limited(questions: list[Question], limit: int, videos: int) -> list[Question]:
    """At most so many questions or videos (0: all): whole videos, evenly over the file, the last one cut."""
    if not limit and not videos:
        return questions
    by_video: dict[str, list[Question]] = {}
    for question in questions:
        by_video.setdefault(question.video, []).append(question)
    names = list(by_video)
    most = min(videos or len(names), len(names))
    for count in range(1 if limit else most, most + 1):
        chosen = [names[i] for i in np.linspace(0, len(names) - 1, count).astype(int)]
        if not limit or sum(len(by_video[name]) for name in chosen) >= limit:
            break
    kept = [question for name in chosen for question in by_video[name]]
    return kept[: limit or None]
