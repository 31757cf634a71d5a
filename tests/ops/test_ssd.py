"""SSD: every implementation against the token scan, splits with carried state, and what the compiled program may hold."""

import dataclasses
import functools

import hypothesis
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import close_to_largest
from helpers.ssd_shared import SharedSsdTests
from hypothesis import strategies as st

from hybridvlm.ops.segments import segment_runs
from hybridvlm.ops.ssd import ssd, ssd_step
from hybridvlm.ops.ssd.xla import ssd_chunked

CHUNKED = ("associative", "sequential")
ARRAYS = ("x", "dt", "A", "B", "C", "D", "initial_state")


@pytest.fixture(autouse=True)
def _exact_products():
    with jax.default_matmul_precision("highest"):
        yield


class TestAssociative(SharedSsdTests):
    implementation, chunk = "associative", 32
    quick = tuple(
        f"test_agrees_with_the_token_scan[{case}]"
        for case in ("packed_rows-float32", "strong_decay-float32", "tiny-float32")
    )


class TestSequential(SharedSsdTests):
    implementation, chunk = "sequential", 64
    quick = ("test_agrees_with_the_token_scan[packed_rows-float32]", "test_agrees_with_the_token_scan[tiny-float32]")


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int = 2
    length: int = 21
    groups: int = 2
    segments: str = "packed"  # none | packed | empty row
    initial: str = "none"  # no incoming state | unnamed | same segment | other segment
    seed: int = 0
    decay: float = 1.0  # factor on dt A

    def inputs(self):
        rng = np.random.default_rng(self.seed)
        heads, p, n = 4, 3, 5

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), jnp.float32)

        arrays = {
            "x": normal(self.batch, self.length, heads, p),
            "dt": jax.nn.softplus(normal(self.batch, self.length, heads)),
            "A": -jnp.asarray(rng.uniform(0.1, 2.0, heads) * self.decay, jnp.float32),
            "B": normal(self.batch, self.length, self.groups, n),
            "C": normal(self.batch, self.length, self.groups, n),
            "D": normal(heads),
        }
        rest = {}
        if self.segments != "none":
            rest["segment"] = _segments(rng, self.batch, self.length)
            if self.segments == "empty row":
                rest["segment"] = rest["segment"].at[-1].set(0)
        if self.initial != "none":
            arrays["initial_state"] = normal(self.batch, heads, p, n)
            if "segment" in rest and self.initial != "unnamed":
                rest["initial_segment"] = rest["segment"][:, 0] + (self.initial == "other segment")
        return arrays, rest


def _segments(rng, batch, length):
    """Rows of one to four segments, cut anywhere, most with padding at the end."""
    rows = np.zeros((batch, length), np.int32)
    for row in rows:
        real = int(rng.integers(1, length + 1))
        cuts = np.sort(rng.integers(0, real, size=rng.integers(0, 4)))
        row[:real] = 1 + np.searchsorted(cuts, np.arange(real), side="right")
    return jnp.asarray(rows)


# Drawn cases share one shape per number of groups, so that they share its compiled programs.
cases = st.builds(
    Case,
    batch=st.just(3),
    length=st.just(21),
    groups=st.sampled_from((1, 2)),
    segments=st.sampled_from(("packed", "empty row")),
    initial=st.sampled_from(("same segment", "other segment")),
    seed=st.integers(0, 10**6),
)
sweep = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def _forward(arrays, rest, implementation, chunk_size=8):
    return ssd(**arrays, **rest, implementation=implementation, chunk_size=chunk_size)


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def _with_gradients(arrays, rest, implementation, chunk_size=8):
    def loss(arrays):
        y, state = ssd(**arrays, **rest, implementation=implementation, chunk_size=chunk_size)
        weights = [jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape) for v in (y, state)]
        return jnp.sum(y.astype(jnp.float32) * weights[0]) + jnp.sum(state * weights[1]), (y, state)

    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return outputs, gradients


