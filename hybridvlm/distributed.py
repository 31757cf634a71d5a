"""Several processes as one run: joining it, bringing together what each process found, and ending together when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SILENCE = 45  # seconds without a sign of life after which JAX counts a process as lost, and ends the others
POLL = 1.0  # seconds between two looks at whether another process has failed
GRACE = 3.0  # seconds in which a process that hears of it may come to its own end
HEARD = 15.0  # seconds that a failing process waits for the others to hear of it


@dataclasses.dataclass(frozen=True)
class Process:
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
                jax.distributed.initialize(given[ADDRESS], count, index, **_silence())
        elif _cluster(environment) and not {COUNT, INDEX} & set(given):
            jax.distributed.initialize(**_silence())
        elif given:
            raise ValueError(f"{ADDRESS}, {COUNT} and {INDEX} go together, got only {sorted(given)}")
    return here()


def _silence() -> dict[str, Any]:
    """How JAX is told of SILENCE, where its release can be."""
    known = "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
    return {"heartbeat_timeout_seconds": SILENCE} if known else {}


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
        raise OtherProcessFailed(_reasons(failed))


@contextlib.contextmanager
def together(but: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """While this is entered, in all processes, an error that leaves it in one of them ends all, each with its reason.

    Where one fails, the others may wait in a collective for ever, which nothing can interrupt. So a thread looks for the news in JAX's
    coordination service; a process whose main thread does not leave by itself is ended there, after a line on standard error, with
    exit code 1. What was saved before stays. Of one process alone this does nothing; inside another `together` neither.

    Args:
        but: exceptions that are no failure, since all processes raise them together.

    Raises:
        OtherProcessFailed: instead of an error that came up here after another process had failed, which is mostly its consequence.
    """
    global _watch
    if jax.process_count() == 1 or _watch is not None:
        yield
        return
    _watch = _Watch()
    try:
        yield
    except but:
        raise
    except BaseException as error:
        others = _watch.failed()
        _watch.tell(error)
        if others and not isinstance(error, OtherProcessFailed):
            raise OtherProcessFailed(_reasons(others)) from error
        raise
    finally:
        _watch.close()
        _watch = None


def leave(code: int) -> NoReturn:
    """End this process with an exit code. Of several, one that failed does not wait for the others, as JAX would at the exit."""
    if code and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _Watch:
    """The thread after `together`, and what it and the others tell each other: keys in JAX's coordination service."""

    number = 0  # of the watch; all processes make them in the same order

    def __init__(self) -> None:
        from jax._src import distributed

        self.client: Any = distributed.global_state.client
        _Watch.number += 1
        self.prefix, self.me = f"hybridvlm/together/{_Watch.number}", jax.process_index()
        self.ended, self.missed = threading.Event(), 0
        threading.Thread(target=self._look, name="together", daemon=True).start()

    def _keys(self, kind: str) -> dict[int, str]:
        found = self.client.key_value_dir_get(f"{self.prefix}/{kind}/")
        return {int(key.rsplit("/", 1)[-1]): value for key, value in found}

    def failed(self) -> dict[int, str]:
        """Reasons of the other processes that have failed; none where the service no longer answers."""
        try:
            found = {index: reason for index, reason in self._keys("failed").items() if index != self.me}
        except jax.errors.JaxRuntimeError:
            self.missed += 1
            return {}
        self.missed = 0
        return found

    def _set(self, kind: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(f"{self.prefix}/{kind}/{self.me}", text, allow_overwrite=True)

    def tell(self, error: BaseException) -> None:
        """Let the others know, and wait until they have ended or are about to."""
        self._set("failed", f"{type(error).__name__}: {error}")
        until = time.monotonic() + HEARD
        while time.monotonic() < until:
            try:
                if len(self._keys("failed") | self._keys("heard")) == jax.process_count():
                    break
            except jax.errors.JaxRuntimeError:
                return
            time.sleep(0.1)
        self._last()

    def _last(self) -> None:
        """Process 0 holds the service, without which JAX aborts the others: it goes after them."""
        if self.me == 0:
            time.sleep(1.0)

    def close(self) -> None:
        self.ended.set()

    def _look(self) -> None:
        others: dict[int, str] = {}
        while not others and self.missed < 5:
            if self.ended.wait(POLL):
                return
            others = self.failed()
        if self.ended.wait(GRACE):
            return
        text = _reasons(others) if others else "process 0 no longer answers"
        print(f"error: {text}", file=sys.stderr)
        self._set("heard", "")
        self._last()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


_watch: _Watch | None = None


def _reasons(failed: Mapping[int, str]) -> str:
    return "; ".join(f"process {index}: {text}" for index, text in sorted(failed.items()))
