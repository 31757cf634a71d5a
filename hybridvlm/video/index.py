"""What a video file holds: every frame's time stamp and the key frames, without decoding.

They come from one pass over the packets or, of an MP4 whose tables and a WebM whose blocks are plain, from these.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from typing import Any

import numpy as np

from hybridvlm.video import container as films
from hybridvlm.video import damage, images
from hybridvlm.video.errors import VideoError
from hybridvlm.video.track import NONE, Track, demuxed, tabled

_CODING_ORDER = ("avi",)  # formats whose time stamps follow the order of coding; with B-frames display differs
_DECODING_CLOCK = ("mpegts", "mpeg", "flv")  # formats that store when a picture is to be decoded
_JUMP = 60.0  # seconds: a broadcast's clock that leaps further has been set anew
_REORDER = 16  # frames: no codec shows a picture further from its position in the file
_NEAR = 3  # packets around the position where parts are put together
_MOST_RATE = 1000  # frames a second; a higher rate is a clock's
_ROUNDED = 0.1  # of a frame, which a length in milliseconds may be off
_SPAN = 0.9  # of the promised length; a video that gives less is incomplete
_ASPECTS = (1 / 16, 16)  # of a pixel; beyond, the number is taken for a mistake


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """frames: how many can be read; fps: their mean rate, measured; duration in seconds, the last frame's own included;
    width, height: displayed, in square pixels."""

    frames: int
    fps: float
    duration: float
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Index:
    """A video's frames in display order.

    remarks: what a reader should be told. turn: see `container.turn_of`. pts: time stamp of each frame, on a clock that never
    restarts; None: no usable stamps, count instead. seconds: of each frame from the first, None: even. tick: seconds that a stamp
    counts. key_pts, key_seek, key_place: stamps of the key frames, ascending, what to seek them by, and their packets' numbers
    in the file. shifts: (number
    of the first packet, what to add to its stamps) of each part whose clock starts anew. stream: its number in the
    container; None: a moving picture that Pillow reads. cut: stamps of packets that the end of the file cuts off, None: all damaged
    ones are to be left out.
    """

    info: VideoInfo
    remarks: tuple[str, ...]
    turn: tuple[bool, bool, bool]
    pts: np.ndarray | None
    seconds: np.ndarray | None
    tick: float
    key_pts: np.ndarray
    key_seek: np.ndarray
    key_place: np.ndarray
    shifts: tuple[tuple[int, int], ...]
    stream: int | None
    cut: frozenset[int] | None = None


def index_of(path: str | os.PathLike[str]) -> Index:
    """The index of a file, kept until the file changes. VideoError for a file that is none, or gives no frame."""
    status = file_status(path)
    return _read_index(os.path.abspath(path), str(path), status.st_size, status.st_mtime_ns)


def file_status(path: str | os.PathLike[str]) -> os.stat_result:
    """VideoError unless `path` is a file that holds something."""
    file = pathlib.Path(path)
    try:
        if not file.exists():
            raise VideoError(f"{path}: no such file")
        if not file.is_file():
            raise VideoError(f"{path}: not a file; give one video file")
        status = file.stat()
    except (OSError, ValueError) as error:  # a name that no file can have
        raise error if isinstance(error, VideoError) else VideoError(f"{path}: {error}") from error
    if status.st_size == 0:
        raise VideoError(f"{path}: the file is empty")
    return status


@functools.lru_cache(maxsize=16)
def _read_index(path: str, name: str, size: int, mtime: int) -> Index:
    """name: how the caller calls the file; the path itself, size and mtime make the cache notice another or a changed one."""
    shape = images.kind(name)
    if shape == "still":
        raise VideoError(f"{name} is a still picture, not a video; ask about it as an image")
    if shape == "moving":
        return _moving_picture(name)
    index = _from_tables(path, name)
    return _from_packets(path, name, size) if index is None else index


def _from_tables(path: str, name: str) -> Index | None:
    """The index of an MP4 or a WebM that says itself all there is; None for any other file."""
    import av

    with films.listening() as said:
        container, streams = films.open_film(name, said)
        try:
            if films.complaints(said) or damage.second_film(path, container.format.name):
                return None
            track = tabled(path, container, streams)
            facts = None if track is None else _Facts.of(container, streams[0], track)
            stamps = None if track is None or facts is None else _stamps(facts, track)
            if track is None or facts is None or stamps is None:
                return None
            container.seek(int(stamps.pts[0]), stream=streams[0], backward=True)
            first = next(films.Reader(container, streams[0]).frames(films.packets(container, streams[0])), None)
        except av.FFmpegError:  # of a position that cannot be sought
            return None
        finally:
            films.close(container)
    if first is None or films.complaints(said, (facts.format,)):
        return None
    return _assemble(name, facts, track, stamps, len(stamps.pts), first, [])


def _from_packets(path: str, name: str, size: int) -> Index:
    """The index of any file, by one pass over its packets."""
    ended: list[str] = []
    with films.listening() as said:
        container, streams = films.open_film(name, said)
        try:
            tracks, end = demuxed(container, streams, ended)
            chosen = films.choose(streams, [t.count for t in tracks], [t.span for t in tracks])
            track = tracks[chosen]
            facts = _Facts.of(container, streams[chosen], track)
            reordered = bool(streams[chosen].codec_context.has_b_frames)
            lead = damage.lead(container, streams[chosen], track.pts[track.pts != NONE])
        finally:
            films.close(container)
    # what the decoders say while the streams are looked at is no matter: a video may begin anywhere
    complaints = films.complaints(said, (facts.format,)) or ended
    if facts.format == "flv" and 0 < end < _SPAN * size:  # passes over what it does not know without a word
        complaints.append(f"nothing can be read after {end} of {size} bytes")
    another = damage.second_film(path, facts.format)
    if another:
        complaints.append(f"a second video begins at byte {another} of {size} and cannot be read; split the file there")
    if lead > 0:
        complaints.append(f"the index knows of pictures that begin {lead:.2f} s earlier")
    stamps = _stamps(facts, track) if facts.format not in _CODING_ORDER or _in_order(track, reordered) else None

    # a second time: not every format can go back to its start
    container, streams = films.open_film(name)
    try:
        stream = next(s for s in streams if s.index == track.number)
        reader = films.Reader(container, stream)
        decoded = reader.frames(films.packets(container, stream))
        first = next(decoded, None)
        if first is None:
            raise VideoError(f"{name}: not one frame could be decoded; the file is damaged or cut off")
        frames = len(stamps.pts) if stamps is not None else 1 + sum(1 for _ in decoded)
        if stamps is None and reader.lost:
            complaints.append(f"{reader.lost} of {frames + reader.lost} pictures do not decode")
    finally:
        films.close(container)
    if facts.broadcast:
        sound = damage.joints(name, facts.format, track.number, track.key, track.damaged)
        track = dataclasses.replace(track, damaged=track.damaged & ~sound)
    return _assemble(name, facts, track, stamps, frames, first, complaints)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a container says about itself and the chosen stream."""

    format: str
    broadcast: bool  # whether its clock may leap
    tick: float
    rates: tuple[float, ...]  # frames a second as declared, or found by FFmpeg; none: not known
    promised: int  # frames, 0: not said
    seconds: float  # how long the stream runs, 0: not said
    aspect: float  # of a stored pixel, width to height

    @classmethod
    def of(cls, container: Any, stream: Any, track: Track) -> _Facts:
        name = container.format.name
        alone = len(container.streams) == 1
        promised, seconds = 0, 0.0
        if (name.startswith("mov") or name == "avi") and stream.frames > track.count:
            # the index, as the count includes what an edit list hides, and empty positions that stand for a longer picture
            promised = sum(entry.size > 0 and not entry.is_discard for entry in stream.index_entries)
            if name == "avi" and track.indexed < track.count:
                # no index, or one that does not fit the file, and another was made in reading; every position takes one tick
                known = track.dts[track.dts != NONE]
                positions = int(known.max()) + 1 if len(known) else 0
                promised = track.count + max(0, stream.frames - positions)
        if name.startswith("mov"):
            seconds = 0.0
        elif stream.duration:
            seconds = stream.duration * track.tick
        else:
            seconds = _clock(stream.metadata.get("DURATION", "")) or (alone and (container.duration or 0) / 1e6) or 0.0
        if name in ("mpegts", "mpeg"):  # an estimate, out of the last time stamp
            seconds = 0.0
        rates = (stream.average_rate, stream.guessed_rate)
        aspect = float(stream.sample_aspect_ratio or 1) or 1.0
        if not _ASPECTS[0] <= aspect <= _ASPECTS[1]:
            aspect = 1.0
        jumps = name in ("mpegts", "mpeg")
        known = tuple(float(rate) for rate in rates if rate and rate <= _MOST_RATE)
        return cls(name, jumps, track.tick, known, promised, seconds, aspect)

    @property
    def rate(self) -> float:
        return self.rates[0] if self.rates else 0.0


