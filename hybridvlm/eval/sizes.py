"""How much an evaluation will ask of a model, from its options alone: what the memory guard is told before anything is loaded."""

from __future__ import annotations

import argparse
from typing import Any

from hybridvlm.checkpoints.describe import Description
from hybridvlm.eval.benchmarks import MODULES, published
from hybridvlm.options import override, split
from hybridvlm.video import default_frames, most_frames


def asked_sizes(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `hybridvlm.estimates.mesh_option` besides mesh and model, for the largest bucket of all tasks.

    Args:
        options: of the command line.
    """
    return {
        "frames": lambda found: largest_frames(options, found),
        "batch": options.batch_size,
        "dtype": options.dtype,
        "buckets": lambda found: override(found.buckets, options.buckets, "--buckets"),
        # without one every question is asked in any case, to compare with
        "reducible": False,
    }


def largest_frames(options: argparse.Namespace, found: Description) -> int:
    """The most frames that a task of the options shows a model, each by its own rule where --frames does not say.

    Raises:
        ValueError: a published benchmark has no such protocol.
    """
    if options.frames is not None:
        return options.frames
    from hybridvlm.tiny import needle

    usual = []
    for name in split(options.tasks):
        if name in MODULES:
            usual.append(published(name).protocol(options.protocol).frames)
        else:
            usual.append(
                needle.FRAMES if name in ("needle", "needle-scenes") else default_frames(found.config, found.buckets)
            )
    return min(max(usual, default=1), most_frames(found.config, found.buckets))
