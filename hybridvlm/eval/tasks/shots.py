"""What is shown of a video in a benchmark: a file or a folder of frames, the part that a question is about, its frames."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
from typing import Any

import numpy as np

from hybridvlm.eval.benchmarks import frames
from hybridvlm.eval.benchmarks.definition import Question
from hybridvlm.models.media import Clip
from hybridvlm.video import VideoError, VideoInfo, frame_seconds, read_image

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Shot:
    """One way to show a video.

    Attributes:
        path: file, or folder of frames.
        part: of it that may be shown.
        folder_fps: frames a second of a folder.
    """

    path: pathlib.Path
    part: frames.Part
    folder_fps: float | None = None

    @classmethod
    def of(cls, question: Question) -> Shot:
        """What a question whose file is there is asked on."""
        assert question.file is not None
        part = frames.Part(question.start, question.end, question.stop)
        return cls(question.file, part, question.folder_fps)

    @property
    def suffix(self) -> str:
        """What tells this part of a video from others, "" for the whole."""
        bounds = [self.part.start, self.part.end, self.part.stop]
        return "" if bounds == [None] * 3 else "#" + "-".join("" if b is None else f"{b:g}" for b in bounds)

    def numbers(self, rule: str, info: VideoInfo, n: int) -> np.ndarray:
        """The frames of a video file that a rule takes."""
        seconds = None
        if self.part.end is not None and self.part.start is None:
            seconds = np.asarray(frame_seconds(self.path, np.arange(info.frames)))
        source = frames.Source(info.frames, info.fps, info.duration)
        return frames.choose(rule, source, n, self.part, seconds)

    def folder_clip(self, rule: str, n: int, pixels: bool) -> Clip:
        """The frames of a folder that a rule takes; files are numbered from 1, as in their names."""
        listed = sorted(p for p in self.path.iterdir() if p.suffix.lower() in PICTURES)
        if not listed:
            raise VideoError(f"{self.path}: a folder without a picture; it should hold frames 00001.jpg and so on")
        files = {_number(path, place): path for place, path in enumerate(listed, 1)}
        first, fps = min(files), self.folder_fps or 1.0
        source = frames.Source(len(files), fps, len(files) / fps)
        chosen = [k for k in frames.choose(rule, source, n, self.part, first=first).tolist() if k in files]
        if not chosen:
            raise VideoError(
                f"{self.path}: none of the frames asked for is there; the folder holds {len(files)} pictures"
            )
        seconds = tuple((k - first) / fps for k in chosen)
        size = read_image(files[chosen[0]]).shape[1:3]
        shown = np.concatenate([read_image(files[k]) for k in chosen]) if pixels else None
        return Clip(seconds, shown, "video", size, tuple(chosen), fps)


def _number(path: pathlib.Path, place: int) -> int:
    digits = re.findall(r"\d+", path.stem)
    return int(digits[-1]) if digits else place


def shuffled(video: str, count: int) -> np.ndarray:
    """An order of frames that depends on the video's name alone; never the order they have, if there is another."""
    keys = [hashlib.sha256(f"{video}:{i}".encode()).digest() for i in range(count)]
    order = np.asarray(sorted(range(count), key=lambda i: keys[i]))
    return np.roll(order, 1) if count > 1 and np.array_equal(order, np.arange(count)) else order


def pieces(clip: Clip, items: list[int | str], patch: int) -> list[Clip | str]:
    """A clip cut where texts stand between its frames; a text waits until whole patches of frames lie before it.

    Args:
        clip: the frames' times.
        items: positions of frames, rising, and texts.
        patch: frames that a tower takes together.
    """
    out: list[Any] = []
    begin, here, waiting = 0, 0, list[str]()
    for item in [*items, None]:
        if isinstance(item, str):
            waiting.append(item)
            continue
        if waiting and (here % patch == 0 or item is None):
            if here > begin:
                out.append(_cut(clip, begin, here))
            out.append("\n" + "\n".join(waiting) + "\n")
            begin, waiting = here, []
        here += item is not None
    if here > begin:
        out.append(_cut(clip, begin, here))
    return out


def _cut(clip: Clip, begin: int, end: int) -> Clip:
    return dataclasses.replace(
        clip,
        seconds=clip.seconds[begin:end],
        numbers=clip.numbers[begin:end],
        frames=None if clip.frames is None else clip.frames[begin:end],
    )
