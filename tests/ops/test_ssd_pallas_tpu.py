"""The TPU kernels of SSD: numbers in the TPU interpreter, HBM traffic from their grids, compiled ahead of time for TPUs."""

import contextlib
import dataclasses
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.ssd_shared import SPECS, SharedSsdTests, small_arrays
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl

from hybridvlm import aot
from hybridvlm.config_files import load_model_config
from hybridvlm.nn.mamba2 import MambaStack, mamba_layer
from hybridvlm.ops import traffic
from hybridvlm.ops.platforms import compiling_for, tpu_interpreter
from hybridvlm.ops.ssd import pallas_tpu, pallas_tpu_backward, pallas_tpu_common, ssd
from hybridvlm.ops.ssd.arg_specs import ARG_SPECS

needs_libtpu = pytest.mark.aot("tpu")
# The interpreted kernels are long programs of small operations: compiling them well takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class TestPallasTpu(SharedSsdTests):
    implementation = "pallas_tpu"
    compiler_options = QUICK
    quick = ("test_agrees_with_the_token_scan[tiny-float32]",)

    @pytest.fixture(autouse=True)
    def _narrow_head_blocks(self, monkeypatch):
        """So that few heads make several head blocks, and two of them share VAMBA's one group."""
        monkeypatch.setattr(pallas_tpu_common, "WIDEST", 512)

    @contextlib.contextmanager
    def tracing(self):
        with tpu_interpreter():
            yield

    @pytest.mark.slow
    def test_no_races_between_two_cores(self):
        """Two cores take the parallel axes of the grid, forward and backward, and the interpreter watches what they touch."""
        arrays, rest = ARG_SPECS["tiny"].small(140).arrays(jnp.float32)
        with tpu_interpreter(detect_races=True, num_cores_or_threads=2):
            jax.block_until_ready(jax.jit(_gradient, compiler_options=QUICK)(arrays, rest))
            assert interpret_pallas_call.races is not None
            assert not interpret_pallas_call.races.races_found


def test_narrow_head_blocks_are_what_the_tests_above_say(monkeypatch):
    monkeypatch.setattr(pallas_tpu_common, "WIDEST", 512)
    found = {name: _plan(ARG_SPECS[name].small()) for name in SPECS}
    assert {name: (s.blocks, s.sharing, s.block_groups) for name, s in found.items()} == {
        "12b_prefill": (2, 1, 1), "vamba_piece": (2, 2, 1), "packed_rows": (2, 1, 1), "small_state": (1, 1, 2),
        "tiny": (1, 1, 2), "strong_decay": (2, 1, 1),
    }  # fmt: skip


def _plan(spec, length=None):
    s, length = spec, length or spec.length
    shape = (s.batch, length, s.heads * s.p)
    return pallas_tpu.plan(shape, s.heads, s.groups, s.n, chunk_size=128, packed=s.segments is not None, skip=s.skip)


def _traffic(specs):
    _, call = specs
    return traffic.count(**call).total


@pytest.mark.parametrize("name", ARG_SPECS)
def test_declared_bytes_are_those_of_the_grid(name):
    spec = ARG_SPECS[name]
    for dtype in (jnp.bfloat16, jnp.float32):
        for keep_states in (False, True):
            counted = _traffic(pallas_tpu.forward_specs(_plan(spec), dtype, keep_states))
            assert pallas_tpu.forward_cost(_plan(spec), dtype, keep_states).bytes_accessed == pytest.approx(
                counted, rel=0.05
            )
        counted = _traffic(pallas_tpu_backward.backward_specs(_plan(spec), dtype))
        assert pallas_tpu_backward.backward_cost(_plan(spec), dtype).bytes_accessed == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("name", ["12b_131072", "vamba_1024_frames"])
def test_forward_moves_little_more_than_it_must(name):
    spec = ARG_SPECS[name]
    counted = _traffic(pallas_tpu.forward_specs(_plan(spec), jnp.bfloat16, keep_states=False))
    assert counted <= 1.1 * spec.unavoidable_bytes(jnp.bfloat16)


def test_traffic_counts_blocks_when_they_change():
    f32 = jax.ShapeDtypeStruct((20, 300), jnp.float32)
    rows = pl.BlockSpec((8, 300), lambda i, j: (i, 0))  # fetched once per i: rows 0-7, 8-15, 16-19
    tiles = pl.BlockSpec((8, 128), lambda i, j: (i, j))
    again = pl.BlockSpec((8, 300), lambda i, j: (j, 0))  # comes back for every i
    counted = traffic.count((3, 3), [rows, tiles, again], [f32, f32, f32], [rows], [f32])
    whole = 4 * 24 * 384
    assert counted.read == (whole, whole, 3 * whole) and counted.written == (whole,)
    assert traffic.tiled_bytes((3, 5, 80), jnp.bfloat16) == 3 * 16 * 128 * 2
    assert traffic.tiled_bytes((1, 130), jnp.int32) == 256 * 4
    with pytest.raises(ValueError, match="needs a block shape"):
        traffic.count((3,), [pl.BlockSpec(memory_space=pl.ANY)], [f32], [], [])


