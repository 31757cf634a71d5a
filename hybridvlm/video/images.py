"""Pictures (Pillow): known by what they hold and not by their names; all that a model sees is RGB of 8 bits.

Transparent parts stand on white. Animated GIF, WebP, PNG and AVIF are videos, each frame shown for its own time; of a TIFF of
several pages the first is taken, with a warning. HEIC is refused: there is no decoder for it, and its pictures are cut into
tiles of which FFmpeg gives one at a time.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridvlm.video.errors import VideoError, VideoTimeout, check_time, warn

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
PLAIN = "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF"
MAX_PIXELS = 1 << 26  # 67 million; one more is refused before anything is decoded
_MOVING = ("PNG", "WEBP", "GIF", "AVIF")
# How PNG, JPEG, GIF and TIFF begin.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"mif2", b"msf1")
_AVIF = (b"avif", b"avis")
_BITS, _INTERPRETATION, _SAMPLE, _SUBFILE = 258, 262, 339, 254  # TIFF's tags
_no_limit = threading.Lock()  # Pillow's limit is one for the process
_NO_TIME, _USUAL_TIME = 10, 100  # milliseconds: what is shown for no more than that is shown for this (as browsers do)


def kind(path: str | os.PathLike[str]) -> str | None:
    """What a file holds: "still" for a picture, "moving" for an animated one, None for anything else.

    VideoError for a picture that is too large, or of a kind that cannot be read.
    """
    with _opened(path) as image:
        if image is None:
            return None
        return "moving" if _frames(image) > 1 else "still"


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture as uint8 RGB [1,h,w,3], turned the way its EXIF says, transparent parts on white.

    Whole numbers of 32 bits and floats outside 0..1 have no black and white of their own: the least and the greatest become
    them, with a VideoWarning. Of several frames or pages the first is taken, with one too. VideoError if it cannot be read.
    """
    if not pathlib.Path(path).is_file():
        raise VideoError(f"{path}: no such file")
    with _opened(path) as image, _words(path):
        if image is None:
            raise VideoError(f"{path}: cannot be read as an image: it is none of {PLAIN}")
        count = _frames(image)
        if count > 1:
            _warn(f"{path}: has {count} frames; the first is taken")
            image.seek(_first(image))
        elif image.format == "TIFF":
            pages = _pages(image)
            if len(pages) > 1:
                _warn(f"{path}: has {len(pages)} pages; the first is taken")
            image.seek(pages[0])
        return _rgb(path, image)[None]


def lengths(path: str | os.PathLike[str]) -> tuple[list[int], tuple[int, int], str]:
    """An animation's milliseconds for each frame, its (height, width), and what kept the rest from being read, if anything."""
    out: list[int] = []
    with _opened(path) as image:
        try:
            for number in range(_first(image), image.n_frames):
                check_time(path)
                image.seek(number)
                image.load()
                time = int(image.info.get("duration", 0) or 0)
                out.append(time if time > _NO_TIME else _USUAL_TIME)
        except VideoTimeout:
            raise
        except Exception as error:  # whatever a damaged file makes the decoder raise
            if not out:
                raise VideoError(f"{path}: not one frame could be decoded: {error}") from error
            return out, (image.height, image.width), f"{error}"
        return out, (image.height, image.width), ""


def moving_frames(path: str | os.PathLike[str], last: int) -> Iterator[np.ndarray]:
    """An animation's frames number 0 to `last` as uint8 RGB [h,w,3]."""
    with _opened(path) as image, _words(path):
        first = _first(image)
        for number in range(first, first + last + 1):
            check_time(path)
            image.seek(number)
            image.load()
            yield _rgb(path, image)


# -- opening ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The Pillow image, nothing decoded yet; None for a file that is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    image, problem = None, ""
    try:
        with _no_limit:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit is set below, once
            try:
                image = Image.open(_with_alpha(path, head), formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        if image.format == "JPEG" and motion_jpeg(path):
            image.close()
            image = None
    except UnidentifiedImageError:
        if brand in _HEIF:
            problem = "is a HEIC picture, which cannot be read here; save it as JPEG, PNG or AVIF"
        elif brand in _AVIF:
            problem = "cannot be read as an image: damaged, or an AVIF while this Pillow has no AVIF decoder"
        elif _begins_as_picture(head) and not motion_jpeg(path):
            problem = "cannot be read as an image: it begins as one and is damaged"
    except Exception as error:  # of the many parsers after Pillow; a stranger's file must not end a run
        problem = f"cannot be read as an image: {type(error).__name__}: {error}"
    if problem:
        raise VideoError(f"{path}: {problem}")
    if image is None:
        yield None
        return
    with image:
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width}x{image.height}"
            raise VideoError(f"{path}: has {size} pixels, more than {MAX_PIXELS:,}; make the picture smaller")
        yield image


