"""Signs of damage that FFmpeg keeps to itself, and those that are none."""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np

from hybridvlm.video import container as films

_MARKED = ("asf", "nut", "wtv")  # formats that begin with 16 bytes which stand nowhere else
_STEPS = (188, 192, 204)  # bytes from one transport packet to the next
_NEAR = 3  # packets around a key frame
_JOINTS = 64  # damaged positions up to which each is looked at


def lead(container: Any, stream: Any, stamps: np.ndarray) -> float:
    """Seconds by which a Matroska's index begins ahead of the first picture that can be read, by the packets' `stamps`."""
    import av

    if not container.format.name.startswith("matroska") or not len(stamps):
        return 0.0
    start = int(stamps.min())
    with contextlib.suppress(av.FFmpegError):  # the index stands at the end, and is read when something is sought
        container.seek(start, stream=stream)
    first = min((entry.timestamp for entry in stream.index_entries), default=start)
    return (start - first) * float(stream.time_base or 0)


def second_film(path: str, form: str) -> int:
    """Where a second file begins that was put after the first, in formats of which FFmpeg reads the first alone; 0: nowhere."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if form in _MARKED:
            return max(0, data.find(data[:16], 16))
        if not form.startswith("mov"):
            return 0
        at, begin, found = 0, 0, 0
        while at + 16 <= len(data):
            length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
            if length == 1:
                length = int.from_bytes(data[at + 8 : at + 16], "big")
            begin = at if kind == b"ftyp" else begin
            found += kind == b"moov"
            if found == 2:
                return begin or at
            if length < 8:
                break
            at += length
    return 0


def joints(name: str, form: str, number: int, key: np.ndarray, damaged: np.ndarray) -> np.ndarray:
    """[n] packets that are said to be `damaged` [n] and are not: next to a `key` frame [n], and all around them decodes.

    Where parts of a broadcast are put one after another its packets' counter leaps, as if some were lost.
    """
    keys, flagged = np.flatnonzero(key).tolist(), np.flatnonzero(damaged).tolist()
    found = np.zeros(len(key), bool)
    near = [position for position in flagged if any(abs(key - position) <= _NEAR for key in keys)]
    if not near or len(flagged) > _JOINTS:
        return found
    sound, begins = list[int](), set[int]()
    with films.listening() as said:
        container, streams = films.open_film(name)
        try:
            stream = next(s for s in streams if s.index == number)
            reader = films.Reader(container, stream, strict=True, said=said, cut=frozenset())
            packets = list[Any]()
            numbered = enumerate(p for p in films.packets(container, stream) if p.size)
            for position in near:
                begin = max((key for key in keys if key <= position), default=0)
                stop = min((key for key in keys if key > position + _NEAR), default=len(key))
                packets = [(n, p) for n, p in packets if n >= begin]
                for at, packet in numbered:
                    begins.add(packet.pos or 0)
                    if at >= begin:
                        packets.append((at, packet))
                    if at + 1 >= stop:
                        break
                if _decodes(reader, [p for n, p in packets if n < stop]):
                    sound.append(position)
        finally:
            films.close(container)
    # where bytes are gone, what follows no longer stands on the grid of the transport packets
    even = any(len({begin % step for begin in begins}) == 1 for step in _STEPS)
    found[sound] = even or form != "mpegts"
    return found


def _decodes(reader: films.Reader, packets: list[Any]) -> bool:
    """Whether packets, from a key frame on, decode without a word."""
    import av

    reader.codec.flush_buffers()
    lost, trouble = reader.lost, not packets
    for _ in reader.frames(iter([*packets, av.Packet()]), packets[0].pts if packets else None):
        trouble |= reader.trouble
    return not trouble and not reader.trouble and reader.lost == lost