def _clock(text: str) -> float:
    """Seconds of a text such as 00:01:02.345, 0 for any other."""
    try:
        hours, minutes, seconds = text.split(":")
        return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
    except ValueError:
        return 0.0


@dataclasses.dataclass(frozen=True)
class _Stamps:
    """pts, length: each shown frame's stamp (ascending) and duration in ticks (0: not said)."""

    pts: np.ndarray
    length: np.ndarray
    key_pts: np.ndarray
    key_seek: np.ndarray
    key_place: np.ndarray
    shifts: tuple[tuple[int, int], ...]
    cut: frozenset[int]


def _stamps(facts: _Facts, track: Track) -> _Stamps | None:
    """Time stamps on one clock for the whole file; None where packets have none, or share one."""
    whole = len(track.pts)
    while whole and track.damaged[whole - 1]:
        whole -= 1
    shown = ~track.hidden
    shown[whole:] = False
    if not shown.any() or (track.pts[shown] == NONE).any():
        return None
    pts = np.where(track.pts == NONE, 0, track.pts)
    key = track.key & shown
    starts = [] if facts.format.startswith("mov") else _restarts(facts, track, pts, key, shown)
    bounds = list(zip([0, *starts], [*starts, len(pts)], strict=True))
    parts = [np.sort(pts[begin:stop][shown[begin:stop]]) for begin, stop in bounds]
    steps = np.concatenate([np.diff(part) for part in parts])
    gap = max(1, int(np.median(steps))) if len(steps) else 1
    shifts, end = [], int(parts[0][-1])
    for (begin, stop), part in zip(bounds[1:], parts[1:], strict=True):
        shift = end + gap - int(part[0])
        pts[begin:stop] += shift
        shifts.append((begin, shift))
        end = int(part[-1]) + shift
    order = np.argsort(pts[shown], kind="stable")
    ascending = pts[shown][order]
    if (np.diff(ascending) == 0).any():
        return None
    cut = frozenset(pts[whole:].tolist())
    length = track.length[shown][order]
    keys = np.flatnonzero(key)
    keys = keys[np.argsort(pts[keys], kind="stable")]
    seek = pts[keys]
    if facts.format in _DECODING_CLOCK:  # these are sought by the time of decoding
        seek = np.where(track.dts[keys] != NONE, track.dts[keys], pts[keys])
    return _Stamps(ascending, length, pts[keys], seek, keys, tuple(shifts), cut)


