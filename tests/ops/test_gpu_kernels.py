"""The GPU kernels: numbers in the Mosaic GPU interpreter, and compiled for an H200 that is not there.

What the interpreter does not see is listed in `gpu_interpreter`; the compiler checks layouts, shared memory and registers;
what is left (speed, asynchronous copies and their fences, approximate exponentials) takes a card.
"""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers.attention_shared import SIXTEEN_BIT, SharedAttentionTests, SharedScoreTests, outputs_close
from helpers.gpu_interpreter import interpreted
from helpers.ssd_shared import SharedSsdTests

from hybridvlm import aot
from hybridvlm.ops.attention import attention, text_to_visual
from hybridvlm.ops.attention.arg_specs import SPECS as ATTENTION_SPECS
from hybridvlm.ops.platforms import compiling_for
from hybridvlm.ops.ssd import ssd
from hybridvlm.ops.ssd.arg_specs import ARG_SPECS as SSD_SPECS

needs_compiler = pytest.mark.aot("gpu")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Interpreted:
    implementation = "pallas_gpu"
    dtypes = (jnp.bfloat16, jnp.float16)
    compiler_options = QUICK

    def tracing(self):
        return interpreted()


@pytest.mark.slow
class TestSsd(Interpreted, SharedSsdTests):
    quick = ()


class TestAttention(Interpreted, SharedAttentionTests):
    # its forward pass along with it
    quick = ("test_gradients_agree_with_the_reference[tiny]",)


class TestScores(Interpreted, SharedScoreTests):
    quick = ("test_scores_agree_with_the_reference[12b_packed]",)

    def test_the_gradient_is_that_of_xla(self):
        spec = ATTENTION_SPECS["vamba_text"].small(70)
        arrays, rest = spec.score_inputs(jnp.bfloat16)

        def loss(q, k, implementation):
            q, k = (x.reshape(*x.shape[:2], -1, spec.width) for x in (q, k))
            score = text_to_visual(q, k, lse=arrays["lse"], implementation=implementation, **rest)
            return jnp.sum(score * jnp.arange(score.size).reshape(score.shape))

        gradient = jax.grad(loss, (0, 1))
        with self.tracing():
            got = jax.block_until_ready(jax.jit(gradient, static_argnums=2)(arrays["q"], arrays["k"], "pallas_gpu"))
        for mine, theirs in zip(got, gradient(arrays["q"], arrays["k"], "xla"), strict=True):
            assert jnp.array_equal(mine, theirs)

    def test_more_rows_than_a_tile(self):
        """Two tiles of 128 rows: k comes twice, and what the first one found is kept."""
        spec = dataclasses.replace(ATTENTION_SPECS["vamba_text"].small(200), rows=150)
        arrays, rest = spec.score_inputs(jnp.bfloat16)
        for queries in ("mean", "max"):

            def run(arrays, implementation, queries=queries):
                q, k = (arrays[n].reshape(*arrays[n].shape[:2], -1, spec.width) for n in ("q", "k"))
                lse = arrays["lse"]
                return text_to_visual(q, k, lse=lse, implementation=implementation, queries=queries, **rest)

            with self.tracing():
                got = jax.block_until_ready(jax.jit(run, static_argnums=1)(arrays, self.implementation))
            outputs_close(got, run({n: v.astype(jnp.float32) for n, v in arrays.items()}, "reference"), SIXTEEN_BIT[0])


def test_an_explicit_choice_that_cannot_run_says_why():
    x = jnp.zeros((1, 8, 4, 64), jnp.bfloat16)
    rest = {"dt": jnp.zeros((1, 8, 4)), "A": -jnp.ones(4)}

    def scan(x, n=64, chunk_size=None):
        bc = jnp.zeros((1, 8, 2, n), x.dtype)
        return ssd(x, B=bc, C=bc, **rest, implementation="pallas_gpu", chunk_size=chunk_size)

    def attend(x, v=None):
        return attention(x, x, x if v is None else v, implementation="pallas_gpu")

    def score(x):
        mask = jnp.ones((1, 8), bool)
        return text_to_visual(x, x, q_mask=mask, visual=mask, lse=jnp.zeros((1, 4, 8)), implementation="pallas_gpu")

    wide = jnp.zeros((1, 8, 4, 112), jnp.bfloat16)
    for op in (scan, attend, score):
        with pytest.raises(NotImplementedError, match="'pallas_gpu' runs on gpu, and this program is for cpu"):
            op(x)
    refusals = [
        *((op, x.astype(jnp.float32), {}, "no float32 path") for op in (scan, attend, score)),
        *((op, x[..., :40], {}, "multiple of 16") for op in (scan, attend, score)),
        (scan, x, {"n": 256}, "up to 128 states"),
        (scan, x, {"n": 128, "chunk_size": 64}, "multiple of 128 tokens"),
        (scan, wide, {"n": 128}, "bytes of shared memory"),
        (attend, x, {"v": x[..., :32]}, "v of the shape"),
    ]
    with compiling_for("gpu"):
        for op, given, options, reason in refusals:
            with pytest.raises(NotImplementedError, match=reason):
                op(given, **options)
        # As many tokens at once as were asked for or as the kernel takes: the same numbers.
        assert jax.eval_shape(lambda x: scan(x, chunk_size=256), x)[0].shape == x.shape


