"""An MP4's own tables of its samples (ISO 14496-12), read with NumPy: sizes, times and key frames of all of them at once.

Whatever is not plain gives None and is left to FFmpeg: fragments, files that end before their boxes do, edit lists that do more
than move the start, samples that overlap the file's end, sync samples that groups name.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_LIMIT = 1 << 28  # ticks; FFmpeg takes a larger composition offset for a mistake
_MOST = 1 << 26  # samples of one track
_GROUPED = (b"rap ", b"sync")  # sample groups that make key frames of samples that are not listed as such

Box = tuple[bytes, int, int]  # (kind, first byte of the content, byte after it)


class Samples(NamedTuple):
    """Samples of a track in the file's order, times in ticks of 1 / timescale s and before any shift.

    pts, dts, length: when each is shown, decoded, and for how long; size: bytes; key: whether decoding can start at it.
    """

    timescale: int
    pts: np.ndarray
    dts: np.ndarray
    length: np.ndarray
    size: np.ndarray
    key: np.ndarray


class _Odd(ValueError):
    """Tables that are left to FFmpeg."""


def samples(path: str, track: int) -> Samples | None:
    """The samples of the track with this id; None where the file's tables are not plain."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            top = list(_boxes(data, 0, len(data)))
            movies = [box for box in top if box[0] == b"moov"]
            if len(movies) != 1 or any(kind == b"moof" for kind, _, _ in top):
                return None
            return _samples(memoryview(data[movies[0][1] : movies[0][2]]), track, len(data))
        except (_Odd, IndexError, ValueError, OverflowError):
            return None


def _boxes(data: mmap.mmap | memoryview, at: int, end: int) -> Iterator[Box]:
    while at < end:
        if at + 8 > end:
            raise _Odd
        length, head = int.from_bytes(data[at : at + 4], "big"), 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if length < head or at + length > end:
            raise _Odd
        yield bytes(data[at + 4 : at + 8]), at + head, at + length
        at += length


def _inside(data: memoryview, box: Box, *kinds: bytes) -> Box:
    """The only box of each kind in the one before, down to the last."""
    for kind in kinds:
        found = [inner for inner in _boxes(data, box[1], box[2]) if inner[0] == kind]
        if len(found) != 1:
            raise _Odd
        box = found[0]
    return box


def _numbers(data: memoryview, start: int, count: int, kind: str = ">u4") -> np.ndarray:
    if count < 0 or count > _MOST:
        raise _Odd
    return np.frombuffer(data, kind, count, start).astype(np.int64)


def _samples(movie: memoryview, track: int, file: int) -> Samples:
    whole: Box = (b"moov", 0, len(movie))
    traks = [box for box in _boxes(movie, 0, len(movie)) if box[0] == b"trak"]
    (trak,) = (box for box in traks if _track_id(movie, _inside(movie, box, b"tkhd")) == track)
    if any(kind == b"mvex" for kind, _, _ in _boxes(movie, 0, len(movie))):
        raise _Odd
    movie_scale = _scale(movie, _inside(movie, whole, b"mvhd"))
    scale = _scale(movie, _inside(movie, trak, b"mdia", b"mdhd"))
    table = list(_boxes(movie, *_inside(movie, trak, b"mdia", b"minf", b"stbl")[1:]))
    kinds = [kind for kind, _, _ in table]
    if (
        len(set(kinds) - {b"sgpd", b"sbgp"}) != sum(kind not in (b"sgpd", b"sbgp") for kind in kinds)
        or b"stps" in kinds
    ):
        raise _Odd
    if any(kind == b"sbgp" and bytes(movie[at + 4 : at + 8]) in _GROUPED for kind, at, _ in table):
        raise _Odd
    at = {kind: begin for kind, begin, _ in table}
    if _numbers(movie, at[b"stsd"] + 4, 1)[0] != 1:  # pictures of several kinds
        raise _Odd
    size = _sizes(movie, at[b"stsz"])
    count = len(size)
    steps = _runs(movie, at[b"stts"], count)
    dts = np.concatenate([[0], np.cumsum(steps[:-1])])
    offset = _runs(movie, at[b"ctts"], count, ">i4") if b"ctts" in at else np.zeros(count, np.int64)
    if steps.min() <= 0 or steps.max() >= 1 << 31 or np.abs(offset).max() > _LIMIT:
        raise _Odd
    key = np.ones(count, bool)
    if b"stss" in at:
        listed = _numbers(movie, at[b"stss"] + 8, int(_numbers(movie, at[b"stss"] + 4, 1)[0]))
        if not len(listed) or listed[0] != 1 or listed[-1] > count or (np.diff(listed) <= 0).any():
            raise _Odd
        key = np.zeros(count, bool)
        key[listed - 1] = True
    _check_bytes(movie, at, size, file)
    pts = dts + offset
    _check_edits(movie, trak, pts, scale, movie_scale)
    return Samples(scale, pts, dts, steps, size, key)


