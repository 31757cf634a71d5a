"""Opening video files with FFmpeg (PyAV): which formats, which stream, and what FFmpeg has to say about a file.

Files come from strangers. Only formats that hold a video in one file are opened (no playlists, no series of pictures, no
descriptions of streams), through no protocol but `file`, and by their absolute path, so that no name is taken for an address.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridvlm.video.errors import VideoError, VideoTimeout, check_time, time_is_limited
from hybridvlm.video.images import motion_jpeg

if TYPE_CHECKING:
    import av

# FFmpeg's names of the formats that hold a video in one file
FORMATS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf"),
    *(
        "ogg",
        "mxf",
        "nut",
        "rm",
        "wtv",
        "dv",
        "h261",
        "h263",
        "h264",
        "hevc",
        "vvc",
        "m4v",
        "av1",
        "obu",
        "ivf",
        "mjpeg",
    ),
    "yuv4mpegpipe",
)
PLAIN = "MP4/MOV, Matroska/WebM, AVI, MPEG, FLV, ASF/WMV, Ogg, MXF and raw streams"
_PLAYLISTS = ("concat", "dash", "hls", "imf", "rtp", "rtsp", "sap", "sdp", "webm_dash_manifest")
_PICTURES = ("_pipe", "image2")  # how FFmpeg's still-picture formats are called
_ASIDE = ("attached_pic", "timed_thumbnails", "still_image", "dependent", "metadata")
MAX_SIDE = 1 << 14  # pixels


# -- what FFmpeg says ---------------------------------------------------------------------------------------------------


class _Ears:
    """FFmpeg's log is one for the process: switched on while anyone listens, left alone where the user has switched it on."""

    def __init__(self) -> None:
        self.lock, self.count = threading.Lock(), 0
        self.level: int | None = None
        self.repeats = True
        self.sink: av.logging.Capture | None = None

    def open(self) -> None:
        from av import logging

        with self.lock:
            self.count += 1
            if self.count > 1:
                return
            self.level, self.repeats = logging.get_level(), logging.get_skip_repeated()
            logging.set_skip_repeated(False)  # else a second file's like complaint would be lost
            if self.level is None:
                # what other threads' decoders say meanwhile goes nowhere, as without a listener
                sink = logging.Capture(local=False)
                sink.__enter__()
                self.sink = sink
                logging.set_level(logging.ERROR)

    def close(self) -> None:
        from av import logging

        with self.lock:
            self.count -= 1
            if self.count:
                return
            logging.set_skip_repeated(self.repeats)
            if self.sink is not None:
                logging.set_level(None)
                self.sink.__exit__(None, None, None)
                self.sink = None


_EARS = _Ears()
Said = list[tuple[int, str, str]]  # (level, who, what)


@contextlib.contextmanager
def listening() -> Iterator[Said]:
    """The list to which FFmpeg's messages of this thread are added as they come; decoders have to run on one thread."""
    from av import logging

    _EARS.open()
    try:
        with logging.Capture() as said:
            yield said
    finally:
        _EARS.close()


def complaints(said: Said, who: Sequence[str] = ()) -> list[str]:
    """The errors among messages, each text once; of those in `who` alone, if given."""
    from av import logging

    texts = (text.strip() for level, name, text in said if level <= logging.ERROR and (not who or name in who))
    return list(dict.fromkeys(text for text in texts if text))


def quoted(texts: Sequence[str]) -> str:
    """Complaints as the end of a message, "" for none."""
    more = f" (and {len(texts) - 1} more)" if len(texts) > 1 else ""
    return f" (FFmpeg: {texts[0]}{more})" if texts else ""


# -- opening ------------------------------------------------------------------------------------------------------------


class _Plain(mmap.mmap):
    """A file under a name that FFmpeg cannot take for the pattern of a series of pictures."""

    name: str


def open_film(path: str, said: Said | None = None) -> tuple[Any, list[Any]]:
    """Container, and the video streams that may be the video; the caller closes the container (`close`).

    said: gets what FFmpeg says while the file is opened, which is when the beginning of it is read.
    """
    container = _opened(path, os.path.abspath(path), said)
    if container is None:
        with open(path, "rb") as file:
            plain = _Plain(file.fileno(), 0, access=mmap.ACCESS_READ)
        plain.name = os.path.abspath(path).translate(str.maketrans("%*?[{", "_____"))
        container = _opened(path, plain, said)
    pictured = [s for s in container.streams.video if not _aside(s)]
    streams = [s for s in pictured if s.codec_context is not None]
    problem = None
    if not pictured:
        problem = "has sound but no pictures" if container.streams.audio else "has no video stream"
    elif not streams:
        problem = "is coded in a way that this FFmpeg cannot decode"
    elif max(max(s.width, s.height) for s in streams) > MAX_SIDE:
        problem = f"has frames of {streams[0].width}x{streams[0].height} pixels; at most {MAX_SIDE} a side"
    if problem:
        container.close()
        raise VideoError(f"{path} {problem}")
    return container, streams