def _in_order(track: Track, reordered: bool) -> bool:
    """Whether a stream is shown in the order of its packets, as far as can be told without decoding."""
    return not reordered and bool(((track.pts != NONE) & (track.pts == track.dts)).all())


def _gap(pts: np.ndarray) -> int:
    """The usual distance of two stamps (ascending)."""
    return max(1, int(np.median(np.diff(pts)))) if len(pts) > 1 else 1


def _restarts(facts: _Facts, track: Track, pts: np.ndarray, key: np.ndarray, shown: np.ndarray) -> list[int]:
    """Packets at which the clock starts anew: parts put one after another, a counter that ran over or was reset."""
    if facts.format in _DECODING_CLOCK and (track.dts != NONE).all():
        step = np.diff(track.dts)
        anew = step < 0
        if facts.broadcast:
            anew |= np.multiply(step, facts.tick) > _JUMP
        positions = (np.flatnonzero(anew) + 1).tolist()
    else:
        # a key frame that is to be shown long before what stands ahead of it in the file
        window = _REORDER * _gap(np.unique(pts[shown]))
        ahead = np.maximum.accumulate(np.where(shown, pts, NONE))
        if not (key & shown & (ahead > pts + window)).any():
            return []
        positions, high = [], None
        for position in np.flatnonzero(shown).tolist():
            if high is not None and key[position] and high - pts[position] > window:
                positions.append(position)
                high = pts[position]
            high = pts[position] if high is None else max(high, pts[position])
    out: list[int] = []  # a part of which nothing is shown has no clock to speak of
    for position in (int(p) for p in positions):
        if shown[(out[-1] if out else 0) : position].any() and shown[position:].any():
            out.append(position)
    return out


