"""Benchmarks: python -m hybridvlm.bench NAME [--json FILE] [options of NAME]; NAME --help tells them."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pathlib
import sys
from typing import Any

from hybridvlm.console import plain_table, print_table

# name -> (module, what it measures). A module has add_arguments(parser) and run(args) -> list of rows, dicts with the
# same keys (or TABLE = False, and they are not shown as one); its docstring is its help. It is imported only when it is asked for.
BENCHES = {
    "device": ("hybridvlm.bench.device", "what an accelerator can tell in minutes: parity, ops, the 12B, VAMBA"),
    "ssd": ("hybridvlm.bench.ssd", "implementations of the SSD op: forward, gradient, memory"),
    "vamba": (
        "hybridvlm.bench.vamba",
        "VAMBA-7B and Qwen2-VL-7B at true size, compiled ahead of time for TPUs",
    ),
    "attention": ("hybridvlm.bench.attention", "implementations of attention over whole rows"),
    "score": ("hybridvlm.bench.score", "implementations of the text-to-visual score"),
    "compact": ("hybridvlm.bench.compact", "dropping tokens from a row, by sorting and by counting"),
    "dtype": ("hybridvlm.bench.dtype", "the embedded model in bfloat16 against float32: kept tokens and accuracy"),
    "aot": ("hybridvlm.bench.aot", "a whole prefill compiled ahead of time for TPUs: memory, cost, compile time"),
    "train": ("hybridvlm.bench.train", "a whole step of training compiled ahead of time for TPUs, as aot"),
    "step": ("hybridvlm.bench.step", "a training step, dense and under reduction"),
    "prefill": ("hybridvlm.bench.prefill", "decoder prefill, dense and under reduction methods"),
    "decode": ("hybridvlm.bench.decode", "frames of an hour-long file, with OpenCV, decord and torchcodec"),
    "vs_transformers": ("hybridvlm.bench.vs_transformers", "prefill and decode, with transformers' NemotronH"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark; 0 when it ran, 2 for a request that cannot be met."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__ + "\n\n" + "\n".join(f"  {name:10} {what}" for name, (_, what) in BENCHES.items()))
        return 0 if argv else 2
    name = argv[0]
    if name not in BENCHES:
        print(f"bench: there is no benchmark {name!r}; there are: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    module = importlib.import_module(BENCHES[name][0])
    parser = argparse.ArgumentParser(
        prog=f"python -m hybridvlm.bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the rows to FILE as a JSON list")
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    if args.json is not None and not args.json.absolute().parent.is_dir():
        parser.error(f"--json: the folder {args.json.absolute().parent} does not exist")
    try:
        rows = module.run(args)
    except (OSError, ValueError) as error:
        print(f"bench {name}: {error}", file=sys.stderr)
        return 2
    if rows and getattr(module, "TABLE", True):
        print_table(_texts(rows), keys=_keys(rows), right=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text, a column per key, in the order in which keys first appear; None is shown as '-'."""
    return plain_table(_texts(rows), right=True)


def _texts(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: _cell(row.get(key)) for key in columns} for row in rows]


def _keys(rows: list[dict[str, Any]]) -> int:
    """How many columns name a row: those of text before the first one of numbers. A narrow terminal repeats them."""
    columns = list(_texts(rows)[0])
    names = itertools.takewhile(lambda key: all(isinstance(row.get(key), str) for row in rows), columns)
    return max(1, len(list(names)))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