def _opened(path: str, source: str | _Plain, said: Said | None) -> Any:
    """The container; None where FFmpeg takes the file for a series of pictures, by its name."""
    import av

    # in the middle of another kind of file (a PDF, a web page) a JPEG would be taken for a video as well
    known = "mjpeg" if motion_jpeg(path) else None
    formats = FORMATS if known else [name for name in FORMATS if name != "mjpeg"]
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(formats)}
    # from PyAV 19 on, notes that are no UTF-8 are replaced without being asked
    replace: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
    with listening() as heard:
        try:
            container = av.open(source, "r", format=known, options=options, **replace)
        except av.FFmpegError as error:
            if isinstance(source, str) and any(
                "not on whitelist" in text and name == "image2" for _, name, text in heard
            ):
                return None
            raise VideoError(f"{path}{_refusal(error, heard)}") from None
        except Exception as error:  # of PyAV, not of FFmpeg: a stranger's file must not end a run
            raise VideoError(f"{path}: cannot be opened as a video: {type(error).__name__}: {error}") from error
    if said is not None:
        said.extend(heard)
    return container


def close(container: Any) -> None:
    """Close a container whose decoders may be at work.

    They are stopped first: freeing a decoder holds Python's lock, and a worker that has to say something waits for it.
    """
    for stream in container.streams:
        if stream.codec_context is not None:
            stream.codec_context.flush_buffers()
    container.close()


def _refusal(error: Any, said: Said) -> str:
    names = [name for _, name, text in said if "not on whitelist" in text]
    if not names:
        reason = f"{error.strerror} (cut off, or not a video)" if error.strerror else type(error).__name__
        return f": cannot be opened as a video: {reason}"
    name = names[0]
    if name.endswith(_PICTURES):
        return f" is a still picture ({name.removesuffix('_pipe')}), not a video"
    if name in _PLAYLISTS:
        return f" is a list of other files or addresses ({name}), not a video; give the video itself"
    if name == "mjpeg":
        return " holds JPEG pictures among other things; it is not a video"
    if name == "tty":
        return " is a text file, not a video"
    return f" is of the format {name}, not a video of a format that is read here: {PLAIN}"


def _aside(stream: Any) -> bool:
    """Whether a stream says of itself that it is a cover, a preview or a part of another picture."""
    import av

    flags = av.stream.Disposition(0)
    for name in _ASIDE:
        flags |= getattr(av.stream.Disposition, name)
    return bool(stream.disposition & flags)


def choose(streams: Sequence[Any], counts: Sequence[int], spans: Sequence[float]) -> int:
    """Which stream is the video: not a thumbnail (few frames, or over soon) and no small preview of another stream.

    counts, spans: each stream's frames and seconds. Of those left the default one, then the one of most frames, then the
    largest, then the first. Writers mark the first stream as default unless told otherwise, so that mark alone says little.
    """
    import av

    area = [s.width * s.height for s in streams]
    films = [i for i in range(len(streams)) if 2 * counts[i] >= max(counts) or 2 * spans[i] >= max(spans) > 0]
    films = [i for i in films if counts[i] > 1] or films
    films = [i for i in films if 2 * area[i] >= max(area[j] for j in films)]

    def rank(i: int) -> tuple[bool, int, int, int]:
        return bool(streams[i].disposition & av.stream.Disposition.default), counts[i], area[i], -i

    return max(films, key=rank)


# -- what is in it ------------------------------------------------------------------------------------------------------


def packets(container: Any, *streams: Any, ended: list[str] | None = None) -> Iterator[av.Packet]:
    """Packets of the streams up to the end or the first unreadable position, then the empty ones that flush the decoders.

    ended: gets the reason, where that position is not the end.
    """
    import av

    limited = time_is_limited()
    try:
        for packet in container.demux(streams):
            if limited:
                check_time(container.name)
            if packet.size or packet.dts is None:  # an empty one on the way would end the decoding
                yield packet
    except VideoTimeout:
        raise
    except av.FFmpegError as error:
        if ended is not None:
            ended.append(error.strerror or type(error).__name__)
        yield av.Packet()
    except (ValueError, LookupError, RuntimeError) as error:
        raise VideoError(f"{container.name}: cannot be read: {type(error).__name__}: {error}") from error


