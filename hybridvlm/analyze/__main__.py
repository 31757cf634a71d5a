"""Analyses of token reduction on any checkpoint: python -m hybridvlm.analyze NAME [options]; NAME --help tells them."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys

from hybridvlm.files import FolderBusy
from hybridvlm.options import add_compilation_cache

# name -> (module, what it answers). A module has add_arguments(parser) and run(options) -> exit code; its docstring is its
# help. It is imported only when it is asked for.
ANALYSES = {
    "sparsity": (
        "hybridvlm.analyze.sparsity",
        "how few tokens hold a layer's score; position bias; with and without decay",
    ),
    "stability": (
        "hybridvlm.analyze.stability",
        "do layers agree on which tokens matter: Jaccard, Kendall's tau, by type",
    ),
    "deletion": ("hybridvlm.analyze.deletion", "accuracy when exactly the needed tokens are deleted after a layer"),
    "ablate": (
        "hybridvlm.analyze.ablate",
        "which choices matter: layers, schedules, decay, budgets, rivals, seeds, Transformer baselines",
    ),
    "rivals": (
        "hybridvlm.analyze.rivals",
        "the methods that people compare with, alone and with str: accuracy and time from pixels",
    ),
    "probe": (
        "hybridvlm.analyze.probe",
        "what the model still holds of a token that was dropped: compression or dropping?",
    ),
    "lookahead": (
        "hybridvlm.analyze.lookahead",
        "which score finds what later attention reads: a layer's own, or the next attention layers'",
    ),
    "calibrate": (
        "hybridvlm.analyze.calibrate",
        "which layers' scores follow the question, and layer weights for str-calibrated",
    ),
    "search": (
        "hybridvlm.analyze.search",
        "which schedule loses least: p-sigmoid at a budget, g-search within a tolerance",
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run one analysis; 0 when it ran, 2 for a request that cannot be met, 130 when it was stopped."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__ + "\n\n" + "\n".join(f"  {name:10} {what}" for name, (_, what) in ANALYSES.items()))
        return 0 if argv else 2
    name = argv[0]
    if name not in ANALYSES:
        print(f"error: there is no analysis {name!r}; there are: {', '.join(ANALYSES)}", file=sys.stderr)
        return 2
    module = importlib.import_module(ANALYSES[name][0])
    parser = argparse.ArgumentParser(
        prog=f"python -m hybridvlm.analyze {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    add_compilation_cache(parser)
    options = parser.parse_args(argv[1:])
    options.command = shlex.join(["python", "-m", "hybridvlm.analyze", *argv])
    from hybridvlm.compilation import keep_compiled

    try:
        keep_compiled(options.compilation_cache)
        return module.run(options) or 0
    except (OSError, ValueError, FolderBusy) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "error: stopped; start the same command again (answers of ablate, rivals and --compare are kept)",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
