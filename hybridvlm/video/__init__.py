"""Video files and images: decoding, frame sampling, clips for a model."""

from hybridvlm.video.clip import read_clip
from hybridvlm.video.decode import decode_frames, frame_seconds, probe
from hybridvlm.video.errors import VideoError, VideoWarning
from hybridvlm.video.images import read_image
from hybridvlm.video.index import VideoInfo
from hybridvlm.video.sampling import RULES, sample_indices
from hybridvlm.video.shown import default_frames, most_frames, shown_clip

__all__ = [
    "RULES",
    "VideoError",
    "VideoInfo",
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
