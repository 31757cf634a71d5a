"""What reading a video or a picture raises, and what it warns of."""

from __future__ import annotations

import contextlib
import contextvars
import time
import warnings
from collections.abc import Iterator


class VideoError(ValueError):
    """A file that gives no frames; the text names the file and says why."""


class VideoTimeout(VideoError):
    """A file that took longer to read than it was given time for (`time_limit`).

    Attributes:
        seconds: that it was given.
    """

    def __init__(self, text: str, seconds: float):
        super().__init__(text)
        self.seconds = seconds


class VideoWarning(UserWarning):
    """A file that gives less than it should, or than was asked for, or gives it only by a guess that the text tells."""


_HEARD: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("heard", default=None)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list that takes what this thread would else warn of; unlike warnings.catch_warnings it leaves other threads alone."""
    texts: list[str] = []
    token = _HEARD.set(texts)
    try:
        yield texts
    finally:
        _HEARD.reset(token)


def warn(text: str, stacklevel: int) -> None:
    """Warn (VideoWarning) of a file, or tell whoever listens in this thread.

    Args:
        text: names the file.
        stacklevel: as of warnings.warn, counted from the caller.
    """
    texts = _HEARD.get()
    if texts is None:
        warnings.warn(text, VideoWarning, stacklevel=stacklevel + 1)
    else:
        texts.append(text)


_DEADLINE: contextvars.ContextVar[tuple[float, float] | None] = contextvars.ContextVar("deadline", default=None)


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """What this thread reads of a video in here raises VideoTimeout after so many seconds; None: no limit.

    It is looked at between two packets or pictures, so that nothing is left half open. One packet that never decodes, or a file
    system that never answers, is not noticed.
    """
    token = _DEADLINE.set(None if seconds is None else (time.monotonic() + seconds, seconds))
    try:
        yield
    finally:
        _DEADLINE.reset(token)


def time_is_limited() -> bool:
    """Whether this thread is inside a `time_limit`."""
    return _DEADLINE.get() is not None


def check_time(path: object) -> None:
    """VideoTimeout, naming the file, where the time of `time_limit` is over."""
    limit = _DEADLINE.get()
    if limit is not None and time.monotonic() > limit[0]:
        raise VideoTimeout(f"{path}: not read within {limit[1]:g} s, the time limit of a video", limit[1])
