"""ReductionPlan: what is kept where, settled in plain Python (make_plan.py) before anything is traced.

A plan turns (method, schedule, budget, kind of budget, bucket) into static integers: the share and the capacity of
visual tokens that enter each layer. It is hashable (a static argument of jit), explains itself, goes through JSON, and
checks after a run that what was kept is what was planned.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any, TypeVar

import jax
import numpy as np

from hybridvlm import config as configs
from hybridvlm.config import KINDS, ModelConfig, Schedule, ScoreOptions
from hybridvlm.reduction import cost as flops
from hybridvlm.reduction import methods, schedules
from hybridvlm.reduction.cost import Cost
from hybridvlm.reduction.frame_text import FrameText
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.schedules import SHARE_ONE
from hybridvlm.reduction.solver import pooled_tokens

Counts = TypeVar("Counts", int, np.ndarray, jax.Array)  # arrays of int32


def _rounded_share(count: Counts, share: int) -> Counts:
    """count * share / SHARE_ONE to the nearest, a half upwards; no product on the way is larger than an int32 holds."""
    whole, rest = count // SHARE_ONE, count % SHARE_ONE
    return whole * share + (rest * share + SHARE_ONE // 2) // SHARE_ONE


class PlanMismatch(RuntimeError):
    """A run kept something else than its plan says."""


@dataclasses.dataclass(frozen=True)
class ReductionPlan:
    """A static plan for one bucket of `visual_tokens` (in `frames` frames) and `text_tokens`.

    method: as written; `input_method` runs before layer 0 and `decoder_method` inside ("none" where there is none).
    budget: the product budget, of `kind`. input_rule: how many tokens enter layer 0: "share" (`input_share` 1/4096ths
    of them) or the name of the method whose own rule it is (`Method.count`, keeping `input_rate`). relative[l]: share,
    in 1/4096ths, of the tokens entering layer 0 that enter layer l. pool_factors: (frames, rows, columns) merged into one before
    the decoder, on a `grid` of rows and columns. sites: where the method may drop. cost, dense_cost: see hybridvlm/reduction/cost.py.
    drop_text, frame_text: the rule by which frames lose their own text, and most tokens that one has of it (frame_text.py).
    """

    method: str
    input_method: str
    decoder_method: str
    budget: float
    kind: str
    pattern: str
    visual_tokens: int
    text_tokens: int
    frames: int
    relative: tuple[int, ...]
    sites: tuple[int, ...]
    input_rule: str
    input_share: int
    input_rate: float
    pool_factors: tuple[int, int, int]
    grid: tuple[int, int]
    schedule: Schedule
    score: ScoreOptions
    seed: int
    cost: Cost
    dense_cost: Cost
    drop_text: str = "none"
    frame_text: int = 0

    @property
    def layers(self) -> int:
        return len(self.relative)

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """[layers] share, in 1/4096ths, of the visual tokens that the decoder is handed, that enters each layer."""
        return tuple((self.input_share * r + SHARE_ONE // 2) // SHARE_ONE for r in self.relative)

    @functools.cached_property
    def capacities(self) -> tuple[int, ...]:
        """[layers] visual tokens of the full bucket that enter each layer."""
        return tuple(self.keep(layer, self.decoder_tokens) for layer in range(self.layers))

    @functools.cached_property
    def drops(self) -> tuple[int, ...]:
        """Layers after which tokens are dropped. A drop before layer 0 is `drops_input`."""
        return schedules.drop_sites(self.relative)

    @property
    def depends_on_query(self) -> bool:
        """Whether what the plan keeps depends on the question, so that no two questions can share it."""
        return bool(self.drops) and methods.get_method(self.decoder_method).depends_on_query

    @property
    def prefix_key(self) -> tuple[Any, ...]:
        """What the layers before the first drop depend on, besides the prompt: plans that agree in it can share them."""
        before = (self.input_method, self.input_rule, self.input_share, self.input_rate, self.pool_factors, self.grid)
        text = (self.drop_text, self.frame_text)
        return (self.pattern, self.visual_tokens, self.frames, *before, self.seed, self.drops[:1], *text)

    @property
    def shared_layers(self) -> int:
        """How many layers see a video once for all questions: up to the first drop, or all where no drop depends on them."""
        return self.drops[0] + 1 if self.depends_on_query else self.layers

    def further_flops(self, config: ModelConfig, text: int, chunk_size: int | None = None) -> int:
        """Operations of the decoder for a further question of `text` tokens on a video that was prefilled, head included.

        It goes through the shared layers by itself and on with the video after them.
        """
        lengths = [self.row_length(layer) for layer in range(self.shared_layers)]
        alone = (flops.continued_flops(config, i, max(0, n - text), text, chunk_size) for i, n in enumerate(lengths))
        return sum(alone) + sum(self.cost.layers[self.shared_layers :]) + self.cost.head

    @property
    def drops_input(self) -> bool:
        """Whether tokens are dropped before layer 0, by `plan_functions.input_selection`, down to keep(0, count)."""
        return self.input_share < SHARE_ONE

    @functools.cached_property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """(first layer, one past the last) of every run of layers that see the same tokens."""
        edges = [0, *(site + 1 for site in self.drops), self.layers]
        return tuple(itertools.pairwise(edges))

    @property
    def decoder_frames(self) -> int:
        """Frames of the full bucket that the decoder is handed, after merging."""
        return -(-self.frames // self.pool_factors[0])

    @property
    def decoder_tokens(self) -> int:
        """Visual tokens of the full bucket that the decoder is handed: after merging, before any drop."""
        if self.pool_factors == (1, 1, 1):
            return self.visual_tokens
        return pooled_tokens(self.frames, self.grid, self.pool_factors)

    def row_length(self, layer: int) -> int:
        """Length of a row on the device at `layer`: visual capacity, and what is left of the text bucket."""
        return self.capacities[layer] + self.text_left(layer)

    @functools.cached_property
    def _frame_text(self) -> FrameText:
        whole = methods.get_method(self.input_method).encodes is not None
        per_frame = max(1, self.visual_tokens // max(1, self.frames))
        return FrameText(self.drop_text, self.frames, per_frame, self.frame_text, whole)

    def text_left(self, layer: int) -> int:
        """Text tokens of the bucket that a row has room for at `layer`."""
        return self._frame_text.text(self.text_tokens, self.capacities[layer], self.capacities[0])

    def most_frames(self, kept: Counts) -> Counts | None:
        """The most frames with text of their own, of an example of which `kept` visual tokens are left; None: no text is dropped."""
        return None if self.drop_text == "none" else self._frame_text.most_frames(kept)

    def keep(self, layer: int, count: Counts) -> Counts:
        """Visual tokens that enter `layer` of an example that has `count` (int, or int32 array of numpy or jax).

        `count` is what the decoder is handed: after merging (avgpool), before any drop. The bucket plays no part.
        """
        entering = count
        if self.input_rule != "share":
            entering = self._own_count(count)
        elif self.input_share < SHARE_ONE:
            entering = _rounded_share(count, self.input_share)
        return self.keep_of_entering(layer, entering)

    def keep_of_entering(self, layer: int, entering: Counts) -> Counts:
        """Visual tokens that enter `layer` of an example of which `entering` entered layer 0."""
        if self.relative[layer] == SHARE_ONE:
            return entering
        return _rounded_share(entering, self.relative[layer])

    def _own_count(self, count: Counts) -> Counts:
        m, rule = self.visual_tokens // self.frames, methods.get_method(self.input_rule).count
        assert rule is not None  # a plan names a rule only where there is one
        # from a table, since a rule may truncate float64 products that a device has no way to repeat
        table = [rule(t, m, self.input_rate) for t in range(self.frames + 1)]
        if isinstance(count, int):
            return table[count // m]
        if isinstance(count, (np.ndarray, np.generic)):
            return np.asarray(table, count.dtype)[count // m]
        import jax.numpy as jnp

        return jnp.take(jnp.asarray(table, jnp.int32), count // m, mode="clip")

    @property
    def retention_input(self) -> float:
        """Share of the video's tokens that enters layer 0, merging included."""
        return self._handed * self.input_share / SHARE_ONE

    @property
    def total_flop_ratio(self) -> float:
        """Predicted operations of decoder, scoring and vision tower relative to those of a dense pass from pixels."""
        return self.cost.total / self.dense_cost.total

    @property
    def needs_attention(self) -> bool:
        """Whether it ranks by the tower's attention, which `encode` hands out on request."""
        return "attention" in methods.get_method(self.input_method).needs

    @property
    def pixel_selection(self) -> PixelSelection | None:
        """What `encode` has to be told, as `keep`, by a plan whose method chooses before the tower; None for all others."""
        if "pixels" not in methods.get_method(self.input_method).needs:
            return None
        if self.pool_factors != (1, 1, 1):
            return PixelSelection(self.input_method, 1.0, self.pool_factors[1:])
        return PixelSelection(self.input_method, self.input_rate) if self.drops_input else None

    @property
    def merges(self) -> bool:
        """Whether visual tokens are merged behind the tower, by `plan_functions.merge_fn`."""
        return self.pool_factors != (1, 1, 1) and self.pixel_selection is None

    @property
    def retention_mean(self) -> float:
        """Average over layers of the share of the video's tokens that enters them, merging included."""
        return self.retention_input * schedules.mean_share(self.relative)

    @property
    def retention_final(self) -> float:
        """Share of the video's tokens that enters the last layer, merging included."""
        return self.retention_input * schedules.final_share(self.relative)

    @property
    def _handed(self) -> float:
        return self.decoder_tokens / self.visual_tokens if self.visual_tokens else 1.0

    @property
    def flop_ratio(self) -> float:
        """Predicted decoder operations relative to dense; scoring and vision tower not included."""
        return self.cost.decoder / self.dense_cost.decoder

    @property
    def flop_speedup(self) -> float:
        """The speed-up that the predicted operations promise."""
        return self.dense_cost.decoder / self.cost.decoder

    def verify(self, kept_counts: Any, visual_counts: Any) -> None:
        """Check what a run kept: kept_counts [layers,B(,S)] entering each layer, of visual_counts [B(,S)].

        visual_counts are what the decoder was handed. Raises PlanMismatch, with the layer and the counts, where a count
        is not the plan's.
        """
        kept, visual = np.asarray(kept_counts), np.asarray(visual_counts)
        if kept.shape != (self.layers, *visual.shape):
            raise ValueError(f"verify: kept_counts must be {(self.layers, *visual.shape)}, got {kept.shape}")
        for layer, row in enumerate(kept):
            planned = np.asarray(self.keep(layer, visual.astype(np.int64)))
            wrong = np.argwhere(row != planned)
            if len(wrong):
                at = tuple(wrong[0].tolist())
                raise PlanMismatch(
                    f"{self.method}: layer {layer} ({KINDS[self.pattern[layer]]}) was given {row[at]} visual tokens of "
                    f"example {at[0]} where the plan says {planned[at]} of {visual[at]} "
                    f"({len(wrong)} of {row.size} counts differ)"
                )

    def explain(self) -> str:
        """The plan as a table: per layer share, capacity and operations, then totals against dense."""
        schedule = self.schedule
        scheduled = methods.get_method(self.decoder_method).scheduled
        form = f", {schedule.shape} schedule, floor {schedule.floor:.1%}" if scheduled else ""
        pooled = f", blocks of {'x'.join(map(str, self.pool_factors))} averaged" if self._handed < 1 else ""
        lines = [
            f"{self.method}: {self.kind} budget {self.budget:.2%}{form}{pooled}; {self.layers} layers, "
            f"{self.visual_tokens} visual tokens in {self.frames} frames, {self.text_tokens} text tokens",
            f"{'layer':>5}  {'kind':<9}  {'share':>7}  {'visual':>7}  {'GFLOPs':>11}",
        ]
        if self.drop_text != "none":
            lines[0] += f", of which {self.frames} x {self.frame_text} are frames' own (drop_text {self.drop_text})"
            lines[1] += f"  {'text':>6}"
        for i, kind in enumerate(self.pattern):
            share = self._handed * self.input_share * self.relative[i] / SHARE_ONE**2
            mark, work = "  drop after" if i in self.drops else "", self.cost.layers[i] / 1e9
            text = "" if self.drop_text == "none" else f"  {self.text_left(i):>6}"
            lines.append(f"{i:>5}  {KINDS[kind]:<9}  {share:>7.2%}  {self.capacities[i]:>7}  {work:>11.3f}{text}{mark}")
        lines.append("")
        lines.append(f"{'':<28}{'plan':>14}{'dense':>14}")
        lines.append(f"{'retention, mean of layers':<28}{self.retention_mean:>14.2%}{1:>14.2%}")
        lines.append(f"{'retention, last layer':<28}{self.retention_final:>14.2%}{1:>14.2%}")
        pairs = (("decoder", "decoder GFLOPs"), ("scoring", "scoring GFLOPs"), ("vision", "vision tower GFLOPs"))
        for field, label in pairs:
            here, dense = getattr(self.cost, field) / 1e9, getattr(self.dense_cost, field) / 1e9
            lines.append(f"{label:<28}{here:>14.3f}{dense:>14.3f}")
        for field, label in (("kv_bytes", "KV cache MiB"), ("state_bytes", "SSM state MiB")):
            here, dense = getattr(self.cost, field) / 2**20, getattr(self.dense_cost, field) / 2**20
            lines.append(f"{label:<28}{here:>14.3f}{dense:>14.3f}")
        speedup = f"  {self.flop_speedup:.2f}x less work"
        lines.append(f"{'decoder FLOPs over dense':<28}{self.flop_ratio:>14.4f}{1:>14.4f}{speedup}")
        if self.dense_cost.vision:
            speedup = f"  {1 / self.total_flop_ratio:.2f}x less work"
            lines.append(f"{'from pixels, over dense':<28}{self.total_flop_ratio:>14.4f}{1:>14.4f}{speedup}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them back."""
        return configs.to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ReductionPlan:
        """The plan that `to_dict` wrote, also after a trip through JSON. Unknown keys are refused."""
        nested = {"schedule": Schedule, "score": ScoreOptions, "cost": Cost, "dense_cost": Cost}
        built = {k: configs.from_dict(nested[k], v) if k in nested else v for k, v in data.items()}
        return configs.from_dict(cls, built)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())
