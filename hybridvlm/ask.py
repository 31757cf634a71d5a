"""Ask a question about a video or an image: `python -m hybridvlm.ask VIDEO QUESTION`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hybridvlm.config import BUDGET_KINDS
from hybridvlm.errors import said
from hybridvlm.options import THINKING, add_compilation_cache, add_drop_text, add_mesh, add_thinking

if TYPE_CHECKING:
    from hybridvlm.checkpoints.describe import Description
    from hybridvlm.config import Reduction
    from hybridvlm.inference.conversation import Answer
    from hybridvlm.inference.model import Model
    from hybridvlm.models.media import Clip
    from hybridvlm.reduction import ReductionPlan

DEFAULT = "tiny-reduced"
GRAMMAR = """The embedded model knows the embedded benchmark alone: 64 frames of 4 x 4 cells, and in each cell an item (a piece of
clothing) with a border in one of 16 colours and two small tags that spell the number of a frame. It takes any video or image,
but on others than its own it can only guess. A question is four words:

  <colour>@t<frame> <t<frame>|none> <type> ?

The first names an item: the one with that border in that frame (t00 to t63). The types, with none as second word:
  what            the item's class             where           its cell, c0 to c15
  tag1, tag2      the colour of a tag
  class-pointed   the class in the same cell of the frame that its tags spell
  class-same      the class of the item with the same border in that frame
and with a frame as second word:
  class-at        the class in the same cell of that frame

An answer is one word. One example of each:"""


def examples() -> list[str]:
    """Questions of the embedded benchmark, one of each kind."""
    from hybridvlm.tiny import needle

    shown: dict[str, str] = {}
    for _, questions in needle.split_questions("val", videos=4):
        for kind, text in zip(questions.type_names(), questions.texts(), strict=True):
            shown.setdefault(kind, text)
    return [f"  {text:<36} ({kind})" for kind, text in sorted(shown.items())]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.ask", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("video", help="a video file or an image")
    add("question", help="in the model's language; the embedded model has a grammar of its own (--grammar)")
    add("--model", default=DEFAULT, help="a checkpoint folder, owner/name on the hub, or a packaged name (%(default)s)")
    add("--revision", default=None, help="commit, tag or branch on the hub")
    add("--cache", default=None, help="folder for an Orbax copy of a published checkpoint")
    add("--dtype", default=None, help="of weights and activations, such as bfloat16 (default: as stored)")
    add("--frames", type=int, default=None, help="most frames to look at (default: 32, or what the model was made for)")
    add("--rule", default="uniform", help="which frames: uniform, middle, fps:2, ... (see hybridvlm/video/sampling.py)")
    add("--clock", default="exact", help="time stamps: exact, or milliseconds (as vLLM counts)")
    add("--reduction", default=None, help="method to drop visual tokens by, such as str or evs:0.5+str:0.5")
    add("--budget", type=float, default=None, help="share of visual tokens under --reduction (default: 0.25)")
    add("--kind", default=None, choices=BUDGET_KINDS, help="how the budget is counted")
    first = "no drop before this layer has run: later makes further questions cheaper (default: the checkpoint's own schedule; "
    first += "with --follow-up and none of its own a sixth of the depth, where further questions then share layers)"
    add("--first-drop", type=int, default=None, metavar="N", help=first)
    add_drop_text(parser)
    add(
        "--allow-special-tokens",
        action="store_true",
        help="control tokens in what people write count",
    )
    add("--system", default="", help="a system message, such as /no_think")
    add("--max-new", type=int, default=None, help="most tokens of an answer")
    add_thinking(parser)
    add_mesh(parser)
    add_compilation_cache(parser)
    add("--follow-up", action="store_true", help="read further questions from standard input, one a line")
    add(
        "--show-kept",
        metavar="FILE.png",
        default=None,
        help="write a contact sheet of what survived, of the last question",
    )
    add("--grammar", action="store_true", help="explain the embedded model's questions, and answer nothing")
    return parser


def report(answer: Answer, model: Model) -> str:
    """What an answer took, in lines."""
    from hybridvlm.inference.thinking import UNFINISHED

    plan, first = answer.plan, answer.stages[0][2]
    lines = [f"{answer.frames} frames, {first} visual tokens, {len(answer.tokens)} tokens answered"]
    if answer.unfinished:
        lines[0] += f"; no answer: the reply {UNFINISHED} (--think-tokens gives it some of its own, --max-new more)"
    if answer.continued:
        lines[0] += "; went on from the caches"
    if plan is not None:
        before = plan.keep(0, first) if plan.drops_input else first
        lines.append(f"{plan.method}: predicted decoder FLOPs {plan.flop_ratio:.3f} of dense ({before} enter layer 0)")
        for begin, end, count in merged(answer.stages):
            lines.append(f"  layers {begin:>3} to {end:>3}: {count:>7} visual tokens ({count / max(1, first):.1%})")
    seconds = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in answer.seconds.items())
    if answer.saved and plan is not None:
        seconds += f"; {answer.saved:.2f} s saved: layers 0 to {plan.drops[0]} had seen the video"
    lines.append(seconds)
    return "\n".join(lines)


def looked_at(args: argparse.Namespace, found: Description) -> int:
    """How many frames of the video, or tiles of the image, a model will be shown; nothing is decoded for it."""
    from hybridvlm.models.family import family_for
    from hybridvlm.video import default_frames, shown_clip

    config, vision = found.config, found.config.vision
    frames = args.frames or default_frames(config, found.buckets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said once it is read
            rules = {"frames": frames, "rule": args.rule, "clock": args.clock}
            clip, _ = shown_clip(family_for(config), config, args.video, **rules, pixels=False)
    except (ValueError, OSError):
        return frames
    return len(clip.seconds) if clip.kind == "video" else max(vision.temporal_patch, vision.max_tiles + 1)


def merged(stages: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Stages (first layer, last layer, tokens) with neighbours of the same number of tokens as one."""
    runs = [list(group) for _, group in itertools.groupby(stages, key=lambda stage: stage[2])]
    return [(run[0][0], run[-1][1], run[0][2]) for run in runs]


