"""Questions about one video or image: what is decoded and encoded once, and what every question makes of it.

The projector's outputs are kept, so that a further question never decodes or encodes anything again. Where the prompt so far
stands unchanged in the caches, and what was kept of the video does not depend on the question (no plan, or one that does
not read it), the next turn goes on from the caches. Where it does, the layers before the first drop are run over the video once,
and every question goes on from what they left. Otherwise it is prefilled anew from the projector's outputs.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from hybridvlm.config import Reduction
from hybridvlm.files import text_problem
from hybridvlm.inference.memories import VideoMemories
from hybridvlm.inference.placement import to_host
from hybridvlm.inference.programs import ModelPrograms
from hybridvlm.inference.sampling import Sampling
from hybridvlm.inference.thinking import opens, read_reply, switch, think_budget
from hybridvlm.models.media import Clip
from hybridvlm.models.prompt import Layout, user_message
from hybridvlm.reduction import methods
from hybridvlm.reduction.pixels import PixelSelection
from hybridvlm.reduction.plan import ReductionPlan
from hybridvlm.tokenizers.messages import Message
from hybridvlm.tokenizers.text import check_tokenizer
from hybridvlm.video.shown import default_frames, most_frames, shown_clip

PIECE = 8  # tokens that are decoded before they are shown
_UNFINISHED = "\ufffd"  # what a tokenizer gives for the first bytes of a letter


@dataclasses.dataclass(repr=False)
class Answer:
    """One answer and what it took.

    text, and the tokens of the whole reply. thinking: the reasoning before the text; unfinished: whether it never came to an
    end, so that there is no answer, and text is all that was said. frames looked at. stages: (first layer, last layer,
    visual tokens) of every run of layers that see the same tokens. seconds by phase, device work awaited (video, compile,
    encode, prefill, decode; a phase that was not needed is missing). continued: whether it went on from the caches. saved: seconds
    of the prefill that an earlier question had spent already, on the layers before the first drop.
    survivors: bool [F,rows,cols], the visual tokens that entered the last layer. plan: of the reduction, if there is one.
    conversation takes the next question.
    """

    text: str
    tokens: list[int]
    frames: int
    stages: list[tuple[int, int, int]]
    seconds: dict[str, float]
    continued: bool
    survivors: np.ndarray
    plan: ReductionPlan | None
    conversation: Conversation
    thinking: str = ""
    unfinished: bool = False
    saved: float = 0.0

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        kept = f", {self.stages[-1][2]} of {self.stages[0][2]} visual tokens at the end" if self.stages else ""
        took = sum(self.seconds.values())
        return f"Answer({self.text!r}, {self.frames} frames{kept}, {took:.2f} s)"


@dataclasses.dataclass
class CachedTurn:
    """What the caches hold: the prompt and answer that went in (as a Layout), and the empty slots left."""

    layout: Layout
    caches: Any
    free: int
    answer: Answer


def _depends_on_query(plan: ReductionPlan | None) -> bool:
    return plan is not None and plan.depends_on_query


def check_question(question: str) -> None:
    """ValueError for a question that asks nothing, TypeError for what is no text."""
    if not isinstance(question, str):
        raise TypeError(
            f"the question must be one text, got {type(question).__name__}; ask several one after the other"
        )
    if not question.strip():
        raise ValueError(f"the question is empty; it must be a text, got {question!r}")
    if problem := text_problem(question):
        raise ValueError(f"the question: {problem}")


class Conversation:
    """Questions to `model` about `video`: a path, frames [F,h,w,3] uint8, a Clip, or None for text alone.

    frames, rule, clock: which frames of a file, see `video.read_clip`. reduction: a method and its budget (default: none), or a
    method's name, such as "str", with `budget` beside it: see `Model.reduction_for`.
    system: a system message, for models that know conversations. room: cache slots for later turns, beside those of the
    answer. thinking: True or False turns reasoning on or off where the chat template has a switch for it, None leaves it to
    the template. think_tokens: the most tokens of reasoning, beside the answer's own; then the closing tag is put.
    ValueError for a reduction that the family does not take, or a switch that the template does not have.
    """

    def __init__(
        self,
        model: ModelPrograms,
        video: Any,
        *,
        frames: int | None = None,
        rule: str = "uniform",
        clock: str = "exact",
        reduction: Reduction | str | None = None,
        budget: float | None = None,
        system: str = "",
        decode_capacity: int = 0,
        thinking: bool | None = None,
        think_tokens: int | None = None,
    ):
        check_tokenizer(model)
        if problem := text_problem(system):
            raise ValueError(f"system: {problem}")
        if isinstance(reduction, str):
            reduction = model.reduction_for(reduction, budget)
        elif budget is not None:
            raise ValueError("budget goes with a method's name, such as reduction='str'; a Reduction has its own")
        if not isinstance(reduction, Reduction | None):
            raise TypeError(f"reduction must be a Reduction or a method's name such as 'str', got {reduction!r}")
        if reduction is not None and reduction.method != "none" and model.family.METHODS is not None:
            for name, _ in methods.parse_method(reduction.method):
                if name not in model.family.METHODS:
                    took = ", ".join(model.family.METHODS)
                    raise ValueError(f"{model.name}: reduction {name!r} is not for this model; it takes {took}")
        self.model, self.reduction, self.decode_capacity = model, reduction, decode_capacity
        self.switch, self.budget = switch(model, thinking), think_budget(model, think_tokens)
        self.seconds: dict[str, float] = {}
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.clips: list[Clip] = []
        self.config = model.config
        if video is not None:
            with self._timed("video"):
                self._read(video, frames, rule, clock)
        self._visual: tuple[PixelSelection | None, Any] | None = None  # what of the video was encoded, and its tokens
        self._memories = VideoMemories()
        self._shared_seconds = 0.0  # that the memory held took
        self._held: CachedTurn | None = None

    def _read(self, video: Any, frames: int | None, rule: str, clock: str) -> None:
        model = self.model
        if self.config.vision is None:
            raise ValueError(f"{model.name} reads text alone; ask without a video")
        most = most_frames(self.config, model.buckets)
        if frames is None:
            frames = default_frames(self.config, model.buckets)
        if not 1 <= frames <= most:
            raise ValueError(f"frames must lie in 1..{most} for {model.name}, got {frames}")
        clip, self.config = shown_clip(model.family, self.config, video, frames=frames, rule=rule, clock=clock)
        self.clips = [clip]

    def shown(self) -> np.ndarray:
        """What the model looks at, uint8 [F,h,w,3]: the frames of a video, the tiles of an image."""
        (clip,) = self.clips
        if clip.kind == "video":
            assert clip.frames is not None  # `shown_clip` was asked for them
            return clip.frames
        (layout,) = self._layouts([user_message("", self.model.style, ["image"])], (1, 1, 1))
        pixels = self.model.family.pixels(self.config, self.clips, layout.frames)[0]
        return pixels if pixels.ndim == 4 else pixels[:, 0]  # an image that is shown twice, as a tubelet

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add a phase's seconds, those of compiling apart."""
        compiled, start = self.model.programs.compile_seconds, time.perf_counter()
        yield
        compiled = self.model.programs.compile_seconds - compiled
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start - compiled
        if compiled:
            self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiled

    # -- one turn ---------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        *,
        max_new: int | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        show: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question. show: called with each new piece of text as it comes. A model that knows no conversation gets every
        question by itself, about the same video."""
        check_question(question)
        model = self.model
        max_new = model.check_max_new(max_new)
        talks = hasattr(model.tokenizer, "chat")
        begun = any(message["role"] == "user" for message in self.messages)
        kinds = [] if talks and begun else [clip.kind for clip in self.clips]
        message = user_message(question, model.style, kinds)
        messages = [*self.messages, message] if talks else [message]

        batch, plan = model.batch_of(
            lambda factors: self._layouts(messages, factors), self.reduction, config=self.config
        )
        (layout,) = self._layouts(messages, (1, 1, 1) if plan is None else plan.pool_factors)
        most = max_new + (0 if self.budget is None else self.budget.decode_capacity)
        held, rest = self._held, self._rest(layout, plan, most)
        if held is None or rest is None:
            self._held = None
            logits, caches, answer = self._prefill(batch, layout, plan, most)
            free = most + self.decode_capacity
        else:
            answer = dataclasses.replace(held.answer, continued=True, saved=0.0)
            padded = model.buckets.pick("text", len(rest))
            ids = np.zeros((1, padded), np.int32)
            ids[0, : len(rest)] = rest
            with self._timed("prefill"):
                logits, caches = jax.block_until_ready(
                    model.extend(ids, (np.arange(padded) < len(rest))[None] * np.int32(1), held.caches)
                )
            free = held.free - padded
        opened = opens(model.tokenizer, layout.ids)
        answer.tokens, state = self._decode(logits, caches, max_new, sampling, seed, show, opened)
        answer.text, answer.thinking, answer.unfinished = read_reply(model.tokenizer, answer.tokens, opened)
        answer.seconds, self.seconds = self.seconds, {}
        fed = answer.tokens[: int(state.steps) - 1]  # the token that was chosen last did not go in
        whole = Layout(
            np.concatenate([layout.ids, np.asarray(fed, np.int32)]),
            np.concatenate([layout.frame, np.full(len(fed), -1, np.int32)]),
            layout.frames,
        )
        self._held = CachedTurn(whole, state.caches, free - int(state.steps) + 1, answer)
        if talks:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _layouts(self, messages: list[Message], factors: tuple[int, int, int]) -> list[Layout]:
        model = self.model
        return [
            model.family.prompt(
                self.config,
                model.tokenizer,
                self.switch.messages(messages),
                self.clips,
                style=model.style,
                factors=factors,
                template_options=self.switch.options,
            )
        ]

    def _rest(self, layout: Layout, plan: ReductionPlan | None, max_new: int) -> np.ndarray | None:
        """The ids that the caches lack of a prompt; None where they cannot be gone on from."""
        held = self._held
        if held is None or _depends_on_query(plan) or _depends_on_query(held.answer.plan):
            return None
        size = len(held.layout.ids)
        same = len(layout.ids) > size and np.array_equal(layout.ids[:size], held.layout.ids)
        if not same or not np.array_equal(layout.frame[:size], held.layout.frame) or (layout.frame[size:] >= 0).any():
            return None
        rest = layout.ids[size:]
        fits = len(rest) <= self.model.buckets.text[-1]
        return rest if fits and self.model.buckets.pick("text", len(rest)) + max_new <= held.free else None

    def _prefill(self, batch: Any, layout: Layout, plan: ReductionPlan | None, max_new: int) -> tuple[Any, Any, Answer]:
        model, visual = self.model, None
        if self.clips:
            keep = None if plan is None else plan.pixel_selection
            if self._visual is None or self._visual[0] != keep:
                with self._timed("encode"):
                    self._visual = keep, jax.block_until_ready(self._encode(layout, keep))
            visual = self._visual[1]
        saved = 0.0
        if visual is not None and model.shares_video(batch, plan):
            before = self.seconds.get("prefill", 0.0)
            with self._timed("prefill"):
                make = lambda: model.build_video_memory(batch, visual, plan)  # noqa: E731
                visual, found = self._memories.get(self._memory_key(layout, plan), make)
                jax.block_until_ready(visual)
            if found:
                saved = self._shared_seconds
            else:
                self._shared_seconds = self.seconds["prefill"] - before
        with self._timed("prefill"):
            prefilled = jax.block_until_ready(model.prefill(batch, visual, plan, max_new + self.decode_capacity))
        self._memories.spill()
        kept = to_host(prefilled.decoder.kept)[:, 0].sum(-1)
        layers = len(self.config.pattern) if plan is None else plan.layers
        stages = [(0, layers)] if plan is None else list(plan.stages)
        listed = [(first, stop - 1, int(count)) for (first, stop), count in zip(stages, kept, strict=True)]
        answer = Answer(
            "",
            [],
            sum(len(clip.seconds) for clip in self.clips),
            listed,
            {},
            False,
            self._survivors(prefilled, layout, plan),
            plan,
            self,
            saved=saved,
        )
        return prefilled.logits, prefilled.decoder.caches, answer

    def _encode(self, layout: Layout, keep: PixelSelection | None) -> Any:
        """Visual tokens of the clip, all or those that a plan chooses before the tower."""
        bucket = self.model.buckets.pick("frames", layout.frames)
        pixels = self.model.family.pixels(self.config, self.clips, bucket)
        if keep is None:
            return self.model.encode(pixels, attention=methods.needs_attention(self.reduction))
        return self.model.encode(pixels, keep=keep, frame_count=[layout.frames])

    def _memory_key(self, layout: Layout, plan: ReductionPlan | None) -> tuple[Any, ...]:
        """What a video memory depends on: of a hybrid the prompt as far as it is in it, and how long rows are where they are cut."""
        if plan is None or not plan.depends_on_query:
            return (plan,)
        end = int(np.flatnonzero(layout.frame >= 0)[-1]) + 1
        cut = self.model.mesh is not None and self.model.mesh.shape["sequence"] > 1
        length = plan.row_length(0) if cut else None
        return (plan.prefix_key, length, layout.ids[:end].tobytes(), layout.frame[:end].tobytes())

    def _survivors(self, prefilled: Any, layout: Layout, plan: ReductionPlan | None) -> np.ndarray:
        """bool [F,rows,cols]: which visual tokens entered the last layer."""
        if not self.clips:
            return np.zeros((0, 0, 0), bool)
        rows, cols = self.config.vision.grid
        factors = (1, 1, 1) if plan is None else plan.pool_factors
        shape = (-(-layout.frames // factors[0]), rows // factors[1], cols // factors[2])
        alive = np.zeros(shape, bool)
        if plan is None or not (plan.drops or plan.drops_input):
            alive[:] = True
        else:
            survivors = prefilled.decoder.survivors
            last = survivors[-1] if survivors else (prefilled.decoder.tokens.index, prefilled.decoder.tokens.visual)
            index, visual = (part[0] for part in to_host(last))
            # index in the prompt -> which visual token
            visual_index = np.cumsum(layout.frame >= 0) - 1
            alive.reshape(-1)[visual_index[index[visual]]] = True
        for axis, factor in enumerate(factors):
            alive = np.repeat(alive, factor, axis=axis)
        return alive[: layout.frames]

    def _decode(
        self,
        logits: Any,
        caches: Any,
        max_new: int,
        sampling: Sampling | None,
        seed: int,
        show: Callable[[str], None] | None,
        opened: bool,
    ) -> tuple[list[int], Any]:
        """Tokens of the answer, and where decoding stands; in pieces where somebody watches. opened: the prompt began reasoning."""
        model, seeds = self.model, np.asarray([seed], np.int32)
        tokens: list[int] = []
        answering = False
        shown, state, left = "", None, max_new + (0 if self.budget is None else self.budget.decode_capacity)
        while left:
            piece = left if show is None else min(PIECE, left)
            with self._timed("decode"):
                new, lengths, state = model.decode(
                    logits,
                    caches if state is None else state,
                    seeds,
                    max_new=piece,
                    sampling=sampling,
                    budget=self.budget,
                    inside=[opened],
                    answer=None if self.budget is None else max_new,
                )
            logits = None
            tokens += new[0, : lengths[0]].tolist()
            left -= piece
            done = left == 0 or bool(to_host(state.done)[0])
            if show is not None:
                text, thinking, unfinished = read_reply(model.tokenizer, tokens, opened)
                if thinking and not unfinished and not answering:  # the reasoning was shown as it came
                    answering = True
                    show("\n" * bool(shown))
                    shown = ""
                if text.startswith(shown) and (done or not text.endswith(_UNFINISHED)):
                    show(text[len(shown) :])
                    shown = text
            if done:
                break
        return tokens, state
