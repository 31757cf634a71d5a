"""Attention and scores, implementation by implementation: TPU kernels in the TPU interpreter, compiled ahead of time for TPUs."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_cases import case
from helpers.attention_shared import (
    FLOAT32,
    SIXTEEN_BIT,
    SharedAttentionTests,
    SharedScoreTests,
    forward,
    outputs_close,
)
from helpers.micro_checkpoint import micro_model
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl

from hybridvlm import aot
from hybridvlm.config import Reduction, Schedule
from hybridvlm.estimates import Workload
from hybridvlm.models import nemotron_vl
from hybridvlm.models.prompt import Batch
from hybridvlm.ops import traffic
from hybridvlm.ops.attention import attention, pallas_tpu, pallas_tpu_scores, text_to_visual
from hybridvlm.ops.attention.api import DEFAULTS, default_implementations
from hybridvlm.ops.attention.arg_specs import SPECS
from hybridvlm.ops.platforms import compiling_for, tpu_interpreter

needs_libtpu = pytest.mark.aot("tpu")
# The interpreted kernels are long programs of small operations: compiling them well takes longer than running them.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@contextlib.contextmanager
def interpreted():
    """Two cores take the parallel axes of the grid, and the interpreter watches for races between them."""
    with tpu_interpreter(detect_races=True, num_cores_or_threads=2):
        yield
        assert interpret_pallas_call.races is not None
        assert not interpret_pallas_call.races.races_found


class TestXla(SharedAttentionTests, SharedScoreTests):
    implementation = "xla"
    quick = (
        *(f"test_agrees_with_the_reference[{name}]" for name in ("12b_packed", "12b_extend", "vamba_cross")),
        *(f"test_gradients_agree_with_the_reference[{name}]" for name in ("12b_packed", "tiny")),
        *(f"test_scores_agree_with_the_reference[{name}]" for name in ("12b_packed", "vamba_cross")),
        *(f"test_reductions_agree_with_the_reference[{name}]" for name in ("max-mean", "mean-max", "max-last")),
    )


class TestPallasTpu(SharedAttentionTests, SharedScoreTests):
    implementation = "pallas_tpu"
    compiler_options = QUICK
    quick = (
        "test_agrees_with_the_reference[12b_packed]",
        # of gradients test_cases_of_several_tiles
        "test_scores_agree_with_the_reference[12b_packed]",
        "test_reductions_agree_with_the_reference[max-last]",
    )

    @pytest.fixture(autouse=True)
    def small_tiles(self, monkeypatch):
        """So that a few hundred tokens are several tiles."""
        monkeypatch.setattr(pallas_tpu, "BLOCK", 128)
        monkeypatch.setattr(pallas_tpu_scores, "BLOCK", 128)

    def tracing(self):
        return interpreted()

    @pytest.mark.parametrize("name", ["long, order reversed", "only padding"])
    def test_cases_of_several_tiles(self, name):
        arrays, options = case(name)

        def values_and_gradients(arrays, implementation):
            def outputs(*arrays):
                return attention(*arrays, implementation=implementation, **options)

            (out, lse), pull = jax.vjp(outputs, *arrays)
            return out, lse, *pull((jnp.cos(out), jnp.where(lse > -1e29, 1.0, 0.0)))

        with self.tracing():
            run = jax.jit(lambda arrays: values_and_gradients(arrays, "pallas_tpu"))
            got = jax.block_until_ready(run.lower(arrays).compile(compiler_options=QUICK)(arrays))
        expected = jax.jit(lambda arrays: values_and_gradients(arrays, "reference"))(arrays)
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)

    @pytest.mark.slow
    def test_more_query_rows_than_fit_are_taken_in_parts(self, monkeypatch):
        monkeypatch.setattr(pallas_tpu_scores, "VMEM_BYTES", 1 << 19)
        self.scores_agree("vamba_cross", jnp.float32, rows=130, queries="max")

    @pytest.mark.slow
    def test_the_score_has_the_gradient_of_xla(self):
        spec = SPECS["tiny"].small(128)
        arrays, rest = spec.score_inputs(jnp.float32)

        def gradient(arrays, implementation):
            def loss(arrays):
                q, k = (x.reshape(*x.shape[:2], -1, spec.width) for x in (arrays["q"], arrays["k"]))
                return jnp.sin(text_to_visual(q, k, lse=arrays["lse"], implementation=implementation, **rest)).sum()

            return jax.grad(loss)(arrays)

        with self.tracing():
            got = jax.block_until_ready(jax.jit(lambda arrays: gradient(arrays, "pallas_tpu"))(arrays))
        expected = jax.jit(lambda arrays: gradient(arrays, "reference"))(arrays)
        for name in expected:
            outputs_close(got[name], expected[name], FLOAT32[1], name)


class TestSplash(SharedAttentionTests):
    implementation = "splash"
    lse_gradient = False
    refused = ("12b_extend",)
    compiler_options = QUICK
    quick = (
        "test_agrees_with_the_reference[12b_packed]",
        "test_agrees_with_the_reference[12b_extend]",
        "test_gradients_agree_with_the_reference[tiny]",
        "test_gradients_agree_with_the_reference[12b_extend]",
    )

    def tracing(self):
        return tpu_interpreter()

    def test_its_log_sum_exp_has_no_gradient(self):
        arrays, _ = case("plain")
        with self.tracing(), pytest.raises(NotImplementedError, match="log-sum-exp has no gradient"):
            jax.grad(lambda q: attention(q, *arrays[1:], implementation="splash")[1].sum())(arrays[0])


def small_arrays(dtype=np.float32, length=20):
    return tuple(jnp.zeros((1, length, heads, 64), dtype) for heads in (4, 2, 2))


@pytest.mark.parametrize(("implementation", "needed"), [("pallas_tpu", "tpu"), ("splash", "tpu"), ("cudnn", "gpu")])
def test_an_explicit_choice_that_cannot_run_says_why(implementation, needed):
    message = f"'{implementation}' runs on {needed}, and this program is for cpu"
    with pytest.raises(NotImplementedError, match=message):
        attention(*small_arrays(), implementation=implementation)
    if implementation == "pallas_tpu":
        q, k, _ = small_arrays()
        given = {"q_mask": np.ones((1, 20), bool), "visual": np.ones((1, 20), bool)}
        with pytest.raises(NotImplementedError, match=message):
            text_to_visual(q, k, **given, implementation=implementation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_segment": np.ones((1, 20), np.int32), "kv_segment": np.ones((1, 20), np.int32)}, "got q_segment"),
        ({"q_index": np.zeros((1, 20), np.int32)}, "got q_index"),
        ({"kv_index": np.zeros((1, 20), np.int32)}, "got kv_index"),
        ({"dtype": np.float32}, "must be bfloat16 or float16, got float32"),
    ],
)
def test_cudnn_refuses_what_it_would_ignore(options, message):
    arrays = small_arrays(options.pop("dtype", jnp.bfloat16))
    with compiling_for("gpu"), pytest.raises(NotImplementedError, match=message):
        attention(*arrays, **options, implementation="cudnn")


@pytest.mark.aot("gpu")
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuDNN runs here")
def test_cudnn_says_that_it_is_not_installed():
    with compiling_for("gpu"), pytest.raises(NotImplementedError, match="cudnn: "):
        attention(*small_arrays(jnp.bfloat16), implementation="cudnn")


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """cuDNN's calls, run by the XLA code of the same function, which has the same results and gradients; and what they were given."""
    library, calls = jax.nn.dot_product_attention, []

    def without_cudnn(*arrays, implementation, **options):
        assert implementation == "cudnn"
        calls.append(options)
        return library(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", without_cudnn)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("name", ["12b_plain", "tiny"])
def test_cudnn_gives_both_results_and_refuses_the_gradient_that_it_would_drop(cudnn_by_xla, name):
    spec = SPECS[name].small(64)
    arrays = spec.arrays(jnp.bfloat16)

    def run(arrays, implementation):
        def loss(arrays):
            out, lse = forward(spec, implementation, arrays)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), (out, lse)

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
        return *outputs, *gradients

    with compiling_for("gpu"):
        got = run(arrays, "cudnn")
        with pytest.raises(NotImplementedError, match="log-sum-exp has no gradient"):
            jax.grad(lambda arrays: forward(spec, "cudnn", arrays)[1].sum())(arrays)
    expected = run(tuple(x.astype(jnp.float32) for x in arrays), "reference")
    for mine, theirs in zip(got, expected, strict=True):
        outputs_close(mine, theirs, SIXTEEN_BIT[1])


