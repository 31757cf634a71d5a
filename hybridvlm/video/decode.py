"""Frames out of video files, exactly the ones asked for (PyAV), and out of animated pictures (Pillow).

`probe` and `decode_frames` count frames in display order. The packets, or the tables of an MP4, give every frame's
time stamp and the key frames without decoding (`index`); decoding then runs forward through the asked frames and seeks only where a
key frame lies between the present position and the next asked frame. A frame is recognised by its time stamp, never by
counting after a seek. Where the clock starts anew in the middle of a file (recordings put one after another), frames come
in the file's order, their times run on, and the way to a key frame is read, not sought. Files without usable time stamps are
decoded from the start and counted.

Decoding is strict at first: a damaged picture is not made up. What is missing then is decoded again, one picture at a time,
and what FFmpeg says to it is told. A file of which only a part can be read is used as far as it decodes, with a VideoWarning; a
file that gives no frame at all raises VideoError.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hybridvlm.models.media import resize as plain_resize
from hybridvlm.video import container as films
from hybridvlm.video import images
from hybridvlm.video.errors import VideoError, warn
from hybridvlm.video.index import Index, VideoInfo, index_of

_NEAR = 4  # frames; a key frame no further ahead is not sought
_SMALL = 640 * 360  # pixels; frames that one thread decodes
Resize = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Frames, rate, duration and displayed size of a video file.

    Raises VideoError for a file that is missing, empty, no video, or damaged so far that not one frame decodes; warns
    (VideoWarning) where the file holds fewer frames than it promises, or FFmpeg complains of it.
    """
    index = index_of(path)
    for remark in index.remarks:
        _warn(remark)
    return index.info


def frame_seconds(path: str | os.PathLike[str], indices: Sequence[int] | np.ndarray) -> tuple[float, ...]:
    """Time stamps of frames number `indices`, in seconds from the first frame: the file's own, whatever its rate does."""
    index = index_of(path)
    numbers = np.asarray(indices, np.int64).reshape(-1)
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= index.info.frames):
        raise IndexError(f"{path} has frames 0..{index.info.frames - 1}, got {numbers.min()}..{numbers.max()}")
    if index.seconds is None:
        return tuple((numbers / index.info.fps).tolist())
    return tuple(index.seconds[numbers].tolist())


def decode_frames(
    path: str | os.PathLike[str],
    indices: Sequence[int] | np.ndarray,
    *,
    size: tuple[int, int] | None = None,
    resize: Resize | None = None,
) -> np.ndarray:
    """Frames number `indices` (display order, any order, repeats allowed) -> uint8 RGB [n,height,width,3].

    size: (height, width) to scale every frame to while decoding, which keeps long high-resolution videos out of memory;
    default the displayed size. resize: scales frames [1,h,w,3] to a size instead of the decoder's own scaling, which is
    quick but no image processor's. A frame that does not decode is replaced by the nearest asked one that does, with a
    VideoWarning; VideoError if none does. IndexError for a number outside 0..frames-1.
    """
    index = index_of(path)
    wanted = np.asarray(indices, np.int64).reshape(-1)
    if not len(wanted):
        raise ValueError("indices is empty; ask for at least one frame")
    if wanted.min() < 0 or wanted.max() >= index.info.frames:
        raise IndexError(f"{path} has frames 0..{index.info.frames - 1}, got {wanted.min()}..{wanted.max()}")
    order, inverse = np.unique(wanted, return_inverse=True)
    height, width = size if size is not None else (index.info.height, index.info.width)
    task = _Task(str(path), index, order, np.empty((len(order), height, width, 3), np.uint8), resize)
    task.run()
    out, found = task.out, task.found
    if not found.any():
        said = films.quoted(task.complaints)
        raise VideoError(f"{path}: none of the {len(order)} asked frames could be decoded; the file is damaged{said}")
    if not found.all():
        lost = f"{int((~found).sum())} of {len(order)} frames could not be decoded; the nearest ones stand in"
        _warn(f"{path}: {lost}{films.quoted(task.complaints)}")
        good = np.flatnonzero(found)
        near = good[np.abs(order[good][None] - order[:, None]).argmin(1)]
        out[~found] = out[near[~found]]
    elif task.doubtful:
        doubt = f"{task.doubtful} of {len(order)} frames may show damage"
        _warn(f"{path}: {doubt}{films.quoted(task.complaints)}")
    return out if np.array_equal(order, wanted) else out[inverse]


