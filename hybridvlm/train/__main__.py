"""`python -m hybridvlm.train CONFIG [--set key=value ...]`: finetune a model under reduction."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

EXAMPLES = """\
examples:
  python -m hybridvlm.train configs/train_tiny_reduced.yaml
      the embedded model under the 25% plan
  python -m hybridvlm.train configs/train_tiny_reduced.yaml --set reduction.reduction.budget=0.125 output=runs/eighth
      the same at 12.5%
  python -m hybridvlm.eval --model runs/tiny-reduced/export --split val --methods str
      what came out of it

A run goes on where it stopped when it is started again with the same config; a folder of another config is refused.

files in output: run.json (the config), metrics.jsonl (a line per step), checkpoints/, export/ (for hybridvlm.load and hybridvlm.eval),
lora/ (the factors, where a config has rank).
exit code: 0 done; 1 the run failed, its last whole checkpoint is kept; 2 a wrong config or input, nothing was started;
75 it was told to stop (SIGTERM), saved, and can be started again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridvlm.train",
        description="Finetune a model under token reduction.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="a .json, .yaml or .py file (hybridvlm/train/config.py says what it may hold)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="changes")
    args = parser.parse_args(argv)

    from hybridvlm import distributed
    from hybridvlm.train import config as configs
    from hybridvlm.train import loop

    started = False
    try:
        config = configs.read(args.config, args.changes)
        distributed.initialize()
        run = loop.Run(config, say=lambda text: print(text, flush=True))
        started = True
        loop.guarded(run)
    except loop.Stopped as stop:
        print(stop, flush=True)
        return loop.STOPPED
    except KeyboardInterrupt:
        return _fail("stopped; start the same command again to go on from the last checkpoint", 130)
    except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
        return _fail(str(error) or type(error).__name__, 1 if started else 2)
    return 0


def _fail(text: str, code: int) -> int:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
