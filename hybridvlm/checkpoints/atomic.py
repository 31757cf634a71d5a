"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hybridvlm.files import runs


@contextmanager
def whole_folder(path: str | pathlib.Path, ours: Callable[[pathlib.Path], bool]) -> Iterator[pathlib.Path]:
    """A new folder to write into, which replaces `path` at the end; on any error `path` is as it was.

    ours: whether what stands at `path` already may be replaced; ValueError if not. What a process that was killed had
    written lies next to it under a hidden name, and is removed by the next one.
    """
    path = pathlib.Path(path)
    if path.exists() and not ours(path):
        raise ValueError(f"{path} exists and is not a checkpoint folder; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    work = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}-{_host()}.", dir=path.parent))
    try:
        new = work / "new"
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, work / "old")
        try:
            os.replace(new, path)
        except OSError:
            if (work / "old").exists():
                os.replace(work / "old", path)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(path: pathlib.Path) -> None:
    """Remove what processes of this host that no longer run left next to `path`; of others nothing is known."""
    for left in path.parent.iterdir():
        owner = re.match(rf"{re.escape(f'.{path.name}.')}(\d+)-{re.escape(_host())}\.", left.name)
        if owner and not runs(int(owner[1])):
            old = left / "old"
            if old.exists() and not path.exists():  # killed between the two renames: the old one comes back
                os.replace(old, path)
            shutil.rmtree(left, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())
