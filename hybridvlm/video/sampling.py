"""Which frames of a video to look at: rules by name.

* `uniform`: evenly from the first to the last frame, `int(linspace(0, total - 1, n))`.
* `middle`: the middle frame of each of n equal stretches.
* `fps:R` (R frames a second, such as `fps:2`): `uniform` with n = floor(duration * R), at most `frames`.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from hybridvlm.video.decode import VideoInfo, VideoWarning

RULES = ("uniform", "middle", "fps:R")


def sample_indices(info: VideoInfo, frames: int, rule: str = "uniform", name: str = "video") -> np.ndarray:
    """Frame numbers to decode, int64 [n], ascending, n <= frames.

    A video with fewer frames than asked for gives all of them, with a VideoWarning that calls it `name`. Raises
    ValueError for an unknown rule or fewer than one frame.
    """
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    kind, _, rate = rule.partition(":")
    if kind == "fps":
        try:
            per_second = float(rate)
        except ValueError:
            per_second = math.nan
        if not 0 < per_second < math.inf:
            raise ValueError(f"rule 'fps:R' needs a rate above 0, such as 'fps:2', got {rule!r}")
        frames = max(1, min(frames, math.floor(info.duration * per_second)))
    elif rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    count = min(frames, info.frames)
    if count < frames:
        text = f"{name}: has {count} frames, fewer than the {frames} asked for; using all"
        warnings.warn(text, VideoWarning, stacklevel=2)
    if kind == "middle":
        edges = np.arange(count + 1, dtype=np.int64) * info.frames // count
        return (edges[:-1] + edges[1:]) // 2
    return np.linspace(0, info.frames - 1, count).astype(np.int64)