def _track_id(movie: memoryview, box: Box) -> int:
    long = movie[box[1]] == 1
    return int(_numbers(movie, box[1] + (20 if long else 12), 1)[0])


def _scale(movie: memoryview, box: Box) -> int:
    """Ticks a second of a header."""
    long = movie[box[1]] == 1
    return int(_numbers(movie, box[1] + (20 if long else 12), 1)[0])


def _sizes(movie: memoryview, at: int) -> np.ndarray:
    same, count = _numbers(movie, at + 4, 2).tolist()
    size = np.full(count, same) if same and count <= _MOST else _numbers(movie, at + 12, count)
    if not len(size) or (size <= 0).any():  # FFmpeg passes over empty samples
        raise _Odd
    return size


def _runs(movie: memoryview, at: int, count: int, kind: str = ">u4") -> np.ndarray:
    """A table of (how often, value) as one value per sample."""
    entries = int(_numbers(movie, at + 4, 1)[0])
    times = _numbers(movie, at + 8, 2 * entries)[::2]
    if times.sum() != count:
        raise _Odd
    return np.repeat(_numbers(movie, at + 8, 2 * entries, kind)[1::2], times)


def _check_bytes(movie: memoryview, at: dict[bytes, int], size: np.ndarray, file: int) -> None:
    """_Odd unless every chunk of samples lies in the file."""
    wide = b"co64" in at
    begin = at[b"co64" if wide else b"stco"]
    chunks = _numbers(movie, begin + 8, int(_numbers(movie, begin + 4, 1)[0]), ">u8" if wide else ">u4")
    entries = int(_numbers(movie, at[b"stsc"] + 4, 1)[0])
    first, per, kind = _numbers(movie, at[b"stsc"] + 8, 3 * entries).reshape(-1, 3).T
    repeats = np.diff(np.append(first, len(chunks) + 1))
    if first[0] != 1 or (repeats < 0).any() or (per <= 0).any() or (kind != 1).any():
        raise _Odd
    held = np.repeat(per, repeats)
    if held.sum() != len(size):
        raise _Odd
    ends = chunks + np.add.reduceat(size, np.concatenate([[0], np.cumsum(held[:-1])]))
    if ends.max() > file or chunks.min() <= 0:
        raise _Odd


def _check_edits(movie: memoryview, trak: Box, pts: np.ndarray, scale: int, movie_scale: int) -> None:
    """_Odd for an edit list that hides samples, repeats them, or changes their pace; it may wait before the first."""
    lists = [box for box in _boxes(movie, trak[1], trak[2]) if box[0] == b"edts"]
    if not lists:
        return
    (box,) = lists
    _, at, _ = _inside(movie, box, b"elst")
    kind = [("length", ">u8"), ("start", ">i8")] if movie[at] == 1 else [("length", ">u4"), ("start", ">i4")]
    entries = int(_numbers(movie, at + 4, 1)[0])
    edits = np.frombuffer(movie, np.dtype([*kind, ("rate", ">u4")]), entries, at + 8)
    if (edits["rate"] != 1 << 16).any() or (edits["start"][:-1] != -1).any() or not 1 <= entries <= 2:
        raise _Odd
    length, start = int(edits["length"][-1]), int(edits["start"][-1])
    if not 0 <= start <= pts.min() or start + length * scale / max(1, movie_scale) <= pts.max():
        raise _Odd
