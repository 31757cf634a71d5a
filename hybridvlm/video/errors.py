"""What reading a video or a picture raises, and what it warns of."""

from __future__ import annotations


class VideoError(ValueError):
    """A file that gives no frames; the text names the file and says why."""


class VideoWarning(UserWarning):
    """A file that gives less than it should, or than was asked for, or gives it only by a guess that the text tells."""
