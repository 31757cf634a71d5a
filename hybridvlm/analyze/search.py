"""Which schedule loses least? G-Search and P-Sigmoid (arXiv 2412.00556) on videos without answers.

    python -m hybridvlm.analyze search --model tiny-reduced                   # p-sigmoid: a steepness, at a budget
    python -m hybridvlm.analyze search --model tiny-reduced --rule g-search   # least shares within a tolerance

Quality is the mean divergence KL(dense || reduced) of the first answer token, over the questions on a few videos. Both keep the method
(--method, default: str) and choose its schedule alone:

  p-sigmoid  a sigmoid of depth has two parameters; the budget settles its midpoint, and the steepness of least divergence is
             taken. (The paper fits both by Bayesian optimisation, in a form that is not public.)
  g-search   from shallow to deep, each site takes the smallest share of --levels, never above the one before, with which the
             divergence stays within --tolerance

Every schedule that is tried is compiled anew. Written: search.json, search.md, with the option that `eval` takes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybridvlm.analyze.common import (
    Asked,
    Row,
    add_source,
    base_reduction,
    check_source,
    load_model,
    markdown,
    output_folder,
    questions,
    short,
    source_name,
    write_json,
)
from hybridvlm.config import MIXERS, Reduction, Schedule, to_dict
from hybridvlm.console import print_markdown
from hybridvlm.eval.results import write_atomic
from hybridvlm.inference.model import Model
from hybridvlm.reduction import make_plan

RULES = ("p-sigmoid", "g-search")
STEEPNESS = (2.0, 4.0, 8.0, 12.0, 20.0, 32.0)
LEVELS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.08, 0.04)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_source(parser, 4, 2, seed=1)
    add = parser.add_argument
    add("--rule", choices=RULES, default="p-sigmoid", help="what is searched (default: %(default)s)")
    add("--method", default="str", help="whose schedule it is (default: %(default)s)")
    add("--budget", type=float, default=0.25, help="mean share, of p-sigmoid (default: %(default)s)")
    add(
        "--sites",
        type=int,
        default=4,
        help="layers after which g-search drops, evenly over depth (default: %(default)s)",
    )
    add("--tolerance", type=float, default=0.05, help="most divergence of g-search, in nats (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """Search, write, print the schedule."""
    if options.sites < 1 or options.tolerance <= 0:
        raise ValueError(
            f"--sites must be at least 1 and --tolerance above 0, got {options.sites}, {options.tolerance}"
        )
    check_source(options, per_video=1)
    model = load_model(options.model)
    base = dataclasses.replace(
        base_reduction([model.reduction]), method=options.method, budget=options.budget, kind="mean"
    )
    folder = output_folder(options, f"search-{short(options.model)}-{source_name(options)}")
    oracle = Divergence(model, [asked for own in questions(model, options) for asked in own])
    if options.rule == "p-sigmoid":
        found = best_steepness(base, STEEPNESS, oracle)
        option = f"--schedule shape=sigmoid steepness={found.schedule.steepness:g}"
    else:
        sites = spread_sites(model.config.pattern, options.sites)
        layers = len(model.config.pattern)
        tried = lambda shares: list_reduction(base, sites, shares, layers)  # noqa: E731
        shares = greedy_shares(len(sites), LEVELS, lambda s: oracle(tried(s)) <= options.tolerance)
        found = tried(shares)
        values = ",".join(f"{v:g}" for v in found.schedule.values)
        option = f"--budgets 1 --schedule shape=list values={values}"
    text = f"# {options.model}: {options.rule} on {source_name(options)}\n\n`{options.command}`\n\n{markdown(oracle.rows)}\n"
    write_json(
        folder / "search.json",
        {"command": options.command, "model": options.model, "tried": oracle.rows, "reduction": to_dict(found)},
    )
    print_markdown(text)
    print(f"--methods {options.method} {option}")
    write_atomic(folder / "search.md", f"{text}\n`--methods {options.method} {option}`\n")
    print(folder / "search.md")
    return 0


class Divergence:
    """Mean KL(dense || reduced) of the first answer token over questions, by reduction; `rows` holds what was tried."""

    def __init__(self, model: Model, asked: Sequence[Asked]):
        self.model, self.asked, self.rows = model, list(asked), list[Row]()
        self._dense = [self._log_probabilities(one, None) for one in self.asked]

    def _log_probabilities(self, one: Asked, reduction: Reduction | None) -> np.ndarray:
        frames, m = one.visual.shape[1:3]
        length = one.batch.input_ids.shape[1]
        plan = None
        if reduction is not None:
            plan = make_plan(
                reduction,
                self.model.config,
                visual_tokens=frames * m,
                text_tokens=length - frames * m,
                frames=frames,
            )
        logits = self.model.prefill(one.batch, one.visual, plan).logits
        return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)[0]), np.float64)

    def __call__(self, reduction: Reduction) -> float:
        lost = []
        for one, dense in zip(self.asked, self._dense, strict=True):
            reduced = self._log_probabilities(one, reduction)
            lost.append(float(np.sum(np.exp(dense) * (dense - reduced))))
        schedule = reduction.schedule
        form = f"steepness {schedule.steepness:g}" if schedule.shape == "sigmoid" else _steps(schedule.values)
        self.rows.append({"schedule": form, "divergence, nats": float(np.mean(lost))})
        return float(np.mean(lost))


def best_steepness(base: Reduction, choices: Sequence[float], quality: Callable[[Reduction], float]) -> Reduction:
    """`base` under the sigmoid whose steepness has the least `quality` number; its midpoint is the budget's."""
    tried = [
        dataclasses.replace(base, schedule=dataclasses.replace(base.schedule, shape="sigmoid", steepness=s, values=()))
        for s in choices
    ]
    return min(tried, key=quality)


def greedy_shares(sites: int, levels: Sequence[float], good: Callable[[tuple[float, ...]], bool]) -> tuple[float, ...]:
    """The smallest shares after each of `sites` drops, from shallow to deep, that `good` accepts; they never rise.

    levels: falling, from 1. While a site is settled all that come after it have its share, the most that they may have.
    """
    shares, level = [levels[0]] * sites, 0
    for site in range(sites):
        while level + 1 < len(levels) and good((*shares[:site], *[levels[level + 1]] * (sites - site))):
            level += 1
        shares[site:] = [levels[level]] * (sites - site)
    return tuple(shares)


def spread_sites(pattern: str, count: int) -> tuple[int, ...]:
    """`count` layers of M and *, evenly over depth, none of them the last layer."""
    mixers = [i for i, kind in enumerate(pattern[:-1]) if kind in MIXERS]
    if not mixers:
        raise ValueError(f"no layer of {pattern!r} can be dropped after")
    count = min(count, len(mixers))
    return tuple(mixers[(i * len(mixers)) // count] for i in range(count))


def list_reduction(base: Reduction, sites: Sequence[int], shares: Sequence[float], layers: int) -> Reduction:
    """`base` with these shares after these layers, as written."""
    after = dict(zip(sites, shares, strict=True))
    values, share = [], 1.0
    for layer in range(layers):
        share = after.get(layer - 1, share)
        values.append(share)
    schedule = Schedule(shape="list", values=tuple(values), floor=min(values) if min(values) < 1 else 0.0)
    return dataclasses.replace(base, budget=1.0, schedule=schedule)


def _steps(values: Sequence[float]) -> str:
    """A list of shares as its changes: "1, .5 from 4"."""
    steps = [f"{v:g} from {i}" for i, v in enumerate(values) if i == 0 or v != values[i - 1]]
    return ", ".join(steps)