def test_nothing_but_an_explicit_choice_takes_these_kernels():
    """They are compiled, and not yet timed: the defaults on GPU are others, and importing the ops imports none of them."""
    code = "import sys, hybridvlm, hybridvlm.ops;assert not [m for m in sys.modules if 'pallas' in m]"
    subprocess.run([sys.executable, "-c", code], check=True)
    x, dt, a, bc = jnp.zeros((1, 8, 4, 64), jnp.bfloat16), jnp.zeros((1, 8, 4)), -jnp.ones(4), jnp.zeros((1, 8, 2, 64))
    with compiling_for("gpu"):
        programs = jax.make_jaxpr(lambda x: (attention(x, x, x), ssd(x, dt, a, bc, bc)))(x)
    assert "mosaic" not in str(programs) and "pallas" not in str(programs)


SSD_PROGRAMS = (("12b_prefill", jnp.bfloat16, True), ("small_state", jnp.float16, False), ("tiny", jnp.bfloat16, False))
ATTENTION_PROGRAMS = (("12b_packed", jnp.bfloat16, True), ("12b_plain", jnp.float16, False))


@needs_compiler
@pytest.mark.parametrize(("name", "dtype", "gradient"), SSD_PROGRAMS)
def test_ssd_compiles_for_h200(name, dtype, gradient):
    """At its full size; the gradient's forward kernel is the one that keeps the states of the chunks."""
    spec = SSD_SPECS[name]
    arrays, rest = spec.shapes(dtype)

    def forward(arrays, rest):
        return ssd(**arrays, **rest, implementation="pallas_gpu")

    def loss(arrays, rest):
        return sum(jnp.sum(out.astype(jnp.float32)) for out in forward(arrays, rest))

    compiled = aot.compile_for(aot.target("H200"), jax.grad(loss) if gradient else forward, arrays, rest)
    assert "ssd_forward" in compiled.executable.as_text()
    token_states = 4 * spec.batch * spec.length * spec.heads * spec.p * spec.n
    assert compiled.fits and compiled.temporaries < token_states / 8


@needs_compiler
@pytest.mark.parametrize(("name", "dtype", "gradient"), ATTENTION_PROGRAMS)
def test_attention_compiles_for_h200(name, dtype, gradient):
    spec = ATTENTION_SPECS[name]
    options = spec.options()

    def forward(arrays):
        return attention(*spec.split(*arrays), **options, implementation="pallas_gpu")

    def loss(arrays):
        return sum(jnp.sum(out.astype(jnp.float32)) for out in forward(arrays))

    compiled = aot.compile_for(aot.target("H200"), jax.grad(loss) if gradient else forward, spec.shapes(dtype))
    assert "attention_forward" in compiled.executable.as_text()
    scores = 2 * spec.batch * spec.heads * spec.queries * spec.keys
    assert compiled.fits and compiled.temporaries < scores / 8


@needs_compiler
@pytest.mark.parametrize("name", ["12b", "tiny"])
def test_scores_compile_for_h200(name):
    spec = ATTENTION_SPECS[name]
    arrays, rest = jax.eval_shape(lambda: spec.score_inputs(jnp.bfloat16)[0]), spec.score_inputs(jnp.bfloat16)[1]

    def score(arrays):
        q, k = (arrays[n].reshape(*arrays[n].shape[:2], -1, spec.width) for n in ("q", "k"))
        return text_to_visual(q, k, lse=arrays["lse"], implementation="pallas_gpu", **rest)

    compiled = aot.compile_for(aot.target("H200"), score, arrays)
    assert "text_to_visual" in compiled.executable.as_text()
    whole_weights = 4 * spec.batch * spec.heads * spec.rows * spec.keys
    assert compiled.fits and (name == "tiny" or compiled.temporaries < whole_weights / 1000)
