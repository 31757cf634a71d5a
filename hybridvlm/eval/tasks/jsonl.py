"""Questions on video and image files, listed in a JSONL file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import string
from typing import Any

from hybridvlm.eval.tasks import Sample, TaskOptions, letters, plain
from hybridvlm.eval.tasks.files import FileTask
from hybridvlm.files import json_rows, text_problem
from hybridvlm.models.family import family_for
from hybridvlm.video import VideoError, default_frames

FIELDS = """\
  video     path of the video or image file, relative to the JSONL file (required)
  question  text (required)
  answer    the right one: an option's text, or its letter; free text without options (required)
  options   list of at least two different texts
  type      question type, for the accuracy by type
  two_hop   true where the answer needs a second look-up, for accuracy_two_hop
  id        unique text (default: the line number)"""
_KNOWN = {"video", "question", "answer", "options", "type", "two_hop", "id"}


class JsonlTask(FileTask):
    """A JSONL file, one question a line (or one JSON array of them); frames by the rule of the options, evenly from first to last
    unless told, and as many as `ask` looks at.

    Files that are one and the same, however their paths are written, are one video. ValueError with file and line number for a
    line that is not a question; FileNotFoundError for a missing file.
    """

    def __init__(self, path: pathlib.Path, options: TaskOptions):
        if not path.is_file():
            raise FileNotFoundError(f"no questions at {path}; give a JSONL file, one question a line")
        if options.config.vision is None:
            raise ValueError(f"{path}: the model has no vision tower, it cannot be asked about videos")
        self.name, self._folder, self._template = path.stem, path.parent, options.prompt
        count = options.frames or default_frames(options.config, options.buckets)
        rule = options.sampling or "uniform"
        super().__init__(family_for(options.config), options.config, count, rule, options.decoding)
        self._digests: dict[str, str] = {}
        first: dict[Any, str] = {}  # file -> how it was written first
        samples = []
        for sample in read_samples(path)[: options.limit or None]:
            video = first.setdefault(_file(self._folder / sample.video), sample.video)
            samples.append(dataclasses.replace(sample, video=video))
        order = {video: i for i, video in enumerate(dict.fromkeys(sample.video for sample in samples))}
        samples.sort(key=lambda sample: order[sample.video])  # stable: a video's questions come together
        self.samples = tuple(samples)
        _check_template(self._template)

    def prompt(self, sample: Sample) -> str:
        return self._template.format(question=sample.question, options=letters(sample.options))

    def path(self, video: str) -> pathlib.Path:
        return self._folder / video

    def check(self) -> list[str]:
        problems = []
        for video in self.videos:
            try:
                self.clip(video, pixels=False)
            except VideoError as error:
                problems.append(str(error))
        return problems

    def identity(self, video: str) -> str:
        if video not in self._digests:
            with open(self._folder / video, "rb") as file:
                self._digests[video] = hashlib.file_digest(file, "sha256").hexdigest()
        clip, config = self.clip(video, pixels=False)
        return repr((self._digests[video], clip.kind, clip.numbers, clip.seconds, config.vision.image_size))


def _check_template(template: str) -> None:
    """ValueError for a prompt that asks for more than the two fields as they are: an attribute, an index, a conversion."""
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        fields = [("", "", None)]
    if any(name not in ("question", "options") or form or turned for name, form, turned in fields):
        raise ValueError(f"--prompt may name {{question}} and {{options}} only, got {template!r}")


def _file(path: pathlib.Path) -> Any:
    """What two spellings of one file have in common."""
    try:
        status = path.stat()
    except OSError:
        return os.path.realpath(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def read_samples(path: pathlib.Path) -> list[Sample]:
    """The samples of a JSONL file, or of a JSON array; ValueError names file and line (or position)."""
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    for number, where, parse in json_rows(path):
        try:
            sample = _sample(parse(), number)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, {where}: not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}, {where}: {error}") from None
        if sample.id in seen:
            raise ValueError(f"{path}, {where}: id {sample.id!r} is also that of {seen[sample.id]}")
        seen[sample.id] = where
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path} holds no question")
    return samples


def _sample(row: Any, number: int) -> Sample:
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with video, question and answer, got {type(row).__name__}")
    unknown = sorted(set(row) - _KNOWN)
    if unknown:
        raise ValueError(f"has no field {unknown[0]!r}; the fields are {', '.join(sorted(_KNOWN))}")
    for field in ("video", "question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"{field} must be a text that is not empty, got {row.get(field)!r}")
    if "\0" in row["video"]:
        raise ValueError(f"video holds a zero byte, which no path has: {row['video']!r}")
    if problem := text_problem(row):
        raise ValueError(problem)
    options = row.get("options") or []
    if not isinstance(options, list) or any(not isinstance(o, str) for o in options) or len(options) == 1:
        raise ValueError(f"options must be a list of at least two texts, got {options!r}")
    if len(options) > 26 or len({plain(o) for o in options}) != len(options):
        raise ValueError("options must be at most 26 different texts (case and a full stop make no difference)")
    answer = row["answer"]
    if options:
        same = [o for o in options if plain(o) == plain(answer)]
        position = ord(answer.strip().upper()) - ord("A") if re.fullmatch("[A-Za-z]", answer.strip()) else -1
        if not same and not 0 <= position < len(options):
            raise ValueError(f"answer {answer!r} is none of the options {options} and not the letter of one")
        answer = same[0] if same else options[position]
    for field, kind in (("type", str), ("two_hop", bool)):
        if not isinstance(row.get(field, kind()), kind):
            raise ValueError(f"{field} must be {'a text' if kind is str else 'true or false'}, got {row[field]!r}")
    identity = row.get("id", f"line-{number}")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)):
        raise ValueError(f"id must be a text or a whole number, got {identity!r}")
    return Sample(
        str(identity),
        row["video"],
        row["question"],
        answer,
        tuple(options),
        row.get("type", ""),
        row.get("two_hop", False),
    )