def foreign(model: Model, clips: Sequence[Clip]) -> str:
    """A warning where the embedded model is asked about what is no video of its benchmark; else ""."""
    from hybridvlm.tiny.tiles import FRAME

    vision = model.config.vision
    own = all(clip.kind == "video" and clip.size == (FRAME, FRAME) for clip in clips)
    if vision is None or vision.kind != "stem" or own:
        return ""
    return (
        f"warning: {model.name} knows the videos of its own benchmark alone ({FRAME} x {FRAME} pixels); here it guesses"
    )


def asked(args: argparse.Namespace) -> tuple[str, float | None, str | None, int | None, str | None]:
    """The options of `Model.reduction_for`."""
    return args.reduction, args.budget, args.kind, args.first_drop, args.drop_text


def for_many_questions(model: Model, reduction: Reduction | None) -> Reduction | None:
    """A reduction that leaves the first layers to all questions on a video, where it shares them at all and its budget can then be met
    whenever it can be now."""
    from hybridvlm.reduction import BudgetError
    from hybridvlm.reduction.schedules import SHARED_DEPTH

    if reduction is None:
        return None
    start = int(SHARED_DEPTH * len(model.config.pattern))
    late = dataclasses.replace(reduction, schedule=dataclasses.replace(reduction.schedule, start=start))

    def planned(reduction: Reduction, frames: int, text: int) -> ReductionPlan | None:
        try:
            return model.plan(reduction, frames, text)
        except BudgetError:
            return None

    # what text adds makes some budgets of few frames impossible
    for frames, text in itertools.product(model.buckets.frames, model.buckets.text):
        plan = planned(late, frames, text)
        if plan is None and planned(reduction, frames, text) is not None:
            return reduction
        if plan is not None and not (plan.depends_on_query and model.family.memory_serves(plan)):
            return reduction
    return late


