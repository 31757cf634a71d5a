"""Memory against shapes and against what compilers said, seconds worked out by hand, and the mesh that is chosen."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.micro_checkpoint import micro_model
from jax.sharding import AbstractMesh, NamedSharding

import hybridvlm as hv
from hybridvlm.config import ModelConfig, Reduction, Schedule
from hybridvlm.config_files import load_model_config
from hybridvlm.estimates import DoesNotFit, MeshSizes, Workload, check_fits, choose_mesh, first_that_fits
from hybridvlm.estimates.choose import HEADROOM, candidates
from hybridvlm.estimates.memory import memory
from hybridvlm.estimates.workload import dealt_frames, weight_bytes
from hybridvlm.hardware import CHIPS, memory_limit, parse_slice, usual_slices
from hybridvlm.inference import placement
from hybridvlm.models import nemotron_vl
from hybridvlm.models.prompt import Batch
from hybridvlm.nn.caches import AttentionCache, MambaCache
from hybridvlm.parallel.layout import local_config
from hybridvlm.plan.__main__ import main
from hybridvlm.sharding import AXES, DEFAULT_RULES

TINY, BIG, QWEN, OMNI = map(
    load_model_config, ("tiny", "nemotron_nano_12b_v2_vl", "qwen3_vl_8b", "nemotron_3_nano_omni_30b_a3b")
)
STR = Reduction("str", 0.25)


def test_weights_and_caches_are_those_of_the_programs():
    config = micro_model().config
    work = Workload(config, 4, text=8, batch=2, max_new=3, dtype="float32", reduction=Reduction("str", 0.5))
    params = jax.eval_shape(lambda: nemotron_vl.init(config, jax.random.key(0)))
    found = memory(work, MeshSizes())
    assert found.weights == sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    row = jax.ShapeDtypeStruct((2, work.visual_tokens + 8), jnp.int32)
    visual = jax.ShapeDtypeStruct((2, 4, config.tower.tokens_per_frame, config.width), jnp.float32)
    batch = Batch(row, row, row, jax.ShapeDtypeStruct((2,), jnp.int32))
    prefill = lambda p, b, v: nemotron_vl.prefill(p, config, b, v, work.plan, 3).decoder.caches  # noqa: E731
    caches = jax.eval_shape(prefill, params, batch, visual)
    arrays = [a for c in caches if isinstance(c, AttentionCache) for a in (c.k, c.v, c.new_k, c.new_v)]
    states = [a for c in caches if isinstance(c, MambaCache) for a in (c.conv, c.ssm)]
    assert found.caches == sum(4 * a.size for a in arrays)
    assert found.states == sum(4 * a.size for a in states)
    assert found.visual == 4 * visual.size


def test_weights_of_one_device_are_those_of_its_part():
    for config, tensor in ((TINY, 2), (BIG, 4)):
        # a model of the sizes of one device
        sizes = vars(local_config(config, tensor))
        part = ModelConfig(**{f.name: sizes[f.name] for f in dataclasses.fields(ModelConfig)})
        params = jax.eval_shape(lambda part=part: nemotron_vl.init(part, jax.random.key(0)))["decoder"]
        assert weight_bytes(config, MeshSizes(tensor=tensor), 4, "decoder/") == sum(
            4 * leaf.size for leaf in jax.tree.leaves(params)
        )
    up = "decoder/mlp/up_proj"
    whole = TINY.count("-") * TINY.width * TINY.mlp_width * 2
    assert weight_bytes(TINY, MeshSizes(), 2, up) == weight_bytes(TINY, MeshSizes(data=8), 2, up) == whole
    assert weight_bytes(TINY, MeshSizes(fsdp=2, tensor=2), 2, up) == whole // 4
    # shards of a row hold all weights for decoding, and shares of them in training
    assert weight_bytes(TINY, MeshSizes(sequence=4), 2, up) == whole
    assert weight_bytes(TINY, MeshSizes(sequence=4), 2, up, DEFAULT_RULES) == whole // 4
    assert weight_bytes(TINY, MeshSizes(), 2, "decoder/mamba/A_log") == 4 * TINY.count("M") * TINY.mamba_heads


# GB that libtpu 0.0.42 (jax 0.10.2) says that programs need on a chip; hybridvlm/plan/README.md has the commands
# the first column is the model: Nemotron Nano 12B v2 VL, Nemotron-3-Nano-Omni or Qwen3-VL 8B, of which a frame here is two of the video
COMPILED = [
    (BIG, "prefill", "v5p:2x2x1", {}, 128, None, 34.80),
    (BIG, "prefill", "v5p:2x2x1", {}, 32, None, 29.77),
    (BIG, "prefill", "v5p:2x2x1", {}, 128, 0.25, 37.27),
    (BIG, "prefill", "v6e:2x2", {"tensor": 4}, 128, None, 11.98),
    (BIG, "prefill", "v6e:2x2", {"tensor": 4}, 128, 0.25, 10.89),
    (BIG, "tower", "v6e:2x2", {"tensor": 4}, 128, None, 8.69),
    (BIG, "decode", "v6e:2x2", {"tensor": 4}, 128, None, 8.30),
    (BIG, "prefill", "v6e:2x2", {"data": 2, "tensor": 2}, 128, None, 22.26),
    (BIG, "prefill", "v5e:2x4", {"data": 2, "tensor": 4}, 128, None, 11.64),
    (BIG, "decode", "v5e:2x4", {"data": 2, "tensor": 4}, 128, None, 8.29),
    (BIG, "prefill", "v5e:2x4", {"data": 2, "tensor": 4}, 128, 0.25, 10.91),
    (BIG, "tower", "v5e:2x4", {"data": 2, "tensor": 4}, 128, None, 8.64),
    (BIG, "prefill", "v5e:4x4", {"sequence": 2, "tensor": 8}, 1024, None, 15.10),
    (BIG, "prefill", "v5e:4x4", {"sequence": 2, "tensor": 8}, 1024, 0.25, 15.24),
    (BIG, "prefill", "v5p:2x2x2", {"sequence": 2, "tensor": 4}, 3600, None, 65.60),
    (BIG, "prefill", "v5p:2x2x2", {"sequence": 2, "tensor": 4}, 3600, 0.25, 51.05),
    (BIG, "tower", "v5p:2x2x2", {"sequence": 2, "tensor": 4}, 3600, None, 17.70),
    (BIG, "decode", "v5p:2x2x2", {"sequence": 2, "tensor": 4}, 3600, None, 12.31),
    (BIG, "decode", "v5p:2x2x2", {"sequence": 2, "tensor": 4}, 3600, 0.25, 8.89),
    (BIG, "prefill", "v5e:8x8", {"sequence": 16, "tensor": 4}, 3600, None, 16.24),
    (OMNI, "prefill", "v6e:2x2", {"tensor": 4}, 128, None, 20.59),
    (OMNI, "prefill", "v6e:2x2", {"tensor": 4}, 128, 0.25, 20.52),
    (OMNI, "decode", "v6e:2x2", {"tensor": 4}, 128, None, 30.90),
    (OMNI, "tower", "v6e:2x2", {"tensor": 4}, 128, None, 19.77),
    (BIG, "prefill", "v5e:4x4", {"tensor": 16}, 128, None, 5.88),
    (BIG, "prefill", "v5e:4x4", {"tensor": 16}, 1024, None, 17.12),
    (BIG, "prefill", "v5p:2x2x4", {"tensor": 16}, 1024, None, 21.58),
    (BIG, "tower", "v5p:2x2x1", {}, 128, None, 30.83),
    (BIG, "decode", "v5p:2x2x1", {}, 128, None, 27.93),
    (QWEN, "prefill", "v5p:2x2x1", {}, 128, None, 23.48),
    (QWEN, "tower", "v5p:2x2x1", {}, 128, None, 19.80),
    (QWEN, "decode", "v5p:2x2x1", {}, 128, None, 20.83),
    (QWEN, "prefill", "v5e:2x4", {"data": 2, "tensor": 4}, 512, None, 13.76),
    (QWEN, "prefill", "v5e:2x4", {"data": 2, "tensor": 4}, 512, 0.25, 11.43),
    (QWEN, "decode", "v5e:2x4", {"data": 2, "tensor": 4}, 512, None, 8.45),
    (QWEN, "decode", "v5e:2x4", {"data": 2, "tensor": 4}, 512, 0.25, 6.15),
]


@pytest.mark.parametrize(
    "config, program, topology, sizes, frames, budget, compiled",
    COMPILED,
    ids=lambda value: getattr(value, "name", None) or str(value),
)
def test_memory_is_near_the_compilers(config, program, topology, sizes, frames, budget, compiled):
    reduction = None if budget is None else Reduction("str", budget, schedule=Schedule(stages=7))
    batch = sizes.get("data", 1)
    work = Workload(config, frames, batch=batch, max_new=64, reduction=reduction)
    limit = parse_slice(topology).chip.hbm_bytes
    found = memory(work, MeshSizes(**sizes))
    needed = found.program(program, least=found.program(program) > limit)
    assert needed / 1e9 == pytest.approx(compiled, rel=0.15)


def test_seconds_by_hand():
    made = hv.estimate(BIG, frames=128, topology="v6e:2x2", mesh={"tensor": 4})
    prefill, decode = made.phases["prefill"], made.phases["decode"]
    # 62 layers end in a sum over four devices of [33280,5120] in two bytes; a ring sends 3/4 of it twice
    assert prefill.sent == 2 * 3 / 4 * 62 * 33280 * 5120 * 2
    assert prefill.bound == "compute" and prefill.seconds == pytest.approx(made.work.plan.cost.decoder / 4 / 918e12)
    # a decoded token reads a quarter of the weights of decoder and head
    params = jax.eval_shape(lambda: nemotron_vl.init(BIG, jax.random.key(0)))
    read = 2 * sum(leaf.size for leaf in jax.tree.leaves((params["decoder"], params["lm_head"]))) / 4
    assert decode.bound == "memory" and decode.moved == pytest.approx(read, rel=0.06)
    assert decode.moved > read and decode.seconds == pytest.approx(decode.moved / 1640e9)
    one = hv.estimate(BIG, frames=128, topology="v5p:2x2x1")
    assert one.phases["prefill"].sent == one.phases["decode"].sent == 0


@pytest.mark.parametrize("batch", [1, 2, 4, 6])
@pytest.mark.parametrize("sizes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "sequence": 2}, {"tensor": 4}, {}])
def test_frames_are_dealt_as_programs_deal_them(batch, sizes, monkeypatch):
    @dataclasses.dataclass
    class Part:
        frame_axes: tuple[str, ...]

    mesh, abstract = MeshSizes(**sizes), AbstractMesh(tuple(getattr(MeshSizes(**sizes), axis) for axis in AXES), AXES)
    shard = lambda array, mesh, spec: NamedSharding(mesh, spec).shard_shape(array.shape)  # noqa: E731
    monkeypatch.setattr(placement, "put", shard)
    work = Workload(QWEN, 30, batch=batch)  # 15 pairs of frames
    pixels = np.broadcast_to(np.zeros((), np.uint8), (batch, work.groups, 2, 4, 4, 3))
    (rows, frames, *_), _ = placement.put_frames(pixels, abstract, Part(()))
    assert dealt_frames(work, mesh) == (rows, frames)
    tower = hv.estimate(QWEN, frames=30, batch=batch, topology="H200:8", mesh=mesh).phases["tower"]
    assert tower.flops == pytest.approx(rows * frames / work.groups * work.plan.cost.vision)


def test_one_video_goes_through_the_towers_of_all_devices():
    one, dealt = (hv.estimate(BIG, frames=128, topology="v6e:2x4", mesh=sizes) for sizes in (None, {"data": 8}))
    first, last = one.phases["tower"], dealt.phases["tower"]
    assert last.flops == first.flops / 8 and dealt.memory.tower == pytest.approx(one.memory.tower / 8)
    # the ring that gathers the row passes on seven of its eight parts
    assert first.sent == 0 and last.sent == 7 / 8 * one.memory.visual


def test_experts_that_are_not_chosen_are_held_and_not_read():
    omni = load_model_config("nemotron_3_nano_omni_30b_a3b")
    one = hv.estimate(omni, frames=64, topology="H200")
    many = hv.estimate(omni, frames=64, topology="H200", batch=64)
    assert one.memory.weights == many.memory.weights > 60e9
    assert one.phases["decode"].moved < 10e9 < 55e9 < many.phases["decode"].moved


def test_the_chosen_mesh_is_the_smallest_that_fits():
    work = Workload(BIG, 1024, reduction=STR)
    limit = CHIPS["v5e"].hbm_bytes
    choice = choose_mesh(work, 64, limit)
    assert choice.mesh.devices == 64 and choice.memory.fits(int(limit * (1 - HEADROOM)))
    size = choice.mesh.tensor * choice.mesh.sequence
    for mesh in candidates(work, 64):
        if mesh.tensor * mesh.sequence < size:
            assert not memory(work, mesh).fits(int(limit * (1 - HEADROOM))), mesh
    assert f"fewer than {size} devices" in choice.why and "1024 frames" in choice.why
    # a model that fits one device leaves all of them for other prompts
    assert choose_mesh(Workload(TINY, 64), 8, limit).mesh == MeshSizes(data=8)


def test_a_comfortable_mesh_goes_before_a_tight_one_of_its_size():
    work, limit = Workload(BIG, 960, reduction=STR), CHIPS["v5e"].hbm_bytes
    first, *_ = (mesh for mesh in candidates(work, 16) if memory(work, mesh).fits(int(limit * (1 - HEADROOM))))
    choice = choose_mesh(work, 16, limit)
    assert (first, choice.mesh) == (MeshSizes(tensor=16), MeshSizes(sequence=2, tensor=8))
    assert choice.memory.peak() <= limit * (1 - HEADROOM) < memory(work, first).peak()


def test_what_fits_just_so_is_chosen_and_not_refused():
    work = Workload(BIG, 128)
    for devices in (1, 2):
        least = min(memory(work, mesh).peak(0) for mesh in candidates(work, devices))
        assert choose_mesh(work, devices, least).memory.peak(least) == least
        with pytest.raises(DoesNotFit, match="needs"):
            choose_mesh(work, devices, least - 1)


def test_too_few_devices_are_refused_with_what_would_do():
    work = Workload(BIG, 128)
    with pytest.raises(
        DoesNotFit, match=r"needs .* GB on each device \(weights .*smallest slice that would do is v5e:2x2"
    ):
        choose_mesh(work, 1, CHIPS["v5e"].hbm_bytes, "TPU v5 lite")
    with pytest.raises(DoesNotFit, match="--mesh tensor=4 would do"):
        check_fits(work, None, 4, CHIPS["v5e"].hbm_bytes, "TPU v5 lite")
    check_fits(work, {"tensor": 4}, 4, CHIPS["v5e"].hbm_bytes)
    # an hour takes several hosts, and so no slice is named that a command could not use
    hour = Workload(BIG, 3600)
    assert first_that_fits(hour, "v5e").slice.hosts > 1 and first_that_fits(hour, "v5e", one_host=True) is None
    with pytest.raises(DoesNotFit, match="more devices"):
        choose_mesh(hour, 1, CHIPS["v5e"].hbm_bytes, "TPU v5 lite")
    # on CPU there is no known limit, and nothing is refused
    assert memory_limit(jax.devices("cpu")[0]) is None
    check_fits(work, None, 1, None)
    with pytest.raises(DoesNotFit, match="take fewer frames"):
        check_fits(Workload(BIG, 100_000), None, 1, 10**9, "some other device")


def test_memory_limits_of_devices():
    @dataclasses.dataclass
    class Device:
        platform: str
        device_kind: str
        stats: dict | None

        def memory_stats(self):
            if self.stats is None:
                raise NotImplementedError
            return self.stats

    assert memory_limit(Device("tpu", "TPU v5 lite", {"bytes_limit": 17})) == 17
    assert memory_limit(Device("tpu", "TPU v5 lite", None)) == CHIPS["v5e"].hbm_bytes
    assert memory_limit(Device("gpu", "a card of no name", {})) is None


def test_slices():
    assert parse_slice("v5e:4x4")[1:] == ("v5e", 16) and parse_slice("v5e:4x4").hosts == 4
    assert parse_slice("v5e:2x4").hosts == 1 and parse_slice("v5p:2x2x2").hosts == 2 and parse_slice("H200").chips == 1
    for name in ("v9:2x2", "v5e", "v5e:2x2x2", "v5p:4x4", "H200:0", "v5e:2xa"):
        with pytest.raises(ValueError, match="topology"):
            parse_slice(name)
    for generation in CHIPS:
        counts = [where.chips for where in usual_slices(generation)]
        assert counts == sorted(set(counts))


def test_wrong_sizes_are_refused():
    for changes, reason in (
        ({"frames": -1}, "frames"),
        ({"text": 0}, "text"),
        ({"dtype": "int8"}, "dtype"),
        ({"batch": True}, "batch"),
    ):
        with pytest.raises(ValueError, match=reason):
            Workload(**({"config": TINY, "frames": 8} | changes))
    with pytest.raises(ValueError, match="takes 8 devices, v5e:2x2 has 4"):
        hv.estimate(BIG, frames=8, topology="v5e:2x2", mesh={"tensor": 8})
    with pytest.raises(ValueError, match="tensor=3"):
        hv.estimate(BIG, frames=8, topology="v5e:2x2", mesh={"tensor": 3})


def test_an_hour_is_planned():
    hour = Workload(BIG, 3600, reduction=STR)
    assert hour.visual_tokens == 921_600 and hour.plan.capacities[0] == 921_600
    # shares are exact integers far beyond what fits an int32 as a product
    counts = np.array([1, 524_288, 921_600], np.int32)
    for layer in (5, 30, 61):
        exact = [(int(n) * hour.plan.relative[layer] + 2048) // 4096 for n in counts]
        assert hour.plan.keep(layer, counts).tolist() == exact
        assert np.asarray(hour.plan.keep(layer, jnp.asarray(counts))).tolist() == exact
    assert first_that_fits(hour, "v5e").slice.chips > first_that_fits(Workload(BIG, 128), "v5e").slice.chips


@pytest.mark.parametrize("model", ["nemotron_nano_12b_v2_vl", "qwen3_vl_8b", "vamba_qwen2_vl_7b", "tiny-reduced"])
def test_the_command_shows_one_slice(model, capsys, tmp_path):
    method = ["--method", "none"] if "vamba" in model else []
    assert (
        main(["--model", model, "--frames", "64", "--topology", "v6e:2x2", "--json", str(tmp_path / "e.json"), *method])
        == 0
    )
    out = capsys.readouterr().out
    assert "918 TFLOP/s" in out and "a decoded token, least time" in out and "fits" in out
    rows = json.loads((tmp_path / "e.json").read_text())
    assert [row["method"] for row in rows] == ["dense", "str at 25%"][: len(rows)]
    assert all(row["fits"] and row["prefill_seconds"] > 0 for row in rows)


def test_the_command_surveys_slices_and_says_what_is_too_small(capsys):
    assert main(["--model", "nemotron_nano_12b_v2_vl", "--frames", "128"]) == 0
    out = capsys.readouterr().out
    assert "first that fits" in out and "v5e:2x2" in out and "H200" in out
    assert main(["--model", "nemotron_nano_12b_v2_vl", "--topology", "v5e:1x1"]) == 1
    assert "too much" in capsys.readouterr().out


def test_the_command_takes_auto_as_others_do(capsys):
    for words in (["--topology", "v5e:2x4"], []):
        said = []
        for mesh in ([], ["--mesh", "auto"]):
            assert main(["--model", "tiny", "--frames", "8", *words, *mesh]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1]


def test_the_command_refuses_in_one_line(capsys, tmp_path):
    for words, reason in (
        (["--model", "nothing-like-this"], "nothing-like-this"),
        (["--model", "tiny", "--topology", "v9:2x2"], "expected one of"),
        (["--model", "tiny", "--mesh", "tensor=2"], "--mesh goes with --topology"),
        (["--model", "tiny", "--topology", "v5e:2x2", "--mesh", "rows=2"], "--mesh takes"),
        (["--model", "tiny", "--topology", "v5e:2x4", "--mesh", "data=-1,tensor=-1"], "--mesh takes one -1"),
        (["--model", "qwen3_vl_8"], "did you mean 'qwen3_vl_8b'?"),
        (["--model", "qwen2_vl_7b", "--json", str(tmp_path / "missing" / "x.json")], "its folder does not exist"),
        (["--model", "qwen2_vl_7b", "--json", str(tmp_path)], "is a folder"),
        (["--model", "qwen3_vl_8b", "--size", "720x1280", "--frames", "0"], "--frames 0 asks for none"),
        (["--model", "tiny", "--compile"], "--compile needs --topology"),
        (["--model", "qwen3_vl_8b", "--size", "big"], "--size takes"),
        (["--model", "tiny", "--topology", "H200", "--compile"], "--compile takes a TPU slice"),
    ):
        assert main(words) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_is_quick():
    """The whole command, the interpreter's start included, while another core is busy."""
    words = ["--model", "nemotron_nano_12b_v2_vl", "--frames", "1024", "--topology", "v5e:4x4"]
    subprocess.run([sys.executable, "-m", "hybridvlm.plan", *words], check=True, timeout=20)


@pytest.mark.slow
@pytest.mark.aot("tpu")
def test_the_compiler_agrees(capsys, tmp_path):
    words = ["--model", "nemotron_nano_12b_v2_vl", "--frames", "32", "--method", "none"]
    words += ["--topology", "v5p:2x2x1", "--mesh", "tensor=1", "--compile", "--json", str(tmp_path / "c.json")]
    assert main(words) == 0
    estimate, compiler = json.loads((tmp_path / "c.json").read_text())
    assert estimate["prefill_bytes"] / 1e9 == pytest.approx(compiler["needed_gb"], rel=0.15)
