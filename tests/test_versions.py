"""Under a JAX too old for kernels: one that is asked for is refused with the version, defaults go over to XLA and say so."""

import sys
import tomllib
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hybridvlm.ops import attention, platforms, ssd, text_to_visual
from hybridvlm.ops.platforms import compiling_for

X = jnp.zeros((1, 16, 4, 64), jnp.bfloat16)


@pytest.fixture
def old(monkeypatch):
    """As if a later JAX were needed than there is; no kernel's module may be imported."""
    monkeypatch.setattr(platforms, "KERNELS_NEED", (99, 1))
    monkeypatch.setattr(platforms, "_told", set())
    for name in [name for name in sys.modules if "hybridvlm" in name and "pallas" in name]:
        monkeypatch.delitem(sys.modules, name)
    yield
    assert not [name for name in sys.modules if "hybridvlm" in name and "pallas" in name]


def scan(**options):
    bc = jnp.zeros((1, 16, 2, 64), X.dtype)
    return ssd(X, jnp.zeros((1, 16, 4)), -jnp.ones(4), bc, bc, **options)


def score(**options):
    mask = jnp.ones((1, 16), bool)
    return text_to_visual(X, X, q_mask=mask, visual=mask, lse=jnp.zeros((1, 4, 16)), **options)


def attend(**options):
    return attention(X, X, X, **options)


@pytest.mark.parametrize("op", [scan, attend, score])
@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_that_is_asked_for_names_the_version(old, op, implementation):
    reason = (
        rf"'{implementation}' is a kernel that needs jax 99.1 or newer, and this is jax {jax.__version__}; upgrade jax"
    )
    with compiling_for(implementation[-3:]), pytest.raises(NotImplementedError, match=reason):
        op(implementation=implementation)


def test_defaults_go_over_to_xla_and_say_so_once(old):
    with compiling_for("tpu"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            programs = [str(jax.make_jaxpr(op)()) for op in (scan, attend, score)]
    assert not any("pallas" in program for program in programs)
    messages = [str(warning.message) for warning in said if "needs jax 99.1" in str(warning.message)]
    assert len(messages) == 2 and "'sequential' runs instead" in messages[0] and "'xla' runs" in messages[1]


def test_what_is_required_leaves_an_older_jax_in_place():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    needed = dict(part.split(">=") for part in project["dependencies"])
    assert needed["jax"] == "0.7.2" and needed["flax"] == "0.11.2"
    assert {"cuda12", "aot-tpu", "aot-gpu", "aot"} <= set(project["optional-dependencies"])
    assert "Programming Language :: Python :: 3.13" in project["classifiers"]