def _shown_size(frame: Any, aspect: float, turn: tuple[bool, bool, bool]) -> tuple[int, int]:
    """(height, width) as displayed: pixels that are not square are stretched along their longer side, then turned."""
    width, height = frame.width, frame.height
    if aspect > 1:
        width = max(1, round(width * aspect))
    elif aspect < 1:
        height = max(1, round(height / aspect))
    if max(width, height) > films.MAX_SIDE:
        width, height = frame.width, frame.height
    return (width, height) if turn[0] else (height, width)


def _assemble(
    name: str,
    facts: _Facts,
    track: Track,
    stamps: _Stamps | None,
    frames: int,
    first: Any,
    complaints: list[str],
) -> Index:
    if not 1 <= first.width <= films.MAX_SIDE or not 1 <= first.height <= films.MAX_SIDE:
        raise VideoError(f"{name}: frames of {first.width}x{first.height} pixels; at most {films.MAX_SIDE} a side")
    turn = films.turn_of(first)
    size = _shown_size(first, facts.aspect, turn)
    pts = seconds = None
    if stamps is not None:
        pts, whole = stamps.pts, not complaints
        seconds = (pts - pts[0]) * facts.tick
        span = float(seconds[-1])
        duration = span + _last(facts, stamps, span, whole)
    else:
        # counted; their times are those of the packets, in ascending order, if every one gave a frame
        clock = track.dts[~track.hidden]
        ticks = np.unique(clock[clock != NONE])
        if len(clock) == len(ticks) == frames:
            seconds = (ticks - ticks[0]) * facts.tick
            gap = _gap(ticks) * facts.tick
            duration = float(seconds[-1]) + (gap if frames > 1 or not facts.rate else 1 / facts.rate)
        else:
            lengths = track.length[track.length != 0]
            rate = 1 / (float(np.median(lengths)) * facts.tick) if len(lengths) and facts.tick else facts.rate or 1.0
            duration = frames / rate
    fps = frames / duration
    # a declared rate that the stamps bear out, but for their rounding, is the exact one
    for rate in facts.rates:
        if abs(frames / rate - duration) <= max(2.5 * facts.tick, _ROUNDED / rate * (facts.tick >= 1e-3)):
            fps, duration = rate, frames / rate
            break
    remarks = _remarks(name, facts, track, frames, duration, seconds, complaints, stamps)
    info = VideoInfo(frames, fps, duration, size[1], size[0])
    nothing = np.zeros(0, np.int64)
    return Index(
        info,
        remarks,
        turn,
        pts,
        seconds,
        facts.tick,
        key_pts=nothing if stamps is None else stamps.key_pts,
        key_seek=nothing if stamps is None else stamps.key_seek,
        key_place=nothing if stamps is None else stamps.key_place,
        shifts=() if stamps is None else stamps.shifts,
        stream=track.number,
        cut=None if stamps is None else stamps.cut,
    )


