"""What every implementation of the SSD op must do: subclass `SharedSsdTests` and name the implementation.

References run in float32 at the highest matmul precision, on the very values that the implementation got.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from helpers.compare import close_for_shares

from hybridvlm.ops.ssd import ssd
from hybridvlm.ops.ssd.arg_specs import ARG_SPECS

SPECS = ("12b_prefill", "vamba_piece", "packed_rows", "small_state", "tiny", "strong_decay")

# Largest error relative to max|reference| by share of the values: of y and the final state, of the gradients.
FLOAT32 = {1.0: 1e-5}, {1.0: 1e-4}
SIXTEEN_BIT = {0.99: 3e-3, 1.0: 1e-2}, {0.99: 5e-3, 1.0: 2e-2}


def small_arrays(name, dtype=jnp.float32):
    return ARG_SPECS[name].small().arrays(dtype)


def forward_and_gradients(implementation, chunk, arrays, rest):
    def loss(arrays):
        y, state = ssd(**arrays, **rest, implementation=implementation, chunk_size=chunk)
        weights = [jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape) for v in (y, state)]
        return jnp.sum(y.astype(jnp.float32) * weights[0]) + jnp.sum(state * weights[1]), (y, state)

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs, gradients


_reference_program = jax.jit(functools.partial(forward_and_gradients, "reference", None))


@functools.cache
def reference(name, dtype=jnp.float32):
    arrays, rest = small_arrays(name, dtype)
    with jax.default_matmul_precision("highest"):
        return _reference_program({key: v.astype(jnp.float32) for key, v in arrays.items()}, rest)


class SharedSsdTests:
    """implementation, chunk: as `ssd` takes them. dtypes: those it takes x, B and C in."""

    implementation: str
    chunk: int | None = None
    dtypes = (jnp.float32, jnp.bfloat16)
    specs = SPECS
    compiler_options = None

    @classmethod
    def setup_class(cls):
        run = functools.partial(forward_and_gradients, cls.implementation, cls.chunk)
        cls.program = staticmethod(jax.jit(run, compiler_options=cls.compiler_options))
        forward = functools.partial(ssd, implementation=cls.implementation, chunk_size=cls.chunk)
        cls.forward_program = staticmethod(jax.jit(forward, compiler_options=cls.compiler_options))

    @contextlib.contextmanager
    def tracing(self):
        """Under which the implementation is traced and run."""
        yield

    def run(self, arrays, rest):
        with jax.default_matmul_precision("highest"), self.tracing():
            return jax.block_until_ready(self.program(arrays, rest))

    def run_forward(self, arrays, rest):
        with jax.default_matmul_precision("highest"), self.tracing():
            return jax.block_until_ready(self.forward_program(**arrays, **rest))

    def agree(self, arrays, rest, expected, tolerances):
        outputs, gradients = self.run(arrays, rest)
        for name, got, value in zip(("y", "state"), outputs, expected[0], strict=True):
            close_for_shares(got, value, tolerances[0], name)
        assert gradients.keys() == expected[1].keys()
        for name, got in gradients.items():
            assert got.dtype == arrays[name].dtype, name
            close_for_shares(got, expected[1][name], tolerances[1], f"gradient of {name}")
        assert outputs[0].dtype == arrays["x"].dtype and outputs[1].dtype == jnp.float32

    @property
    def first(self):
        """The dtype of tests that are not about one, and its tolerance of equal things computed twice."""
        return self.dtypes[0], {1.0: 1e-6 if self.dtypes[0] == jnp.float32 else 1e-2}

    def pytest_generate_tests(self, metafunc):
        if "dtype" in metafunc.fixturenames:
            cases = [(name, jnp.float32) for name in self.specs if jnp.float32 in self.dtypes]
            cases += [("12b_prefill", dtype) for dtype in self.dtypes if dtype != jnp.float32]
            metafunc.parametrize(("name", "dtype"), cases, ids=[f"{name}-{d.__name__}" for name, d in cases])

    def test_agrees_with_the_token_scan(self, name, dtype):
        tolerances = FLOAT32 if dtype == jnp.float32 else SIXTEEN_BIT
        self.agree(*small_arrays(name, dtype), reference(name, dtype), tolerances)

    # One shape for all tests that follow: packed rows with padding and an incoming state, one compiled program.

    def test_state_of_another_segment_is_dropped(self):
        dtype, _ = self.first
        arrays, rest = small_arrays("tiny", dtype)
        other = rest | {"initial_segment": rest["initial_segment"] + 7}
        (y, state), gradients = self.run(arrays, other)
        zero = arrays | {"initial_state": jnp.zeros_like(arrays["initial_state"])}
        (fresh_y, fresh_state), _ = self.run(zero, rest)
        close_for_shares(y, fresh_y, {1.0: 0.0})
        close_for_shares(state, fresh_state, {1.0: 0.0})
        assert not np.asarray(gradients["initial_state"]).any()

    def test_padding_is_inert_and_a_row_of_it_hands_the_state_on(self):
        dtype, tolerance = self.first
        arrays, rest = small_arrays("tiny", dtype)
        rest["segment"] = rest["segment"].at[1].set(0)
        clean, gradients = self.run(arrays, rest)
        padding = rest["segment"] == 0
        dirty = {
            name: jnp.where(padding.reshape(*padding.shape, *[1] * (v.ndim - 2)), 3, v).astype(v.dtype)
            if name in ("x", "dt", "B", "C") else v
            for name, v in arrays.items()
        }  # fmt: skip
        dirty, dirty_gradients = self.run(dirty, rest)
        for got, expected in zip(dirty, clean, strict=True):
            close_for_shares(got, expected, tolerance)
        for name, expected in gradients.items():
            close_for_shares(dirty_gradients[name], expected, tolerance, name)
        assert not np.asarray(clean[0])[np.asarray(padding)].any()
        assert not np.asarray(gradients["x"])[np.asarray(padding)].any()
        close_for_shares(clean[1][1], arrays["initial_state"][1], {1.0: 0.0})

    def test_extreme_decay_stays_finite(self):
        arrays, rest = small_arrays("tiny", self.first[0])
        results = self.run(arrays | {"A": 1e4 * arrays["A"]}, rest)
        assert all(np.isfinite(np.asarray(v, np.float32)).all() for v in jax.tree.leaves(results))

    def test_split_anywhere_equals_the_whole(self):
        dtype, _ = self.first
        tolerance = {1.0: 1e-5} if dtype == jnp.float32 else SIXTEEN_BIT[0]
        arrays, rest = small_arrays("tiny", dtype)
        segment = rest["segment"]
        (y, state), _ = self.run(arrays, rest)
        parts, carried, owner = [], arrays["initial_state"], segment[:, 0]
        cut = 150
        for piece in (slice(None, cut), slice(cut, None)):
            row = {name: v[:, piece] if name in ("x", "dt", "B", "C") else v for name, v in arrays.items()}
            row["initial_state"] = carried
            part, carried = self.run_forward(row, {"segment": segment[:, piece], "initial_segment": owner})
            parts.append(part)
            owner = jnp.max(segment[:, piece], axis=1)
        close_for_shares(jnp.concatenate(parts, 1), y, tolerance, "y")
        close_for_shares(carried, state, tolerance, "state")
