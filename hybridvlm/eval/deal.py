"""Who answers what: videos dealt over processes, and weights by what they are."""

from __future__ import annotations

import hashlib
import heapq
import pathlib
import re
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

from hybridvlm.checkpoints.names import resolve
from hybridvlm.checkpoints.steps import checksum

VideoT = TypeVar("VideoT", bound=Hashable)
_BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache calls a large file by its SHA-256
_WEIGHTS = ("*.safetensors", "*.bin", "*.npz")


def deal(costs: Mapping[VideoT, float], processes: int) -> list[list[VideoT]]:
    """Videos for each process, the dearest first: each goes to whoever has least so far.

    Args:
        costs: of every video with all that is still asked about it, in the videos' order.
        processes: how many there are.
    """
    hands: list[list[VideoT]] = [[] for _ in range(processes)]
    least = [(0.0, process) for process in range(processes)]
    for video in sorted(costs, key=lambda video: -costs[video]):  # stable: of equals the first of the file
        cost, process = heapq.heappop(least)
        hands[process].append(video)
        heapq.heappush(least, (cost + costs[video], process))
    return hands


def weights_fingerprint(name_or_path: Any, params: Mapping[str, Any], revision: str | None = None) -> str:
    """A text that says which weights a model has: of a checkpoint's files, whatever mesh, process, folder or dtype they are loaded to.

    No array is brought together anywhere. Of a model that comes from no files (name_or_path None) its arrays are summed where they lie.
    """
    if name_or_path is None:
        return checksum(params)
    folder = resolve(name_or_path, revision)
    files = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    if not files:  # Orbax: many files without suffixes
        files = sorted(path for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(folder).as_posix()} {_sha256(path)};".encode())
    return digest.hexdigest()[:32]


def _sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file; where the hub's cache has it for a name, that."""
    stored = path.resolve().name
    if path.is_symlink() and _BLOB.fullmatch(stored) and path.resolve().parent.name == "blobs":
        return stored
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
