"""`python -m hybridvlm.train CONFIG ... [--set key=value ...]`: finetune a model under reduction."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence

from hybridvlm.options import add_compilation_cache, add_distributed

EXAMPLES = """\
examples:
  python -m hybridvlm.train train_tiny_reduced
      the embedded model under the 25% plan, by a config that comes with the package
  python -m hybridvlm.train train_tiny_reduced --set reduction.reduction.budget=0.125 output=runs/eighth
      the same at 12.5%
  python -m hybridvlm.eval --model runs/tiny-reduced/export --split val --methods str
      what came out of it

Several configs run one after the other, each read when the one before is done, so that it may begin from its result:
  python -m hybridvlm.train train_tiny_vamba_stage1 train_tiny_vamba_stage2

A run goes on where it stopped when it is started again with the same config; a folder of another config is refused.

files in output: run.json (the config), metrics.jsonl (a line per step), checkpoints/, export/ (for hybridvlm.load and hybridvlm.eval),
lora/ (the factors, where a config has rank).
A run that is told to stop, by SIGTERM or Ctrl-C, ends its step, saves and leaves; a second Ctrl-C leaves at once. A checkpoint that was
damaged on the disk is moved to checkpoints-damaged/, with a line that says why, and the run goes on from the newest one that is whole.
exit code: 0 done; 1 the run failed, its last whole checkpoint is kept; 2 a wrong config or input, or another training holds the folder:
nothing was started; 143 it was told to stop by SIGTERM, saved, and can be started again; 130 the same by SIGINT (Ctrl-C).

A config in Python (.py) is run as a program, with all rights of whoever starts it: take such files from nobody whom you would not let
type at your shell. JSON and YAML configs are data and run nothing."""


def fields_text() -> str:
    """The fields of a config, grouped, each with its type, its default and what it is."""
    from hybridvlm.options import field_help
    from hybridvlm.train.config import TrainConfig

    lines = ["fields of a config, each with its default (--set KEY=VALUE; lists and numbers as JSON has them):"]
    for group, fields in field_help(TrainConfig()).items():
        lines.append(f"\n  {group or 'the run'}")
        names = [f"{field.key}={field.default}" for field in fields]
        wide = min(44, max(map(len, names)))
        for name, field in zip(names, fields, strict=True):
            start = f"    {name:<{wide}}  {field.type}: "
            hang = " " * (wide + 6)
            lines += textwrap.wrap(f"{start}{field.text}", 118, subsequent_indent=hang, break_long_words=False)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.train",
        description="Finetune a model under token reduction.",
        epilog=f"{EXAMPLES}\n\n{fields_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="CONFIG",
        help="a .json, .yaml or .py file with the fields below (a .py file is run as a program), "
        "or the name of a config that comes with the package",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="change fields of the config (of each), such as data.text=16 optimizer.rate=1e-4",
    )
    add_distributed(parser)
    add_compilation_cache(parser)
    args = parser.parse_args(argv)

    from hybridvlm import distributed
    from hybridvlm.compilation import keep_compiled
    from hybridvlm.errors import said
    from hybridvlm.files import FolderBusy
    from hybridvlm.train import config_files, loop

    started = False
    try:
        keep_compiled(args.compilation_cache)
        distributed.initialize(mode=args.distributed)
        with distributed.together(but=(loop.Stopped,)):
            for name in args.configs:
                config = config_files.read(name, args.changes)
                run = loop.Run(config, say=lambda text: print(text, flush=True))
                started = True
                loop.guarded(run)
    except loop.Stopped as stop:
        print(stop, flush=True)
        return stop.code
    except KeyboardInterrupt:
        return _fail("stopped; start the same command again to go on from the last checkpoint", loop.INTERRUPTED)
    except FolderBusy as error:
        return _fail(str(error), 2)
    except (OSError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        return _fail(said(error), 1 if started else 2)
    return 0


def _fail(text: str, code: int) -> int:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    from hybridvlm.distributed import leave

    leave(main())
