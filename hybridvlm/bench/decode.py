"""Frames out of an hour of video: this library's decoder with OpenCV, decord and torchcodec, whichever are installed.

Files are made on the spot, one per codec, every frame with its own number in black and white blocks, so that each frame that comes
out is told: `exact` is the share that are the ones asked for. A reader starts cold each time: opening the file and finding its
frames is part of the time. Frames are asked for evenly over the file, at the file's own size. Readers take turns; seconds are
the median over --rounds, those of the CPU of all threads together: on a busy machine they say more.
"""

from __future__ import annotations

import argparse
import contextlib
import fractions
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

BITS, BLOCK = 20, 8  # numbers up to 2 ** 20; pixels a side of a block
# name -> (FFmpeg's encoder, file ending, options that make it quick)
CODECS = {
    "h264": ("libx264", ".mp4", {"preset": "ultrafast", "crf": "26"}),
    "hevc": ("libx265", ".mp4", {"preset": "ultrafast", "crf": "28", "x265-params": "log-level=none"}),
    "vp9": ("libvpx-vp9", ".webm", {"deadline": "realtime", "cpu-used": "8", "crf": "40", "b:v": "0", "row-mt": "1"}),
    "av1": ("libsvtav1", ".mp4", {"preset": "11", "crf": "30"}),
}
Reader = Callable[[str, Sequence[int]], np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    add = parser.add_argument
    add("--codecs", nargs="+", default=list(CODECS), choices=list(CODECS), help="default: all")
    add("--frames", nargs="+", type=int, default=[64, 512, 1024], help="frames asked for (default: 64 512 1024)")
    add("--minutes", type=float, default=60.0, help="length of the files (default: 60)")
    add("--fps", type=int, default=10, help="of the files (default: 10)")
    add("--height", type=int, default=180, help="of the frames (default: 180)")
    add("--width", type=int, default=320, help="of the frames (default: 320)")
    add("--gop", type=int, default=100, help="frames from one key frame to the next (default: 100)")
    add("--readers", nargs="+", default=list(READERS), choices=list(READERS), help="default: all that are installed")
    add("--rounds", type=int, default=5, help="times that every reader takes its turn (default: 5)")
    add("--folder", type=pathlib.Path, help="where the files are made and kept (default: a temporary folder)")


def picture(number: int, height: int, width: int) -> np.ndarray:
    """A frame [h,w,3]: a moving gradient under its number in BITS blocks, the highest first."""
    across = (np.arange(width) + 3 * number) % 256
    frame = np.repeat(across[None, :, None].astype(np.uint8), height, 0).repeat(3, 2)
    bits = np.array([255 * (number >> (BITS - 1 - bit) & 1) for bit in range(BITS)], np.uint8)
    per = width // BLOCK
    for start in range(0, BITS, per):
        row = np.repeat(bits[start : start + per], BLOCK)
        top = start // per * BLOCK
        frame[top : top + BLOCK, : len(row)] = row[None, :, None]
    return frame


def read_number(frame: np.ndarray) -> int:
    """The number that a frame carries."""
    per = frame.shape[1] // BLOCK
    value = 0
    for bit in range(BITS):
        y, x = bit // per * BLOCK, bit % per * BLOCK
        value = 2 * value + int(frame[y + 2 : y + BLOCK - 2, x + 2 : x + BLOCK - 2].mean() > 127)
    return value


def make(path: pathlib.Path, codec: str, count: int, fps: int, height: int, width: int, gop: int) -> None:
    """Write a file of numbered frames; ValueError where this FFmpeg has no such encoder."""
    import av

    encoder, _, options = CODECS[codec]
    with av.open(str(path), "w") as out:
        try:
            stream: Any = out.add_stream(encoder, rate=fps, options=options)
        except av.error.FFmpegError as error:
            raise ValueError(f"this PyAV has no encoder {encoder} for {codec}: {error}") from error
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, fps)
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(picture(number, height, width), format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def hybridvlm_frames(path: str, numbers: Sequence[int]) -> np.ndarray:
    """This library's decoder."""
    from hybridvlm.video import decode_frames

    return decode_frames(path, numbers)


def opencv_frames(path: str, numbers: Sequence[int]) -> np.ndarray:
    """OpenCV, sought by frame number."""
    import cv2

    capture = cv2.VideoCapture(path)
    out = []
    for number in numbers:
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        good, frame = capture.read()
        if not good:
            raise ValueError(f"OpenCV gave no frame {number}")
        out.append(frame[..., ::-1])
    capture.release()
    return np.stack(out)


def decord_frames(path: str, numbers: Sequence[int]) -> np.ndarray:
    """decord, all frames in one call."""
    import decord

    return decord.VideoReader(path, num_threads=0).get_batch(list(numbers)).asnumpy()


def torchcodec_frames(path: str, numbers: Sequence[int]) -> np.ndarray:
    """torchcodec, exact seeking, all frames in one call."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=0, seek_mode="exact")
    return decoder.get_frames_at(list(numbers)).data.numpy()


READERS: dict[str, Reader] = {
    "hybridvlm": hybridvlm_frames,
    "opencv": opencv_frames,
    "decord": decord_frames,
    "torchcodec": torchcodec_frames,
}


@contextlib.contextmanager
def _folder(given: pathlib.Path | None) -> Iterator[pathlib.Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="decode-") as name:
        yield pathlib.Path(name)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per codec, reader and number of frames; a reader that is not installed, or fails, is a row that says so."""
    if args.width // BLOCK < 1 or args.height < -(-BITS // (args.width // BLOCK)) * BLOCK:
        raise ValueError(f"--width and --height are too small for {BITS} blocks of {BLOCK} pixels")
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    count = round(args.minutes * 60 * args.fps)
    if not 0 < count < 1 << BITS:
        raise ValueError(f"--minutes times --fps must give 1 to {(1 << BITS) - 1} frames, got {count}")
    rows = []
    with _folder(args.folder) as folder:
        for codec in args.codecs:
            name = f"{codec}-{count}-{args.height}x{args.width}{CODECS[codec][1]}"
            path = folder / name
            if not path.exists():
                try:
                    part = path.with_name(f"part-{name}")
                    make(part, codec, count, args.fps, args.height, args.width, args.gop)
                    part.rename(path)
                except ValueError as error:
                    rows.append(_row(codec, "-", 0, str(error)))
                    continue
            for asked in args.frames:
                rows += _measure(codec, path, args.readers, min(asked, count), args.rounds, count)
    return rows


def _measure(
    codec: str, path: pathlib.Path, readers: Sequence[str], asked: int, rounds: int, count: int
) -> list[dict[str, Any]]:
    """A row per reader, for `asked` of the `count` frames."""
    numbers = np.linspace(0, count - 1, asked).astype(int).tolist()
    seconds: dict[str, list[tuple[float, float]]] = {reader: [] for reader in readers}
    exact, problems = dict[str, float](), dict[str, str]()
    for turn in range(rounds):
        for reader in readers:
            if reader in problems:
                continue
            try:
                if turn == 0:
                    READERS[reader](str(path), [0])  # its imports and libraries are loaded
                os.utime(path)  # what is remembered of a file is remembered by its date
                start = time.perf_counter(), time.process_time()
                found = READERS[reader](str(path), numbers)
            except ImportError as error:
                problems[reader] = f"not installed: {str(error).splitlines()[0]}"
                continue
            except Exception as error:  # each library has exceptions of its own
                problems[reader] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            seconds[reader].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            right = [read_number(frame) == number for frame, number in zip(found, numbers, strict=True)]
            exact[reader] = min(exact.get(reader, 1.0), float(np.mean(right)))
    rows = []
    for reader in readers:
        if reader in problems:
            rows.append(_row(codec, reader, asked, problems[reader]))
        else:
            wall, cpu = (statistics.median(found) for found in zip(*seconds[reader], strict=True))
            rows.append(_row(codec, reader, asked, "", wall, cpu, exact[reader]))
    return rows


def _row(
    codec: str,
    reader: str,
    asked: int,
    problem: str,
    seconds: float | None = None,
    cpu: float | None = None,
    exact: float | None = None,
) -> dict[str, Any]:
    return {
        "codec": codec,
        "reader": reader,
        "frames": asked,
        "seconds": None if seconds is None else round(seconds, 3),
        "cpu_s": None if cpu is None else round(cpu, 3),
        "frames/s": None if seconds is None else round(asked / seconds, 1),
        "exact": exact,
        "problem": problem[:80],
    }
