"""A schedule that runs over layer weights instead of depth: the shares of `str-calibrated`.

Schedule.layer_weights says per layer how far its score follows the question (`python -m hybridvlm.analyze calibrate` measures it).
Between two drops the curve advances by the weights of the layers in between, not by their number: a layer of weight 0 is skipped,
one of little weight drops little, and most tokens are dropped where the score follows the question most.
"""

from __future__ import annotations

from hybridvlm.config import MIXERS, Schedule
from hybridvlm.reduction import schedules


def weighted_sites(pattern: str, schedule: Schedule) -> tuple[int, ...]:
    """Sites after every M and * that has a weight and that the schedule lets drop. ValueError for weights that do not fit."""
    weights = schedule.layer_weights
    if len(weights) != len(pattern):
        found = f"{len(weights)} numbers" if weights else "none"
        raise ValueError(
            f"str-calibrated needs Schedule.layer_weights, one number for each of {len(pattern)} layers, got {found}; "
            "python -m hybridvlm.analyze calibrate measures it"
        )
    return tuple(
        i
        for i, kind in enumerate(pattern[:-1])
        if kind in MIXERS and weights[i] > 0 and i >= schedule.start and i not in schedule.never
    )


def weighted_curve(schedule: Schedule, layers: int) -> schedules.Curve:
    """The schedule's curve with each layer at its position in the accumulated weights."""
    if schedule.shape == "list":
        raise ValueError("str-calibrated takes a schedule with a shape of its own, got shape 'list'")
    curve, span = schedules.shape_curve(schedule, layers), max(1, layers - 1)
    total = sum(schedule.layer_weights[: layers - 1]) or 1.0  # nothing drops after the last layer
    position = [span * sum(schedule.layer_weights[:layer]) / total for layer in range(layers)]
    return lambda layer, ordinal, p: curve(position[layer], ordinal, p)
