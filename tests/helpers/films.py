"""Small synthetic videos and pictures: every frame carries its number as a grey level, so that it can be told apart."""

from __future__ import annotations

import fractions
import pathlib
import struct

import av
import numpy as np

STEP = 6  # grey levels from one frame to the next
COLOURS = {"R": (250, 0, 0), "G": (0, 250, 0), "B": (0, 0, 250), "W": (250, 250, 250)}


def plain(number, width=64, height=48):
    """A picture of one grey, which is its number."""
    return np.full((height, width, 3), 16 + STEP * number, np.uint8)


def number_of(frame):
    """The number that a decoded frame carries."""
    return round((float(frame.mean()) - 16) / STEP)


def numbers(frames):
    return [number_of(frame) for frame in frames]


def quarters(_=0, width=64, height=48):
    """Red, green / blue, white."""
    image = np.zeros((height, width, 3), np.uint8)
    for place, colour in enumerate(COLOURS.values()):
        y, x = place // 2 * (height // 2), place % 2 * (width // 2)
        image[y : y + height // 2, x : x + width // 2] = colour
    return image


def corners(frame):
    """The colours of the four quarters, row by row, such as RGBW."""
    height, width = frame.shape[:2]
    names = {tuple(c > 128 for c in colour): name for name, colour in COLOURS.items()}
    return "".join(
        names.get(tuple((frame[y, x] > 128).tolist()), "?")
        for y in (height // 4, 3 * height // 4)
        for x in (width // 4, 3 * width // 4)
    )


def noisy(number, width=128, height=96):
    """A picture with enough in it that damage shows; its number is the shift of its pattern."""
    base = np.random.default_rng(7).integers(0, 255, (height // 8, width // 8, 3))
    base = np.kron(base, np.ones((8, 8, 1))).astype(np.uint8)
    grain = np.random.default_rng(number).integers(0, 40, base.shape).astype(np.uint8)
    return np.roll(base, 3 * number, 1) // 2 + grain


def film(
    path,
    count=24,
    *,
    fps=12,
    width=64,
    height=48,
    codec="libx264",
    seconds=None,
    lengths=None,
    first=0,
    picture=plain,
    options=None,
    gop=12,
    b_frames=0,
    container=None,
    muxer=None,
    pix_fmt="yuv420p",
    tick=None,
    shift=0.0,
    aspect=None,
    title="",
):
    """Write a video. seconds, lengths: each frame's time stamp and duration (default: even); picture: number -> RGB [h,w,3]."""
    tick = tick or (90000 if codec in ("libx264", "libx265") else fps)
    base = fractions.Fraction(1, tick)
    with av.open(str(path), "w", format=container, options=muxer or {}) as out:
        if title:
            out.metadata["title"] = title
        fine = {"qmin": "1", "qmax": "2"} if codec == "mpeg4" else {}
        stream = out.add_stream(codec, rate=fps, options=options or fine)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        stream.time_base = stream.codec_context.time_base = base
        stream.codec_context.gop_size = gop
        if codec in ("libx264", "libx265", "mpeg2video", "mpeg4"):
            stream.codec_context.max_b_frames = b_frames
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(first + i, width, height), format="rgb24")
            when = shift + (seconds[i] if seconds is not None else i / fps)
            frame.pts, frame.time_base = round(when * tick), base
            packets = stream.encode(frame)
            if lengths is not None:
                for packet in packets:
                    packet.duration = round(lengths[i] / packet.time_base)
            out.mux(packets)
        out.mux(stream.encode(None))
    return path


def transport(path, first, offset, count=12, **options):
    """A transport stream whose clock begins at `offset` seconds."""
    muxer = {"avoid_negative_ts": "disabled"}
    return film(path, count, first=first, shift=offset, container="mpegts", muxer=muxer, **options)


def joined(path, *parts):
    """Files put one after another, byte by byte."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def streams(path, *specs):
    """A file of several video streams: (codec, (width, height), frames, pixel format, default?) each, in this order."""
    with av.open(str(path), "w") as out:
        made = []
        for codec, (width, height), count, pix_fmt, default in specs:
            stream = out.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            if default is not None:
                stream.disposition = av.stream.Disposition.default if default else av.stream.Disposition(0)
            made.append((stream, count))
        for stream, count in made:
            for i in range(count):
                frame = av.VideoFrame.from_ndarray(plain(i, stream.width, stream.height), format="rgb24")
                frame = frame.reformat(format=stream.pix_fmt)
                frame.pts, frame.time_base = i, fractions.Fraction(1, 12)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path


def matrix(path, a, b, c, d):
    """Set the display matrix of an MP4's first track: a place (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(pathlib.Path(path).read_bytes())
    at = data.index(b"tkhd") + 44
    rows = [round(v * 65536) for v in (a, b)] + [0] + [round(v * 65536) for v in (c, d)] + [0, 0, 0, 1 << 30]
    data[at : at + 36] = struct.pack(">9i", *rows)
    pathlib.Path(path).write_bytes(data)
    return path


def trimmed(source, path, seconds):
    """The video from `seconds` on without recoding: an edit list hides the lead-in from the last key frame."""
    with av.open(str(source)) as read, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as out:
        old = read.streams.video[0]
        new = out.add_stream_from_template(old)
        cut = round(seconds / old.time_base)
        for packet in read.demux(old):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - cut, packet.dts - cut, new
                out.mux(packet)
    return path
