"""What a run says of itself: one line now and then, a line of JSON for every step, and TensorBoard or W&B where asked."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import resource
import time
import uuid
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hybridvlm.config import to_dict
from hybridvlm.train.config import Logging, TrainConfig

FILE = "metrics.jsonl"
# Dense bfloat16 operations per second of one device, by the name that JAX gives its kind (makers' data sheets)
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(stated: float) -> tuple[float, str]:
    """(operations per second of one device, where the number is from): stated, of the table, or measured by a large product."""
    if stated:
        return stated, "stated"
    kind = jax.devices()[0].device_kind
    for name in sorted(PEAK, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK[name], "data sheet"
    n = 1024
    a = jnp.ones((n, n), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, "measured"


def memory_bytes() -> int:
    """Most memory used so far: of the fullest device where it says so, else of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = max((s.get("peak_bytes_in_use", 0) for s in stats), default=0)
    return used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Log:
    """Writes to a run folder from process 0; elsewhere it is silent.

    A run that goes on after step `done` cuts the file back to the steps up to it, so that every step has one line.
    """

    def __init__(self, folder: pathlib.Path, config: TrainConfig, done: int, say: Callable[[str], None] = print):
        self.options: Logging = config.logging
        self.active = jax.process_index() == 0
        self._say, self._writers = say, []
        self.path = folder / FILE
        if not self.active:
            return
        lines = _kept(self.path, done)
        part = self.path.with_suffix(".part")
        part.write_text("".join(lines))
        os.replace(part, self.path)
        self._file = self.path.open("a")
        if self.options.tensorboard:
            self._writers.append(_tensorboard(folder / "tensorboard"))
        if self.options.wandb:
            self._writers.append(_wandb(folder, config))

    def say(self, text: str) -> None:
        """One line for people."""
        if self.active:
            self._say(text)

    def step(self, record: dict[str, Any]) -> None:
        """One step's record: "step", plain numbers, and lists of one number per layer."""
        if not self.active:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        numbers = {key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "step"}
        for key, values in record.items():
            if isinstance(values, list):
                numbers |= {f"{key}/layer {layer:02d}": value for layer, value in enumerate(values)}
        for write in self._writers:
            write(record["step"], numbers)

    def close(self) -> None:
        if self.active:
            with contextlib.suppress(OSError):  # every step was flushed: what fails here has been told before
                self._file.close()


def _kept(path: pathlib.Path, done: int) -> list[str]:
    """The whole lines of steps up to `done`; a line that was cut off by a kill is none."""
    kept = []
    if path.is_file():
        for line in path.read_text().splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= done:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue
    return kept


def check_installed(options: Logging) -> None:
    """ValueError where a run is to write to something that is not installed."""
    if options.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("Logging.tensorboard needs the package tensorboardX, which is not installed")
    if options.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("Logging.wandb needs the package wandb, which is not installed")


def _tensorboard(folder: pathlib.Path) -> Callable[[int, dict[str, float]], None]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder))

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write


def _wandb(folder: pathlib.Path, config: TrainConfig) -> Callable[[int, dict[str, float]], None]:
    import wandb

    name = folder / "wandb-id"  # a run that goes on writes to the same one
    if not name.is_file():
        name.write_text(uuid.uuid4().hex)
    run = wandb.init(
        project=config.logging.wandb, id=name.read_text(), dir=str(folder), config=to_dict(config), resume="allow"
    )
    return lambda step, numbers: run.log(numbers, step=step)