def _agree(case, implementation, chunk_size=8, forward=1e-5, backward=1e-4):
    arrays, rest = case.inputs()
    outputs, gradients = _with_gradients(arrays, rest, implementation, chunk_size)
    expected_outputs, expected_gradients = _with_gradients(arrays, rest, "reference")
    for name, got, expected in zip(("y", "state"), outputs, expected_outputs, strict=True):
        close_to_largest(got, expected, forward, name)
    for name in gradients:
        close_to_largest(gradients[name], expected_gradients[name], backward, f"gradient of {name}")


@sweep
@hypothesis.given(case=cases)
@pytest.mark.parametrize("implementation", CHUNKED)
def test_agrees_with_the_token_scan(implementation, case):
    with jax.default_matmul_precision("highest"):
        _agree(case, implementation)


@pytest.mark.parametrize("implementation", CHUNKED)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, length=1, segments="none"),
        Case(batch=2, length=47, segments="none", initial="unnamed", groups=1),
    ],
    ids=str,
)
def test_arguments_left_out_and_odd_lengths(implementation, case):
    _agree(case, implementation)


@pytest.mark.parametrize("implementation", CHUNKED)
@pytest.mark.parametrize("chunk_size", [1, 5])
def test_any_chunk_size(implementation, chunk_size):
    arrays, rest = Case(batch=3, initial="same segment").inputs()
    got = _forward(arrays, rest, implementation, chunk_size)
    for a, b in zip(got, _forward(arrays, rest, "reference"), strict=True):
        close_to_largest(a, b, 1e-5)


def test_reference_is_the_recurrence():
    """The oracle itself, against loops over tokens and heads that know of no library."""
    arrays, rest = Case(batch=2, length=9, initial="same segment", seed=3).inputs()
    y, state = _forward(arrays, rest, "reference")
    v = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    segment = np.asarray(rest["segment"])
    for row in range(2):
        for head in range(4):
            s, owner, group = v["initial_state"][row, head], segment[row, 0], head // 2
            for t in range(9):
                expected = np.zeros(3)
                if segment[row, t]:
                    if segment[row, t] != owner:
                        s, owner = np.zeros_like(s), segment[row, t]
                    dt, x = v["dt"][row, t, head], v["x"][row, t, head]
                    s = np.exp(dt * v["A"][head]) * s + dt * np.outer(x, v["B"][row, t, group])
                    expected = s @ v["C"][row, t, group] + v["D"][head] * x
                np.testing.assert_allclose(y[row, t, head], expected, atol=1e-4)
            np.testing.assert_allclose(state[row, head], s, atol=1e-4)


@pytest.mark.parametrize("block", [2, 16])
def test_several_chunks_at_once(block):
    """As on platforms where a step works on a block of chunks: forward and backward, last block overlapping or alone."""
    arrays, rest = Case(batch=3, initial="same segment", seed=5).inputs()
    real = rest["segment"] > 0

    @jax.jit
    def blocks(arrays):
        def loss(arrays):
            x, dt, a, b, c, d, state = (arrays[name] for name in ARRAYS)
            dt, run = jnp.where(real[..., None], dt, 0.0), segment_runs(rest["segment"], rest["initial_segment"])
            y, state = ssd_chunked(x, dt, a, b, c, d, run, real, state, chunk_size=4, block=block, associative=True)
            weights = [jnp.cos(jnp.arange(v.size, dtype=jnp.float32)).reshape(v.shape) for v in (y, state)]
            return jnp.sum(y * weights[0]) + jnp.sum(state * weights[1]), (y, state)

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return outputs, gradients

    got, expected = blocks(arrays), _with_gradients(arrays, rest, "reference")
    for a, b in zip(got[0], expected[0], strict=True):
        close_to_largest(a, b, 1e-5)
    for name in ARRAYS:
        close_to_largest(got[1][name], expected[1][name], 1e-4, name)