def _last(facts: _Facts, stamps: _Stamps, span: float, whole: bool) -> float:
    """How long the last frame is shown: its own length where the file says it, else as long as frames usually are."""
    usual = _gap(stamps.pts) * facts.tick if len(stamps.pts) > 1 else 0.0
    # these formats store no lengths, and FFmpeg's guess goes by the declared rate
    own = 0.0 if facts.format in _DECODING_CLOCK else int(stamps.length[-1]) * facts.tick
    rest = facts.seconds - span
    # what the container leaves for it counts where it is no longer than the video's other pictures are at most, as with
    # slides; a longer rest speaks of a video that was cut off
    longest = float(np.diff(stamps.pts).max()) * facts.tick if len(stamps.pts) > 1 else rest
    if whole and own < rest <= 1.01 * longest:
        return rest
    return own or usual or (1 / facts.rate if facts.rate else 1.0)


def _remarks(
    name: str,
    facts: _Facts,
    track: Track,
    frames: int,
    duration: float,
    seconds: np.ndarray | None,
    complaints: list[str],
    stamps: _Stamps | None,
) -> tuple[str, ...]:
    remarks = []
    known = track.pts[track.pts != NONE]
    start = float(known.min()) * facts.tick if len(known) else 0.0
    reached = duration + max(0.0, start)  # a promised length counts from 0, or from the first picture
    if facts.promised > frames:
        text = f"the file is incomplete, {frames} of {facts.promised} frames can be read; using those"
        remarks.append(text + films.quoted(complaints))
    elif facts.seconds and reached < _SPAN * facts.seconds:
        text = f"the file is incomplete, pictures for {duration:.1f} of {facts.seconds:.1f} s; using {frames} frames"
        remarks.append(text + films.quoted(complaints))
    elif complaints:
        holes = _missing(seconds)
        lost = f"about {holes} frames are missing" if holes else "frames may be missing or damaged"
        remarks.append(f"the file is damaged, {lost}; using {frames} frames{films.quoted(complaints)}")
    else:
        restarts = [position for position, _ in stamps.shifts] if stamps else []
        # where parts are put together packets look damaged and are not
        near = {position + step for position in restarts for step in range(-_NEAR, _NEAR + 1)}
        harmed = sum(position not in near for position in np.flatnonzero(track.damaged).tolist())
        if harmed:
            remarks.append(f"the file is damaged in {harmed} of {len(track.pts)} packets; using {frames} frames")
    return tuple(f"{name}: {remark}" for remark in remarks)


def _missing(seconds: np.ndarray | None) -> int:
    """Frames that fit into the holes of a video of an even rate; 0 for one whose rate varies."""
    if seconds is None or len(seconds) < 8:
        return 0
    gaps = np.diff(seconds)
    usual = float(np.median(gaps))
    if usual <= 0 or (np.abs(gaps - usual) < 0.2 * usual).mean() < 0.8:
        return 0
    return int((np.round(gaps[gaps > 1.5 * usual] / usual) - 1).sum())


def _moving_picture(name: str) -> Index:
    lengths, size, complaint = images.lengths(name)
    pts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    duration = float(np.sum(lengths)) / 1000
    info = VideoInfo(len(pts), len(pts) / duration, duration, size[1], size[0])
    remarks = (f"{name}: the file is damaged, {len(pts)} frames can be read: {complaint}",) if complaint else ()
    nothing = np.zeros(0, np.int64)
    return Index(info, remarks, (False, False, False), pts, pts / 1000, 1e-3, nothing, nothing, nothing, (), None)