def _warn(text: str) -> None:
    warn(text, stacklevel=3)


class _Task:
    """The frames `order` (ascending) of one file into `out`, marked in `found` as they come.

    doubtful: how many were decoded after something that was not; complaints: what FFmpeg said to it.
    """

    def __init__(self, path: str, index: Index, order: np.ndarray, out: np.ndarray, resize: Resize | None):
        self.path, self.index, self.order, self.out, self.resize = path, index, order, out, resize
        self.found = np.zeros(len(order), bool)
        self.doubtful = 0
        self.complaints: list[str] = []
        self.reading = bool(index.shifts)  # a clock that restarts cannot be sought by
        # keyless: a key frame did not come out, as where a container marks pictures that are none
        self.keyless = self.from_start = False

    def run(self) -> None:
        if self.index.stream is None:
            self._pictures()
            return
        if self.index.pts is None:
            self._pass(self._count)
            return
        # the smaller the frames, the sooner one thread has them than several that wait for each other
        small = self.index.info.width * self.index.info.height <= _SMALL
        self._walks(strict=True, threads=1 if small else 0)
        if self.found.all():
            return
        with films.listening() as said:
            self._walks(said=said)
            if not self.found.all() and self.keyless:
                self.from_start = True
                self._walks(said=said)
            self.complaints = films.complaints(said)

    def _walks(self, **options: Any) -> None:
        try:
            self._pass(self._walk, **options)
        except _Astray:
            self.reading = True
            self._pass(self._walk, **options)

    def _pass(self, how: Callable[[films.Reader], None], **options: Any) -> None:
        """Open the file and decode what is not found yet."""
        container, streams = films.open_film(self.path)
        try:
            stream = next((s for s in streams if s.index == self.index.stream), None)
            if stream is None:
                raise VideoError(f"{self.path}: changed while it was read")
            how(films.Reader(container, stream, cut=self.index.cut, **options))
        finally:
            films.close(container)

    def _keep(self, position: int, pixels: np.ndarray) -> None:
        self.out[position] = pixels
        self.found[position] = True

    def _pictures(self) -> None:
        shape = self.out.shape[1:3]
        place_of = {int(number): position for position, number in enumerate(self.order)}
        for number, pixels in enumerate(images.moving_frames(self.path, int(self.order[-1]))):
            if number in place_of:
                scaled = (self.resize or plain_resize)(pixels[None], shape)
                self._keep(place_of[number], scaled[0])

    def _count(self, reader: films.Reader) -> None:
        scaler = films.scaler()
        frames = reader.frames(films.packets(reader.container, reader.stream))
        last = -1
        for position in np.flatnonzero(~self.found).tolist():
            for frame in frames:
                last += 1
                if last == self.order[position]:
                    self._keep(position, self._pixels(frame, scaler))
                    break

    def _walk(self, reader: films.Reader) -> None:
        pts, keys = self.index.pts, self.index.key_pts
        assert pts is not None  # else `run` counts
        place_of = {int(pts[self.order[i]]): int(i) for i in np.flatnonzero(~self.found)}
        # here: time stamp of the last frame that came out; floor: of the key frame that was last sought, whatever comes
        # out before it (an open group of pictures) was decoded without its references
        way = _Way(reader, self.index, self.reading)
        frames, floor = way.start(), int(pts[0])
        here: int | None = None
        for target in sorted(place_of):
            if self.found[place_of[target]] or (here is not None and here >= target):
                continue
            before = int(np.searchsorted(keys, target, side="right"))  # key frames up to the target
            ahead = int(keys[before - 1]) if before else floor
            past = floor if here is None else here
            if before and ahead > past and not self.from_start and self._far(pts, past, ahead):
                sought = way.to(before - 1)
                if sought is not None:
                    frames, floor, here = sought, ahead, None
            for frame in frames:
                stamp = frame.pts
                if stamp is None:
                    continue
                self.keyless |= here is None and stamp > floor
                here = int(stamp)
                asked = place_of.get(here)
                # a strict pass leaves to the second what comes after something that did not decode
                if (
                    asked is not None
                    and not self.found[asked]
                    and here >= floor
                    and not (reader.strict and reader.trouble)
                ):
                    self._keep(asked, self._pixels(frame, way.scaler))
                    self.doubtful += reader.trouble
                if here >= target:
                    break
            self.keyless |= here is None

    @staticmethod
    def _far(pts: np.ndarray, here: int, ahead: int) -> bool:
        """Whether a key frame lies so far ahead that seeking beats decoding up to it."""
        at, to = np.searchsorted(pts, [here, ahead])
        return bool(to - at > _NEAR)

    def _pixels(self, frame: Any, scaler: Any) -> np.ndarray:
        """Frame -> RGB, scaled and turned to fit the output."""
        turn, (height, width) = self.index.turn, self.out.shape[1:3]
        try:
            frame = films.on_white(frame)
            if self.resize is not None:
                pixels = films.turned(scaler.reformat(frame, format="rgb24", threads=1).to_ndarray(), turn)
                return self.resize(np.ascontiguousarray(pixels)[None], (height, width))[0]
            if turn[0]:
                height, width = width, height
            return films.turned(scaler.reformat(frame, width, height, "rgb24", threads=1).to_ndarray(), turn)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise VideoError(
                f"{self.path}: frames of the format {frame.format.name} cannot be read: {error}"
            ) from error


