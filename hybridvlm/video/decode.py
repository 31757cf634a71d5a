"""Frames out of video files, exactly the ones asked for (PyAV).

`probe` and `decode_frames` count frames in display order. One pass over the packets, without decoding, gives every
frame's time stamp and the key frames; decoding then runs forward through the asked frames and seeks only where a key
frame lies between the present place and the next asked frame. A frame is recognised by its time stamp, never by
counting after a seek. Files without usable time stamps are decoded from the start and counted.

A file of which only a part can be read is used as far as it decodes, with a VideoWarning; a file that gives no frame at
all raises VideoError.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av

_PICTURES = ("_pipe", "image2")  # how FFmpeg's still-picture formats are called
_CODING_ORDER = ("avi",)  # formats whose time stamps follow the order of coding; with B-frames display differs
_MAX_SIDE = 1 << 14


class VideoError(ValueError):
    """A file that gives no frames; the text names the file and says why."""


class VideoWarning(UserWarning):
    """A file that gives fewer frames than it should, or than were asked for."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """frames: how many can be read; fps: their mean rate; duration in seconds; width, height: displayed, in pixels."""

    frames: int
    fps: float
    duration: float
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class _Index:
    info: VideoInfo
    quarter_turns: int  # counterclockwise, from stored to displayed
    promised: int  # frames that the container says it holds, 0 where it does not say
    seconds: float  # how long the container says it runs, sound included, 0 where it does not say
    pts: np.ndarray | None  # time stamp of each frame in display order; None: count instead
    tick: float  # seconds that a time stamp counts
    key_pts: np.ndarray  # of the key frames, ascending


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Frames, rate, duration and displayed size of a video file.

    Raises VideoError for a file that is missing, empty, no video, or damaged so far that not one frame decodes; warns
    (VideoWarning) where the file holds fewer frames than it promises.
    """
    index = _index_of(path)
    info = index.info
    if index.promised > info.frames:
        _warn(f"{path}: the file is incomplete, {info.frames} of {index.promised} frames can be read; using those")
    elif info.duration < 0.9 * index.seconds:
        _warn(f"{path}: pictures for {info.duration:.1f} of {index.seconds:.1f} s only; using {info.frames} frames")
    return info


def frame_seconds(path: str | os.PathLike[str], indices: Sequence[int] | np.ndarray) -> tuple[float, ...]:
    """Time stamps of frames number `indices`, in seconds from the first frame: the file's own, whatever its rate does."""
    index = _index_of(path)
    numbers = np.asarray(indices, np.int64).reshape(-1)
    if index.pts is None:
        return tuple((numbers / index.info.fps).tolist())
    return tuple(((index.pts[numbers] - index.pts[0]) * index.tick).tolist())


def decode_frames(
    path: str | os.PathLike[str],
    indices: Sequence[int] | np.ndarray,
    *,
    size: tuple[int, int] | None = None,
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None = None,
) -> np.ndarray:
    """Frames number `indices` (display order, any order, repeats allowed) -> uint8 RGB [n,height,width,3].

    size: (height, width) to scale every frame to while decoding, which keeps long high-resolution videos out of memory;
    default the displayed size. resize: scales frames [1,h,w,3] to a size in the place of the decoder's own scaling, which is
    quick but no image processor's. A frame that does not decode is replaced by the nearest asked one that does, with a
    VideoWarning; VideoError if none does. IndexError for a number outside 0..frames-1.
    """
    index = _index_of(path)
    wanted = np.asarray(indices, np.int64).reshape(-1)
    if not len(wanted):
        raise ValueError("indices is empty; ask for at least one frame")
    if wanted.min() < 0 or wanted.max() >= index.info.frames:
        raise IndexError(f"{path} has frames 0..{index.info.frames - 1}, got {wanted.min()}..{wanted.max()}")
    order, inverse = np.unique(wanted, return_inverse=True)
    height, width = size if size is not None else (index.info.height, index.info.width)
    out = np.empty((len(order), height, width, 3), np.uint8)
    found = np.zeros(len(order), bool)
    _fill(path, index, order, out, found, resize)
    if not found.all():  # a damaged stretch, or a seek that went wrong
        _fill(path, index, order, out, found, resize, careful=True)
    if not found.any():
        raise VideoError(f"{path}: none of the {len(order)} asked frames could be decoded; the file is damaged")
    if not found.all():
        _warn(f"{path}: {int((~found).sum())} of {len(order)} frames could not be decoded; the nearest ones stand in")
        good = np.flatnonzero(found)
        near = good[np.abs(order[good][None] - order[:, None]).argmin(1)]
        out[~found] = out[near[~found]]
    return out if np.array_equal(order, wanted) else out[inverse]


def _warn(text: str) -> None:
    warnings.warn(text, VideoWarning, stacklevel=3)


def _index_of(path: str | os.PathLike[str]) -> _Index:
    file = pathlib.Path(path)
    if not file.exists():
        raise VideoError(f"{path}: no such file")
    if not file.is_file():
        raise VideoError(f"{path}: not a file; give one video file")
    status = file.stat()
    if status.st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    return _read_index(str(file), status.st_size, status.st_mtime_ns)