def _begins_as_picture(head: bytes) -> bool:
    """Whether a file's first bytes are those of a picture's format, whatever comes after them."""
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _with_alpha(path: str | os.PathLike[str], head: bytes) -> Any:
    """What Pillow is to open: the file, or an animated WebP with the mark that it has transparent parts.

    Writers leave that mark out where every frame is opaque, though none may cover the whole picture; Pillow then takes what
    is not covered for black.
    """
    moving, alpha = 0x02, 0x10
    if head[:4] != b"RIFF" or head[8:16] != b"WEBPVP8X" or head[20] & (moving | alpha) != moving:
        return path
    data = bytearray(pathlib.Path(path).read_bytes())
    data[20] |= alpha
    return io.BytesIO(data)


@contextlib.contextmanager
def _words(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a damaged picture makes Pillow raise becomes a VideoError that names it."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        raise VideoError(f"{path}: cannot be read as an image: {error}") from error


def motion_jpeg(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a row of JPEGs, a video; a photograph may have one more after it (a map of its brightness)."""
    mark = b"\xff\xd9\xff\xd8"  # the end of one, the beginning of the next
    with open(path, "rb") as file:
        if file.read(2) != mark[2:]:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            at = data.find(mark)
            return at >= 0 and data.find(mark, at + 2) >= 0


def _frames(image: Image.Image) -> int:
    """Frames of an animation, 1 for any other picture; a multi-picture JPEG is one with previews or a second eye's view."""
    if image.format not in _MOVING:
        return 1
    try:
        return getattr(image, "n_frames", 1) - _first(image)
    except Exception:  # a damaged one; reading it will say so
        return 1


def _first(image: Image.Image) -> int:
    """An animated PNG may begin with a picture for those who cannot show it; that is no frame."""
    return int(bool(getattr(image, "default_image", False)) and getattr(image, "n_frames", 1) > 1)


def _pages(image: Any) -> list[int]:
    """A TIFF's pages, less those that are smaller copies of another."""
    whole = []
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        if not int(image.tag_v2.get(_SUBFILE, 0)) & 1:
            whole.append(number)
    return whole or [0]


# -- to RGB of 8 bits ----------------------------------------------------------------------------------------------------


def _rgb(path: str | os.PathLike[str], image: Any) -> np.ndarray:
    from PIL import Image, ImageOps

    if image.width * image.height > MAX_PIXELS:  # a page may be larger than the first
        raise VideoError(f"{path}: has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}")
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        plain: Any = _eight_bits(path, image)
    elif image.mode == "LAB":
        plain = _from_lab(image)
    else:
        plain = image
        clear = image.info.get("transparency")
        if image.mode == "RGB" and isinstance(clear, tuple) and _sixteen_bits(path):
            # Pillow keeps the upper bytes of a picture of 16 bits, and all of its transparent colour
            plain = image.copy()
            plain.info["transparency"] = tuple(value >> 8 for value in clear)
    orientation = _orientation(image)
    if plain.mode == "La":
        plain = plain.convert("LA")
    if plain.has_transparency_data:
        plain = plain.convert("RGBA")
        plain = Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain)
    plain = plain.convert("RGB")
    if orientation != 1:
        exif = Image.Exif()
        exif[0x0112] = orientation
        plain.info["exif"] = exif.tobytes()
        plain = ImageOps.exif_transpose(plain)
    return np.asarray(plain, np.uint8)


def _sixteen_bits(path: str | os.PathLike[str]) -> bool:
    """Whether a PNG has 16 bits a channel."""
    with open(path, "rb") as file:
        return file.read(25)[24:] == bytes([16])


def _orientation(image: Any) -> int:
    """How the camera was held, 1 to 8; 1 where the file does not say, or says it in a way that nobody can read."""
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # notes next to a picture that is whole
        return 1
    return value if value in range(1, 9) else 1


def _from_lab(image: Any) -> Any:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")


def _eight_bits(path: str | os.PathLike[str], image: Any) -> Any:
    """Pictures of one channel deeper than 8 bits, as "L" or, with a transparent value, "LA"."""
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    clear = values == transparent if isinstance(transparent, int) else None
    if image.mode.startswith("I;16"):
        bits = _one(tags.get(_BITS, 16))
        grey = (values >> max(0, min(bits, 16) - 8)).clip(0, 255)
    else:
        if image.mode == "I" and _one(tags.get(_SAMPLE, 0)) == 1 and _one(tags.get(_BITS, 0)) == 32:
            values = values.view(np.uint32)
        values = values.astype(np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(values).all():
            raise VideoError(f"{path}: holds values that are no numbers (NaN or infinite); save it with 8 or 16 bits")
        if image.mode == "F" and low >= 0 and high <= 1:
            grey = (255 * values).round()
        else:
            _warn(f"{path}: holds values from {low:g} to {high:g}; they are shown from black to white")
            grey = (255 * (values - low) / (high - low)).round() if high > low else np.zeros_like(values)
    if tags.get(_INTERPRETATION, 1) == 0:  # nought is white
        grey = 255 - grey
    plain = Image.fromarray(grey.astype(np.uint8))
    if clear is not None:
        plain.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return plain


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, tuple) else value)


def _warn(text: str) -> None:

    warn(text, stacklevel=5)
