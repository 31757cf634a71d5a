"""What a command says of an error that it cannot help: one line for people, with the way out."""

from __future__ import annotations

import errno


def said(error: BaseException) -> str:
    """The text of an error; for want of memory or disk, what to do about it."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0]
    if isinstance(error, MemoryError):
        return f"out of memory: {first}; {MEMORY}"
    if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text:
        return f"out of memory on the device: {first}; {MEMORY}"
    if disk_full(error):
        return f"{first}; {DISK}"
    return text


MEMORY = (
    "what was saved before is kept; use smaller batches, fewer frames, a smaller model or more devices, and start again"
)
DISK = "what was saved before is kept; make room on that disk or choose a folder elsewhere, and start again"


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "Disk quota exceeded" in str(error):  # as TensorStore has it
            return True
        error = error.__cause__
    return False
