"""Which frames the harnesses take of a video: their rules by name, to the frame.

With N frames in the file and n asked for, each rule gives the numbers that the harness would decode, repeats included;
`choose` leaves repeats out, stays inside the file and inside the part that a question is about. Rules of
`hybridvlm.video.RULES` are known here too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hybridvlm.video import RULES as VIDEO_RULES
from hybridvlm.video import VideoInfo, sample_indices


class Source(NamedTuple):
    """What a rule knows of a video: frames, frames a second, seconds."""

    total: int
    fps: float
    duration: float


def _slicer(video: Source, n: int) -> list[int]:
    edges = np.round((video.total - 1) / n * np.arange(n + 1)).astype(np.int64)
    return ((edges[:-1] + edges[1:]) // 2).tolist()


def _mvbench(video: Source, n: int) -> list[int]:
    return span_numbers(0, video.total - 1, n)


def span_numbers(first: int, last: int, n: int) -> list[int]:
    """MVBench's frames between two numbers: the middles of n equal stretches."""
    step = (last - first) / n
    return [int(first + step / 2 + np.round(step * i)) for i in range(n)]


def bounds(start: float, end: float, fps: float, first: int, last: int) -> tuple[int, int]:
    """(first, last) frame number of a part from `start` to `end` seconds, inside first..last."""
    low = max(first, round(start * fps))
    return min(low, last), max(min(low, last), min(round(end * fps), last))


def _vk_fps(video: Source, rate: float) -> list[int]:
    return [int(i * video.fps / rate) for i in range(int(video.total / video.fps * rate))] or [0]


def _lvb(video: Source, n: int) -> list[int]:
    whole, count = int(video.duration * video.fps), min(n, int(video.duration))
    if count < 1:
        return [0]
    return [int(whole / count) * i for i in range(count)]


def _hourvideo(video: Source, n: int) -> list[int]:
    return list(range(0, video.total, max(1, int(video.fps / 0.5))))


RULES: dict[str, Callable[[Source, int], list[int]]] = {
    "linspace": lambda video, n: np.linspace(0, video.total - 1, n).astype(np.int64).tolist(),
    "round": lambda video, n: np.linspace(0, video.total - 1, n).round().astype(np.int64).tolist(),
    "vk.nframe": lambda video, n: [i * video.total // (n + 1) for i in range(1, n + 1)],
    "slicer": _slicer,
    "mvbench": _mvbench,
    "vamba": lambda video, n: _middles(video.total, n),
    "lvb": _lvb,
    "hourvideo": _hourvideo,
}


def _middles(total: int, n: int) -> list[int]:
    if total < n:
        return list(range(total))
    edges = [i * total // n for i in range(n + 1)]
    return [(low + high) // 2 for low, high in itertools.pairwise(edges)]


def known(rule: str) -> bool:
    """Whether there is a rule of this name, with a rate above 0 where it takes one."""
    kind, colon, rate = rule.partition(":")
    if not colon:
        return rule in RULES or rule in VIDEO_RULES
    try:
        return (kind == "vk.fps" or f"{kind}:R" in VIDEO_RULES) and 0 < float(rate) < math.inf
    except ValueError:
        return False


def numbers(rule: str, video: Source, n: int) -> list[int]:
    """Frame numbers as the harness takes them, repeats included.

    Args:
        rule: of `RULES`, `vk.fps:R`, or of `hybridvlm.video.RULES`.
        video: what is sampled.
        n: frames asked for.

    Raises:
        ValueError: for an unknown rule.
    """
    kind, _, rate = rule.partition(":")
    if kind == "vk.fps":
        return _vk_fps(video, float(rate))
    if rule in RULES:
        return RULES[rule](video, n)
    info = VideoInfo(video.total, video.fps, video.duration, 0, 0)
    return sample_indices(info, min(n, video.total), rule).tolist()


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of a video that is shown: seconds `start` to `end`, or all before `end`, or before frame `stop`.

    With a `start` the part is sampled as MVBench does it, its bounds inclusive; else what lies before its end is taken for the
    whole video.
    """

    start: float | None = None
    end: float | None = None
    stop: int | None = None


def choose(
    rule: str, video: Source, n: int, part: Part, seconds: np.ndarray | None = None, first: int = 0
) -> np.ndarray:
    """Frame numbers to show: rising, without repeats, inside the part.

    Args:
        rule: of `numbers`.
        video: the whole file.
        n: most frames.
        part: what may be shown.
        seconds: time stamps [N] of all frames, where they are not even.
        first: number of the first frame (1 in folders whose files are counted from 1).

    Returns:
        int64 numbers, `first` or more.
    """
    low, high = first, first + video.total - 1
    if part.stop is not None:
        high = min(high, max(low, first + part.stop - 1))
    if part.start is not None and part.end is not None:
        # MVBench's own code takes the number of files for the last of a folder, and the last index of a video
        low, high = bounds(part.start, part.end, video.fps, low, high)
        found = span_numbers(low, high, n) if rule == "mvbench" else None
    else:
        if part.end is not None:
            high = min(high, max(low, first + _before(part.end, video, seconds) - 1))
        found = span_numbers(low, high, n) if rule == "mvbench" and first else None
    if found is None:
        total = high - low + 1
        found = [low + k for k in numbers(rule, Source(total, video.fps, _length(video, total)), n)]
    unique = np.unique(np.clip(np.asarray(found, np.int64), low, high))
    if len(unique) > n:
        unique = unique[np.linspace(0, len(unique) - 1, n).astype(np.int64)]
    return unique


def _length(video: Source, total: int) -> float:
    return video.duration if total == video.total else total / video.fps


def _before(end: float, video: Source, seconds: np.ndarray | None) -> int:
    """How many frames have a time below `end`."""
    if seconds is not None:
        return int(np.searchsorted(seconds, end - 1e-6, side="left"))
    return max(0, math.ceil(end * video.fps - 1e-6))
