"""From a file, or from frames at hand, to the Clip that a model takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hybridvlm.models.media import Clip, resize
from hybridvlm.video import images
from hybridvlm.video.decode import decode_frames, frame_seconds, probe
from hybridvlm.video.images import read_image
from hybridvlm.video.index import VideoInfo, file_status
from hybridvlm.video.sampling import sample_indices

CLOCKS = ("exact", "milliseconds")
# (height, width, frames, kind) of a source -> (height, width) of the frames that a model takes
SizeOf = Callable[[int, int, int, str], tuple[int, int]]
# (a video, most frames) -> numbers of the frames to take, rising
FrameRule = Callable[[VideoInfo, int], np.ndarray]


def read_clip(
    source: str | os.PathLike[str] | np.ndarray | Clip,
    size_of: SizeOf,
    *,
    frames: int = 32,
    rule: str | FrameRule = "uniform",
    clock: str = "exact",
    pixels: bool = True,
) -> Clip:
    """The clip of a video file, an image file, frames [F,h,w,3] uint8 (one a second), one image [h,w,3], or a Clip as it is.

    A file is known by what it holds: a picture is an image, an animated one (GIF, WebP, PNG, AVIF) a video.
    frames, rule: which frames of a file are taken, see `sample_indices`, or a function that says. clock: "exact" time
    stamps, as the file has them, or "milliseconds", frame number times a whole number of milliseconds, as vLLM and others
    count (and drift). Video frames are scaled to size_of as they are decoded, an image is left to the model. pixels: False
    decodes no video and leaves the clip's frames out. VideoError for a file that gives nothing.
    """
    if clock not in CLOCKS:
        raise ValueError(f"clock must be one of {CLOCKS}, got {clock!r}")
    if isinstance(source, Clip):
        if source.frames is None:
            raise ValueError("the Clip has no frames")
        if source.kind == "image":
            return source
        height, width = source.size if all(source.size) else source.frames.shape[1:3]
        size = size_of(height, width, len(source.seconds), "video")
        return Clip(source.seconds, resize(source.frames, size), "video", source.size, source.numbers, source.fps)
    if isinstance(source, list | tuple) or (hasattr(source, "__array__") and not isinstance(source, np.ndarray)):
        source = _stacked(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, size_of)
    file_status(source)
    if images.kind(source) == "still":
        image = read_image(source)
        return Clip((0.0,), image if pixels else None, "image", image.shape[1:3])
    info = probe(source)
    numbers = sample_indices(info, frames, rule, str(source)) if isinstance(rule, str) else rule(info, frames)
    size = size_of(info.height, info.width, len(numbers), "video")
    shown = decode_frames(source, numbers, size=size, resize=resize) if pixels else None
    if clock == "exact":
        seconds = frame_seconds(source, numbers)
    else:
        seconds = tuple(int(n) * int(1000 / info.fps) / 1000 for n in numbers)
    return Clip(seconds, shown, "video", (info.height, info.width), tuple(numbers.tolist()), info.fps)


def _stacked(source: Any) -> np.ndarray:
    """Frames in a list, or an array of another library, as one array."""
    try:
        return np.asarray(source)
    except ValueError as error:
        raise ValueError(f"frames must all be of one size and uint8 [h,w,3]: {error}") from None


def _from_array(source: np.ndarray, size_of: SizeOf) -> Clip:
    if source.dtype != np.uint8 or source.ndim not in (3, 4) or source.shape[-1] != 3 or not source.size:
        raise ValueError(f"frames must be uint8 [F,h,w,3] (or one image [h,w,3]), got {source.dtype} {source.shape}")
    if source.ndim == 3:
        return Clip((0.0,), source[None], "image", source.shape[:2])
    count, height, width = source.shape[:3]
    pixels = resize(source, size_of(height, width, count, "video"))
    return Clip(tuple(map(float, range(count))), pixels, "video", (height, width), tuple(range(count)), 1.0)
