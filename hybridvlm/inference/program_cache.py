"""Compiled programs: one per function, static arguments and shapes of its arrays."""

from __future__ import annotations

import collections
import gc
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


_compiled: collections.Counter[int] = collections.Counter()  # by thread, once somebody has asked
_listening, _asking = False, threading.Lock()


def compile_count(*, thread: bool = False) -> int:
    """How many programs XLA has compiled in this process since the first call of this function, which returns 0.

    Args:
        thread: count those of the calling thread alone.
    """
    global _listening
    with _asking:  # threads may ask first at once, and two listeners would count twice
        if not _listening:
            jax.monitoring.register_event_duration_secs_listener(_count)
            _listening = True
    return _compiled[threading.get_ident()] if thread else sum(list(_compiled.values()))


def _count(event: str, duration_secs: float, **_: Any) -> None:
    if event == _BACKEND_COMPILE:
        _compiled[threading.get_ident()] += 1


def peak_bytes(program: Any) -> int:
    """Memory that a compiled program needs (arguments, outputs, temporaries), by its compiler; 0 where that says nothing."""
    memory = program.memory_analysis()
    if memory is None:
        return 0
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def _axes_in_memory(array: Any) -> tuple[int, ...] | None:
    """The order of an array's axes in memory where that is not row-major: what a program is compiled for, it takes alone."""
    lies = array.format.layout if isinstance(array, jax.Array) else None  # type: ignore[attr-defined]  # jax.Array's stub lacks it
    order = tuple(getattr(lies, "major_to_minor", ()))
    return None if order == tuple(range(len(order))) else order


def memory_maps_used() -> float:
    """The share of the memory maps that Linux gives a process which this one holds; 0.0 where nothing tells.

    A compiled program of a CPU takes one or more for each of its kernels, and XLA ends the process where there are none left.
    """
    try:
        most = int(pathlib.Path("/proc/sys/vm/max_map_count").read_text())
        return pathlib.Path("/proc/self/maps").read_bytes().count(b"\n") / most
    except (OSError, ValueError):
        return 0.0


# The share of a process's memory maps from which on programs that were not used for longest make room for a new one. One of a model of
# 26 layers takes up to 6%, and a few compile at once.
MOST_MAPS = 0.6


class ProgramCache:
    """Compiled programs. A program's key: the function, its static arguments, the shapes of its arrays and how they lie in memory.

    On a CPU, where programs take memory maps, the least recently used go before a process runs out of them.

    Attributes:
        compile_seconds: total seconds spent compiling.
    """

    def __init__(self) -> None:
        self.compile_seconds = 0.0
        self._programs: dict[tuple[Any, ...], Any] = {}  # the most recently used last
        self._clearing = threading.Lock()  # programs are compiled in several threads

    def __len__(self) -> int:
        return len(self._programs)

    def _make_room(self) -> None:
        """Let go of programs, those that were not used for longest first, until enough memory maps are left."""
        with self._clearing:
            while self._programs and memory_maps_used() > MOST_MAPS:
                for key in list(self._programs)[: -(-len(self._programs) // 3)]:
                    self._programs.pop(key, None)  # another thread may be at it
                gc.collect()

    def get(self, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), **static: Any) -> Any:
        """The compiled program of `function(*args, **static)`, made at the first call.

        Args:
            function: of a module, not a closure: whatever it reads besides its arguments is not in the key.
            args: pytrees of arrays; their values do not matter.
            donate: arguments whose memory the results may take; they are gone after the call.
            static: hashable arguments by name.
        """
        leaves, tree = jax.tree.flatten(args)
        shapes = tuple((jnp.shape(a), str(jnp.result_type(a)), _axes_in_memory(a)) for a in leaves)
        key = (function, donate, tuple(sorted(static.items())), shapes, tree)
        program = self._programs.pop(key, None)
        if program is None:
            self._make_room()
            start = time.perf_counter()

            def run(*args: Any) -> Any:
                return function(*args, **static)

            program = jax.jit(run, donate_argnums=donate).lower(*args).compile()
            self.compile_seconds += time.perf_counter() - start
        self._programs[key] = program
        return program

    @property
    def peak_bytes(self) -> int:
        """Most memory that one of the programs needs."""
        return max(map(peak_bytes, self._programs.values()), default=0)
