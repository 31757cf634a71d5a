"""What a command says of an error that it cannot help: one line for people, with the way out."""

from __future__ import annotations

import errno


def said(error: BaseException) -> str:
    """The text of an error; for want of memory or disk, what to do about it."""
    text = str(error).strip() or type(error).__name__
    if disk_full(error):  # before the next: TensorStore calls both the same
        return f"{text.splitlines()[0]}; {DISK}"
    if isinstance(error, MemoryError):
        return f"out of memory: {text.splitlines()[0]}; {MEMORY}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:
        return f"out of memory on the device: {text.splitlines()[0]}; {MEMORY}"
    return text


def reason(error: BaseException) -> str:
    """Why something failed, on one line."""
    text = str(error).strip()
    for short in _FULL:
        if short in text:  # what TensorStore says around it is a page
            return short
    return text.splitlines()[0] if text else type(error).__name__


MEMORY = (
    "what was saved before is kept; use smaller batches, fewer frames, a smaller model or more devices, and start again"
)
_FULL = ("No space left on device", "Disk quota exceeded")
DISK = "what was saved before is kept; make room on that disk or choose a folder elsewhere, and start again"


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(short in str(error) for short in _FULL):  # as TensorStore has it
            return True
        error = error.__cause__
    return False


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or tensors and what is wrong with them."""