@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_one_segment_go_to_cudnn_with_their_lengths(cudnn_by_xla, causal):
    """By the default, padding full of NaN, one row of nothing else."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 20, heads, 8)), jnp.bfloat16) for heads in (4, 2, 2))
    segment = (np.arange(20) < np.array([[20], [13], [0]])).astype(np.int32)
    hole = jnp.where(segment[..., None, None] > 0, 0, jnp.nan).astype(jnp.bfloat16)
    given = {"q_segment": segment, "kv_segment": segment, "causal": causal}
    with compiling_for("gpu", (8, 0)):
        got, lse = attention(q + hole, k + hole, v + hole, **given, one_segment=True, return_lse=False)
    (options,) = cudnn_by_xla
    assert lse is None
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        np.testing.assert_array_equal(options[name], [20, 13, 0])
    expected, _ = attention(*(x.astype(jnp.float32) for x in (q, k, v)), **given, implementation="reference")
    outputs_close(got, expected, SIXTEEN_BIT[0], "out")
    assert not got[segment == 0].any()


@pytest.mark.parametrize(
    ("capability", "dtype", "lengths", "chosen"),
    [
        ((7, 5), jnp.bfloat16, True, ("xla",)),
        ((8, 0), jnp.bfloat16, True, ("cudnn", "xla")),
        ((8, 9), jnp.bfloat16, False, ("xla",)),
        ((9, 0), jnp.bfloat16, True, ("cudnn", "pallas_gpu", "xla")),
        ((9, 0), jnp.bfloat16, False, ("pallas_gpu", "xla")),
        ((9, 0), jnp.float32, True, ("xla",)),
        ((10, 0), jnp.bfloat16, False, ("xla",)),
        ((10, 0), jnp.bfloat16, True, ("cudnn", "xla")),
        (None, jnp.bfloat16, True, ("xla",)),
    ],
)
def test_the_default_on_a_gpu(capability, dtype, lengths, chosen):
    with compiling_for("gpu", capability):
        assert default_implementations(DEFAULTS, *small_arrays(dtype), lengths=lengths) == chosen
        assert default_implementations(DEFAULTS, *small_arrays(dtype, 8), lengths=lengths) == ("xla",)


def test_without_cudnn_the_next_one_runs_and_says_why(monkeypatch):
    def no_cudnn(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", no_cudnn)
    arrays = small_arrays(jnp.bfloat16)
    with compiling_for("gpu", (8, 0)), pytest.warns(UserWarning, match="not the platform's 'cudnn': .*not detected"):
        out, _ = attention(*arrays, return_lse=False)
    assert out.shape == arrays[0].shape
    with compiling_for("gpu", (8, 0)), pytest.raises(NotImplementedError, match="not detected"):
        attention(*arrays, implementation="cudnn")


def test_a_prefill_promises_rows_of_one_segment(cudnn_by_xla):
    """Attention layers of a model's prefill go to cuDNN, but for one that is scored, whose log-sum-exp has to be exact."""
    model = micro_model()
    config = dataclasses.replace(model.config, pattern="M*-M-*MM*-")  # nothing that repeats, and is traced once for all
    work = Workload(config, 4, text=12, reduction=Reduction("str-attention", 0.8, schedule=Schedule(start=2)))
    drops = work.plan.drops
    params = jax.eval_shape(lambda: nemotron_vl.init(config, jax.random.key(0)))
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)
    row = jax.ShapeDtypeStruct((2, work.visual_tokens + 12), jnp.int32)
    batch = Batch(row, row, row, jax.ShapeDtypeStruct((2,), jnp.int32))
    visual = jax.ShapeDtypeStruct((2, 4, config.tower.tokens_per_frame, config.width), jnp.bfloat16)

    def lengths(plan):
        cudnn_by_xla.clear()
        with compiling_for("gpu", (8, 0)):
            jax.eval_shape(lambda p, b, v: nemotron_vl.prefill(p, config, b, v, plan, 1).logits, params, batch, visual)
        assert all(call["query_seq_lengths"].shape == (2,) for call in cudnn_by_xla)
        return len(cudnn_by_xla)

    assert 0 < len(drops) < 3 and all(config.pattern[layer] == "*" for layer in drops)
    assert (lengths(None), lengths(work.plan)) == (3, 3 - len(drops))


