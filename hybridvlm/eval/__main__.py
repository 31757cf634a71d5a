"""`python -m hybridvlm.eval`: dense and reduced variants of a model, answered questions, one honest table."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from hybridvlm.config import BUDGET_KINDS, Schedule, ScoreOptions
from hybridvlm.options import add_compilation_cache, add_distributed, add_drop_text, add_mesh, add_thinking

STOPPED = "stopped; what was answered is kept, and the same command goes on from there"
METHODS = "none,str-lookahead,str,uniform-input"
EXAMPLES = """\
examples:
  python -m hybridvlm.eval
      the embedded model on 100 questions of the embedded benchmark, dense and three methods at 25%
  python -m hybridvlm.eval --limit 20 --methods str
      a quick look
  python -m hybridvlm.eval --model tiny-reduced --limit 0 --methods str,random,oneshot-mamba,fastv --match-flops str
      the finetuned model on all questions, every rule at the predicted FLOPs of str
  python -m hybridvlm.eval --model tiny-reduced --methods str,vidcom2,frames,divprune --match total-flops
      rivals at the predicted FLOPs of str, scoring and vision tower included
  python -m hybridvlm.eval --methods str,evs:0.5+str:0.5 --budgets 0.1,0.25,0.5
      several budgets; methods compose, one before the decoder and one inside it
  python -m hybridvlm.eval --methods str --score decay=on sign=relu --schedule shape=linear start=2
      other score options and another schedule
  python -m hybridvlm.eval --tasks my/questions.jsonl --frames 32 --output results/mine
      your own videos
  python -m hybridvlm.eval --mesh data=4,tensor=2
      on the eight devices of this host: two hold a copy of the model between them, and four such pairs share a batch
  python -m hybridvlm.eval --model DIR --tasks videomme,lvbench --data /data --methods str --missing skip
      published benchmarks from files of your own, by their official protocols (--protocol, --list)
  python -m hybridvlm.eval compare results/a results/b --paired
      two runs, or logs of lmms-eval, on the same questions
  python -m hybridvlm.eval --rescore results/a/samples.jsonl
      parse and score the replies of a run, or of lmms-eval, again; no model is needed

A run that was killed goes on where it stopped when it is started again with the same options.

Several processes share a run, each with a part of the videos, those that cost most first; a model that the devices of one do not
hold, or for which --mesh has the devices of all, runs over all of them, and they answer every batch together. On a TPU slice or
under Slurm start this command on every host; by hand set JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
Process 0 writes the results; --output gs://bucket/folder writes them to a store. notebooks/README.md has the commands for each kind
of machine.

fields of a JSONL task, one question a line:
{fields}

A reply that reasons first is read after its closing tag; --think-tokens gives the reasoning tokens of its own. Questions on a file
that turns out damaged are not asked: they are counted apart, and the accuracy is that of the others.

