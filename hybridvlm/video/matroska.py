"""A Matroska's or WebM's own blocks (RFC 9559), read over without their content: when each picture is shown, and which are keys.

Whatever is not plain gives None and is left to FFmpeg: files that are cut off or go on after their segment, elements of
unknown size or kind, content that is compressed, several pictures in a block, invisible ones, and flags of key frames that
say other than the pictures.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hybridvlm.video.errors import VideoTimeout, check_time

_EBML, _SEGMENT, _INFO, _TRACKS, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675
_ASIDE = (0xEC, 0xBF)  # what may stand anywhere: space, and checksums
# indexes, tags, chapters, attachments
_TOP = (_INFO, _TRACKS, 0x114D9B74, 0x1C53BB6B, 0x1254C367, 0x1043A770, 0x1941A469, *_ASIDE)
_SCALE, _ENTRY, _NUMBER, _KIND, _CODEC = 0x2AD7B1, 0xAE, 0xD7, 0x83, 0x86
_CHANGED = (0x6D80, 0x23314F, 0x56AA)  # of a track: compressed or encrypted content, a clock of its own, a delay
_TIME, _SIMPLE, _GROUP, _BLOCK, _LENGTH, _REFERENCE = 0xE7, 0xA3, 0xA0, 0xA1, 0x9B, 0xFB
_PLACES = (0xA7, 0xAB, *_ASIDE)  # of a cluster: where it and the one before stand
_UNSEEN = 0x08 | 0x06  # flags of a block: invisible, several frames in one

Element = tuple[int, int, int]  # (id, first byte of the content, byte after it)
# of a picture by its first byte: whether decoding can start at it, as FFmpeg has it whatever the container says; None: no telling
Keys = tuple[bool | None, ...]


def _key_of_vp8(byte: int) -> bool | None:
    """Whether it is none of the keys, and three bits of version, up to 3."""
    return None if byte >> 1 & 0b111 > 3 else not byte & 1


def _key_of_vp9(byte: int) -> bool | None:
    """Marker 10, two bits of profile, whether an earlier picture is shown again, whether it is none of the keys."""
    if byte >> 6 != 0b10 or byte >> 4 & 0b11 == 0b11:
        return None
    return byte >> 2 & 0b11 == 0


_CODECS: dict[bytes, Keys] = {
    b"V_VP8": tuple(map(_key_of_vp8, range(256))),
    b"V_VP9": tuple(map(_key_of_vp9, range(256))),
}
_HEADER = 10  # bytes of a key frame in either of them, at least


class Blocks(NamedTuple):
    """Pictures of the only video track in the file's order.

    nanoseconds: of a tick; pts: when each is shown, in ticks; key: whether decoding can start at it; size: bytes.
    """

    nanoseconds: int
    pts: np.ndarray
    key: np.ndarray
    size: np.ndarray


class _Odd(ValueError):
    """A file that is left to FFmpeg."""


def blocks(path: str) -> Blocks | None:
    """The blocks of a file's only video track; None where it is not plain."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _blocks(path, data)
        except VideoTimeout:
            raise
        except (_Odd, IndexError, ValueError, OverflowError):
            return None


def _elements(data: mmap.mmap, at: int, end: int) -> Iterator[Element]:
    while at < end:
        kind = data[at]
        if kind & 0x80:
            at += 1
        else:
            width = 9 - kind.bit_length()
            if width > 4:
                raise _Odd
            kind = int.from_bytes(data[at : at + width], "big")
            at += width
        start, length = _length(data, at)
        at = start + length
        if at > end:
            raise _Odd
        yield kind, start, at


def _length(data: mmap.mmap, at: int) -> tuple[int, int]:
    """(the byte after a number of variable width, the number); _Odd for "not known"."""
    first = data[at]
    width = 9 - first.bit_length()
    if width == 2:  # as most blocks have it
        value = (first & 0x3F) << 8 | data[at + 1]
    elif width > 8:
        raise _Odd
    else:
        value = int.from_bytes(data[at : at + width], "big") - (1 << 7 * width)
    if value == (1 << 7 * width) - 1:
        raise _Odd
    return at + width, value


