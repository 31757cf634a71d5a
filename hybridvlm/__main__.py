"""All commands after one: `hybridvlm eval ...` is `python -m hybridvlm.eval ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# name -> (module with a main(argv) -> exit code, what it does)
COMMANDS = {
    "eval": ("hybridvlm.eval.__main__", "accuracy and cost of a model, dense and with visual tokens dropped"),
    "ask": ("hybridvlm.ask", "answer a question about a video or an image"),
    "train": ("hybridvlm.train.__main__", "finetune a model under token reduction"),
    "plan": (
        "hybridvlm.plan.__main__",
        "whether a model fits on devices that need not be there, and how fast it could be",
    ),
    "analyze": ("hybridvlm.analyze", "which layers' scores follow the question, ablations, probes"),
    "bench": ("hybridvlm.bench.__main__", "time and memory, measured or by the compilers"),
}


def usage() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<8} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hybridvlm COMMAND ...   (the same as python -m hybridvlm.COMMAND ...)",
            "",
            *lines,
            "",
            "hybridvlm COMMAND --help explains each; hybridvlm --version says which this is",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, and return its exit code; 2 for a word that names none."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] == "--version":
        from hybridvlm import __version__

        print(f"hybridvlm {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(f"hybridvlm: no command {words[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])


if __name__ == "__main__":
    from hybridvlm.distributed import leave

    leave(main())
