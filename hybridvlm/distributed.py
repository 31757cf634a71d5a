"""Several processes as one run: joining it from the environment, and bringing together what each process found."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


class Process(NamedTuple):
    """This process and how many there are."""

    index: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this one prints and writes for all."""
        return self.index == 0


def initialize(environment: Mapping[str, str] | None = None) -> Process:
    """Join the other processes of this run, if the environment says that there are any; call it before anything asks for devices.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID name a run by hand; under Slurm, Open MPI and on a
    slice of several TPU hosts JAX finds all three by itself. Called twice, it joins once. ValueError where only some of the three are
    set, or are no numbers.
    """
    environment = os.environ if environment is None else environment
    if not jax.distributed.is_initialized():
        given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
        if len(given) == 3:
            try:
                count, index = int(given[COUNT]), int(given[INDEX])
            except ValueError:
                raise ValueError(f"{COUNT} and {INDEX} must be whole numbers, got {given}") from None
            if not 0 <= index < count:
                raise ValueError(f"{INDEX} must lie in 0..{COUNT}-1 = 0..{count - 1}, got {index}")
            if count > 1:
                jax.distributed.initialize(given[ADDRESS], count, index)
        elif _cluster(environment) and not {COUNT, INDEX} & set(given):
            jax.distributed.initialize()
        elif given:
            raise ValueError(f"{ADDRESS}, {COUNT} and {INDEX} go together, got only {sorted(given)}")
    return here()


def _cluster(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started more than this process. A Slurm allocation alone has not: its steps have."""
    names = ["OMPI_COMM_WORLD_SIZE"] + ["SLURM_NTASKS"] * ("SLURM_STEP_NODELIST" in environment)
    tasks = max(int(environment.get(name) or 1) for name in names)
    return tasks > 1 or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def here() -> Process:
    """This process, as JAX counts."""
    return Process(jax.process_index(), jax.process_count())


def gather(part: bytes) -> list[bytes]:
    """What every process passes in, in their order; all of them have to call it."""
    if jax.process_count() == 1:
        return [part]
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.int32(len(part)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(part)] = np.frombuffer(part, np.uint8)
    rows = multihost_utils.process_allgather(padded) if padded.size else np.zeros((len(sizes), 0), np.uint8)
    return [bytes(np.asarray(row[:size])) for row, size in zip(rows, sizes, strict=True)]


class OtherProcessFailed(RuntimeError):
    """Another process of this run could not go on."""


def agree(error: BaseException | None) -> None:
    """Raise `error`, here where it came up, and OtherProcessFailed in all other processes; all of them have to call it."""
    told = gather(b"" if error is None else f"{type(error).__name__}: {error}".encode())
    if error is not None:
        raise error
    failed = {index: text.decode() for index, text in enumerate(told) if text}
    if failed:
        raise OtherProcessFailed("; ".join(f"process {index}: {text}" for index, text in failed.items()))
