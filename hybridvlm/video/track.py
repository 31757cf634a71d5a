"""The packets of a video's stream as columns: read one by one, or out of the tables that an MP4 keeps of them."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from hybridvlm.video import container as films
from hybridvlm.video import mp4

NONE = -(1 << 63)  # a time stamp that is not known, as FFmpeg writes it
_FIELDS = operator.attrgetter(
    *("stream_index", "size", "pos", "pts", "dts", "duration", "is_keyframe", "is_discard", "is_corrupt")
)
_AT_ONCE = 1 << 12  # packets
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
    """The track of an MP4's only video, out of its tables; None where these do not say all, or FFmpeg says otherwise.

    The container has to stand at its beginning, and stands elsewhere then. FFmpeg's own stamps of the first packet and of
    the last key frame settle how it shifts the tables' times.
    """
    if (
        len(streams) != 1
        or not container.format.name.startswith("mov")
        or streams[0].codec_context.codec.canonical_name not in _TABLED
    ):
        return None
    (stream,) = streams
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
    container.seek(int(pts[last]), stream=stream, backward=True)
    # FFmpeg may go back to the key frame before
    wanted = int(pts[last])
    packet = next((p for p in films.packets(container, stream) if not p.size or p.pts == wanted), None)
    seen = None if packet is None else (packet.pts, packet.dts, packet.is_keyframe, packet.size)
    if seen != (wanted, int(dts[last]), True, int(found.size[last])):
        return None
    nothing = np.zeros(count, bool)
    return Track(stream.index, float(stream.time_base), count, pts, dts, found.length, found.key, nothing, nothing)
