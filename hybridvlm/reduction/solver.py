"""Fitting a method to a budget and a bucket: the steps after `make_plan`, each refusing what cannot be met."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hybridvlm.config import ModelConfig, Reduction, Schedule, ScoreOptions
from hybridvlm.reduction import cost as flops
from hybridvlm.reduction import methods, schedules
from hybridvlm.reduction.frame_text import FrameText
from hybridvlm.reduction.schedules import SHARE_ONE, BudgetError

_POOL_TOLERANCE = 0.1  # how far, relative to it, the share that blocks can keep may lie from the budget


def pooled_tokens(frames: int, grid: tuple[int, int], factors: tuple[int, int, int]) -> int:
    return -(-frames // factors[0]) * (grid[0] // factors[1]) * (grid[1] // factors[2])


def entering_tokens(rule: str, share: int, rate: float, decoder_input: int, frames: int) -> int:
    if rule != "share":
        count = methods.get_method(rule).count
        assert count is not None  # a plan names a rule only where there is one
        return count(frames, decoder_input // frames, rate)
    return (decoder_input * share + SHARE_ONE // 2) // SHARE_ONE


def split_pair(
    pair: methods.Pair, name: str, pattern: str, schedule: Schedule, budget: float, kind: str
) -> tuple[str, float, str, float]:
    """(outer method, its rate, inner method, its budget) by which a pair meets a budget of kind "mean" or "final", the inner stage
    keeping its published share. BudgetError where that alone keeps less."""
    inner = methods.get_method(pair.inner)
    assert inner.sites is not None  # it drops inside the decoder
    sites = inner.sites(pattern, schedule)
    if budget == 1.0:
        return pair.outer, 1.0, pair.inner, 1.0
    if not sites:
        raise BudgetError(
            f"{name}: {inner.name} drops after {inner.where}, and these {len(pattern)} layers have no such site: "
            f"only budget 1 can be met, got {budget:g}",
            1.0,
            1.0,
        )
    before = (sites[0] + 1) / len(pattern)
    share = pair.kept if kind == "final" else before + pair.kept * (1 - before)
    if budget > share:
        raise BudgetError(
            f"{name} can meet {kind} budgets up to {math.floor(share * 1e4) / 1e4:g} on these {len(pattern)} layers, since "
            f"{inner.name} keeps {pair.kept:g} after layer {sites[0]}, or 1; got {budget:g}",
            0.0,
            share,
        )
    return pair.outer, budget / share, pair.inner, share


def drop_flops(
    method: methods.Method,
    config: flops.Counted,
    layer: int,
    visual: int,
    length: int,
    text_tokens: int,
    options: ScoreOptions,
) -> int:
    """Operations of a method's score after one layer, over a row of `length` tokens, `visual` of them visual."""
    coming = method.ahead(config.pattern, layer, options)
    if coming:
        if not isinstance(config, ModelConfig):
            raise ValueError(
                f"{method.name} reads the next attention layer of one row of video and text, which a {type(config).__name__} "
                "has not; use str"
            )
        return len(coming) * flops.lookahead_flops(config, length, text_tokens)
    if method.scoring is not None:
        return method.scoring(visual, 0, 0, config.width)
    if method.reads == methods.FEATURES:
        return 3 * length * config.width
    if method.reads == methods.INDEX_ONLY:
        return 0
    return flops.scoring_flops(config, layer, length, 1 if method.reads == methods.LAST_QUERY else text_tokens)


class BeforeDecoder(NamedTuple):
    """What a method before the decoder leaves of the visual tokens; attributes as of `ReductionPlan` (rate: its `input_rate`)."""

    pool_factors: tuple[int, int, int]
    grid: tuple[int, int]
    rule: str
    share: int
    rate: float