@pytest.mark.aot("gpu")
def test_a_program_for_a_gpu_calls_cudnn(monkeypatch):
    """One call of the library for rows of one segment, the kernel for Hopper where the log-sum-exp is needed or rows are packed."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)
    where = aot.target("H200")
    spec = SPECS["12b"]
    shapes = spec.shapes(jnp.bfloat16)

    def calls(**promise):
        given = spec.options() | promise
        run = lambda *arrays: attention(*spec.split(*arrays), **given)[0]  # noqa: E731
        with jax.default_device(where.devices[0]):
            text = jax.jit(run, in_shardings=where.one).lower(*shapes).compile().as_text()
        return [name for name in ("__cudnn$fmhaSoftmax", "mosaic_gpu") if name in text]

    assert calls(return_lse=False) == ["__cudnn$fmhaSoftmax"]
    assert calls() == calls(return_lse=False, one_segment=False) == ["mosaic_gpu"]


@pytest.mark.parametrize(
    ("length", "blocks"),
    [(100, (128, 1)), (384, (384, 1)), (896, (128, 7)), (1034, (384, 3)), (2000, (512, 4)), (33280, (512, 65))],
)
def test_tpu_blocks_pad_little_and_are_large(length, blocks):
    """A RADIO frame of 1,034 rows is padded to 1,152 in any case: three blocks read its keys three times, nine nine times."""
    from hybridvlm.ops.attention.pallas_tpu_common import block_of

    assert block_of(length, 512) == blocks


def test_tpu_kernels_take_one_dtype():
    q, k, v = small_arrays()
    with compiling_for("tpu"), pytest.raises(NotImplementedError, match=r"got \['bfloat16', 'float32'\]"):
        attention(q, k.astype(jnp.bfloat16), v, implementation="pallas_tpu")


def _programs(name, dtype):
    """Forward pass, gradient and score of a spec, with the shapes of their arguments."""
    spec = SPECS[name]
    options = spec.options()

    def forward(*arrays):
        out, lse = attention(*spec.split(*arrays), **options, implementation="pallas_tpu")
        return out.reshape(*out.shape[:2], -1), lse

    def gradient(*arrays):
        return jax.grad(lambda *a: sum(x.astype(jnp.float32).sum() for x in forward(*a)), (0, 1, 2))(*arrays)

    arrays, rest = jax.eval_shape(lambda: spec.score_inputs(dtype)[0]), spec.score_inputs(dtype)[1]

    def score(arrays):
        q, k = (x.reshape(*x.shape[:2], -1, spec.width) for x in (arrays["q"], arrays["k"]))
        return text_to_visual(q, k, lse=arrays["lse"], implementation="pallas_tpu", **rest)

    shapes = spec.shapes(dtype)
    return {"forward": (forward, shapes), "gradient": (gradient, shapes), "score": (score, (arrays,))}


@needs_libtpu
@pytest.mark.parametrize("slice_name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_kernels_compile_for_tpus(slice_name):
    """The 12B's, packed, forward, backward and score: nothing of the size of a score matrix is left in memory."""
    for part, (program, shapes) in _programs("12b_packed", jnp.bfloat16).items():
        if part == "forward":  # part of the gradient
            continue
        compiled = aot.compile_for(aot.target(slice_name), program, *shapes)
        assert compiled.fits and compiled.temporaries < 1.2e9, part
        assert compiled.executable.as_text().count("tpu_custom_call") >= {"gradient": 3, "score": 1}[part]