files in --output: results.json (rows and metadata), report.md with two pictures, samples.jsonl (one line per answer); .lock while
a run is at work in there.
exit code: 0 done; 1 a run failed, what was answered before is kept, or no video of a task could be read; 2 a wrong option or
input, nothing was started; 143 told to end by SIGTERM, 130 by Ctrl-C: what was answered is kept, the same command goes on."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    from hybridvlm.eval import decoding
    from hybridvlm.eval.published import add_arguments
    from hybridvlm.eval.tasks.jsonl import FIELDS

    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.eval",
        description="Evaluate a model dense and under token reduction: accuracy with intervals, and what it costs.",
        epilog=EXAMPLES.format(fields=FIELDS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        default="tiny",
        help="packaged name (tiny, tiny-reduced, tiny-vamba) or checkpoint folder (default: tiny)",
    )
    tasks = "comma list of tasks: needle, needle-scenes, paths of .jsonl files, published benchmarks, see --list (default: needle)"
    add("--tasks", default="needle", help=tasks)
    add("--methods", default=METHODS, help=f"comma list, see --list; dense (none) always runs (default: {METHODS})")
    add("--budgets", default="0.25", help="comma list of shares of visual tokens to keep, in (0, 1] (default: 0.25)")
    limit = "N questions of each task, 0 for all (default: 100, of published benchmarks all; there whole videos, spread evenly)"
    add("--limit", type=int, help=limit)
    add("--frames", type=int, help="frames per video (default: 64 for needle, as many as ask looks at for files)")
    sampling = "frames of video files: uniform (first to last), middle (of equal spans), fps:R (default: uniform, or the protocol's)"
    add("--sampling", default="", metavar="RULE", help=sampling)
    add("--batch-size", type=int, default=8, help="questions per batch (default: 8)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="weights and activations")
    add("--buckets", nargs="+", default=[], metavar="KEY=N,N", help="static sizes: frames=16,64 text=16,64 max_new=8")
    add("--output", help="folder for results, or gs://bucket/folder (default: results/<model>-<task>)")
    add("--seed", type=int, default=0, help="of the random methods (default: 0)")
    kind = "what a budget counts: the average over layers (default), the last layer, predicted decoder FLOPs, or those from pixels"
    match = (
        "solve every other method to what METHOD (default: str) has at the same budget: the mean share of visual tokens, predicted "
        "decoder FLOPs, or total-flops, with scoring and vision tower"
    )
    prompt = "text asked for a JSONL question; {question} and {options} (one per line, with letters) are filled in"
    add("--kind", default=None, choices=BUDGET_KINDS, help=kind)
    add("--match", metavar="KIND[:METHOD]", help=match)
    add("--match-flops", metavar="METHOD", help="the same as --match flops:METHOD")
    add("--split", default="test", choices=("test", "val"), help="split of the embedded benchmark (default: test)")
    add("--score", nargs="+", default=[], metavar="KEY=VALUE", help="score options: " + _keys(ScoreOptions))
    add("--schedule", nargs="+", default=[], metavar="KEY=VALUE", help="shares over depth: " + _keys(Schedule))
    first = "no drop before this layer has run, as --schedule start=N: later makes further questions on a video cheaper"
    add("--first-drop", type=int, metavar="N", help=first)
    add_drop_text(parser)
    add("--compare", metavar="METHOD", help="method that all others are paired with (default: str, if it runs)")
    add("--prompt", default="{question}", metavar="TEXT", help=prompt)
    add(
        "--allow-special-tokens",
        action="store_true",
        help="control tokens in what people write count",
    )
    add("--system", default="", metavar="TEXT", help="a system message, such as /no_think")
    add_thinking(parser)
    add_mesh(parser)
    add_distributed(parser)
    add_compilation_cache(parser)
    decoding.add_arguments(parser)
    add_arguments(parser)
    rescored = "samples file of this library or of lmms-eval, or a folder with some: parse its replies again, and stop"
    add("--rescore", metavar="FILE", help=rescored)
    add("--list", action="store_true", help="list methods and tasks, and stop")
    return parser


def _keys(cls: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def listing() -> str:
    """Methods and tasks, with one line on each."""
    from hybridvlm.eval import published
    from hybridvlm.eval.tasks import FILE_TASK, TASKS
    from hybridvlm.reduction import describe_methods

    tasks = [f"  {name:<13}  {what}" for name, (_, what) in TASKS.items()] + [f"  {'FILE.jsonl':<13}  {FILE_TASK}"]
    return (
        f"methods:\n{describe_methods()}\n\ntasks:\n"
        + "\n".join(tasks)
        + f"\n\npublished benchmarks, from --data, and their protocols:\n{published.listing()}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["compare"]:
        from hybridvlm.eval import compare

        return compare.main(argv[1:])
    options = build_parser().parse_args(argv)
    try:
        if options.list:
            from hybridvlm.eval.tasks import load_tasks

            load_tasks(options.task_module)
            print(listing())
            return 0
        if options.rescore is not None:
            from hybridvlm.eval import rescore

            print(rescore.report(options.rescore))
            return 0
    except (ValueError, OSError) as error:
        return _fail(str(error), 2)
    try:
        return _run(options, shlex.join(["python", "-m", "hybridvlm.eval", *argv]))
    except KeyboardInterrupt:
        return _fail(STOPPED, 130)


def _run(options: argparse.Namespace, command: str) -> int:
    from jax.errors import JaxRuntimeError

    from hybridvlm.compilation import keep_compiled
    from hybridvlm.distributed import (
        TERMINATED,
        OtherProcessFailed,
        Terminated,
        agree,
        ends_on_sigterm,
        initialize,
        refuse_alone,
        together,
    )
    from hybridvlm.errors import said
    from hybridvlm.eval.evaluate import Evaluation, prepare
    from hybridvlm.files import FolderBusy, folder_lock
    from hybridvlm.reduction import PlanMismatch

    failures = (PlanMismatch, JaxRuntimeError, OSError, ValueError, OtherProcessFailed, FolderBusy, MemoryError)

    def everywhere(step: Callable[[], Any]) -> Any:
        """What a step gives; where it fails in one process, all of them raise."""
        result = failure = None
        try:
            result = step()
        except failures as error:
            failure = error
        agree(failure)
        return result

    evaluation = None
    with contextlib.ExitStack() as held:
        try:
            keep_compiled(options.compilation_cache)
            process = initialize(mode=options.distributed)
            with ends_on_sigterm(), together():
                checked = everywhere(lambda: prepare(options))
                everywhere(lambda: refuse_alone(checked.folder))
                lock = folder_lock(checked.folder, "an evaluation") if process.first else contextlib.nullcontext()
                everywhere(lambda: held.enter_context(lock))
                made = everywhere(lambda: Evaluation(checked, command))
                everywhere(made.check_same)
                evaluation = made
                evaluation.run()
        except Terminated as error:
            return _fail(f"{error}: {STOPPED}", TERMINATED)
        except failures as error:
            if isinstance(error, OtherProcessFailed) and error.terminated:
                return _fail(f"{error}: {STOPPED}", TERMINATED)
            if evaluation is None:
                return _fail(said(error), 2)
            return _fail(f"{said(error)}\nwhat was answered before is kept in {evaluation.store.path}", 1)
    return _fail("\n".join(evaluation.unread), 1) if evaluation.unread else 0


def _fail(text: str, code: int) -> int:
    for line in text.splitlines():
        if line:
            print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    from hybridvlm.distributed import leave

    leave(main())