def _open(path: str) -> tuple[Any, Any]:
    """Container and video stream; the caller closes the container."""
    import av

    try:
        container = av.open(path)
    except av.FFmpegError as error:
        reason = f"{error.strerror} (cut off, or not a video)" if error.strerror else type(error).__name__
        raise VideoError(f"{path}: cannot be opened as a video: {reason}") from None
    name = container.format.name
    cover = av.stream.Disposition.attached_pic  # the cover picture of a music file
    streams = [s for s in container.streams.video if not s.disposition & cover]
    problem = None
    if name == "tty":
        problem = "is a text file, not a video"
    elif name.endswith(_PICTURES):
        problem = "is a still picture, not a video"
    elif not streams:
        problem = "has sound but no pictures" if container.streams.audio else "has no video stream"
    elif streams[0].codec_context is None:
        problem = "is coded in a way that this FFmpeg cannot decode"
    if problem:
        container.close()
        raise VideoError(f"{path} {problem}")
    streams[0].thread_type = "AUTO"
    return container, streams[0]


def _packets(container: Any, stream: Any) -> Iterator[av.Packet]:
    """Packets of the stream up to its end or the first unreadable place, then the one that flushes the decoder."""
    import av

    try:
        yield from container.demux(stream)
    except av.FFmpegError:
        yield av.Packet()


def _readable(packet: av.Packet) -> bool:
    return packet.size > 0 and not packet.is_corrupt


def _decoded(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Frames in display order; packets that do not decode are passed over."""
    import av

    for packet in _packets(container, stream):
        if packet.size and not _readable(packet):
            continue
        try:
            frames = stream.codec_context.decode(packet if packet.size else None)
        except av.EOFError:
            return
        except av.FFmpegError:
            continue
        yield from (frame for frame in frames if not frame.is_corrupt)


@functools.lru_cache(maxsize=16)
def _read_index(path: str, size: int, mtime: int) -> _Index:
    """One pass over the packets; size and mtime only make the cache notice a changed file."""
    container, stream = _open(path)
    with container:
        seen = [(p.pts, p.is_keyframe) for p in _packets(container, stream) if _readable(p) and not p.is_discard]
        base, rate, promised = stream.time_base, stream.average_rate or stream.guessed_rate, stream.frames
        seconds = (container.duration or 0) / 1e6
        stamped = container.format.name not in _CODING_ORDER
    stamps = {pts: key for pts, key in seen if pts is not None}  # time stamp -> is it a key frame
    usable = stamped and len(stamps) == len(seen) > 0

    container, stream = _open(path)  # a second time: not every format can go back to its start
    with container:
        decoded = _decoded(container, stream)
        first = next(decoded, None)
        if first is None:
            raise VideoError(f"{path}: not one frame could be decoded; the file is damaged or cut off")
        if not 1 <= first.width <= _MAX_SIDE or not 1 <= first.height <= _MAX_SIDE:
            raise VideoError(f"{path}: frames of {first.width}x{first.height} pixels; at most {_MAX_SIDE} a side")
        turns = round(first.rotation / 90) % 4
        frames = len(stamps) if usable else 1 + sum(1 for _ in decoded)
    pts = np.array(sorted(stamps), np.int64) if usable else None
    span = float((pts[-1] - pts[0]) * base) if pts is not None else 0.0  # seconds from the first frame to the last
    fps = float(rate) if rate else (frames - 1) / span if span else 1.0
    duration = span + 1 / fps if pts is not None else frames / fps
    width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
    info = VideoInfo(frames, fps, duration, width, height)
    key_pts = np.array(sorted(t for t, key in stamps.items() if key), np.int64)
    return _Index(info, turns, promised, seconds, pts, float(base or 0), key_pts)


def _fill(
    path: str | os.PathLike[str],
    index: _Index,
    order: np.ndarray,
    out: np.ndarray,
    found: np.ndarray,
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None,
    careful: bool = False,
) -> None:
    """Decode the frames `order` (ascending) that are not yet `found` into `out`, marking them.

    careful: from the start and with one thread; with several, an error in one packet can cost the frames beside it.
    """
    todo = [int(i) for i in np.flatnonzero(~found)]
    container, stream = _open(str(path))
    if careful:
        stream.codec_context.thread_count = 1
    with container:
        if index.pts is None:
            frames = _decoded(container, stream)
            last = -1
            for place in todo:
                for frame in frames:
                    last += 1
                    if last == order[place]:
                        _store(frame, index.quarter_turns, out[place], resize)
                        found[place] = True
                        break
            return
        place_of = {int(index.pts[order[i]]): i for i in todo}
        # here: time stamp of the last frame that came out; floor: of the key frame that was last sought, whatever comes
        # out before it (an open group of pictures) was decoded without its references
        frames, floor = _decoded(container, stream), int(index.pts[0])
        here: int | None = None
        for target in sorted(place_of):
            if found[place_of[target]] or (here is not None and here >= target):
                continue
            before = np.searchsorted(index.key_pts, target, side="right")  # key frames up to the target
            ahead = int(index.key_pts[before - 1]) if before else floor
            if not careful and ahead > (floor if here is None else here):
                container.seek(ahead, stream=stream, backward=True)
                frames, floor = _decoded(container, stream), ahead
            for frame in frames:
                if frame.pts is None:
                    continue
                here = int(frame.pts)
                asked = place_of.get(here)
                if asked is not None and not found[asked] and here >= floor:
                    _store(frame, index.quarter_turns, out[asked], resize)
                    found[asked] = True
                if here >= target:
                    break


def _store(
    frame: Any,
    quarter_turns: int,
    target: np.ndarray,
    resize: Callable[[np.ndarray, tuple[int, int]], np.ndarray] | None,
) -> None:
    """Frame -> RGB, scaled and turned to fit `target` [height,width,3]."""
    if resize is not None:
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)
        target[:] = resize(np.ascontiguousarray(pixels)[None], target.shape[:2])[0]
        return
    height, width = target.shape[1::-1] if quarter_turns % 2 else target.shape[:2]
    pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
    target[:] = np.rot90(pixels, quarter_turns)
