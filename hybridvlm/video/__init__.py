"""Video files and images: decoding, frame sampling, clips for a model.

A file is known by what it holds, never by its name. Videos: MP4/MOV, Matroska/WebM, AVI, MPEG transport, program and raw
streams, FLV, ASF/WMV, Ogg, MXF, NUT, RealMedia, WTV, DV, IVF and OBU, each a video in one file (`container.FORMATS`); and
animated GIF, WebP, PNG and AVIF. Images: PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF (`images.FORMATS`), at most 67 million
pixels; transparent parts stand on white. Not read: HEIC, playlists, series of pictures, anything that names another file.
"""

from hybridvlm.video.clip import read_clip
from hybridvlm.video.decode import decode_frames, frame_seconds, probe
from hybridvlm.video.errors import VideoError, VideoTimeout, VideoWarning
from hybridvlm.video.images import read_image
from hybridvlm.video.index import VideoInfo
from hybridvlm.video.sampling import RULES, sample_indices
from hybridvlm.video.shown import default_frames, most_frames, shown_clip

__all__ = [
    "RULES",
    "VideoError",
    "VideoInfo",
    "VideoTimeout",
    "VideoWarning",
    "decode_frames",
    "default_frames",
    "frame_seconds",
    "most_frames",
    "probe",
    "read_clip",
    "read_image",
    "sample_indices",
    "shown_clip",
]
