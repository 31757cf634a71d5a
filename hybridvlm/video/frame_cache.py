"""Decoded clips kept on disk, so that a video that is asked about again, by another model or method, is not decoded again.

An entry is known by the bytes of its video (SHA-256 of all of them), by what was asked of it, and by the decoder's version: a
changed file, other frames or another size are another entry. It is written whole or not at all, and one that does not read
back to the last bit is decoded anew. Those unused for longest go where a new one would not fit below the limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import re
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from hybridvlm.models.media import Clip
from hybridvlm.storage import make_folder, write_atomic
from hybridvlm.video.errors import heard, warn

VERSION = 1  # of an entry's form; another one reads none of the old
_ENTRY, _DIGESTS = ".npz", "digests"
_OWN = re.compile(r"[0-9a-f]{40}\.npz")  # names of entries; what else lies in the folder is somebody's


class FrameCache:
    """Clips below a folder, of at most `limit` bytes together.

    Several threads and processes may share a folder; of processes that write at one time each keeps to the limit by what it
    sees. Only files that this class wrote are ever removed.

    Attributes:
        hits: clips that were read from it so far.
        misses: clips that had to be decoded.
    """

    def __init__(self, folder: pathlib.Path, limit: int):
        if limit < 1:
            raise ValueError(f"limit must be at least 1 byte, got {limit}")
        self.folder, self.limit = folder, limit
        self.hits = self.misses = 0
        self._lock = threading.Lock()
        make_folder(folder / _DIGESTS)

    def clip(self, path: str | os.PathLike[str], asked: Any, read: Callable[[], Clip]) -> Clip:
        """A clip of a video file, from the folder or as `read` gives it; what `read` warns of is said again with it.

        Args:
            path: the file.
            asked: whatever the clip depends on besides the file, as JSON.
            read: decodes it. What it raises is raised, and nothing is kept.
        """
        entry = self.folder / f"{self._key(path, asked)}{_ENTRY}"
        found = _load(entry)
        with self._lock:
            self.hits += found is not None
            self.misses += found is None
        if found is None:
            with heard() as told:
                clip = read()
            found = clip, told
            try:
                self._keep(entry, _bytes(*found))
            except OSError as error:  # a full disk, a folder that went: the clip itself is there
                warn(f"{self.folder}: decoded frames cannot be kept there: {error.strerror or error}", stacklevel=2)
        clip, remarks = found
        for text in remarks:
            warn(text, stacklevel=2)
        return clip

    def _key(self, path: str | os.PathLike[str], asked: Any) -> str:
        made = [VERSION, importlib.metadata.version("av"), importlib.metadata.version("pillow")]
        return hashlib.sha256(json.dumps([made, self._content(path), asked], sort_keys=True).encode()).hexdigest()[:40]

    def _content(self, path: str | os.PathLike[str]) -> str:
        """SHA-256 of a file; kept beside the entries for as long as the file is not touched."""
        status = os.stat(path)
        # no program sets back when a file's entry was changed last
        touched = [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        note = self.folder / _DIGESTS / hashlib.sha256(json.dumps(touched).encode()).hexdigest()[:40]
        with contextlib.suppress(OSError):
            text = note.read_text()
            if len(text) == 64:
                return text
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with contextlib.suppress(OSError):  # it is made again where it cannot be kept
            write_atomic(note, digest)
        return digest

    def _keep(self, entry: pathlib.Path, data: bytes) -> None:
        if len(data) > self.limit:
            return
        with self._lock:
            held = sorted(self._entries())
            total = sum(size for _, size, _ in held)
            for _, size, old in held:
                if total + len(data) <= self.limit:
                    break
                old.unlink(missing_ok=True)
                total -= size
            write_atomic(entry, data)

    def _entries(self) -> list[tuple[float, int, pathlib.Path]]:
        """(last use, bytes, file) of each entry."""
        out = []
        for file in self.folder.glob(f"*{_ENTRY}"):
            if not _OWN.fullmatch(file.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                status = file.stat()
                out.append((status.st_mtime, status.st_size, file))
        return out


def _bytes(clip: Clip, remarks: list[str]) -> bytes:
    assert clip.frames is not None  # it was read with its pixels
    about = {"seconds": clip.seconds, "kind": clip.kind, "size": clip.size, "numbers": clip.numbers, "fps": clip.fps}
    out = io.BytesIO()
    text = json.dumps(about | {"remarks": remarks}).encode()
    np.savez(out, frames=clip.frames, about=np.frombuffer(text, np.uint8))
    return out.getvalue()


def _load(entry: pathlib.Path) -> tuple[Clip, list[str]] | None:
    """The clip of an entry and what was said of it; None where there is none, or it is not whole (its checksums tell)."""
    try:
        with np.load(entry, allow_pickle=False) as held:
            frames, about = held["frames"], json.loads(held["about"].tobytes())
        os.utime(entry)
        clip = Clip(
            tuple(about["seconds"]), frames, about["kind"], tuple(about["size"]), tuple(about["numbers"]), about["fps"]
        )
        return clip, about["remarks"]
    # RuntimeError: a zip's header that, damaged, speaks of encryption or of a method that zipfile does not know
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None