class Reader:
    """Decodes one stream of an open video, forward from where it stands.

    strict: the decoder gives up a damaged picture instead of inventing what is missing. threads: of the decoder, 0 lets FFmpeg
    choose. said: the list to which FFmpeg's messages go; the decoder then runs on one thread, so that it is known which packet
    an error belongs to. cut: stamps of damaged packets that are left out; None: all of those that are said to be damaged.
    After each frame `trouble` says whether something before it did not decode, since the last key frame; `lost`, how
    many times a picture was given up.
    """

    def __init__(
        self,
        container: Any,
        stream: Any,
        *,
        strict: bool = False,
        threads: int = 0,
        said: Said | None = None,
        cut: frozenset[int] | None = None,
    ):
        self.container, self.stream, self.codec = container, stream, _decoder(stream)
        if strict:
            self.codec.options = {"err_detect": "crccheck+explode"}
        # which packet an error belongs to is known where decoding is not spread over threads
        self.single = said is not None
        if threads or self.single:
            self.codec.thread_count = threads or 1
        else:
            self.codec.thread_type = "AUTO"
        self.said, self.strict, self.cut = said, strict, cut
        self.trouble, self.lost = False, 0

    def frames(self, source: Iterator[av.Packet], floor: int | None = None) -> Iterator[av.VideoFrame]:
        """Frames in display order out of packets; what does not decode is passed over.

        floor: the key frame's time stamp from which decoding starts; what is shown before it lacks its references.
        """
        import av

        self.trouble = False
        suspect: set[int | None] = set()  # stamps of the packets at which something went wrong
        for packet in source:
            if packet.size and packet.is_corrupt and (self.cut is None or packet.pts in self.cut):
                continue
            early = self.single and floor is not None and packet.pts is not None and packet.pts < floor
            heard, wrong = len(self.said or ()), False
            try:
                frames = self.codec.decode(packet if packet.size else None)
            except av.EOFError:
                return
            except av.FFmpegError:
                frames, wrong = [], True
                self.lost += not early
            except (ValueError, LookupError, RuntimeError) as error:
                raise VideoError(f"{self.container.name}: cannot be decoded: {error}") from error
            if not early and (wrong or (self.said and complaints(self.said[heard:]))):
                self.trouble = True
                if self.single:
                    suspect.add(packet.pts)
            for frame in frames:
                if frame.is_corrupt:
                    self.trouble = True
                    self.lost += 1
                    continue
                if frame.key_frame:  # nothing before it matters to what follows
                    self.trouble = frame.pts in suspect
                yield frame


def _decoder(stream: Any) -> Any:
    """A stream's decoder; FFmpeg's own ones of VP8 and VP9 leave out what is transparent."""
    import av

    other = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(stream.codec_context.name)
    if other is not None and stream.metadata.get("alpha_mode") == "1":
        with contextlib.suppress(av.codec.codec.UnknownCodecError):
            return av.CodecContext.create(other, "r")
    return stream.codec_context


def scaler() -> Any:
    """What turns frames into RGB of a size; it keeps its tables from frame to frame."""
    from av.video.reformatter import VideoReformatter

    return VideoReformatter()


def on_white(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame as it is, or, where it has transparent parts, RGB with white after them."""
    import av

    if not frame.format.has_palette and not any(part.is_alpha for part in frame.format.components):
        return frame
    pixels = frame.to_ndarray(format="rgba")
    colour, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    # of a picture that is transparent everywhere and yet one, the fourth channel was never filled
    if alpha.any() or (colour == colour[0, 0]).all():
        colour = ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(colour, np.uint8), format="rgb24")


def turn_of(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a frame is to be shown, by its display matrix: (rows and columns swapped, then mirrored left-right, up-down)."""
    from av.sidedata.sidedata import Type

    # PyAV's stubs have no types for `get`, which the container inherits from a Mapping of nothing
    data = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    if data is None or len(bytes(data)) < 36:
        return False, False, False
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32, 5).astype(np.int64).tolist()
    # a position (x, y) is shown at (a x + c y, b x + d y)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, a < 0, d < 0
    return True, c < 0, b < 0


def turned(pixels: np.ndarray, turn: tuple[bool, bool, bool]) -> np.ndarray:
    """A picture [h,w,3] as `turn_of` says."""
    swap, left_right, up_down = turn
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    return pixels[:: -1 if up_down else 1, :: -1 if left_right else 1]