@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((128, 80, 8, 128), 16), ((112, 64, 1, 128), 28), ((128, 64, 8, 128), 16), ((112, 80, 8, 64), 56), ((4, 32, 2, 32), 4),
        ((112, 80, 8, 128), 56), ((128, 64, 8, 64), 32), ((1, 80, 1, 128), 1),
    ],
)  # fmt: skip
def test_head_blocks_are_whole_tiles(shape, heads):
    """No shape pads x to more lanes than it has, unless it has less than a tile."""
    h, p, g, n = shape
    sizes = pallas_tpu.plan((1, 256, h * p), h, g, n, chunk_size=128, packed=False, skip=False)
    assert sizes.block_heads == heads
    assert sizes.lanes % 128 == 0 or sizes.blocks == 1
    assert sizes.blocks * sizes.block_groups == g * sizes.sharing


def _shapes(eqns):
    for equation in eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _shapes(inner.eqns)


def test_no_token_states_and_x_stays_flat():
    """At the 12B's width: nothing near [L,H,P,N], chunk states only under differentiation, no array ends in P lanes."""
    spec = ARG_SPECS["12b_prefill"]
    arrays, rest = spec.shapes(jnp.bfloat16)

    def forward(arrays, rest):
        return ssd(**arrays, **rest, implementation="pallas_tpu")

    def backward(arrays, rest):
        return jax.grad(lambda a: sum(jnp.sum(v.astype(jnp.float32)) for v in forward(a, rest)))(arrays)

    chunk_states = spec.length // 128 * spec.heads * spec.p * spec.n
    with compiling_for("tpu"):
        for program, most in ((forward, spec.length * spec.heads * spec.p), (backward, chunk_states)):
            shapes = list(_shapes(jax.jit(program).trace(arrays, rest).jaxpr.eqns))
            assert max(np.prod(shape) for shape in shapes) <= most
            assert not [shape for shape in shapes if shape[:2] == (1, spec.length) and shape[-1] == spec.p]


@needs_libtpu
@pytest.mark.parametrize(
    ("where", "name"),
    [("v5e:2x2", "12b_prefill"), ("v5p:2x2x1", "12b_prefill"), ("v6e:2x2", "12b_prefill"), ("v5e:2x2", "vamba_piece"),
     pytest.param("v6e:2x2", "small_state", marks=pytest.mark.slow)],
)  # fmt: skip
def test_compiles_for(where, name):
    """The forward kernel as it runs alone and as it runs for a gradient, and the backward one; all heads, an odd length.

    small_state is the widest head block there is, 56 heads in one.
    """
    arrays, rest = _odd(name).shapes(jnp.bfloat16)
    compiled = aot.compile_for(aot.target(where), lambda *args: (_forward(*args), _gradient(*args)), arrays, rest)
    assert compiled.executable.as_text().count('custom_call_target="tpu_custom_call"') == 3


@needs_libtpu
def test_the_model_hands_x_b_and_c_over_flat():
    """A whole layer of the 12B on TPU, by default: no array of it has heads or groups as an axis after the tokens."""
    config = load_model_config("nemotron_nano_12b_v2_vl")
    stacks = jax.eval_shape(lambda: MambaStack(config).init(jax.random.key(0)))["params"]
    layer = {name: jax.ShapeDtypeStruct(v.shape[1:], jnp.bfloat16) for name, v in stacks.items()}
    tokens = jax.ShapeDtypeStruct((1, 1024, config.width), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1024), jnp.int32)

    def run(layer, x, segment):
        return mamba_layer(layer, config, x, segment)[:2]

    text = aot.compile_for(aot.target("v5e:2x2"), run, layer, *tokens).executable.as_text()
    assert "ssd_forward" in text
    assert not re.findall(r"\[1,1024,(?:128,80|8,128)\]", text)


@needs_libtpu
@pytest.mark.parametrize("name", ["tiny", "small_state"])
def test_compiles_float32_of_few_heads(name):
    arrays, rest = ARG_SPECS[name].small().shapes(jnp.float32)
    compiled = aot.compile_for(aot.target("v5e:2x2"), _gradient, arrays, rest)
    assert "ssd_backward" in compiled.executable.as_text()


def _odd(name, length=1001):
    return dataclasses.replace(ARG_SPECS[name], length=length, segments=(length - 3,))


def _forward(arrays, rest):
    return ssd(**arrays, **rest, implementation="pallas_tpu")


def _gradient(arrays, rest):
    def loss(arrays):
        y, state = _forward(arrays, rest)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    return jax.grad(loss)(arrays)


def test_refusals_say_why():
    arrays, rest = small_arrays("tiny")
    with pytest.raises(NotImplementedError, match="'pallas_tpu' runs on tpu, and this program is for cpu"):
        ssd(**arrays, **rest, implementation="pallas_tpu")
    with compiling_for("tpu"):
        with pytest.raises(NotImplementedError, match="multiple of 128 tokens, got chunk_size 64"):
            ssd(**arrays, **rest, implementation="pallas_tpu", chunk_size=64)
        half = {name: v.astype(jnp.float16) for name, v in arrays.items()}
        with pytest.raises(NotImplementedError, match="bfloat16 or float32, got float16"):
            ssd(**half, **rest, implementation="pallas_tpu")


def test_the_default_is_the_kernel_on_tpu_where_it_can_run_and_xla_elsewhere():
    arrays, rest = small_arrays("tiny")

    def takes_the_kernel(chunk_size=None):
        return "ssd_forward" in str(jax.make_jaxpr(lambda a, r: ssd(**a, **r, chunk_size=chunk_size))(arrays, rest))

    assert not takes_the_kernel()
    with compiling_for("tpu"):
        assert takes_the_kernel()
        assert not takes_the_kernel(chunk_size=64)
    with compiling_for("gpu"):
        assert not takes_the_kernel()
