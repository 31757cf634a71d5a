"""The registry of reduction methods: what each one is called, where it drops, along which curve, and by which score.

A method that drops inside the decoder is a function (layer, aux, tokens, plan, segments) -> score [B,L] fp32,
registered with the layers after which it may drop (its sites) and the curve of shares that is solved to the budget. A
method before the decoder is a function (visual [B,F,m,D], frame_count [B], plan): one that drops returns a score
[B,F*m], one that merges tokens into others a `Selection`, one that changes the grid (visual, frame_count). Adding a
method is adding one function: those of the library are in builtin.py, those it is compared with in rivals/.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from hybridvlm.config import ATTENTION, MAMBA, MIXERS, Reduction, Schedule, ScoreOptions
from hybridvlm.ops.fold import Selection
from hybridvlm.ops.layer_aux import AttentionAux, LookaheadAux, MambaAux
from hybridvlm.ops.tokens import Tokens
from hybridvlm.reduction import calibrated, schedules

Aux = MambaAux | AttentionAux | LookaheadAux
ScoreFn = Callable[[int, Aux, Tokens], jax.Array | Selection]
Sites = Callable[[str, Schedule], tuple[int, ...]]
Looks = Callable[[str, int, int], tuple[int, ...]]
INDEX_ONLY, FEATURES, QUERIES, LAST_QUERY = "index", "features", "queries", "last query"
PIXELS = "pixels"
NEXT_ATTENTION = "next attention"
PHASES = ("decoder", "input")
READS = (INDEX_ONLY, FEATURES, QUERIES, LAST_QUERY, NEXT_ATTENTION)


class PlanView(Protocol):
    """What methods read of a `ReductionPlan`, which see; the plan is made by them, and so is not imported here."""

    @property
    def method(self) -> str: ...
    @property
    def input_method(self) -> str: ...
    @property
    def decoder_method(self) -> str: ...
    @property
    def pattern(self) -> str: ...
    @property
    def text_tokens(self) -> int: ...
    @property
    def sites(self) -> tuple[int, ...]: ...
    @property
    def pool_factors(self) -> tuple[int, int, int]: ...
    @property
    def grid(self) -> tuple[int, int]: ...
    @property
    def score(self) -> ScoreOptions: ...
    @property
    def seed(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def input_share(self) -> int: ...
    @property
    def relative(self) -> tuple[int, ...]: ...
    @property
    def capacities(self) -> tuple[int, ...]: ...
    def keep(self, layer: int, count: Any) -> Any: ...
    def keep_of_entering(self, layer: int, entering: Any) -> Any: ...


class Pair(NamedTuple):
    """Two stages that are published as one method: one before the decoder, one inside, which keeps the share `kept` of what it gets."""

    outer: str
    inner: str
    kept: float


@dataclasses.dataclass(frozen=True)
class Method:
    """One entry of the registry.

    phase: "none", "input" (drops before layer 0), "merge" (merges before the decoder), "decoder" or "pair" (see `Pair`). sites(pattern,
    schedule): the layers after which it may drop. curve(schedule, layers): its shares; None for a method without.
    reads: what its score looks at, for the predicted cost of scoring. where: its sites in words, for errors.
    token_local: after an attention layer, the score of a token depends on the question and that token alone, so that each
    shard of a row that is cut over devices ranks its own (so, too, where attention layers ahead say it: of a LookaheadAux its
    `ahead` alone may be read); any other method is given the whole row on every device.
    looks(pattern, layer, count): of a method that reads "next attention", the attention layers it looks through; None: those of
    `attention_ahead`.
    at_depth(fraction): of a method that drops at a depth of choice, the sites of "name@fraction". score: options of its own
    instead of the plan's. all_heads: its score is no mean or maximum over heads, so that one device must hold them all.
    merges: inside the decoder it returns a Selection that merges tokens. prepare(tokens, plan, segments): what its score needs of
    layer 0, as arrays [B,L,...] for Tokens.extra.
    Before the decoder: count(frames, tokens per frame, share): tokens that it keeps, where that is not the nearest to the share;
    floor(frames, tokens per frame): the least share that it can keep, and keeps, in words, what. needs: "attention" for the
    tower's attention as a fourth argument [B,F,m]; "pixels" for one that chooses before the tower, whose function is given the pixel
    values [B,F,m,V] uint8 of every token in the place of visual tokens, and a PixelSelection in that of the plan (pixels.py).
    encodes(frames, share): of a method that keeps whole frames, how many, and no other enters the tower.
    scoring(visual tokens, kept, frames, width): operations of its score (None: by `reads`).
    """

    name: str
    phase: str
    function: Callable[..., Any]
    sites: Sites | None = None
    curve: Callable[[Schedule, int], schedules.Curve] | None = None
    reads: str = INDEX_ONLY
    where: str = ""
    token_local: bool = False
    looks: Looks | None = None
    at_depth: Callable[[float], Sites] | None = None
    score: ScoreOptions | None = None
    all_heads: bool = False
    merges: bool = False
    prepare: Callable[[Tokens, PlanView, int], dict[str, jax.Array]] | None = None
    count: Callable[[int, int, float], int] | None = None
    floor: Callable[[int, int], float] | None = None
    keeps: str = ""
    needs: tuple[str, ...] = ()
    encodes: Callable[[int, float], int] | None = None
    scoring: Callable[[int, int, int, int], int] | None = None
    pair: Pair | None = None

    def __post_init__(self) -> None:
        if self.phase == "decoder" and (self.sites is None or self.curve is None):
            raise ValueError(f"Method {self.name!r} drops inside the decoder, so it needs sites and a curve")

    @property
    def depends_on_query(self) -> bool:
        """Whether its score reads the question."""
        return self.reads in (QUERIES, LAST_QUERY, NEXT_ATTENTION)

    def ahead(self, pattern: str, layer: int, options: ScoreOptions) -> tuple[int, ...]:
        """The attention layers that its score after `layer` looks through, nearest first; () for its own inside alone."""
        return (self.looks or attention_ahead)(pattern, layer, options.ahead) if self.reads == NEXT_ATTENTION else ()

    @property
    def scheduled(self) -> bool:
        """Whether the reduction's Schedule shapes it; other methods bring their own curve."""
        return self.curve in (_scheduled, calibrated.weighted_curve)

    @property
    def summary(self) -> str:
        """The one line that the command line shows."""
        return (self.function.__doc__ or "").strip().split("\n")[0]


