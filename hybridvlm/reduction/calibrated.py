"""A schedule that runs over trust in place of depth: the shares of `str-calibrated`.

Schedule.trust says per layer how far its score is to be believed (`python -m hybridvlm.analyze calibrate` measures it). Between
two drops the curve moves on by the trust of the layers in between, not by their number: a layer of trust 0 is skipped, one of
little trust drops little, and most of the tokens go where the score is believed most.
"""

from __future__ import annotations

from hybridvlm.config import MIXERS, Schedule
from hybridvlm.reduction import schedules


def trusted_sites(pattern: str, schedule: Schedule) -> tuple[int, ...]:
    """Sites after every M and * that is trusted and that the schedule lets drop. ValueError for a trust that does not fit."""
    trust = schedule.trust
    if len(trust) != len(pattern):
        found = f"{len(trust)} numbers" if trust else "none"
        raise ValueError(
            f"str-calibrated needs Schedule.trust, one number for each of {len(pattern)} layers, got {found}; "
            "python -m hybridvlm.analyze calibrate measures it"
        )
    return tuple(
        i
        for i, kind in enumerate(pattern[:-1])
        if kind in MIXERS and trust[i] > 0 and i >= schedule.start and i not in schedule.never
    )


def trusted_curve(schedule: Schedule, layers: int) -> schedules.Curve:
    """The schedule's curve with each layer at its place in accumulated trust."""
    if schedule.shape == "list":
        raise ValueError("str-calibrated takes a schedule with a shape of its own, got shape 'list'")
    curve, span = schedules.shape_curve(schedule, layers), max(1, layers - 1)
    total = sum(schedule.trust[: layers - 1]) or 1.0  # nothing drops after the last layer
    place = [span * sum(schedule.trust[:layer]) / total for layer in range(layers)]
    return lambda layer, ordinal, p: curve(place[layer], ordinal, p)
