"""The one path from a file to what a model's tower is shown of it: for questions, evaluation, training and analyses alike."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from hybridvlm.config import Buckets
from hybridvlm.models.family import Family
from hybridvlm.models.media import Clip
from hybridvlm.video.clip import FrameRule, read_clip

FRAMES = 32  # of a video, where neither the caller nor the model's table of times says how many


def most_frames(config: Any, buckets: Buckets) -> int:
    """The most frames of a video that a model can be shown: by its largest bucket, and by its table of times if it has one."""
    most = buckets.frames[-1] * config.vision.temporal_patch
    return min(most, config.vision.max_frames or most)


def default_frames(config: Any, buckets: Buckets) -> int:
    """How many frames of a video are shown where nobody says: as many as the model was made for, or FRAMES."""
    return min(config.vision.max_frames or FRAMES, most_frames(config, buckets))


def shown_clip(
    family: Family,
    config: Any,
    source: str | os.PathLike[str] | np.ndarray | Clip,
    *,
    frames: int,
    rule: str | FrameRule = "uniform",
    clock: str = "exact",
    size: tuple[int, int] | None = None,
    pixels: bool = True,
) -> tuple[Clip, Any]:
    """What a model of `family` is shown of a source: the clip, and the config for clips of that size.

    Args:
        source, frames, rule, clock: as of `read_clip`.
        size: (height, width) of every frame, instead of the family's frame_size.
        pixels: False leaves the clip's frames out, and decodes nothing of a video: its times and size alone, which
            prompts and plans are made of. A Clip may then come without frames.

    Returns:
        (clip, config): `family.prompt`, `family.pixels` and `family.make_plan` take both.
    """
    found: list[tuple[int, int]] = []

    def size_of(height: int, width: int, count: int, kind: str) -> tuple[int, int]:
        wanted = size if size is not None else family.frame_size(config, height, width, count, kind)
        found.append((wanted[0], wanted[1]))
        return found[-1]

    if isinstance(source, Clip) and not pixels:
        clip = dataclasses.replace(source, frames=None)
        size_of(*source.size, len(source.seconds), source.kind)
    else:
        clip = read_clip(source, size_of, frames=frames, rule=rule, clock=clock, pixels=pixels)
        if clip.kind == "image":
            height, width = clip.size if clip.frames is None else clip.frames.shape[1:3]
            size_of(height, width, 1, "image")
    if family.trim_frames is not None:
        clip = family.trim_frames(config, clip)
    if not pixels and clip.kind == "video":
        clip = dataclasses.replace(clip, size=(0, 0))  # prompts then take the frames to be of the config's size
    vision = dataclasses.replace(config.vision, image_size=found[-1])
    return clip, dataclasses.replace(config, vision=vision)
