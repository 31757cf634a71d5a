"""Token reduction: plans, schedules, scores and the registry of methods."""

# Importing it registers the methods that come with the library.
from hybridvlm.reduction import builtin as builtin
from hybridvlm.reduction import rivals as rivals
from hybridvlm.reduction.evs import average_pool, evs_keep_count, evs_mask, evs_score
from hybridvlm.reduction.make_plan import make_plan
from hybridvlm.reduction.methods import METHODS, Method, describe_methods, get_method, parse_method
from hybridvlm.reduction.plan import PlanMismatch, ReductionPlan
from hybridvlm.reduction.plan_functions import input_selection, merge_fn, score_fn
from hybridvlm.reduction.schedules import SHARE_ONE, BudgetError
from hybridvlm.reduction.scores import attention_score, lookahead_score, mamba_score, saliency_score

__all__ = [
    "METHODS",
    "SHARE_ONE",
    "BudgetError",
    "Method",
    "PlanMismatch",
    "ReductionPlan",
    "attention_score",
    "average_pool",
    "describe_methods",
    "evs_keep_count",
    "evs_mask",
    "evs_score",
    "get_method",
    "input_selection",
    "lookahead_score",
    "make_plan",
    "mamba_score",
    "merge_fn",
    "parse_method",
    "saliency_score",
    "score_fn",
]
