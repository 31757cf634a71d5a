"""Questions on video files, listed in a JSONL file."""

from __future__ import annotations

import json
import pathlib
import re
import warnings
from typing import Any

import numpy as np

from hybridvlm.eval.tasks import Sample, Task, TaskOptions, letters, plain
from hybridvlm.video import VideoError, VideoWarning, decode_frames, probe, sample_indices

FIELDS = """\
  video     path of the video file, relative to the JSONL file (required)
  question  text (required)
  answer    the right one: an option's text, or its letter; free text without options (required)
  options   list of at least two different texts
  type      question type, for the accuracy by type
  two_hop   true where the answer needs a second look-up, for accuracy_two_hop
  id        unique text (default: the line number)"""
_KNOWN = {"video", "question", "answer", "options", "type", "two_hop", "id"}


class JsonlTask(Task):
    """A JSONL file, one question a line; frames by the rule of the options, evenly from first to last unless told.

    ValueError with file and line number for a line that is not a question; FileNotFoundError for a missing file.
    """

    def __init__(self, path: pathlib.Path, options: TaskOptions):
        if not path.is_file():
            raise FileNotFoundError(f"no questions at {path}; give a JSONL file, one question a line")
        vision = options.config.vision
        if vision is None:
            raise ValueError(f"{path}: the model has no vision tower, it cannot be asked about videos")
        self.name, self._folder, self._template = path.stem, path.parent, options.prompt
        self._size = tuple(vision.image_size)
        self._count, self._rule = options.frames or options.most_frames, options.sampling
        self._indices: dict[str, tuple[np.ndarray, list[float]]] = {}
        self.notes: list[str] = []
        samples = read_samples(path)[: options.limit or None]
        order = {video: i for i, video in enumerate(dict.fromkeys(sample.video for sample in samples))}
        samples.sort(key=lambda sample: order[sample.video])  # stable: a video's questions come together
        self.samples = tuple(samples)
        try:
            self.prompt(self.samples[0])
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"--prompt may name {{question}} and {{options}} only, got {self._template!r}") from error

    def prompt(self, sample: Sample) -> str:
        return self._template.format(question=sample.question, options=letters(sample.options))

    def _choose(self, video: str) -> tuple[np.ndarray, list[float]]:
        """(frame numbers, their seconds), settled once per video; what the decoder remarks is kept in `notes`."""
        if video not in self._indices:
            path = self._folder / video
            with warnings.catch_warnings(record=True) as remarks:
                warnings.simplefilter("always", VideoWarning)
                info = probe(path)
                indices = sample_indices(info, self._count, self._rule, name=str(path))
            self.notes += [str(remark.message) for remark in remarks if issubclass(remark.category, VideoWarning)]
            self._indices[video] = indices, [float(i) / info.fps for i in indices]
        return self._indices[video]

    def check(self) -> list[str]:
        problems = []
        for video in self.videos:
            try:
                self._choose(video)
            except VideoError as error:
                problems.append(str(error))
        return problems

    def seconds(self, video: str) -> list[float]:
        return self._choose(video)[1]

    def frames(self, video: str) -> tuple[np.ndarray, list[float]]:
        indices, seconds = self._choose(video)
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", VideoWarning)
            pixels = decode_frames(self._folder / video, indices, size=self._size)
        fresh = [
            str(r.message) for r in remarks if issubclass(r.category, VideoWarning) and str(r.message) not in self.notes
        ]
        self.notes += fresh
        return pixels, seconds

    def identity(self, video: str) -> str:
        status = (self._folder / video).stat()
        return f"{status.st_size}:{status.st_mtime_ns}:{','.join(map(str, self._choose(video)[0]))}"


def read_samples(path: pathlib.Path) -> list[Sample]:
    """The samples of a JSONL file; ValueError names file and line."""
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            sample = _sample(json.loads(line), number)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if sample.id in seen:
            raise ValueError(f"{path}, line {number}: id {sample.id!r} is also that of line {seen[sample.id]}")
        seen[sample.id] = number
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
    options = row.get("options") or []
    if not isinstance(options, list) or any(not isinstance(o, str) for o in options) or len(options) == 1:
        raise ValueError(f"options must be a list of at least two texts, got {options!r}")
    if len(options) > 26 or len({plain(o) for o in options}) != len(options):
        raise ValueError("options must be at most 26 different texts (case and a full stop make no difference)")
    answer = row["answer"]
    if options:
        same = [o for o in options if plain(o) == plain(answer)]
        place = ord(answer.strip().upper()) - ord("A") if re.fullmatch("[A-Za-z]", answer.strip()) else -1
        if not same and not 0 <= place < len(options):
            raise ValueError(f"answer {answer!r} is none of the options {options} and not the letter of one")
        answer = same[0] if same else options[place]
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
