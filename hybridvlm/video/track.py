"""The packets of a video's stream as columns: read one by one, or out of what an MP4 or a WebM itself says of them."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hybridvlm.video import container as films
from hybridvlm.video import damage, matroska, mp4

NONE = -(1 << 63)  # a time stamp that is not known, as FFmpeg writes it
_FIELDS = operator.attrgetter(
    *("stream_index", "size", "pos", "pts", "dts", "duration", "is_keyframe", "is_discard", "is_corrupt")
)
_AT_ONCE = 1 << 12  # packets
_IN_ORDER = (
    "vp8",
    "vp9",
)  # codecs that show pictures as they come, and whose packets FFmpeg hands on as a Matroska's blocks
_TABLED = ("h264", "hevc", "av1")  # codecs whose packets FFmpeg hands on as an MP4's tables have them


@dataclasses.dataclass(frozen=True)
class Track:
    """The packets of one stream, in the file's order, n of them.

    Attributes:
        number: of the stream in its container.
        tick: seconds that a stamp counts.
        indexed: entries of the container's index before anything was read.
        pts: [n] time stamps, NONE where there is none.
        dts: [n] when a packet is to be decoded, likewise.
        length: [n] in ticks, 0: not said.
        key: [n] key frames.
        hidden: [n] decoded and not shown.
        damaged: [n] said to be.
    """

    number: int
    tick: float
    indexed: int
    pts: np.ndarray
    dts: np.ndarray
    length: np.ndarray
    key: np.ndarray
    hidden: np.ndarray
    damaged: np.ndarray

    @property
    def count(self) -> int:
        """Packets that are shown."""
        return int((~self.hidden).sum())

    @property
    def span(self) -> float:
        """Seconds from the first to the last shown packet."""
        stamps = np.where(self.pts != NONE, self.pts, self.dts)[~self.hidden]
        known = stamps[stamps != NONE]
        return float(known.max() - known.min()) * self.tick if len(known) else 0.0


def demuxed(container: Any, streams: Sequence[Any], ended: list[str]) -> tuple[list[Track], int]:
    """The tracks of streams, by one pass over all packets of the file, and the byte after the last one.

    ended: gets the reason, where the file cannot be read to its end.
    """
    indexed = {s.index: len(s.index_entries) for s in streams}
    rows: dict[int, list[tuple[Any, ...]]] = {s.index: [] for s in streams}
    # an hour has 100,000 packets and more: what is done for each is done in C, and those of other streams do not pile up
    source = map(_FIELDS, films.packets(container, *container.streams, ended=ended))
    last: tuple[Any, ...] = ()
    while found := list(itertools.islice(source, _AT_ONCE)):
        found = [row for row in found if row[1]]
        last = found[-1] if found else last
        for number, own in rows.items():
            own += [row for row in found if row[0] == number] if len(container.streams) > 1 else found
    tracks = []
    for s in streams:
        columns = list(zip(*rows[s.index], strict=True))[3:] or [()] * 6
        pts, dts = (np.array([NONE if x is None else x for x in column], np.int64) for column in columns[:2])
        length = np.array([x or 0 for x in columns[2]], np.int64)
        flags = [np.array(column, bool) for column in columns[3:]]
        tracks.append(Track(s.index, float(s.time_base or 0), indexed[s.index], pts, dts, length, *flags))
    return tracks, last[1] + (last[2] or 0) if last else 0


def tabled(path: str, container: Any, streams: Sequence[Any]) -> Track | None:
    """The track of a file's only video, out of what its container says of all packets; None where that is not plain, or FFmpeg says
    otherwise.

    The container has to stand at its beginning, and stands elsewhere then.
    """
    if len(streams) != 1:
        return None
    (stream,) = streams
    codec = stream.codec_context.codec.canonical_name
    if container.format.name.startswith("mov") and codec in _TABLED:
        return _of_mp4(path, container, stream)
    if container.format.name.startswith("matroska") and codec in _IN_ORDER:
        return _of_matroska(path, container, stream)
    return None


def _of_mp4(path: str, container: Any, stream: Any) -> Track | None:
    """FFmpeg's own stamps of the first packet and of the last key frame settle how it shifts the tables' times."""
    found = mp4.samples(path, stream.id)
    if found is None or stream.time_base is None or stream.time_base * found.timescale != 1:
        return None
    count = len(found.pts)
    if len(stream.index_entries) != count:  # an edit list hides some, or FFmpeg does not trust the tables
        return None
    first = next(films.packets(container, stream), None)
    if first is None or first.pts is None or first.dts is None:
        return None
    shifts = first.pts - int(found.pts[0]), first.dts - int(found.dts[0])
    pts, dts = found.pts + shifts[0], found.dts + shifts[1]
    last = int(np.flatnonzero(found.key)[-1])
    packet = next(_from(container, stream, int(pts[last])), None)
    seen = None if packet is None else (packet.pts, packet.dts, packet.is_keyframe, packet.size)
    if seen != (int(pts[last]), int(dts[last]), True, int(found.size[last])):
        return None
    nothing = np.zeros(count, bool)
    return Track(stream.index, float(stream.time_base), count, pts, dts, found.length, found.key, nothing, nothing)


def _of_matroska(path: str, container: Any, stream: Any) -> Track | None:
    """FFmpeg's first packet, and all from the last key frame on, have to be those of the blocks, and tell how long pictures last."""
    found = matroska.blocks(path)
    if found is None or not stream.time_base or stream.time_base * 10**9 != found.nanoseconds:
        return None
    rows = list(zip(found.pts.tolist(), found.key.tolist(), found.size.tolist(), strict=True))
    first = next(films.packets(container, stream), None)
    if (
        first is None
        or (first.pts, first.is_keyframe, first.size) != rows[0]
        or damage.lead(container, stream, found.pts)
    ):
        return None
    keys = np.flatnonzero(found.key)
    if not len(keys):
        return None
    last = int(keys[-1])
    tail = [p for p in _from(container, stream, rows[last][0]) if p.size]
    if [(p.pts, p.is_keyframe, p.size) for p in tail] != rows[last:] or any(p.is_discard or p.is_corrupt for p in tail):
        return None
    length, nothing = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    length[last:] = [p.duration or 0 for p in tail]
    indexed = len(stream.index_entries)
    return Track(
        stream.index, float(stream.time_base), indexed, found.pts, found.pts, length, found.key, nothing, nothing
    )


def _from(container: Any, stream: Any, stamp: int) -> Iterator[Any]:
    """Packets from the one with this stamp on; FFmpeg may go back to the key frame before."""
    container.seek(stamp, stream=stream, backward=True)
    return itertools.dropwhile(lambda p: p.size and p.pts != stamp, films.packets(container, stream))
