"""Smaller frames: with fewer frames (frames.py) the baseline that any method has to beat (VTC-Bench, arXiv 2510.07143).

Pixels are averaged over whole blocks before the tower, 2 x 2 of them for a quarter of the tokens, 1 x 2 for half, so that sizes and
positions stay whole numbers: a token stands where the first of its block stood. The tower sees the smaller frame, and costs as
little. Budgets that no block comes near are refused.
"""

from __future__ import annotations

from typing import Any

from hybridvlm.reduction.methods import PIXELS, _register


@_register("resolution", "merge", reads=PIXELS, needs=("pixels",))
def resolution(*_: Any) -> None:
    """frames scaled down by area before the tower, blocks of pixels averaged into one"""
    raise ValueError("resolution changes frames before the tower: encode with keep=plan.pixel_selection")
