"""Which frames of a video to look at: rules by name.

Of n frames out of `total`, numbered from 0:

* `uniform`: from the first to the last, `int(linspace(0, total - 1, n))` (vLLM, SGLang, Video-MME scripts).
* `uniform-round`: the same points, rounded (Qwen's own utilities; halves go to the even number).
* `middle`: the middle frame of each of n equal stretches (VAMBA's evaluation).
* `middle-low`: the same, of two middle frames the earlier (VAMBA's demo and training).
* `steps`: multiples of `total // n` (LongVideoBench).
* `inner`: n points that cut the video into n + 1 stretches, the ends left out.

How many a rate gives, at most n:

* `fps:R` (R a second, such as `fps:2`): `uniform` of floor(duration * R) frames (vLLM's and SGLang's Nemotron).
* `qwen:R`: `uniform-round` of an even number of frames, at least four.
* `nemotron-train:R`: time stamps (duration - 1) / n * (i + 0.5), with R * duration of them, at least eight.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from hybridvlm.video.errors import warn
from hybridvlm.video.index import VideoInfo


def _stretches(total: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.arange(n + 1, dtype=np.int64) * total // n
    return edges[:-1], edges[1:]


def _middle(total: int, n: int, low: int) -> np.ndarray:
    begin, end = _stretches(total, n)
    return (begin + end - low) // 2


def _uniform(total: int, n: int) -> np.ndarray:
    return np.linspace(0, total - 1, n).astype(np.int64)


def _uniform_round(total: int, n: int) -> np.ndarray:
    return np.linspace(0, total - 1, n).round().astype(np.int64)


COUNTED: dict[str, Callable[[int, int], np.ndarray]] = {
    "uniform": _uniform,
    "uniform-round": _uniform_round,
    "middle": lambda total, n: _middle(total, n, 0),
    "middle-low": lambda total, n: _middle(total, n, 1),
    "steps": lambda total, n: total // n * np.arange(n, dtype=np.int64),
    "inner": lambda total, n: (total * np.arange(1, n + 1, dtype=np.int64)) // (n + 1),
}
RATED = ("fps", "qwen", "nemotron-train")
RULES = (*COUNTED, *(f"{name}:R" for name in RATED))


def sample_indices(info: VideoInfo, frames: int, rule: str = "uniform", name: str = "video") -> np.ndarray:
    """Frame numbers to decode, int64 [n], ascending, n <= frames.

    A video with fewer frames than asked for gives all of them, with a VideoWarning that calls it `name`. Raises
    ValueError for an unknown rule or fewer than one frame.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    kind, colon, rate = rule.partition(":")
    if kind in RATED and colon:
        return _rated(info, frames, kind, _rate(rule, rate))
    if rule not in COUNTED:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    count = min(frames, info.frames)
    if count < frames:
        text = f"{name}: has {count} frames, fewer than the {frames} asked for; using all"
        warn(text, stacklevel=2)
        return np.arange(count, dtype=np.int64)
    return COUNTED[rule](info.frames, count)


def _rate(rule: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"rule {rule!r} needs a rate above 0 after the colon, such as 'fps:2'")
    return rate


def _rated(info: VideoInfo, most: int, kind: str, rate: float) -> np.ndarray:
    """Frame numbers under a rule that says how many a second; a video too short for it gives what it has."""
    wanted = info.duration * rate
    if kind == "fps":
        return _uniform(info.frames, max(1, min(most, info.frames, math.floor(wanted))))
    if kind == "qwen":
        count = min(max(wanted, 4), most, info.frames)
        return _uniform_round(info.frames, max(1, int(count // 2) * 2))
    count = max(1, min(most, info.frames, max(8, math.floor(wanted))))
    stamps = max(info.duration - 1, 0) / count * (np.arange(count) + 0.5)
    return np.clip((stamps * info.fps).round().astype(np.int64), 0, info.frames - 1)
