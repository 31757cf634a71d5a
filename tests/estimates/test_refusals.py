"""Commands refuse, before they load or compile, what the device at hand has no memory for."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from helpers.micro_checkpoint import micro_model
from PIL import Image

from hybridvlm import ask
from hybridvlm.checkpoints import describe as described
from hybridvlm.checkpoints.folder import save_folder
from hybridvlm.checkpoints.orbax import save_orbax
from hybridvlm.config import Buckets, Reduction
from hybridvlm.config_files import load_model_config, to_dict
from hybridvlm.estimates import DoesNotFit, MeshChoice, MeshSizes, Workload, guard, refuse_training, training_memory
from hybridvlm.estimates.workload import weight_bytes
from hybridvlm.eval.__main__ import main as evaluate
from hybridvlm.inference.model import load
from hybridvlm.train.config import Data, Logging, TrainConfig
from hybridvlm.train.loop import Run


class Chip:
    platform, device_kind = "tpu", "TPU v6 lite"

    def memory_stats(self):
        return {"bytes_limit": 32 << 30}


@pytest.fixture
def small_device(monkeypatch):
    """A device of 100 kB."""
    monkeypatch.setattr(guard, "memory_limit", lambda device: 100_000)


def test_eval_and_ask_refuse_before_they_load(small_device, monkeypatch, tmp_path, capsys):
    def never(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("hybridvlm.eval.evaluate.load", never)
    monkeypatch.setattr("hybridvlm.inference.model.load", never)
    assert evaluate(["--model", "tiny", "--output", str(tmp_path / "out")]) == 2
    assert "tiny with 64 frames" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert ask.main(["clip.mp4", "red@t12 none what ?", "--frames", "16"]) == 2
    error = capsys.readouterr().err
    assert "16 frames" in error and "weights" in error and "GB on each device" in error


def test_ask_counts_the_reduction_that_it_is_given(monkeypatch, capsys):
    """A way out that is named is one that helps, and that was not taken already."""
    monkeypatch.setattr(guard, "memory_limit", lambda device: 40 * 10**9)

    def loaded(*args, **kwargs):
        raise ValueError("loaded")

    monkeypatch.setattr("hybridvlm.inference.model.load", loaded)
    words = ["clip.mp4", "what?", "--model", "qwen3_vl_8b", "--frames", "768"]
    assert ask.main(words) == 2
    error = capsys.readouterr().err
    assert "a reduction" in error and "--batch-size" not in error
    assert ask.main([*words, "--reduction", "str", "--budget", "0.25"]) == 2
    assert capsys.readouterr().err == "hybridvlm.ask: loaded\n"
    monkeypatch.setattr(guard, "memory_limit", lambda device: 10 * 10**9)
    assert ask.main([*words, "--reduction", "str", "--dtype", "float32"]) == 2
    error = capsys.readouterr().err
    assert "at 25%" in error and "fewer frames, bfloat16, a smaller budget or more devices" in error
    assert ask.main([*words, "--reduction", "strr"]) == 2
    assert "strr" in capsys.readouterr().err


def test_ask_counts_the_frames_that_there_are(monkeypatch, tmp_path, capsys):
    pytest.importorskip("av")
    from helpers.films import film

    monkeypatch.setattr(guard, "memory_limit", lambda device: 10**6)
    film(tmp_path / "short.mp4", 12)
    Image.new("RGB", (64, 48)).save(tmp_path / "still.png")
    words = ["what?", "--model", "nemotron_nano_12b_v2_vl"]
    for name, more, frames in (
        ("short.mp4", [], 16),
        ("short.mp4", ["--frames", "3"], 4),
        ("still.png", [], 16),
        ("missing.mp4", [], 32),
    ):
        assert ask.main([str(tmp_path / name), *words, *more]) == 2
        assert f"with {frames} frames" in capsys.readouterr().err, (name, more)


def test_training_refuses_before_it_compiles(small_device, tmp_path):
    settings = TrainConfig(
        model="tiny", steps=1, output=str(tmp_path / "run"), data=Data(batch=2, frames=64), logging=Logging()
    )
    with pytest.raises(DoesNotFit, match=r"a step of 2 rows .* trained parameters needs .*mesh\.fsdp"):
        Run(settings)
    assert not (tmp_path / "run").exists()


def test_training_memory_is_near_the_compilers():
    """The 12B decoder on 64 chips, a row each, by libtpu: hybridvlm/train/README.md."""
    big = load_model_config("nemotron_nano_12b_v2_vl")
    trained = 12_300_000_000
    for budget, mesh, compiled in ((None, MeshSizes(fsdp=64), 53.2), (0.25, MeshSizes(fsdp=64), 24.3)):
        reduction = None if budget is None else Reduction("str", budget)
        work = Workload(big, 128, batch=64, reduction=reduction)
        tower = sum(weight_bytes(big, mesh, 2, part) for part in ("vision/", "projector/"))  # which was left out there
        assert (training_memory(work, mesh, trained) - tower) / 1e9 == pytest.approx(compiled, rel=0.15)
        assert training_memory(work, mesh, trained, least=True) / 1e9 < compiled
    # what does run on 16 GB by the compiler is not refused
    work = Workload(big, 128, batch=64)
    assert training_memory(work, MeshSizes(fsdp=64, sequence=4), trained, least=True) < 16 << 30


def test_the_mesh_of_the_devices_at_hand(monkeypatch):
    assert guard.choose_here("nemotron_nano_12b_v2_vl") is None  # on CPU nothing is known
    monkeypatch.setattr(guard.jax, "local_devices", lambda: [Chip()] * 8)
    choice = guard.choose_here("nemotron_nano_12b_v2_vl", frames=256, batch=4)
    assert choice.mesh == MeshSizes(data=4, tensor=2) and "fewer than 2 devices" in choice.why
    monkeypatch.setattr(guard.jax, "local_devices", lambda: [Chip()])
    assert guard.choose_here("tiny", frames=8) is None  # one device is no choice
    with pytest.raises(DoesNotFit, match="smallest slice that would do is v6e:2x2 with --mesh data=2,tensor=2"):
        guard.choose_here("nemotron_nano_12b_v2_vl", frames=256)


def test_the_option_takes_a_mesh_or_what_fits(small_device, monkeypatch, capsys):
    """--mesh of commands, and mesh="auto" of `load`."""
    chosen = MeshChoice(MeshSizes(), None, "one device holds it")
    monkeypatch.setattr(guard, "choose_here", lambda name, **work: chosen if work.get("frames") else None)
    assert guard.mesh_option("auto", "tiny") is None and capsys.readouterr().err == ""
    assert guard.mesh_option(None, "tiny", frames=8).size == 1
    assert capsys.readouterr().err == "mesh: one device holds it\n"
    assert load("tiny", mesh="auto").mesh is None
    with pytest.raises(DoesNotFit, match="GB on each device"):
        guard.mesh_option("tensor=1", "tiny", frames=8)
    with pytest.raises(ValueError, match="comma list"):
        load("tiny", mesh="tensor")
    devices = len(guard.jax.local_devices())
    with pytest.raises(
        ValueError, match=rf"--mesh data=9 takes 9 devices, and this process has {devices}; .* the rest$"
    ):
        guard.mesh_option("data=9", "tiny")


def test_the_option_says_how_to_take_some_of_the_devices(monkeypatch):
    monkeypatch.setattr(guard.jax, "local_devices", lambda: [Chip()] * 8)
    with pytest.raises(ValueError, match=r"takes 4 devices, and this process has 8; .*or set TPU_VISIBLE_CHIPS"):
        guard.mesh_option("data=4", "tiny")
    with pytest.raises(ValueError, match="takes a multiple of 3 devices, and this process has 8"):
        guard.mesh_option("data=-1,tensor=3", "tiny")
    with pytest.raises(ValueError, match="takes one -1"):
        guard.mesh_option("data=-1,tensor=-1", "tiny")


def test_nothing_is_refused_on_cpu():
    refuse_training(Workload(load_model_config("nemotron_nano_12b_v2_vl"), 4096, batch=512), None, 10**10)
    guard.refuse_too_large("no such model at all")


def test_the_largest_that_is_asked_for_is_looked_at(monkeypatch, tmp_path):
    """Of an evaluation by its tasks' protocols, of a question by what it looks at by itself; in the dtype of loading."""
    seen = []
    monkeypatch.setattr(guard, "memory_limit", lambda device: 10**15)
    monkeypatch.setattr(guard.jax, "local_devices", lambda: [Chip()] * 2)

    def choose(work, *args, **kwargs):
        seen.append(work)
        raise DoesNotFit("stop", MeshSizes())

    monkeypatch.setattr(guard, "choose_mesh", choose)
    output = ["--output", str(tmp_path / "out")]
    for words, frames, dtype in (
        (["--model", "qwen3_vl_8b", "--tasks", "longvideobench"], 256, "float32"),
        (["--model", "qwen3_vl_8b", "--tasks", "mvbench", "--dtype", "bfloat16"], 16, "bfloat16"),
        (["--model", "nemotron_nano_12b_v2_vl", "--tasks", "mvbench,longvideobench"], 128, "float32"),
        (["--model", "qwen3_vl_8b", "--tasks", "videomme"], 64, "float32"),
        (["--model", "qwen3_vl_8b", "--tasks", "own.jsonl", "--buckets", "text=32"], 32, "float32"),
        (["--model", "qwen3_vl_8b", "--tasks", "longvideobench", "--buckets", "frames=512"], 1024, "float32"),
    ):
        seen.clear()
        assert evaluate([*words, *output]) == 2
        longest, shortest = seen
        assert (longest.frames, longest.dtype, longest.batch) == (frames, dtype, 8), words
        assert (longest.text, shortest.text) == ((32, 32) if "text=32" in words else (4096, 64))
        seen.clear()
    assert ask.main(["clip.mp4", "what?", "--model", "tiny"]) == 2
    assert (seen[0].frames, seen[0].text, seen[0].dtype) == (64, 8, "float32")
    with pytest.raises(DoesNotFit):
        load("tiny", mesh="auto", dtype=jnp.bfloat16, buckets=Buckets(frames=(16,), text=(8,)))
    assert (seen[-1].frames, seen[-1].text, seen[-1].dtype) == (16, 8, "bfloat16")


def test_descriptions_are_those_of_the_loaded(tmp_path):
    model = micro_model()
    save_folder(tmp_path / "micro", model)
    found = described.describe(tmp_path / "micro")
    assert (found.config, found.buckets) == (model.config, model.buckets)
    (tmp_path / "micro" / "model.safetensors").unlink()  # weights are not looked at
    assert described.describe(tmp_path / "micro").config == model.config
    assert found.dtype == "float32"
    own = described.describe("tiny")
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(load("tiny").params))
    assert weight_bytes(own.config, MeshSizes(), jnp.dtype(own.dtype).itemsize) == held
    published = pathlib.Path(__file__).parents[1] / "goldens" / "nemotron_nano_vl_v2"
    assert described.describe(published).dtype == "float32"
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    about = {"name": "micro", "model": {"family": model.family.NAME, **to_dict(model.config)}}
    save_orbax(tmp_path / "copy", half, about)
    assert described.describe(tmp_path / "copy").dtype == "bfloat16"
    assert described.describe("qwen3_vl_8b").config == load_model_config("qwen3_vl_8b")
    with pytest.raises(FileNotFoundError, match="no folder here"):
        described.describe("runs/nothing")
