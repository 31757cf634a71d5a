"""What every implementation of attention and of text-to-visual scores must do: subclass and name the implementation.

References run in float32 at the highest matmul precision, on the very values that the implementation got.
"""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import close_for_shares

from hybridvlm.ops.attention import attention, text_to_visual
from hybridvlm.ops.attention.arg_specs import SPECS

# Largest error relative to max|reference| by share of the values: of out and lse, of the gradients.
FLOAT32 = {1.0: 1e-5}, {1.0: 1e-4}
SIXTEEN_BIT = {0.99: 1e-2, 1.0: 2e-2}, {0.99: 1e-2, 1.0: 3e-2}
UNSEEN = -1e29  # a log-sum-exp below is that of a row that sees nothing


def forward(spec, implementation, arrays):
    return attention(*spec.split(*arrays), **spec.options(), implementation=implementation)


def forward_and_gradients(spec, implementation, arrays, with_lse=True):
    """out and lse, and the gradients of a sum that depends on out and, `with_lse`, on lse."""

    def loss(arrays):
        out, lse = forward(spec, implementation, arrays)
        weights = [jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape) for v in (out, lse)]
        total = jnp.sum(out.astype(jnp.float32) * weights[0])
        if with_lse:
            total += jnp.sum(jnp.where(lse > UNSEEN, lse, 0.0) * weights[1])
        return total, (out, lse)

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return *outputs, *gradients


@functools.cache
def reference(name, dtype, program):
    spec = SPECS[name].small()
    arrays = tuple(x.astype(jnp.float32) for x in spec.arrays(dtype))
    return jax.jit(lambda arrays: program(spec, "reference", arrays))(arrays)


_without_lse = functools.partial(forward_and_gradients, with_lse=False)


class SharedAttentionTests:
    """implementation: as `attention` takes it. dtypes: of its operands. lse_gradient: whether lse can be differentiated;
    refused: names of specs that it must refuse. quick: see conftest.py."""

    implementation: str
    dtypes = (jnp.float32, jnp.bfloat16)
    lse_gradient = True
    refused = ()
    compiler_options = None

    def tracing(self):
        """Held while the implementation is traced and run."""
        return contextlib.nullcontext()

    def agree(self, name, dtype, program):
        spec = SPECS[name].small()
        arrays = spec.arrays(dtype)
        run = jax.jit(lambda arrays: program(spec, self.implementation, arrays))
        with self.tracing():
            got = run.lower(arrays).compile(compiler_options=self.compiler_options)(arrays)
            jax.block_until_ready(got)
        tolerance = FLOAT32 if dtype == jnp.float32 else SIXTEEN_BIT
        labels = ("out", "lse", "dq", "dk", "dv")
        for mine, theirs, label in zip(got, reference(name, dtype, program), labels, strict=False):
            outputs_close(mine, theirs, tolerance[label.startswith("d")], label)

    @pytest.mark.parametrize("name", SPECS)
    def test_agrees_with_the_reference(self, name):
        with self.refusal(name):
            self.agree(name, self.dtypes[0], forward)

    def refusal(self, name):
        """Expects that a spec is refused, where this implementation does not take it."""
        if name in self.refused:
            return pytest.raises(NotImplementedError, match="take '")
        return contextlib.nullcontext()

    @pytest.mark.parametrize("name", ["12b_packed", "12b_extend", "tiny"])
    def test_gradients_agree_with_the_reference(self, name):
        with self.refusal(name):
            self.agree(name, self.dtypes[-1 if name == "tiny" else 0], self.program)

    @property
    def program(self):
        return forward_and_gradients if self.lse_gradient else _without_lse


class SharedScoreTests:
    """implementation: as `text_to_visual` takes it."""

    implementation: str
    dtypes = (jnp.float32, jnp.bfloat16)
    compiler_options = None

    def tracing(self):
        return contextlib.nullcontext()

    def score(self, name, dtype, implementation, rows=9, **reductions):
        spec = dataclasses.replace(SPECS[name].small(), rows=rows)
        arrays, rest = spec.score_inputs(dtype)
        if implementation == "reference":
            arrays = arrays | {n: arrays[n].astype(jnp.float32) for n in ("q", "k")}

        def run(arrays):
            q, k = (x.reshape(*x.shape[:2], -1, spec.width) for x in (arrays["q"], arrays["k"]))
            return text_to_visual(q, k, lse=arrays["lse"], implementation=implementation, **rest, **reductions)

        return jax.jit(run).lower(arrays).compile(compiler_options=self.compiler_options)(arrays)

    def scores_agree(self, name, dtype, **reductions):
        with self.tracing():
            got = jax.block_until_ready(self.score(name, dtype, self.implementation, **reductions))
        expected = self.score(name, dtype, "reference", **reductions)
        assert np.asarray(expected).any()
        outputs_close(got, expected, FLOAT32[0] if dtype == jnp.float32 else SIXTEEN_BIT[0], name)

    @pytest.mark.parametrize("name", ["12b", "12b_packed", "vamba_cross", "tiny"])
    def test_scores_agree_with_the_reference(self, name):
        self.scores_agree(name, self.dtypes[0])

    def test_scores_agree_with_the_reference_in_the_last_dtype(self):
        self.scores_agree("12b", self.dtypes[-1])

    @pytest.mark.parametrize(("heads", "queries"), [("max", "mean"), ("mean", "max"), ("max", "last")])
    def test_reductions_agree_with_the_reference(self, heads, queries):
        self.scores_agree("12b_packed", self.dtypes[0], heads=heads, queries=queries)


def outputs_close(got, expected, tolerance, name=""):
    """`close_for_shares`, where a log-sum-exp may be that of a row that sees nothing."""
    close_for_shares(got, expected, tolerance, name, UNSEEN)