class _Astray(Exception):
    """Seeking did not lead to the key frame that was sought."""


class _Way:
    """The way through a video's packets, from key frame to key frame.

    reading: every packet up to the key frame is read and passed over, which is quick compared with decoding them; else it is sought.
    scaler: of the frames on it, one for all, as it takes long to set up.
    """

    def __init__(self, reader: films.Reader, index: Index, reading: bool):
        self.reader, self.index, self.reading = reader, index, reading
        self.scaler = films.scaler()
        plain = films.packets(reader.container, reader.stream)
        self.packets = self._numbered(plain) if reading else plain
        self.number, self.skip = -1, 0

    def start(self) -> Iterator[Any]:
        return self.reader.frames(self.packets)

    def to(self, key: int) -> Iterator[Any] | None:
        """Frames from key frame number `key` on; None if the decoder, which is ahead of what comes out of it, has it already."""
        stamp, position = int(self.index.key_pts[key]), int(self.index.key_place[key])
        if not self.reading:
            return self.reader.frames(self._sought(stamp, int(self.index.key_seek[key])), stamp)
        if self.number >= position:
            return None
        self.reader.codec.flush_buffers()
        self.skip = position
        return self.reader.frames(self.packets, stamp)

    def _sought(self, stamp: int, where: int) -> Iterator[Any]:
        """Packets from the one that has this stamp on; some formats find a position before it, some none."""
        import av

        container, stream = self.reader.container, self.reader.stream
        try:
            container.seek(where, stream=stream, backward=True)
        except av.FFmpegError:
            raise _Astray from None
        packets = films.packets(container, stream)
        for packet in packets:
            if packet.pts == stamp:
                return itertools.chain([packet], packets)
            if not packet.size or (packet.is_keyframe and packet.pts is not None and packet.pts > stamp):
                break
        raise _Astray

    def _numbered(self, packets: Iterator[Any]) -> Iterator[Any]:
        """The file's packets, their stamps on one clock."""
        starts = [*self.index.shifts, (1 << 62, 0)]
        shift, part = 0, 0
        for number, packet in enumerate(packets):
            self.number = number
            if packet.size:
                while number >= starts[part][0]:
                    shift, part = starts[part][1], part + 1
                if number < self.skip:
                    continue
                if packet.pts is not None:
                    packet.pts += shift
                if packet.dts is not None:
                    packet.dts += shift
            yield packet