def _number(data: mmap.mmap, start: int, stop: int) -> int:
    return int.from_bytes(data[start:stop], "big")


def _blocks(path: str, data: mmap.mmap) -> Blocks:
    (head, *_), (segment, start, end) = _elements(data, 0, len(data))
    if (head, segment) != (_EBML, _SEGMENT) or end != len(data):
        raise _Odd
    top = list(_elements(data, start, end))
    if any(kind not in _TOP and kind != _CLUSTER for kind, _, _ in top):
        raise _Odd
    (info,) = (element for element in top if element[0] == _INFO)
    (tracks,) = (element for element in top if element[0] == _TRACKS)
    scales = [_number(data, *own) for kind, *own in _elements(data, *info[1:]) if kind == _SCALE]
    track = _video(data, tracks)
    rows: list[tuple[int, bool, int]] = []
    for kind, start, stop in top:
        if kind == _CLUSTER:
            check_time(path)
            _cluster(data, start, stop, track, rows)
    if not rows:
        raise _Odd
    pts, key, size = zip(*rows, strict=True)
    return Blocks((scales or [1_000_000])[0], np.array(pts, np.int64), np.array(key, bool), np.array(size, np.int64))


def _video(data: mmap.mmap, tracks: Element) -> tuple[int, Keys]:
    """The number of the only video track, and how its pictures begin."""
    found = []
    for kind, start, stop in _elements(data, *tracks[1:]):
        if kind in _ASIDE:
            continue
        if kind != _ENTRY:
            raise _Odd
        fields = {field: own for field, *own in _elements(data, start, stop)}
        if _number(data, *fields.get(_KIND, (0, 0))) != 1:
            continue
        keys = _CODECS.get(data[slice(*fields.get(_CODEC, (0, 0)))])
        if keys is None or _NUMBER not in fields or any(field in fields for field in _CHANGED):
            raise _Odd
        found.append((_number(data, *fields[_NUMBER]), keys))
    (track,) = found
    return track


def _cluster(data: mmap.mmap, at: int, end: int, track: tuple[int, Keys], rows: list[tuple[int, bool, int]]) -> None:
    """Append (pts, key, size) of the blocks of a cluster."""
    time: int | None = None
    for kind, start, stop in _elements(data, at, end):
        if kind in (_SIMPLE, _GROUP):
            if time is None:
                raise _Odd
            row = _block(data, start, stop, track, time) if kind == _SIMPLE else _group(data, start, stop, track, time)
            if row is not None:
                rows.append(row)
        elif kind == _TIME:
            time = _number(data, start, stop)
        elif kind not in _PLACES:
            raise _Odd


def _block(
    data: mmap.mmap, at: int, stop: int, track: tuple[int, Keys], time: int, key: bool | None = None
) -> tuple[int, bool, int] | None:
    """(pts, key, size) of a block; None for one of another track. key: said elsewhere, not by its flags."""
    own, keys = track
    first = data[at]
    if first & 0x80:
        at, number = at + 1, first & 0x7F
    else:
        at, number = _length(data, at)
    if number != own:
        return None
    high, low, flags, picture = data[at : at + 4]
    key = bool(flags & 0x80) if key is None else key
    if flags & _UNSEEN or stop - at - 3 < (_HEADER if key else 1) or keys[picture] is not key:
        raise _Odd
    relative = high << 8 | low
    return time + relative - (relative >> 15 << 16), key, stop - at - 3


def _group(data: mmap.mmap, at: int, end: int, track: tuple[int, Keys], time: int) -> tuple[int, bool, int] | None:
    """The same of a block in a group; without a reference it is a key."""
    block, key, plain = None, True, True
    for kind, start, stop in _elements(data, at, end):
        if kind == _BLOCK:
            block = start, stop
        elif kind == _REFERENCE:
            key = False
        elif kind != _LENGTH and kind not in _ASIDE:
            plain = False
    row = None if block is None else _block(data, *block, track, time, key)
    if row is not None and not plain:
        raise _Odd
    return row