def questions(first: str, more: bool) -> Iterator[str]:
    """The first question, then those on standard input."""
    yield first
    if more:
        if sys.stdin.isatty():
            print("further questions, one a line; an end of file (Ctrl-D) ends", file=sys.stderr)
        for line in sys.stdin:
            if line.strip():
                yield line.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 2 with one line on standard error where the input cannot be used."""
    if "--grammar" in (sys.argv[1:] if arguments is None else arguments):
        print("\n".join([GRAMMAR, *examples()]))
        return 0
    args = parser().parse_args(arguments)
    try:
        return _answer(args)
    except (ValueError, OSError) as error:
        _complain(error, args)
        return 2
    except MemoryError as error:
        _complain(said(error), args)
        return 2
    except KeyboardInterrupt:
        print("\nhybridvlm.ask: stopped", file=sys.stderr)
        return 130


def _complain(error: Exception | str, args: argparse.Namespace) -> None:
    from hybridvlm.checkpoints.names import PACKAGED

    print(f"hybridvlm.ask: {error}", file=sys.stderr)
    if args.model in PACKAGED and "vocabulary" in str(error):
        print("hybridvlm.ask: --grammar explains the embedded model's questions", file=sys.stderr)


def _answer(args: argparse.Namespace) -> int:
    from hybridvlm.checkpoints.names import PACKAGED
    from hybridvlm.compilation import keep_compiled
    from hybridvlm.estimates import mesh_option
    from hybridvlm.inference.conversation import Conversation, check_question
    from hybridvlm.inference.model import load
    from hybridvlm.models.prompt import allow_special_tokens
    from hybridvlm.reduction.methods import named_reduction
    from hybridvlm.tokenizers.text import check_tokenizer
    from hybridvlm.video.sheet import contact_sheet

    check_question(args.question)
    keep_compiled(args.compilation_cache)
    if args.show_kept is not None and not pathlib.Path(args.show_kept).absolute().parent.is_dir():
        raise FileNotFoundError(f"--show-kept {args.show_kept}: its folder does not exist")
    if args.reduction is None and any(option is not None for option in asked(args)[1:]):
        raise ValueError("--budget, --kind, --first-drop and --drop-text go with --reduction, such as --reduction str")
    sizes = {"frames": lambda found: looked_at(args, found), "dtype": args.dtype, "revision": args.revision}
    if args.reduction is not None:
        sizes["reduction"] = lambda found: named_reduction(found.reduction, *asked(args))
    mesh = mesh_option(args.mesh, args.model, **sizes)
    model = load(args.model, mesh=mesh, revision=args.revision, cache=args.cache, dtype=args.dtype)
    check_tokenizer(model)
    if args.allow_special_tokens:
        allow_special_tokens(model.tokenizer)
    reduction = None if args.reduction is None else model.reduction_for(*asked(args))
    if args.follow_up and args.first_drop is None and model.reduction is None:
        reduction = for_many_questions(model, reduction)
    talks = hasattr(model.tokenizer, "chat")
    decode_capacity = 2 * model.buckets.text[0] + model.buckets.max_new if args.follow_up and talks else 0
    conversation = Conversation(
        model,
        args.video,
        frames=args.frames,
        rule=args.rule,
        clock=args.clock,
        reduction=reduction,
        system=args.system,
        decode_capacity=decode_capacity,
        thinking=THINKING[args.thinking],
        think_tokens=args.think_tokens,
    )
    if (note := foreign(model, conversation.clips)) and args.model in PACKAGED:
        print(note, file=sys.stderr)
    answered = False
    for question in questions(args.question, args.follow_up):
        try:
            answer = conversation.ask(question, max_new=args.max_new, show=lambda text: print(text, end="", flush=True))
        except ValueError as error:
            if not answered:
                raise
            _complain(error, args)  # a slip in a further question does not cost the video that was read
            continue
        answered = True
        print()
        print(report(answer, model), file=sys.stderr)
        if args.show_kept is not None:
            (clip,) = conversation.clips
            patch = model.config.tower.temporal_patch if clip.kind == "video" else 1
            frames = conversation.shown()
            kept = f"{answer.stages[-1][2]} of {answer.stages[0][2]} visual tokens in the last layer"
            method = "dense" if answer.plan is None else f"{answer.plan.method} at {answer.plan.budget:g}"
            caption = [f"question: {question}", f"answer: {answer.text}", f"{model.name}, {method}: {kept}"]
            aspect = clip.size[1] / clip.size[0] if clip.kind == "video" and all(clip.size) else None
            contact_sheet(frames, answer.survivors, args.show_kept, clip.seconds, patch, caption=caption, aspect=aspect)
            print(f"wrote {args.show_kept}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
