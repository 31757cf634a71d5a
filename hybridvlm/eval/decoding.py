"""The command's options for reading video files: how long one may take, and where decoded frames are kept."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from hybridvlm.eval.tasks import Decoding, Task
from hybridvlm.options import InputError, byte_count
from hybridvlm.storage import is_url
from hybridvlm.video.frame_cache import FrameCache

SIZE = "50GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of reading video files."""
    add = parser.add_argument_group("video files").add_argument
    limit = (
        "a video that takes longer to read is left out like one that cannot be read, with its reason; the same command with a higher "
        "limit asks for it again (default: no limit)"
    )
    add("--video-timeout", type=float, metavar="SECONDS", help=limit)
    cache = (
        "folder in which decoded frames are kept for the next run, of another model or method too (default: nowhere)"
    )
    add("--frame-cache", metavar="DIR", help=cache)
    add(
        "--frame-cache-size",
        metavar="SIZE",
        help=f"most that is kept there, such as 500MB; the oldest goes (default: {SIZE})",
    )


def build(options: argparse.Namespace) -> Decoding:
    """What the options ask for; InputError for what cannot be."""
    seconds, folder = options.video_timeout, options.frame_cache
    if seconds is not None and not 0 < seconds < math.inf:
        raise InputError(f"--video-timeout must be a number of seconds above 0, got {seconds:g}")
    if folder is None:
        if options.frame_cache_size is not None:
            raise InputError("--frame-cache-size is the size of --frame-cache DIR; give that too")
        return Decoding(seconds)
    if is_url(folder):
        raise InputError(
            f"--frame-cache {folder}: give a folder of this machine; reading a store takes longer than decoding"
        )
    home = pathlib.Path(folder)
    if home.exists() and not home.is_dir():
        raise InputError(f"--frame-cache {home} is a file; give a folder")
    return Decoding(seconds, FrameCache(home, byte_count(options.frame_cache_size or SIZE, "--frame-cache-size")))


def refuse_idle(options: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """InputError for these options where no task has video files. One from outside the package may have them."""
    from hybridvlm.eval.tasks.needle import Needle

    given = [flag for flag in ("video_timeout", "frame_cache") if getattr(options, flag) is not None]
    if given and all(isinstance(task, Needle) for task in tasks):
        raise InputError(f"--{given[0].replace('_', '-')} is for video files; the task needle draws its own")


def about(decoding: Decoding) -> dict[str, Any]:
    """What results.json holds of it."""
    cache = decoding.cache
    held = None if cache is None else {"folder": str(cache.folder), "hits": cache.hits, "decoded": cache.misses}
    return {"video_timeout": decoding.seconds, "frame_cache": held}
