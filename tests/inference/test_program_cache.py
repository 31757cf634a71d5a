"""Counting compilations, from as many threads as ask."""

import concurrent.futures
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from hybridvlm.inference import program_cache
from hybridvlm.inference.program_cache import ProgramCache, compile_count


def test_threads_that_ask_first_at_once_listen_once(monkeypatch):
    listeners, barrier = [], threading.Barrier(4)

    def register(listener):
        time.sleep(0.05)
        listeners.append(listener)

    monkeypatch.setattr(program_cache, "_listening", False)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", register)

    def ask(_):
        barrier.wait()
        compile_count(thread=True)
        return len(listeners)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        # and nobody goes on to compile before there is one
        assert list(pool.map(ask, range(4))) == [1] * 4


def test_one_compilation_counts_once():
    compile_count()
    before = compile_count()
    jax.jit(lambda a: a * 3 + 1).lower(1.0).compile()
    assert compile_count() - before == 1


def _double(a):
    return 2 * a


def test_arrays_that_lie_otherwise_in_memory_have_a_program_of_their_own():
    """Copies of a model share programs, and weights that came out of a computation need not lie as loaded ones do."""
    programs, rows = ProgramCache(), jnp.arange(6.0).reshape(2, 3)
    columns = jax.device_put(rows, Format(Layout((1, 0)), rows.sharding))
    for array in (rows, columns, rows, columns, np.asarray(rows)):
        np.testing.assert_array_equal(programs.get(_double, array)(array), 2 * np.asarray(rows))
    assert len(programs) == 2
