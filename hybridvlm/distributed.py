"""Several processes as one run: joining it, bringing together what each process found, and ending together when one fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from hybridvlm import launchers, storage
from hybridvlm.options import MODES

ADDRESS, COUNT, INDEX = launchers.ADDRESS, launchers.COUNTS[0], launchers.INDICES[0]
SILENCE = 45  # seconds without a sign of life after which JAX counts a process as lost, and ends the others
POLL = 1.0  # seconds between two looks at whether another process has failed
GRACE = 3.0  # seconds in which a process that hears of it may come to its own end
TERMINATED = 143  # exit code of a process that SIGTERM ended: 128 + 15, as a shell has it
LAST = 25.0  # seconds that a process has after SIGTERM; clouds kill after 30
HEARD = 15.0  # seconds that a failing process waits for the others to hear of it
TOLD = "told to end by SIGTERM"


@dataclasses.dataclass(frozen=True)
class Process:
    """This process and how many there are."""

    index: int
    count: int

    @property
    def first(self) -> bool:
        """Whether this one prints and writes for all."""
        return self.index == 0


class Alone(ValueError):
    """One process of several that were meant to work together, and do not."""


def initialize(environment: Mapping[str, str] | None = None, mode: str = "auto") -> Process:
    """Join the other processes of this run, if there are any; call it before anything asks for devices.

    `hybridvlm.launchers.find` says what is recognised. Called twice, it joins once. Of several processes each says on standard error
    which it is.

    Args:
        environment: variables (default: os.environ).
        mode: "auto" joins where a launcher is recognised; "on" joins whatever the environment says, by JAX's own means if by no
            other, and fails where it cannot; "off" stays alone.

    Raises:
        ValueError: for variables that only half name a run; with "on", for a run that cannot be joined.
    """
    if mode not in MODES:
        raise ValueError(f"distributed: expected one of {MODES}, got {mode!r}")
    environment = os.environ if environment is None else environment
    if mode != "off" and not jax.distributed.is_initialized():
        launch = launchers.find(environment)
        if launch is None and mode == "on":
            launch = launchers.Launch("JAX's own detection")
        if launch is not None:
            _join(launch)
            me = here()
            if me.count > 1:
                say_who(me, launch.how)
            elif mode == "on":
                raise ValueError(
                    "distributed: 'on' found one process alone; start the command on every host, or leave it out"
                )
    return here()


def _join(launch: launchers.Launch) -> None:
    try:
        if launch.address is None:
            jax.distributed.initialize(**_silence())
        else:
            jax.distributed.initialize(launch.address, launch.count, launch.index, **_silence())
    except Exception as error:  # JAX raises whatever its cluster's client does
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"distributed: this process could not join the others ({launch.how}): {reason}; start the same command on every "
            "host at about the same time, or --distributed off for one host by itself"
        ) from error


def say_who(process: Process, how: str) -> None:
    """Say on standard error which process this is, and what it has."""
    local, total = len(jax.local_devices()), jax.device_count()
    kind = jax.local_devices()[0].device_kind
    print(
        f"process {process.index} of {process.count} ({how}): {local} of {total} devices ({kind}) on {socket.gethostname()}",
        file=sys.stderr,
        flush=True,
    )


def refuse_alone(folder: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> None:
    """Refuse that one process of several, each by itself, writes into a folder that all of them see.

    Raises:
        Alone: this machine belongs to a slice of several hosts, or to a launch of several processes, which it has not joined, and
            the folder lies in a store or on a network.
    """
    if jax.process_count() > 1 or not storage.is_shared(folder):
        return
    launch = launchers.find(os.environ if environment is None else environment)
    if launch is not None:
        raise Alone(
            f"{folder} is seen by all hosts, and this process is one of several ({launch.how}) that has not joined them: each would "
            "write over the others. Leave out --distributed off, or give each host a folder on its own disk"
        )


def _silence() -> dict[str, Any]:
    """How JAX is told of SILENCE, where its release can be."""
    known = "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
    return {"heartbeat_timeout_seconds": SILENCE} if known else {}


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


class Terminated(Exception):
    """This process was told to end, by SIGTERM: a preemption, or whoever runs the machine."""


class OtherProcessFailed(RuntimeError):
    """Another process of this run could not go on."""

    @property
    def terminated(self) -> bool:
        """Whether it had been told to end."""
        return Terminated.__name__ in str(self)


@contextlib.contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """While this is entered, SIGTERM raises Terminated in the main thread, so that locks are let go and what is buffered is written.

    Python runs no handler while the main thread is in XLA, as in a long compilation or in a collective that others never enter.
    So a thread hears of the signal too: it tells the other processes, and ends this one after `LAST` seconds whatever it is at, or
    as soon as the others go and the main thread has not come to it. In other threads than the main one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised = threading.Event()

    def stop(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        raised.set()
        raise Terminated(TOLD)

    with _signals_to(lambda: _end_after(raised)):
        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _signals_to(terminated: Callable[[], None]) -> Iterator[None]:
    """Call `terminated` in a thread at the first SIGTERM; whoever had Python's wakeup descriptor before is handed all signals on."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    _forks_hear_nothing()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def read() -> None:
        told = False
        with reader:
            while numbers := reader.recv(64):
                if before >= 0:
                    with contextlib.suppress(OSError):  # closed, or full
                        os.write(before, numbers)
                if signal.SIGTERM in numbers and not told:
                    told = True
                    threading.Thread(target=terminated, name="terminated", daemon=True).start()

    threading.Thread(target=read, name="signals", daemon=True).start()
    try:
        yield
    finally:
        mine, now = writer.fileno(), signal.set_wakeup_fd(-1)
        try:
            # an event loop that was begun in the block, and goes on, keeps its own
            signal.set_wakeup_fd(before if now == mine else now)
        except (OSError, ValueError):  # closed meanwhile
            signal.set_wakeup_fd(-1)
        writer.close()


@functools.cache
def _forks_hear_nothing() -> None:
    """A forked child shares the descriptor: what ends the child would be read here as this process's signal."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _end_after(raised: threading.Event) -> None:
    """After SIGTERM: tell the others, leave the main thread its time, and end this process."""
    until = time.monotonic() + LAST
    watch = _watch  # which the main thread may put away meanwhile
    heard = watch is not None and watch.tell(Terminated(TOLD))
    # the others are at their end, and without them there is nothing that the main thread could come to
    if raised.is_set() or not heard:
        time.sleep(max(0.0, until - time.monotonic()))
    print(f"error: {TOLD}, and ended while at work", file=sys.stderr)
    _exit(TERMINATED)


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
        _exit(code)
    sys.exit(code)


def _exit(code: int) -> NoReturn:
    """End this process at once, whatever its main thread is waiting in; locks are let go before."""
    storage.release_all()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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

    def tell(self, error: BaseException) -> bool:
        """Let the others know, and wait until they have ended or are about to; False where some have not heard in time."""
        self._set("failed", f"{type(error).__name__}: {error}")
        until, heard = time.monotonic() + HEARD, False
        while not heard and time.monotonic() < until:
            try:
                heard = len(self._keys("failed") | self._keys("heard")) == jax.process_count()
            except jax.errors.JaxRuntimeError:
                return True  # the service has gone, with process 0
            time.sleep(0.1)
        self._last()
        return heard

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
        _exit(TERMINATED if others and OtherProcessFailed(text).terminated else 1)


_watch: _Watch | None = None


def _reasons(failed: Mapping[int, str]) -> str:
    return "; ".join(f"process {index}: {text}" for index, text in sorted(failed.items()))
