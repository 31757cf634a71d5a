"""The command's options for published benchmarks, and the tasks that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

from hybridvlm.eval.tasks import MODULES, Published, Task, TaskOptions, build_task
from hybridvlm.options import InputError

LIMIT = 100  # questions of the embedded benchmark and of JSONL files where nobody says; of published benchmarks all
SANITY = {"no_video": "no-video", "shuffle_frames": "shuffle-frames"}
# options that `Published` is made of, as they are where nobody gives them
IDLE = {
    "data": None, "protocol": None, "missing": "fail", "incomplete": "fail", "limit_videos": 0, "verify": "quick",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of published benchmarks."""
    group = parser.add_argument_group("published benchmarks (nothing is downloaded)")
    add = group.add_argument
    add(
        "--data",
        type=pathlib.Path,
        metavar="DIR",
        help="folder that holds them: official archives unpacked, hub snapshots, …",
    )
    add(
        "--protocol",
        metavar="NAME",
        help="prompt, frames, subtitles and parser, see --list (default: each one's first)",
    )
    missing = "questions whose video cannot be read: stop (default), count as wrong, or leave out and say so"
    add("--missing", default="fail", choices=("fail", "wrong", "skip"), help=missing)
    add(
        "--incomplete",
        default="fail",
        choices=("fail", "ok"),
        help="go on with an annotation file that lacks questions",
    )
    add(
        "--limit-videos",
        type=int,
        default=0,
        metavar="N",
        help="N whole videos of each, evenly over the file (default: all)",
    )
    verify = "what tells videos of one name apart: size and both ends (quick, default), or all bytes (full)"
    add("--verify", default="quick", choices=("quick", "full"), help=verify)
    add("--no-video", action="store_true", help="one more row per benchmark: its questions without any video")
    add("--shuffle-frames", action="store_true", help="one more row per benchmark: the frames in another order")
    add("--format", default="", choices=("", "lmms-eval"), help="write lmms-eval's results and samples files as well")
    module = "Python file or module that registers tasks of your own (hybridvlm/eval/README.md); may be given again"
    add("--task-module", action="append", default=[], metavar="FILE", help=module)


def build(name: str, settings: TaskOptions, options: argparse.Namespace) -> list[Task]:
    """The task of a name, and the further ones that sanity rows of it take.

    Args:
        name: of a task.
        settings: what all tasks share; the limit and what published benchmarks need are filled in.
        options: of the command line.
    """
    from hybridvlm.eval.tasks.benchmark import BenchmarkTask

    own = Published(
        options.data,
        options.protocol,
        options.missing,
        options.incomplete == "ok",
        options.limit_videos,
        options.verify,
    )
    default = 0 if name in MODULES else LIMIT
    settings = dataclasses.replace(settings, limit=default if options.limit is None else options.limit, published=own)
    tasks = [build_task(name, settings)]
    if isinstance(tasks[0], BenchmarkTask):
        if settings.limit == LIMIT and options.limit is None:  # one from outside the package: what it is was not known
            settings = dataclasses.replace(settings, limit=0)
            tasks = [build_task(name, settings)]
        for flag, sanity in SANITY.items():
            if getattr(options, flag):
                changed = dataclasses.replace(settings, published=dataclasses.replace(own, sanity=sanity))
                tasks.append(build_task(name, changed))
    return tasks


def check(options: argparse.Namespace, names: Sequence[str]) -> None:
    """InputError for options that are wrong whatever the tasks are, or name one task twice."""
    if options.limit_videos < 0:
        raise InputError(f"--limit-videos must be at least 0, got {options.limit_videos}")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"--tasks names {twice[0]!r} twice")


def refuse_idle(options: argparse.Namespace, tasks: Sequence[Task]) -> None:
    """InputError for options that none of the tasks takes.

    Args:
        options: of the command line.
        tasks: that were built. One from outside the package may read what `TaskOptions.published` holds, whatever it is.
    """
    from hybridvlm.eval.tasks.benchmark import BenchmarkTask
    from hybridvlm.eval.tasks.jsonl import JsonlTask
    from hybridvlm.eval.tasks.needle import Needle, NeedleScenes

    benchmarks = [task for task in tasks if isinstance(task, BenchmarkTask)]
    if options.format and not any(task.benchmark.lmms for task in benchmarks):
        raise InputError(f"--format {options.format} is for benchmarks that lmms-eval has; --tasks names none")
    if benchmarks:
        return
    flags = list(SANITY)
    if all(type(task) in (Needle, NeedleScenes, JsonlTask) for task in tasks):
        flags = [*IDLE, *flags]
    given = [flag for flag in flags if getattr(options, flag) != IDLE.get(flag, False)]
    if given:
        flag = given[0].replace("_", "-")
        raise InputError(f"--{flag} is for published benchmarks ({', '.join(MODULES)}); --tasks names none")


def left_out(options: argparse.Namespace, tasks: Sequence[Task]) -> list[str]:
    """A line on the tasks of which --format writes no file, if there are some beside others."""
    from hybridvlm.eval.tasks.benchmark import BenchmarkTask

    without = [task.name for task in tasks if not (isinstance(task, BenchmarkTask) and task.benchmark.lmms)]
    if not options.format or not without:
        return []
    return [f"--format {options.format} writes no files of {', '.join(without)}: not among lmms-eval's tasks here"]


def listing() -> str:
    """Benchmarks with their protocols, a line each."""
    from hybridvlm.eval.benchmarks import published

    lines = []
    for name in MODULES:
        benchmark = published(name)
        protocols = ", ".join(protocol.name for protocol in benchmark.protocols)
        lines.append(f"  {name:<20} {benchmark.title} ({benchmark.questions:,} questions): {protocols}")
    return "\n".join(lines)
