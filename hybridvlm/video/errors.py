"""What reading a video or a picture raises, and what it warns of."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator


class VideoError(ValueError):
    """A file that gives no frames; the text names the file and says why."""


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
