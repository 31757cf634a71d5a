"""What is published as one method of two stages: one before the decoder, and one drop or merge inside it.

The inner stage keeps the published share of what it is given; the outer one makes up what the budget leaves. HoliTom (layer 18
of 28, half) so has a mean share of .82 of its outer one, FlashVID (20 of 28, .3) keeps 1.25 times the
budget outside. On another pattern the depth is that of the nearest attention layer, and the split follows from it.
"""

from __future__ import annotations

from typing import Any

from hybridvlm.reduction.methods import LAST_QUERY, QUERIES, Pair, _register, get_method


def _pair(name: str, outer: str, inner: str, kept: float, reads: str) -> Any:
    return _register(name, "pair", pair=Pair(outer, inner, kept), reads=reads, needs=get_method(outer).needs)


@_pair("holitom", "holitom-outer", "holitom-inner", 0.5, LAST_QUERY)
def holitom(*_: Any) -> None:
    """holitom-outer, then holitom-inner keeps half, as published together (HoliTom)"""


@_pair("flashvid", "flashvid-outer", "oneshot-last@0.71", 0.3, LAST_QUERY)
def flashvid(*_: Any) -> None:
    """flashvid-outer, then oneshot-last@0.71 keeps 30%, as published together (FlashVID)"""


@_pair("prunevid", "prunevid-outer", "oneshot-max@0.31", 0.4, QUERIES)
def prunevid(*_: Any) -> None:
    """prunevid-outer, then oneshot-max@0.31 keeps 40%, as published together (PruneVid)"""
