"""Video files: decoding and frame sampling."""

from hybridvlm.video.decode import VideoError, VideoInfo, VideoWarning, decode_frames, probe
from hybridvlm.video.sampling import RULES, sample_indices

__all__ = ["RULES", "VideoError", "VideoInfo", "VideoWarning", "decode_frames", "probe", "sample_indices"]
