"""What a generation gives: replies, what was dropped for them, and what it took."""

from __future__ import annotations

import dataclasses

from hybridvlm.models.nemotron_vl.model import PrefillOutput
from hybridvlm.reduction.plan import ReductionPlan


@dataclasses.dataclass
class Timing:
    """Seconds of one generate(), device work awaited: compile (0 where the programs were there), prefill, decode."""

    compile: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclasses.dataclass
class Generation:
    """What generate() gives.

    Attributes:
        tokens: ids of each reply.
        text: the answers, without reasoning.
        prefilled: what the prefill gave.
        plan: what was dropped.
        timing: seconds per phase.
        thinking: the reasoning before each answer.
        unfinished: whether the reasoning never ended; `text` then holds the whole reply.
        peak_bytes: most memory that the programs need, by the compiler, that of a video memory which was handed in too.
    """

    tokens: list[list[int]]
    text: list[str]
    prefilled: PrefillOutput
    plan: ReductionPlan | None
    timing: Timing
    thinking: list[str] = dataclasses.field(default_factory=list)
    unfinished: list[bool] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
