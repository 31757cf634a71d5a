"""What loading costs in addition to the model itself: `python -m hybridvlm.bench.load_memory`.

Writes a synthetic checkpoint in Nemotron-H's published layout, loads it in a process of its own, and prints that process's
largest resident size, its final one, and the difference, with the largest tensor. Linux alone counts this way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from hybridvlm.checkpoints import samples
from hybridvlm.checkpoints.tensors import INDEX, write_tensors
from hybridvlm.models import nemotron_vl

ALLOWED = 1_000_000_000  # bytes in addition to the finished model and its largest tensor
_BLOCK = 1 << 24  # values that are drawn once and written over and over


def synthetic_raw(gigabytes: float) -> dict[str, Any]:
    """A config.json whose weights take about that many gigabytes (1e9 bytes) in bfloat16, a few percent less."""
    scale = math.sqrt(max(gigabytes, 0.01) / 4.6)
    width = max(64, round(2560 * scale / 64) * 64)
    raw = samples.raw_config("nemotron_h") | {
        "vocab_size": max(512, round(131072 * scale)),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(1, width // 256),
        "head_dim": 64,
        "mamba_num_heads": width // 32,
        "mamba_head_dim": 64,
        "n_groups": 2,
        "ssm_state_size": 128,
        "layers_block_type": ["linear_attention", "mlp"] * 16 + ["full_attention", "mlp"],
    }
    return raw


def write_synthetic(path: pathlib.Path, gigabytes: float, shard_bytes: int = 1 << 30) -> int:
    """Write the checkpoint; returns the bytes of its largest tensor."""
    raw = synthetic_raw(gigabytes)
    shapes = nemotron_vl.weight_map(nemotron_vl.config_from_hf(raw)).shapes()
    block = (0.02 * np.random.default_rng(0).standard_normal(_BLOCK, np.float32)).astype(ml_dtypes.bfloat16)

    def pieces(name: str) -> Iterator[np.ndarray]:
        left = math.prod(shapes[name])
        while left:
            yield block[: min(left, _BLOCK)]
            left -= min(left, _BLOCK)

    path.mkdir(parents=True)
    shards: list[dict[str, Any]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = (block.dtype, shape)
        held += size
    home: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        write_tensors(path / file, shard, pieces)
        home |= dict.fromkeys(shard, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": home}))
    (path / "config.json").write_text(json.dumps(raw))
    return max(2 * math.prod(shape) for shape in shapes.values())


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a load took: bytes of the weights, resident size before, at its largest and at the end, seconds."""

    weights: int
    before: int
    peak: int
    final: int
    seconds: float


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (largest so far) of this process, in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _child(path: str) -> None:
    import jax

    from hybridvlm.inference.model import load

    jax.block_until_ready(jax.numpy.zeros(8) + 1)  # the backend is there before the count begins
    before, start = resident("VmRSS"), time.perf_counter()
    model = load(path)
    jax.block_until_ready(model.params)
    seconds = time.perf_counter() - start
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    print(json.dumps([weights, before, resident("VmHWM"), resident("VmRSS"), seconds]))


def measure(path: pathlib.Path) -> Loaded:
    """Load a checkpoint in a process of its own."""
    command = [sys.executable, "-m", "hybridvlm.bench.load_memory", "--child", str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Loaded(*json.loads(done.stdout.splitlines()[-1]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sizes; 1 if loading held more than the largest tensor and 1 GB in addition to the model."""
    parser = argparse.ArgumentParser(prog="python -m hybridvlm.bench.load_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.6, help="of the checkpoint (%(default)s)")
    parser.add_argument("--folder", default=None, help="where it is written (default: a temporary folder)")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        _child(args.child)
        return 0
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = pathlib.Path(folder) / "synthetic"
        largest = write_synthetic(path, args.gigabytes)
        found = measure(path)
    extra = found.peak - found.final
    print(f"weights            {found.weights / 1e9:8.3f} GB, largest tensor {largest / 1e9:.3f} GB, bfloat16")
    print(f"resident before    {found.before / 1e9:8.3f} GB")
    print(f"resident at most   {found.peak / 1e9:8.3f} GB")
    print(f"resident at end    {found.final / 1e9:8.3f} GB, after {found.seconds:.1f} s")
    print(
        f"peak over final    {extra / 1e9:8.3f} GB; allowed: largest tensor + 1 GB = {(largest + ALLOWED) / 1e9:.3f} GB"
    )
    return int(extra > largest + ALLOWED or found.final < found.weights)


if __name__ == "__main__":
    raise SystemExit(main())