class BudgetSolver:
    """The steps of make_plan, over one bucket; outer: the method before the decoder ("none"), inner: the one inside it."""

    def __init__(
        self,
        reduction: Reduction,
        config: flops.Counted,
        visual: int,
        text: int,
        frames: int,
        chunk: int | None,
        outer: str,
        inner: str,
        own_text: FrameText,
    ) -> None:
        self.reduction, self.config = reduction, config
        self.visual, self.text, self.frames, self.own_text = visual, text, frames, own_text
        self.outer, self.inner = methods.get_method(outer), methods.get_method(inner)
        self.layers = len(config.pattern)
        self._flops = functools.lru_cache(maxsize=None)(lambda layer, n: flops.layer_flops(config, layer, n, chunk))
        self._dense = self.decoder([visual] * self.layers)
        if (
            self.outer.phase == "merge"
            and "pixels" in self.outer.needs
            and config.vision
            and config.vision.kind == "stem"
        ):
            raise BudgetError(
                f"{outer} scales frames down, and this model's stem has one size; take frames or avgpool", 1.0, 1.0
            )
        if "attention" in self.outer.needs and config.vision is not None and config.vision.kind == "stem":
            able = ", ".join(
                m.name for m in methods.METHODS.values() if m.phase in ("input", "merge") and "attention" not in m.needs
            )
            raise BudgetError(
                f"{outer} ranks by the attention of the vision tower, and this model's is a convolutional stem without any; "
                f"of the methods before the decoder it takes {able}",
                1.0,
                1.0,
            )

    @property
    def counts_flops(self) -> bool:
        """Whether the budget is one of operations."""
        return self.reduction.kind in ("flops", "total-flops")

    def rows(self, visual: Sequence[int]) -> list[int]:
        """Lengths of rows that have so many visual tokens at each layer, with what is left of the text."""
        return [n + self.own_text.text(self.text, n, visual[0]) for n in visual]

    def decoder(self, visual: Sequence[int]) -> int:
        rows = (self._flops(layer, n) for layer, n in enumerate(self.rows(visual)))
        return sum(rows) + flops.head_flops(self.config)

    def cost(self, visual: Sequence[int], scoring: int, vision: int, itemsize: int) -> flops.Cost:
        """The cost of so many visual tokens entering each layer, with operations of scores and tower as given."""
        rows = self.rows(visual)
        return flops.Cost(
            tuple(self._flops(layer, n) for layer, n in enumerate(rows)),
            flops.head_flops(self.config),
            scoring,
            vision,
            flops.kv_bytes(self.config, rows, itemsize),
            flops.state_bytes(self.config, itemsize),
        )

    def before_decoder(self, rate: float) -> BeforeDecoder:
        """What the method before the decoder leaves, asked to keep `rate`; all without one."""
        pool, grid, rule, share, kept = (1, 1, 1), (1, 1), "share", SHARE_ONE, rate
        if self.outer.phase == "merge":
            pool, grid = self.pool(rate)
        elif self.outer.count is not None:
            rule, (share, kept) = self.outer.name, self.own_count(rate)
        elif self.outer.name != "none":
            share = self.input_share(rate)
        return BeforeDecoder(pool, grid, rule, share, kept)

    def scoring(self, relative: Sequence[int], entering: int) -> int:
        """Operations of all scores, before the decoder and inside it, where `entering` visual tokens enter layer 0."""
        lengths = [(entering * r + SHARE_ONE // 2) // SHARE_ONE for r in relative]
        rows, options = self.rows(lengths), self.reduction.score
        total = sum(
            drop_flops(self.inner, self.config, i, lengths[i], rows[i], self.text, options)
            for i in schedules.drop_sites(relative)
        )
        if self.outer.scoring is not None:
            return total + self.outer.scoring(self.visual, entering, self.frames, self.config.width)
        # products with the previous frame and norms, or one sum
        return total + (6 * self.visual * self.config.width if self.outer.reads == methods.FEATURES else 0)

    def vision(self, share: float | None) -> int:
        """Operations of the tower under the method before the decoder, which keeps `share`; None: of a dense pass."""
        tower = self.config.vision
        if tower is None:
            return 0
        frames = self.frames
        if share is not None and self.outer.encodes is not None:
            frames = self.outer.encodes(frames, share)
        if share is not None and self.outer.phase == "merge" and "pixels" in self.outer.needs:
            return flops.shrunk_vision_flops(tower, frames, share, self.config.width)
        if share is not None and "pixels" in self.outer.needs and self.outer.encodes is None:
            kept = min(self.visual, max(1, round(self.visual * share)))
            return flops.packed_vision_flops(tower, frames, kept, self.config.width)
        attends = share is not None and "attention" in self.outer.needs
        extra = flops.tower_attention_flops(tower, frames) if attends else 0
        return flops.vision_flops(tower, frames, self.config.width) + extra

    def work(self, relative: Sequence[int], entering: int, share: float) -> float:
        """Predicted operations relative to dense, of what the budget's kind counts."""
        here = self.decoder([(entering * r + SHARE_ONE // 2) // SHARE_ONE for r in relative])
        if self.reduction.kind == "flops":
            return here / self._dense
        here += self.scoring(relative, entering) + self.vision(share)
        return here / (self._dense + self.vision(None))

    def tokens_per_frame(self, name: str) -> int:
        if self.frames < 1 or self.visual % self.frames:
            raise ValueError(
                f"{name} works on whole frames: visual_tokens {self.visual} is not a multiple of frames {self.frames}"
            )
        return self.visual // self.frames

    def own_count(self, asked: float) -> tuple[int, float]:
        """(nominal share in 1/4096ths of the full bucket, rate) of a method before the decoder with a count rule of its own."""
        method = self.outer
        assert method.count is not None
        m, rate = self.tokens_per_frame(method.name), asked
        if self.counts_flops and "+" not in self.reduction.method:
            rate = self.input_share(asked) / SHARE_ONE
        least = 0.0 if method.floor is None else method.floor(self.frames, m)
        if rate < least - 1e-9:
            raise BudgetError(
                f"{method.name} keeps {method.keeps}: of {self.frames} frames it can keep {_up(least)} or more, "
                f"got {rate:g} of the tokens for a {self.reduction.kind} budget of {asked:g}",
                least,
                1.0,
            )
        kept = method.count(self.frames, m, rate)
        share = (kept * SHARE_ONE + self.visual // 2) // self.visual
        # only of what drops nothing the share is 1, however near it comes
        return (SHARE_ONE if kept == self.visual else min(max(1, share), SHARE_ONE - 1)), rate

    def input_share(self, rate: float) -> int:
        """The share, in 1/4096ths, of a drop before layer 0 that meets the budget.

        In a composition its rate is one of tokens; the decoder's part then makes up what the operations ask for.
        """
        if not self.counts_flops or "+" in self.reduction.method:
            return max(1, round(rate * SHARE_ONE))
        everything = (SHARE_ONE,) * self.layers

        def ratio(share: int) -> float:
            return self.work(everything, (self.visual * share + SHARE_ONE // 2) // SHARE_ONE, share / SHARE_ONE)

        if rate < ratio(1):
            least = _up(ratio(1))
            message = f"{self.reduction.method} can meet {self.reduction.kind} budgets from {least} to 1, got {rate:g}"
            raise BudgetError(message, ratio(1), 1.0)
        return min(range(1, SHARE_ONE + 1), key=lambda share: abs(ratio(share) - rate))

    def pool(self, rate: float) -> tuple[tuple[int, int, int], tuple[int, int]]:
        """(pool_factors, grid): the smallest blocks whose size is nearest 1/rate; of a method by pixels, blocks inside a frame."""
        name, by_pixels = self.outer.name, "pixels" in self.outer.needs
        m = self.tokens_per_frame(name)
        vision = self.config.vision
        grid = vision.grid if vision is not None else (math.isqrt(m), math.isqrt(m))
        if grid[0] * grid[1] != m:
            raise ValueError(f"{name} needs the grid of a frame: {m} tokens per frame do not fill one of {grid}")
        options = [
            (t, h, w)
            for t in range(1, 2 if by_pixels else self.frames + 1)
            for h in range(1, grid[0] + 1)
            for w in range(1, grid[1] + 1)
            if not (grid[0] % h or grid[1] % w)
        ]

        def share(f: tuple[int, int, int]) -> float:
            if self.counts_flops and "+" not in self.reduction.method:
                entering = pooled_tokens(self.frames, grid, f)
                return self.work((SHARE_ONE,) * self.layers, entering, entering / self.visual if by_pixels else 1.0)
            return 1.0 / (f[0] * f[1] * f[2])

        best = min(options, key=lambda f: (round(abs(share(f) - rate), 9), max(f), f))
        if abs(share(best) - rate) > _POOL_TOLERANCE * rate:
            shares = sorted(round(share(f), 4) for f in options)
            near = sorted(set(shares), key=lambda s: abs(s - rate))[:4]
            raise BudgetError(
                f"{name} merges whole blocks of a {grid[0]}x{grid[1]} grid and cannot keep {rate:g}; "
                f"the nearest budgets it can are {', '.join(f'{s:g}' for s in sorted(near))}",
                shares[0],
                shares[-1],
            )
        return best, grid

    def relative(
        self, budget: float, entering: int, rate: float, share: float
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(shares of the tokens entering layer 0, the sites of their drops) for the method inside the decoder.

        rate: what was asked of the part before the decoder, share: what it keeps. Shares are of what that part left;
        operations are of dense, so that a composition is solved to the product of both.
        """
        everything = (SHARE_ONE,) * self.layers
        method, schedule = self.inner, self.reduction.schedule
        if method.phase != "decoder":
            return everything, ()
        assert method.sites is not None and method.curve is not None  # as every Method of this position has
        sites = method.sites(self.config.pattern, schedule)
        curve = method.curve(schedule, self.layers)
        if schedule.shape == "list" and budget == 1.0 and method.scheduled:
            return tuple(schedules.staircase(curve, 0.5, sites, self.layers)), sites  # p = 1/2: the list as written
        if budget == 1.0:
            return everything, sites
        measure = self._measure(entering, share)
        if self.counts_flops:
            budget *= rate
        try:
            shares = schedules.solve(curve, sites, self.layers, budget, measure)
            if schedule.stages and method.scheduled and schedule.shape != "list":
                return self._in_stages(shares, sites, curve, budget, measure)
        except schedules.BudgetError as error:
            raise BudgetError(self._unmet(budget, sites, error), error.low, error.high) from None
        return shares, sites

    def _in_stages(
        self,
        shares: tuple[int, ...],
        sites: tuple[int, ...],
        curve: schedules.Curve,
        budget: float,
        measure: Callable[[Sequence[int]], float],
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shares that meet the budget with as many lengths as the schedule allows, and the sites of their drops."""
        for early in (0.0, 0.25, 0.5):
            thinned = schedules.merge_stages(shares, self.reduction.schedule.stages, self.config.pattern, early)
            if len(thinned) == len(schedules.drop_sites(shares)):
                return shares, sites
            try:
                return schedules.solve(curve, thinned, self.layers, budget, measure), thinned
            except schedules.BudgetError:
                if early == 0.5:
                    raise
        raise AssertionError("unreachable")

    def _measure(self, entering: int, share: float) -> Callable[[Sequence[int]], float]:
        if not self.counts_flops:
            return schedules.mean_share if self.reduction.kind == "mean" else schedules.final_share
        return lambda shares: self.work(shares, entering, share)

    def _unmet(self, budget: float, sites: Sequence[int], error: schedules.BudgetError) -> str:
        method, kind = self.inner, self.reduction.kind
        if not sites:
            return (
                f"{method.name} drops after {method.where}, and these {self.layers} layers have no such site: "
                f"only budget 1 can be met, got {budget:g}"
            )
        return (
            f"{method.name} can meet {kind} budgets from {_up(error.low)} to {error.high:.4g} on this pattern of "
            f"{self.layers} layers (it drops after {method.where}, first after layer {sites[0]}), got {budget:g}"
        )


def _up(low: float) -> str:
    """`low` rounded up to four digits, so that the number printed can be met."""
    return f"{math.ceil(low * 1e4) / 1e4:g}"
