"""What there is to learn of an accelerator in a few minutes, most important first, each row written as it comes.

parity    every kernel against its reference on this device, forward and gradient: whether it may be trusted
ops       SSD, attention, scores and compaction at the 12B's shapes, each against the least time by bytes and by FLOPs
decoder   Nemotron Nano 12B v2's decoder with random bfloat16 weights, 128 frames: prefill and decoding, dense and at 25%
vamba     VAMBA-7B with random bfloat16 weights, 1,024 frames: prefill, dense and at 25%

Nothing begins after --minutes; what was left out is said. A model that does not fit loses layers, and its rows say how many are left.
--lines FILE gets a JSON object a line. Compilation is part of the minutes, and never of a time. On CPU everything is tiny (--size
small) and shows that it runs. jax, flax, optax, orbax, chex and einops are all that has to be installed.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from hybridvlm.bench import timing
from hybridvlm.options import split

TABLE = False  # rows of one kind do not have the columns of another
SIZES = ("small", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m hybridvlm.bench device`."""
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="nothing begins after so many (default: 8)")
    add("--parts", default=",".join(PARTS), help=f"comma list, in this order (default: {','.join(PARTS)})")
    add("--size", choices=SIZES, help="of shapes and models (default: small on CPU, else full)")
    add("--rounds", type=int, default=5, help="measured runs of each program (default: 5)")
    add(
        "--lines",
        type=pathlib.Path,
        default=pathlib.Path("device.jsonl"),
        help="rows as they come (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, write each row as it comes, and return all."""
    start = time.monotonic()
    wanted = tuple(dict.fromkeys(split(args.parts, "--parts")))
    if not set(wanted) <= set(PARTS):
        raise ValueError(f"--parts takes a comma list of {', '.join(PARTS)}, got {args.parts!r}")
    if not args.minutes > 0 or args.rounds < 1:
        raise ValueError(f"--minutes must be above 0 and --rounds at least 1, got {args.minutes} and {args.rounds}")
    from hybridvlm.bench import device_models, device_ops
    from hybridvlm.ops.platforms import platform

    full = (args.size or ("small" if platform() == "cpu" else "full")) == "full"
    parts: dict[str, Callable[..., Iterator[tuple[dict[str, Any], Callable[[], Any]]]]] = {
        "parity": device_ops.parity,
        "ops": device_ops.ops,
        "decoder": device_models.decoder,
        "vamba": device_models.vamba,
    }
    rows = []
    with args.lines.open("w") as lines:

        def write(row: dict[str, Any]) -> None:
            row = {**row, "at_s": round(time.monotonic() - start, 1)}
            rows.append(row)
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            timing.say(", ".join(f"{key} {_short(value)}" for key, value in row.items()))

        write(_device(args, full))
        for part in wanted:
            _part(part, parts[part](full, args.rounds), start + 60 * args.minutes, write)
    return rows


PARTS = ("parity", "ops", "decoder", "vamba")


def _part(name: str, steps: Iterator[Any], end: float, write: Callable[[dict[str, Any]], None]) -> None:
    """The steps of a part, each (what it is, a function of its figures), until `end`; what fails is a row, and the next one runs."""
    while True:
        if time.monotonic() > end:
            write({"part": name, "left_out": "out of time"})
            return
        try:
            begin, measure = next(steps)
        except StopIteration:
            return
        except Exception as error:  # of what the steps share, such as weights that do not fit
            write({"part": name, "failed": _message(error)})
            return
        try:
            found = measure()
        except NotImplementedError as reason:
            found = {"refused": _message(reason)}
        except Exception as error:
            found = {"failed": _message(error)}
        for row in found if isinstance(found, list) else [found]:
            write({"part": name, **begin, **row})


def _device(args: argparse.Namespace, full: bool) -> dict[str, Any]:
    import jax

    from hybridvlm.hardware import memory_limit
    from hybridvlm.ops.platforms import compute_capability, platform

    device = jax.devices()[0]
    limit = memory_limit(device)
    return {
        "part": "device",
        "kind": device.device_kind,
        "platform": platform(),
        "capability": None if (found := compute_capability()) is None else ".".join(map(str, found)),
        "devices": jax.device_count(),
        "memory_gb": None if limit is None else limit * 1e-9,
        "jax": jax.__version__,
        "size": "full" if full else "small",
        "minutes": args.minutes,
    }


def _message(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
