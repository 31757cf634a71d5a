"""Counting compilations, from as many threads as ask."""

import concurrent.futures
import threading
import time

import jax

from hybridvlm.inference import program_cache
from hybridvlm.inference.program_cache import compile_count


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
