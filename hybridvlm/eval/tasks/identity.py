"""What a file or a folder of frames is, whatever its path and date."""

from __future__ import annotations

import hashlib
import pathlib

EDGE = 1 << 16  # bytes at either end of a file that its quick identity is taken from


def identity(path: pathlib.Path, full: bool = False) -> str:
    """A digest of a file: its size and both ends, or all of it with `full`; of a folder: its files' names and digests.

    A change in the middle of a large file that keeps its size is seen with `full` alone.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for member in sorted(path.iterdir()):
            if member.is_file():
                digest.update(f"{member.name}:{identity(member, full)};".encode())
        return digest.hexdigest()[:32]
    with open(path, "rb") as file:
        if full:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
        size = file.seek(0, 2)
        digest.update(str(size).encode())
        file.seek(0)
        digest.update(file.read(EDGE))
        if size > EDGE:
            file.seek(max(EDGE, size - EDGE))
            digest.update(file.read(EDGE))
    return digest.hexdigest()[:32]