@needs_libtpu
def test_narrow_heads_in_float32_compile_for_a_tpu():
    for program, shapes in list(_programs("tiny", jnp.float32).values())[1:]:
        assert aot.compile_for(aot.target("v5e:2x2"), program, *shapes).fits


def _calls(program, shapes, monkeypatch):
    """What the program hands to `pl.pallas_call`, by kernel name, with the scalars that its index maps read."""
    calls = {}
    original = pl.pallas_call

    def spy(kernel, **options):
        def run(*operands):
            calls[options["name"]] = options, operands
            return original(kernel, **options)(*operands)

        return run

    with monkeypatch.context() as patch, compiling_for("tpu"):
        patch.setattr(pl, "pallas_call", spy)
        jax.eval_shape(program, *shapes)
    return calls


@pytest.mark.parametrize("name", ["12b", "vamba_cross"])
def test_declared_bytes_are_those_of_the_grid(name, monkeypatch):
    """Without anything skipped at run time, which no declaration can know."""
    programs = _programs(name, jnp.bfloat16)
    calls = {}
    for part in ("gradient", "score"):
        calls |= _calls(*programs[part], monkeypatch)
    assert len(calls) == 4
    for kernel, (options, operands) in calls.items():
        spec = options.get("grid_spec")
        scalars = 0 if spec is None else spec.num_scalar_prefetch
        grid, ins, outs = (
            (spec.grid, spec.in_specs, spec.out_specs)
            if spec is not None
            else (options["grid"], options["in_specs"], options["out_specs"])
        )
        bound = [_without_scalars(s, scalars) for s in (*ins, *_listed(outs))]
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[scalars:]]
        counted = traffic.count(grid, bound[: len(ins)], shapes, bound[len(ins) :], _listed(options["out_shape"]))
        declared = options["cost_estimate"].bytes_accessed
        assert abs(declared / counted.total - 1) < 0.05, (kernel, declared, counted)


def _listed(value):
    return list(value) if isinstance(value, list | tuple) else [value]


def _without_scalars(spec, scalars):
    """A spec whose index map reads, for its scalars, that every block meets every other: from 0 to the last."""
    open_ended = [np.tile([0, 0, 0, 0, 0, 0, 1 << 20], 4096)] * scalars
    return pl.BlockSpec(spec.block_shape, lambda *at: spec.index_map(*at, *open_ended))