METHODS: dict[str, Method] = {}


def _register(name: str, phase: str, **fields: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        METHODS[name] = Method(name, phase, function, **fields)
        return function

    return add


def register_method(
    name: str,
    *,
    phase: str = "decoder",
    reads: str = QUERIES,
    after: Sequence[str] = MIXERS,
    token_local: bool = False,
    looks: Looks | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a score function of one's own a reduction method: a decorator.

    The method is then known by its name wherever a method is named: `Reduction`, plans, `ask`, `eval`, `train`. It drops on the
    reduction's `Schedule`, as `str` does. A package offers its methods to the command line by an entry point in the group
    "hybridvlm.methods" that names a module which registers them.

    The function takes (layer, aux, tokens, plan, segments) and returns scores [B,L] float32; of each example (and segment) the
    visual tokens of highest score stay, ties go to the earlier. `aux` is what the layer returns in addition to its output:
    `AttentionAux` (q of the question's rows, k, log-sum-exp) or `MambaAux` (b, c, dt, log_decay). `tokens` is its output. It is
    traced by JAX. The first line of its docstring is what `eval --list` shows.

    With reads="next attention" the aux after a Mamba layer (in a model without any: after an attention layer) is a
    `LookaheadAux`: `own` as above, and in `ahead` an `AttentionAux` of each of the next `plan.score.ahead` attention layers, its
    queries and keys of the tokens as they are. After the last attention layer nothing is ahead, and the aux is as above.

    With phase="input" it drops before layer 0 and takes (visual [B,F,m,D], frame_count [B], plan), frames from frame_count on
    being padding; it returns scores [B,F*m]. Either may return a `Selection` instead, which also says what is merged into what.

    Args:
        name: of the method; letters, digits, "-" and "_".
        phase: "decoder", or "input" for before layer 0.
        reads: what the score looks at: "index" (positions alone), "features" (tokens, not the question), "queries" (the
            question), "last query" or "next attention" (the question, by projections of layers to come). Plans predict the
            cost of scoring by it, and conversations reuse caches by it.
        after: the kinds of layers after which it may drop, of "M" and "*".
        token_local: see `Method`.
        looks: see `Method`.

    Raises:
        ValueError: for a name that another function has or that cannot be one, or other values of `reads` and `after`.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise ValueError(f"register_method: a name is letters, digits, '-' and '_', got {name!r}")
    if reads not in READS:
        raise ValueError(f"register_method: reads must be one of {list(READS)}, got {reads!r}")
    if phase not in PHASES:
        raise ValueError(f"register_method: phase must be one of {list(PHASES)}, got {phase!r}")
    kinds = tuple(after)
    if not kinds or not set(kinds) <= set(MIXERS):
        raise ValueError(f"register_method: after must name kinds of layers of {list(MIXERS)}, got {after!r}")
    add = _register(name, "input", reads=reads)
    if phase == "decoder":
        add = _register(
            name,
            "decoder",
            reads=reads,
            sites=_after(kinds),
            curve=_scheduled,
            where=" or ".join(kinds),
            token_local=token_local,
            looks=looks,
        )

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        there = METHODS[name].function if name in METHODS else None
        origin = (function.__module__, function.__qualname__)
        # a notebook cell that is run again defines its function anew
        if there is not None and (there.__module__, there.__qualname__) != origin:
            raise ValueError(f"register_method: there is a method {name!r} already; take another name")
        return add(function)

    return checked


@functools.cache
def load_entry_points() -> None:
    """Import what installed packages offer in the group "hybridvlm.methods", once. ValueError names one that cannot be."""
    for point in importlib.metadata.entry_points(group="hybridvlm.methods"):
        try:
            point.load()
        except Exception as error:
            raise ValueError(
                f"the methods of entry point {point.name!r} ({point.value}) cannot be imported: "
                f"{type(error).__name__}: {error}; mend or uninstall that package"
            ) from error


def get_method(name: str) -> Method:
    """The method called `name`; ValueError with the names there are, and the nearest one, if there is none.

    "oneshot@0.64" is the method `oneshot` at that share of the depth.
    """
    base, at, depth = name.partition("@")
    if at:
        return _at_depth(get_method(base), name, depth)
    if name not in METHODS:
        load_entry_points()
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown reduction method {name!r}; {hint}`python -m hybridvlm.eval --list` says which {len(METHODS)} there are"
        )
    return METHODS[name]


@functools.cache
def _at_depth(method: Method, name: str, depth: str) -> Method:
    """A method moved to a share of the depth, as written after "@"."""
    if method.at_depth is None:
        able = ", ".join(m.name for m in METHODS.values() if m.at_depth is not None)
        raise ValueError(f"method {name!r}: {method.name} has no depth to choose; those with one are {able}")
    try:
        fraction = float(depth)
    except ValueError:
        fraction = -1.0
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"method {name!r}: after @ goes a share of the depth, from 0 to 1, got {depth!r}")
    where = f"the * nearest to {fraction:g} of the depth"
    return dataclasses.replace(method, name=name, sites=method.at_depth(fraction), where=where)


def describe_methods() -> str:
    """All methods, one per line with what they do: for --help."""
    load_entry_points()
    wide = max(map(len, METHODS))
    return "\n".join(f"  {m.name:<{wide}}  {m.summary}" for m in METHODS.values())


def named_reduction(
    own: Reduction | None,
    method: str,
    budget: float | None = None,
    kind: str | None = None,
    first_drop: int | None = None,
    drop_text: str | None = None,
) -> Reduction | None:
    """The Reduction of a method's name, with all else as a checkpoint's own has it; see `Model.reduction_for`."""
    parse_method(method)
    if method == "none":
        return None
    own = own or Reduction()
    if first_drop is not None and not takes_first_drop(method):
        raise ValueError(f"first_drop {first_drop}: {no_first_drop(method)}; leave it out")
    schedule = own.schedule if first_drop is None else dataclasses.replace(own.schedule, start=first_drop)
    budget = 0.25 if budget is None else budget
    kind, drop_text = kind or own.kind, drop_text or own.drop_text
    return dataclasses.replace(own, method=method, budget=budget, kind=kind, schedule=schedule, drop_text=drop_text)


def takes_first_drop(method: str) -> bool:
    """Whether `Schedule.start` has a say in where a method, or the last part of a composition, drops."""
    return get_method(parse_method(method)[-1][0]).scheduled


def no_first_drop(method: str) -> str:
    """Why `Schedule.start` has none."""
    last = get_method(parse_method(method)[-1][0])
    inner = get_method(last.pair.inner) if last.pair is not None else last
    where = f"drops after {inner.where}" if inner.phase == "decoder" else "drops before layer 0"
    return f"{last.name} {where}, wherever a schedule starts"


def parse_method(text: str) -> tuple[tuple[str, float | None], ...]:
    """Read "name", "name:rate" or a composition "evs:0.5+str:0.5" into (name, rate or None) pairs, in running order.

    At most one method before the decoder, and it comes first; at most one inside. ValueError otherwise.
    """
    parts: list[tuple[str, float | None]] = []
    for part in text.split("+"):
        name, colon, number = (p.strip() for p in part.partition(":"))
        get_method(name)
        rate = None
        if colon:
            try:
                rate = float(number)
            except ValueError:
                raise ValueError(f"method {text!r}: the rate of {name!r} must be a number, got {number!r}") from None
            if not 0.0 < rate <= 1.0:
                raise ValueError(f"method {text!r}: the rate of {name!r} is a share to keep, in (0, 1], got {number}")
        parts.append((name, rate))
    if len(parts) > 1:
        inside = [get_method(name).phase == "decoder" for name, _ in parts]
        if len(parts) > 2 or inside != [False, True] or get_method(parts[0][0]).phase in ("none", "pair"):
            raise ValueError(
                f"method {text!r}: a composition is one method before the decoder "
                f"({', '.join(m.name for m in METHODS.values() if m.phase in ('input', 'merge'))}) + one inside it "
                f"({', '.join(m.name for m in METHODS.values() if m.phase == 'decoder')})"
            )
    return tuple(parts)


def needs_attention(reduction: Reduction | None) -> bool:
    """Whether a reduction ranks by the attention of the vision tower, so that frames are encoded with it."""
    names = () if reduction is None else parse_method(reduction.method)
    return any("attention" in get_method(name).needs for name, _ in names)


class AttentionMethods(Collection[str]):
    """Names of the methods that can drop after attention layers by what these tell, or before the decoder: what a model takes
    whose visual tokens are scored by attention alone. Methods that are registered later are among them."""

    def __iter__(self) -> Iterator[str]:
        return (name for name in METHODS if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        method = METHODS.get(str(name).partition("@")[0])
        if method is None or method.reads == NEXT_ATTENTION or method.merges or method.prepare or method.all_heads:
            return False
        if method.pair is not None:
            return method.pair.outer in self and method.pair.inner in self
        return method.phase != "decoder" or ATTENTION in method.where


def attention_ahead(pattern: str, layer: int, count: int) -> tuple[int, ...]:
    """The next `count` (0: all) attention layers after a layer whose score they are to give, nearest first.

    () after an attention layer of a hybrid, which has weights of its own, and where no attention layer comes.
    """
    if pattern[layer] == ATTENTION and MAMBA in pattern:
        return ()
    coming = tuple(i for i in range(layer + 1, len(pattern)) if pattern[i] == ATTENTION)
    return coming[:count] if count else coming


def _after(kinds: tuple[str, ...]) -> Sites:
    """Sites after every layer of `kinds` that the schedule lets drop."""

    def sites(pattern: str, schedule: Schedule) -> tuple[int, ...]:
        return tuple(
            i
            for i, kind in enumerate(pattern[:-1])
            if kind in kinds and i >= schedule.start and i not in schedule.never
        )

    return sites


def _scheduled(schedule: Schedule, layers: int) -> schedules.Curve:
    return schedules.schedule_curve(schedule, layers)