def test_step_is_the_op_on_one_token():
    arrays, _ = Case(batch=2, length=6, segments="none", initial="unnamed", seed=11).inputs()
    y, state = _forward(arrays, {}, "reference")
    carried = arrays["initial_state"]
    for t in range(6):
        x, dt, b, c = (arrays[name][:, t] for name in ("x", "dt", "B", "C"))
        step, carried = jax.jit(ssd_step)(x, dt, arrays["A"], b, c, carried, arrays["D"])
        close_to_largest(step, y[:, t], 1e-5)
    close_to_largest(carried, state, 1e-5)


def _sizes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if hasattr(variable.aval, "size"):
                yield variable.aval.size, variable.aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _sizes(inner)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_no_token_states_and_no_repeated_groups(implementation):
    """Forward and backward at L=512, H=8, P=16, G=1, N=32: nothing comes near [L,H,P,N], nor to B repeated over heads."""
    length, h, p, n = 512, 8, 16, 32
    f = jnp.float32
    shapes = {"x": (1, length, h, p), "dt": (1, length, h), "A": (h,), "B": (1, length, 1, n), "C": (1, length, 1, n)}
    arrays = {name: jax.ShapeDtypeStruct(shape, f) for name, shape in shapes.items()}

    def loss(arrays):
        y, state = ssd(**arrays, implementation=implementation, chunk_size=32)
        return jnp.sum(y) + jnp.sum(state)

    gradient = jax.jit(jax.grad(loss))
    largest, shape = max(_sizes(gradient.trace(arrays).jaxpr.jaxpr))
    assert largest < length * h * n, shape
    held = gradient.lower(arrays).compile().memory_analysis().temp_size_in_bytes
    assert held <= 0.25 * length * h * p * n * 4


def test_flat_x_is_the_same():
    arrays, rest = Case(batch=2, initial="same segment", seed=12).inputs()
    flat = arrays | {"x": arrays["x"].reshape(2, 21, 12)}
    for implementation in ("reference", *CHUNKED):
        y, state = _forward(arrays, rest, implementation)
        flat_y, flat_state = _forward(flat, rest, implementation)
        assert flat_y.shape == (2, 21, 12)
        close_to_largest(flat_y.reshape(y.shape), y, 1e-6)
        close_to_largest(flat_state, state, 1e-6)


def test_errors_say_what_was_expected():
    arrays, _ = Case(segments="none").inputs()
    with pytest.raises(ValueError, match=r"dt does not fit.*expected \(2, 21, 4\), got \(2, 20, 4\)"):
        ssd(**{**arrays, "dt": arrays["dt"][:, 1:]})
    with pytest.raises(ValueError, match=r"must divide x\.shape\[2\] of x \[B,L,H\*P\] = \(2, 21, 10\)"):
        ssd(**{**arrays, "x": jnp.zeros((2, 21, 10))})
    with pytest.raises(ValueError, match=r"one of .*sequential.*'fast'"):
        ssd(**arrays, implementation="fast")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        ssd(**arrays, chunk_size=0)
    with pytest.raises(ValueError, match="initial_segment needs segment"):
        ssd(**arrays, initial_segment=jnp.ones(2, jnp.int32))
    for shape in ((0, 21, 4, 3), (2, 0, 4, 3), (2, 21, 0, 3), (2, 21, 4, 0)):
        with pytest.raises(ValueError, match=r"x must be \[B,L,H,P\].*at least one of each, got"):
            ssd(**{**arrays, "x": jnp.zeros(shape)})
    with pytest.raises(ValueError, match=r"B must be \[B,L,G,N\] with at least one of each, got"):
        ssd(**{**arrays, "B": jnp.zeros((2, 21, 2, 0))})
    with pytest.raises(ValueError, match="divisor of 4, got 3"):
        ssd(**{**arrays, "B": jnp.zeros((2, 21, 3, 5)), "C": jnp.zeros((2, 21, 3, 5))})
